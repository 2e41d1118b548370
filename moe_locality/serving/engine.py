"""The engine: requests in, results out as they finish, a token for every running sequence per step.

Every rank has an engine over the same model and serves requests of its own; all ranks step
together (:mod:`moe_locality.serving.lockstep`).
"""

import contextlib
import dataclasses
import inspect
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_locality.config import OnlineConfig
from moe_locality.dispatch.traffic import counters, local_traffic, reset_traffic
from moe_locality.errors import ConfigError
from moe_locality.layer.agreement import all_agree, all_succeed, section_and_plan
from moe_locality.layer.expert_store import store_experts
from moe_locality.placement.plan import PlacementPlan
from moe_locality.serving.cache import Rows, assemble, check_cache, pass_inputs
from moe_locality.serving.grouping import chooser, profile_of
from moe_locality.serving.homes import HandOver, HomeRule
from moe_locality.serving.lockstep import LockStep, RouteTap, rows_of
from moe_locality.serving.requests import (
    CompletionOutput,
    Request,
    RequestError,
    RequestOutput,
    SamplingParams,
    as_request,
    check_prompt,
    is_request_id,
    shown,
)
from moe_locality.serving.sampling import Choice, choose, draw, seed_of
from moe_locality.serving.scheduler import (
    Decode,
    Limits,
    Prefill,
    RequestState,
    Scheduler,
    Sequence,
    Work,
)
from moe_locality.serving.watch import Watch, WatchDecision
from moe_locality.trace.recorder import annotate

OnToken = Callable[[Sequence, int], None]
OnStep = Callable[[dict[str, Any]], None]
# what a rank tells the others in a step; the last three are of its last one
HELD, MORE, RUNS, OFFERS, ROOM, SURPLUS, DRAINS, LOAD, CROSS, TOKENS = range(10)


class Engine:
    """Continuous batching of a transformers model, one engine per rank. Making one is collective.

    Args:
        model: from ``from_pretrained``, spread over the ranks or whole; or one of transformers
            whose MoE layers are DeepSpeed's or ours, or the engine of ``init_inference`` of it.
        tokenizer: for prompts and stops that are texts, and for the text of results.
        limits: what this rank may hold; the same on all ranks.
        homes: which rank continues a request (:class:`~moe_locality.serving.homes.HomeRule`).
        plan: that the model has, or its file: for homes that are chosen by it, and the watch.
        grouping: which ready request takes a free row (:mod:`moe_locality.serving.grouping`);
            others than ``fifo`` need ``max_num_ready`` to choose from.
        expert_store: low-bit format, such as ``mxfp4-mbs-h``, in which each rank keeps its experts.
        watch: ``propose`` another plan when the routing has drifted, or ``apply`` it between steps
            (:mod:`moe_locality.serving.watch`); ``off``. ``online``: how often, and the budgets.
        on_watch: called with every :class:`~moe_locality.serving.watch.WatchDecision`.
        seed: for requests that have none of their own.
        on_token: called with (sequence, token) for every new token.
        on_step: called with the counts of every step, see :meth:`step_counts`.

    Raises:
        ConfigError, PlacementError: the model cannot be served so, on all ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        limits: Limits | None = None,
        homes: str = "arrival",
        plan: PlacementPlan | str | Path | None = None,
        grouping: str = "fifo",
        expert_store: str | None = None,
        watch: str = "off",
        online: OnlineConfig | None = None,
        seed: int = 0,
        on_token: OnToken | None = None,
        on_step: OnStep | None = None,
        on_watch: Callable[[WatchDecision], None] | None = None,
    ) -> None:
        model = getattr(model, "module", model)
        self.recurrent = all_succeed(lambda: check_cache(model))
        self.model: Any = model.eval()
        self.tokenizer: Any = tokenizer
        self.seed = seed
        self.on_token, self.on_step, self.on_watch = on_token, on_step, on_watch
        self.device: torch.device = self.model.device
        self.config: Any = self.model.config.get_text_config(decoder=True)
        self.limits = all_succeed(lambda: (limits or Limits()).of_model(self.config))
        plan = all_succeed(lambda: section_and_plan({}, plan)[1])
        told = (self.limits, homes, grouping, expert_store, seed, plan and plan.digest(), watch)
        all_agree("settings of the engine", repr((*told, online)))
        rows = all_succeed(lambda: rows_of(plan, model) if plan else [])
        if expert_store is not None:
            all_succeed(lambda: store_experts(model, expert_store))
        self.eos = _eos_tokens(self.model)
        parameters = inspect.signature(self.model.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        # its loss over the router's logits, a setting of training, has no place in a step
        self._without = dict.fromkeys({"output_router_logits"} & parameters.keys(), False)
        self._profiles = grouping != "fifo"
        self._looks = on_step is not None or watch != "off"
        sees = self._profiles or self._looks or homes == "predicted" or ":" in homes
        self.tap = RouteTap(model, sees=sees)
        self.lockstep = all_succeed(lambda: LockStep(model, self.tap, self.device))
        rule = HomeRule(homes, self.lockstep.size, plan=plan, rows=rows, seed=seed)
        nodes = next((layer.topology for layer in self.tap.layers), None)
        self.handover = HandOver(rule, self.lockstep.rank, self.device, nodes)
        self.scheduler = Scheduler(
            self.limits, pads=not self.recurrent, choose=chooser(grouping), stages=rule.reads_routes
        )
        self._surplus = self.unserved = self._arrived = self._steps = 0
        self._drains = self._stopped = False
        self._batch: Rows | None = None
        self._batch_of: list[Sequence] = []
        self._begin_counts()
        self.lockstep.warm_up(self._warm)
        given = (self.lockstep, rows, plan, watch, online)
        self.watch = None if watch == "off" else all_succeed(lambda: Watch(*given))
        reset_traffic(model)
        self._counted = list(counters(model))  # walking a model takes longer than counting
        self.topology = next((counter.topology for _, counter in self._counted), None)
        self._traffic = local_traffic(self._counted, None)

    def _warm(self) -> None:
        self._like = Rows.empty(self.config, 1)
        try:
            self._forward(self._like, [[0]])
        except (ValueError, TypeError) as error:  # on all ranks alike
            raise ConfigError(
                f"found {type(self.model).__name__}, which runs on no cache that rows can join and "
                f"leave ({error}), expected transformers' DynamicCache: use model.generate for it"
            ) from error

    # -- requests in, results out

    def generate(
        self, requests: Iterable[Any], sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Yield the results of this rank's requests as they finish. Collective: on every rank.

        ``requests``: ``Request``, dicts, texts or lists of token ids; taken as there is room.
        ``sampling_params``: of those that have none.
        """
        source, more = iter(requests), True
        try:
            while True:
                outputs = []
                more = more and not self._stopped
                while more and len(self.scheduler.waiting) < self.limits.max_num_seqs:
                    try:
                        value = next(source)
                    except StopIteration:
                        more = False
                        break
                    outputs += self.add_request(value, sampling_params)
                yield from outputs
                finished = self.step(more)
                if finished is None:
                    return
                yield from finished
        except GeneratorExit:  # the caller has enough; the other ranks still count on this one
            self.drain()
            while self.step() is not None:
                pass
            raise

    def close(self) -> None:
        """Leave the model as it was, but for its dense weights, which stay gathered."""
        self.tap.close()

    def drain(self) -> None:
        """Start no further requests, on any rank, and finish those that have begun; at any time, in
        a signal handler too. ``generate`` then ends; ``unserved`` counts the requests that this
        rank had taken and not begun.
        """
        self._drains = True

    def add_request(
        self, value: Any, sampling_params: SamplingParams | None = None
    ) -> list[RequestOutput]:
        """Take a request; one that cannot be served comes back with its ``error``."""
        number, self._arrived = self._arrived, self._arrived + 1
        request_id: Any = number
        try:
            if isinstance(value, RequestError):
                request_id = number if value.request_id is None else value.request_id
                raise value
            if isinstance(value, dict):
                request_id = value.get("request_id", number)
            request = as_request(value, number, sampling_params or SamplingParams())
            request_id = request.request_id
            state = self._state_of(request, number)
        except (TypeError, ValueError, RecursionError) as error:  # RequestError is a ValueError
            self.refused += 1
            return [
                RequestOutput(
                    request_id=request_id if is_request_id(request_id) else shown(request_id),
                    prompt_token_ids=[],
                    outputs=[],
                    error=str(error),
                    arrival=self.lockstep.rank,
                    home=self.lockstep.rank,
                )
            ]
        if state.due_at == 0:
            self.scheduler.park(state)
            self.handover.offer(state)
        else:
            self.scheduler.add(state)
        return []

    def _state_of(self, request: Request, number: int) -> RequestState:
        ids, params = request.prompt_token_ids, request.sampling_params
        if not is_request_id(request.request_id):
            found = shown(request.request_id)
            raise RequestError(f"found request_id {found}, expected a text or a number of 64 bits")
        if not isinstance(request.domain, str | None):
            raise RequestError(f"found domain {shown(request.domain)}, expected a text, or none")
        (request.domain or "").encode()  # a trace holds UTF-8
        if (ids is None) == (request.prompt is None):
            raise RequestError("found both or none of prompt and prompt_token_ids, expected one")
        if self.tokenizer is None and (request.prompt is not None or params.stop):
            names = "stop" if request.prompt is None else "prompt"
            raise RequestError(
                f"found {names} as a text and no tokenizer, expected token ids: give the engine a "
                "tokenizer"
            )
        if request.prompt is not None:
            if not isinstance(request.prompt, str):
                raise RequestError(f"found prompt {shown(request.prompt)}, expected a text")
            tokenize: Any = self.tokenizer
            ids = tokenize(request.prompt)["input_ids"]
        prompt = check_prompt(ids, self.config.vocab_size)
        room = max(self.limits.longest - len(prompt), 1)
        most = room if params.max_tokens is None else min(params.max_tokens, room)
        state = RequestState(
            request_id=request.request_id,
            prompt=prompt,
            params=dataclasses.replace(params, max_tokens=most),
            seed=seed_of(params, request.request_id, self.seed),
            number=number,
            arrival=self.lockstep.rank,
            domain=request.domain,
            due_at=self.handover.rule.due_at(len(prompt)),
            began=time.monotonic(),
        )
        self.scheduler.check(state)
        return state

    # -- a step

    def step(self, more: bool = False) -> list[RequestOutput] | None:
        """One pass on every rank. Collective. Returns what finished here; None: all is done.
        ``more``: whether this rank has requests that it has not added yet.
        """
        self._seconds.clear()
        self._distinct: float | None = None
        if self._stopped:
            self.unserved += len(self.scheduler.waiting)
            self.scheduler.waiting.clear()
        work = self.scheduler.next_work()
        with self._timed("control"):
            words = self.lockstep.meet(self._word(work, more))
        self._stopped |= bool(words[:, DRAINS].any())
        if not words[:, :RUNS].any():
            return None
        self._words = words
        with self._timed("homes"):
            self._send_home(words)
        finished: list[RequestOutput] = []
        if words[:, RUNS].any():
            with self._timed("model"):
                logits = self._run(work)
            if work is not None:
                with self._timed("sample"):
                    finished = self._take_tokens(work, logits)
        with self._timed("homes"):
            self._receive()
        self._steps += 1
        decision = None
        if self.watch is not None:
            with self._timed("watch"):
                decision = self.watch.step(self._steps)
                if decision is not None and decision.applied:
                    self.handover.rule.follow(self.watch.plan)
            if decision is not None and self.on_watch is not None:
                self.on_watch(decision)
        if self.on_step is not None:
            self.on_step({**self.step_counts(work), "watch": decision and decision.to_dict()})
        self._latencies.clear()
        return finished

    def _word(self, work: Work | None, more: bool) -> list[int]:
        """What this rank tells the others before a step."""
        held = len(self.scheduler) + len(self.handover)
        room = self.limits.kv_room - self.scheduler.kv_tokens
        surplus, self._surplus = self._surplus, 0
        runs, offers = int(work is not None), len(self.handover.due)
        return [held, int(more), runs, offers, room, surplus, int(self._drains), *self._told]

    def _send_home(self, words: np.ndarray) -> None:
        handover = self.handover
        if not handover.rule.moves:
            return
        handover.rule.correct(words[:, SURPLUS].tolist())
        for state in handover.choose(words[:, OFFERS].tolist()):
            self.scheduler.stays(state)
        self.scheduler.incoming += handover.start(words[:, ROOM])
        self.scheduler.holds = any(offer.home == handover.rank for offer in handover.waiting)

    def _receive(self) -> None:
        came, left = self.handover.arrived(self._like)
        for state in left:
            self.scheduler.leaves(state)
        for state in came:
            self.scheduler.incoming -= state.reserve if state.computed else 0
            state.due_at = None
            self.scheduler.add(state)

    def _run(self, work: Work | None) -> Tensor | None:
        if work is None:
            self.lockstep.idle()
            return None
        if isinstance(work, Prefill):
            return self._prefill(work)
        with self._timed("rows"):
            batch = self._compose(work.sequences)
        states = [sequence.request for sequence in work.sequences]
        tokens = [[sequence.token_ids[-1]] for sequence in work.sequences]
        logits, picks = self._forward(batch, tokens, states, "decode", keeps=self._looks)
        if picks is not None:
            self._saw("decode", picks, states)
        return logits

    def _saw(self, stage: str, picks: np.ndarray, of: list[RequestState]) -> None:
        """Tell picks ``[T, L, K]`` of as many tokens of each request to what looks at them."""
        if self.watch is not None:
            numbers = [self._number(state) for state in of]
            self.watch.see(stage, picks, np.repeat(numbers, len(picks) // len(of)))
        if self.on_step is not None and self.tap.num_experts is not None:
            counts = profile_of(picks, self.tap.num_experts)
            self.picked[stage] = self.picked.get(stage, 0) + counts
            if stage == "decode":
                self._distinct = float((counts > 0).sum(axis=1).mean())

    def _prefill(self, work: Prefill) -> Tensor | None:
        first = work.requests[0]
        rows = first.rows if first.computed else Rows.empty(self.config, len(work.requests))
        tokens = [
            state.prompt[state.computed : state.computed + count]
            for state, count in zip(work.requests, work.chunks, strict=True)
        ]
        now = time.monotonic()
        self._latencies["queued"] += [now - s.began for s in work.requests if not s.computed]
        keeps = self._profiles or self._looks or any(state.due_at for state in work.requests)
        logits, picks = self._forward(rows, tokens, work.requests, "prefill", keeps=keeps)
        if picks is not None:
            self._keep_picks(work, picks)
        for i, state in enumerate(work.requests):
            state.rows = rows if len(work.requests) == 1 else assemble([(rows, i)])
        return logits

    def _keep_picks(self, work: Prefill, picks: np.ndarray) -> None:
        """Give every request the picks of its own tokens: the last ones of its row."""
        by_row = picks.reshape(len(work.requests), -1, *picks.shape[1:])
        for state, count, mine in zip(work.requests, work.chunks, by_row, strict=True):
            own = mine[len(mine) - count :]
            if self._profiles and self.tap.num_experts is not None:
                counts = profile_of(own, self.tap.num_experts)
                state.profile = counts if state.profile is None else state.profile + counts
                state.profiled += len(own)
            self._saw("prefill", own, [state])
            if state.due_at is not None:
                state.picks.append(own)

    def _compose(self, sequences: list[Sequence]) -> Rows:
        """Return the caches of these sequences as one batch; nothing moves where it is the same."""
        if sequences == self._batch_of and self._batch is not None:
            return self._batch
        place: dict[int, Any] = {id(s): (self._batch, i) for i, s in enumerate(self._batch_of)}
        picks = [place.get(id(sequence), (sequence.request.rows, 0)) for sequence in sequences]
        self._batch, self._batch_of = assemble(picks), list(sequences)
        for sequence in sequences:
            sequence.request.rows = None
        return self._batch

    def _forward(
        self,
        rows: Rows,
        tokens: list[list[int]],
        states: list[RequestState] | None = None,
        stage: str = "prefill",
        *,
        keeps: bool = False,
    ) -> tuple[Tensor, np.ndarray | None]:
        """Return logits ``[B, V]`` of the last token of each row, and picks where it keeps them."""
        given: dict[str, Any] = pass_inputs(rows, tokens)
        valid = given.pop("valid", None)
        self.tap.valid = None if valid is None else valid.reshape(-1).to(self.device)
        told: dict[str, Any] = {"mask": torch.zeros(1, 1, dtype=torch.bool), "request_ids": [0]}
        if states is not None:  # else it is nobody's, the warm-up
            told = {"mask": valid, "request_ids": [self._recorded_id(state) for state in states]}
            if any(state.domain for state in states):
                told["domains"] = [state.domain or "" for state in states]
        # for a recorder, where one is attached
        labels = annotate(stage=stage, positions=given["position_ids"], **told)
        given = {name: value.to(self.device) for name, value in given.items()}
        self.tap.keeps = keeps
        # inference mode takes less time, but what FSDP2 gathers in it can never be trained again
        mode = torch.inference_mode() if self.lockstep.size == 1 else torch.no_grad()
        given |= {**self._without, self._cache_name: rows.cache}
        with mode, labels:
            output = self.model(**given, use_cache=True, logits_to_keep=1)
        rows.lengths = [old + len(new) for old, new in zip(rows.lengths, tokens, strict=True)]
        self.tap.keeps = False
        return output.logits[:, -1], self.tap.take_picks()

    def _recorded_id(self, state: RequestState) -> int:
        if isinstance(state.request_id, int) and state.request_id >= 0:
            return state.request_id
        return self._number(state)

    def _number(self, state: RequestState) -> int:
        """A number that no other request of any rank has."""
        return state.number * self.lockstep.size + state.arrival

    # -- tokens

    def _take_tokens(self, work: Work, logits: Tensor | None) -> list[RequestOutput]:
        assert logits is not None
        if isinstance(work, Decode):
            self._append(work.sequences, logits)
            self.scheduler.drop_finished()
            states = {id(s.request): s.request for s in work.sequences if s.finish_reason}
            return [output for state in states.values() for output in self._result(state)]
        finished = []
        for row, (state, count) in enumerate(zip(work.requests, work.chunks, strict=True)):
            was_read = self.scheduler.was_read(state, count)
            ended = self._first_tokens(state, logits[row : row + 1]) if was_read else []
            if state.computed == state.due_at and not ended:
                self.scheduler.park(state)
                self.handover.offer(state)
            finished += ended
        return finished

    def _first_tokens(self, state: RequestState, logits: Tensor) -> list[RequestOutput]:
        state.sequences = [Sequence(state, index) for index in range(state.params.n)]
        self._append(state.sequences, logits.expand(state.params.n, -1))
        state.seconds["first_token"] = time.monotonic() - state.began
        self._latencies["first_token"].append(state.seconds["first_token"])
        self.scheduler.is_ready(state)
        finished = self._result(state)
        if finished:
            self.scheduler.leaves(state)
        return finished

    def _append(self, sequences: list[Sequence], logits: Tensor) -> None:
        params = [sequence.request.params for sequence in sequences]
        draws = [
            draw(s.request.seed, s.index, len(s.token_ids)) if p.temperature > 0 else 0.0
            for s, p in zip(sequences, params, strict=True)
        ]
        chosen, now = choose(logits, params, draws), time.monotonic()
        for sequence, choice in zip(sequences, chosen, strict=True):
            if sequence.token_at:
                self._latencies["between_tokens"].append(now - sequence.token_at)
            sequence.token_at = now
            self._note(sequence, choice)
        self._new_tokens += len(sequences)

    def _note(self, sequence: Sequence, choice: Choice) -> None:
        """Add a token to a sequence and see whether it ends."""
        params, token = sequence.request.params, choice.token
        sequence.token_ids.append(token)
        if choice.logprobs is not None:
            sequence.logprobs.append(choice.logprobs)
        if token in params.stop_token_ids:
            sequence.finish_reason, sequence.stop_reason = "stop", token
        elif token in self.eos and not params.ignore_eos:
            sequence.finish_reason = "stop"
        elif len(sequence.token_ids) >= (params.max_tokens or 0):
            sequence.finish_reason = "length"
        if params.stop:
            text = self.tokenizer.decode(sequence.token_ids, skip_special_tokens=True)
            found = [(text.find(stop), stop) for stop in params.stop if stop in text]
            if found:
                place, stop = min(found)
                sequence.text = text[:place]
                sequence.finish_reason, sequence.stop_reason = "stop", stop
        if self.on_token is not None:
            self.on_token(sequence, token)

    def _result(self, state: RequestState) -> list[RequestOutput]:
        """The result of a request, once all its sequences have ended."""
        if not all(sequence.finish_reason for sequence in state.sequences):
            return []
        state.seconds["finished"] = time.monotonic() - state.began
        self._latencies["finished"].append(state.seconds["finished"])
        if state.home is not None:  # chosen for as many tokens as it might have had
            self._surplus += state.reserve - sum(
                len(state.prompt) + len(s.token_ids) for s in state.sequences
            )
        outputs = []
        for s in state.sequences:
            self._ended[s.finish_reason or ""] += 1
            text, logs = s.text, s.logprobs or None
            if text is None and self.tokenizer is not None:
                text = self.tokenizer.decode(s.token_ids, skip_special_tokens=True)
            total = sum(logs[i][token] for i, token in enumerate(s.token_ids)) if logs else None
            outputs.append(
                CompletionOutput(
                    index=s.index,
                    text=text,
                    token_ids=s.token_ids,
                    finish_reason=s.finish_reason,
                    stop_reason=s.stop_reason,
                    logprobs=logs,
                    cumulative_logprob=total,
                )
            )
        return [
            RequestOutput(
                request_id=state.request_id,
                prompt_token_ids=state.prompt,
                outputs=outputs,
                arrival=state.arrival,
                home=self.lockstep.rank,
                seconds=state.seconds,
            )
        ]

    # -- counts

    def _begin_counts(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._latencies: dict[str, list[float]] = defaultdict(list)
        self._ended: dict[str, int] = defaultdict(int)
        self.refused = self._new_tokens = 0
        self._told, self._words = [0, 0, 0], np.zeros((1, 10), dtype=np.int64)
        self.picked: dict[str, np.ndarray] = {}

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds[stage] += time.perf_counter() - began

    def step_counts(self, work: Work | None) -> dict[str, Any]:
        """What this rank did in a step: plain data.

        ``step``, ``kind`` (prefill, decode, idle), ``tokens`` (that the model was given),
        ``sequences``, ``running``, ``waiting``, ``ready``, ``kv_tokens`` (reserved) of ``kv_room``,
        ``seconds {stage: s}`` (``exchange``, where ``dispatch.timing`` is on, is a part of
        ``model``), ``bytes`` and ``rows`` ``{kind: [same rank, same node, across nodes]}`` that
        this rank sent; ``load``: rows that its experts worked on; ``distinct``: experts that its
        sequences picked in a layer, mean over the layers, in a decode step; ``new_tokens``;
        ``ended {reason: n}``, ``latencies {queued, first_token, between_tokens,
        finished: [s]}``; ``ranks``: ``held`` requests of all ranks, and of their last step
        ``load``, ``cross_bytes``, ``new_tokens``; ``watch``: a decision, as plain data;
        since the start: ``control_bytes``, ``handover_bytes`` (by link, as above), ``moved``
        requests that went to another home, ``refused`` ones.
        """
        kind = "idle" if work is None else type(work).__name__.lower()
        tokens = sequences = 0
        if isinstance(work, Prefill):
            tokens, sequences = sum(work.chunks), len(work.requests)
        elif isinstance(work, Decode):
            tokens = sequences = len(work.sequences)
        sent: dict[str, Any] = {}
        before, now = self._traffic, local_traffic(self._counted, None)
        self._traffic = now
        if before["resets"] != now["resets"]:  # somebody counts anew
            before = {"sent": {}, "layers": {}, "stage_us": {}}
        for name, key in (("bytes", "by_link"), ("rows", "rows_by_link")):
            old = before["sent"].get(key, {})
            sent[name] = {
                link: (np.array(sums) - np.array(old.get(link, [0, 0, 0]))).tolist()
                for link, sums in now["sent"].get(key, {}).items()
            }
        seconds = dict(self._seconds)
        if now["stage_us"]:
            seconds["exchange"] = (_exchange_us(now) - _exchange_us(before)) / 1e6
        load = sum(now["layers"].values()) - sum(before["layers"].values())
        new, self._new_tokens = self._new_tokens, 0
        self._told = [load, sum(links[2] for links in sent["bytes"].values()), new]
        lived: dict[str, Any] = {"ended": dict(self._ended), "latencies": dict(self._latencies)}
        self._ended.clear()
        names = {"held": HELD, "load": LOAD, "cross_bytes": CROSS, "new_tokens": TOKENS}
        return {
            "step": self._steps,
            "kind": kind,
            "tokens": tokens,
            "new_tokens": new,
            "sequences": sequences,
            **lived,
            "ranks": {name: self._words[:, word].tolist() for name, word in names.items()},
            **self.scheduler.counts(),
            "seconds": seconds,
            **sent,
            "load": load,
            "distinct": self._distinct,
            "control_bytes": self.lockstep.control_bytes,
            "handover_bytes": list(self.handover.sent_bytes),
            "moved": self.handover.moved,
            "refused": self.refused,
        }


def _exchange_us(traffic: dict[str, Any]) -> float:
    stages = traffic["stage_us"].items()
    return sum(us for name, us in stages if name.startswith(("counts", "dispatch", "combine")))


def _eos_tokens(model: Any) -> frozenset[int]:
    own = getattr(model, "generation_config", None), model.config.get_text_config(decoder=True)
    for settings in own:
        found = getattr(settings, "eos_token_id", None)
        if found is not None:
            return frozenset(torch.as_tensor(found).reshape(-1).tolist())
    return frozenset()

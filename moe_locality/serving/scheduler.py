"""Which requests of a rank run in the next step. Plain data: no model, no process group.

A step is one forward pass on every rank. A rank with prompts to read and sequences to continue does
both in turns, so neither waits for the other; a long prompt is read in chunks. Requests start in
the order of their arrival, and one that does not fit yet keeps later ones waiting: none starves.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from moe_locality.errors import ConfigError
from moe_locality.serving.requests import RequestError, RequestId, SamplingParams

_UNKNOWN_LENGTH = 2048  # of sequences, where neither the limits nor the model say


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a rank may hold and run; the names are vLLM's.

    Args:
        max_num_seqs: sequences that are continued together.
        max_num_batched_tokens: tokens of one step, padding included; longer prompts come in chunks.
        max_model_len: tokens of a sequence, prompt and continuation; None: what the model allows
            (``max_position_embeddings``).
        max_num_kv_tokens: tokens in the caches of this rank (default: ``max_num_seqs *
            max_model_len``). The batch counts as a rectangle, rows times the longest of them.
        max_num_ready: prompts that are read before there is a row for them.
    """

    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512
    max_model_len: int | None = None
    max_num_kv_tokens: int | None = None
    max_num_ready: int = 0

    def __post_init__(self) -> None:
        least = {"max_num_seqs": 1, "max_num_batched_tokens": 1, "max_model_len": 2}
        for name, low in {**least, "max_num_ready": 0, "max_num_kv_tokens": 2}.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"found {name}={value}, expected at least {low}")
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise ConfigError(
                f"found max_num_seqs={self.max_num_seqs} and max_num_batched_tokens="
                f"{self.max_num_batched_tokens}, expected a token for every sequence: raise it"
            )

    def of_model(self, config: Any) -> "Limits":
        """Return them with a ``max_model_len``; ConfigError: longer than the model allows."""
        most = getattr(config, "max_position_embeddings", None)
        longest = self.max_model_len or most or _UNKNOWN_LENGTH
        if most is not None and longest > most:
            raise ConfigError(
                f"found max_model_len={longest}, expected at most {most}, the model's "
                "max_position_embeddings: lower it"
            )
        return replace(self, max_model_len=longest)

    @property
    def longest(self) -> int:
        """Tokens of a sequence at most."""
        return self.max_model_len or _UNKNOWN_LENGTH

    @property
    def kv_room(self) -> int:
        """Tokens in the caches of a rank."""
        return self.max_num_kv_tokens or self.max_num_seqs * self.longest


@dataclass(slots=True, eq=False)
class Sequence:
    """One continuation of a request."""

    request: "RequestState"
    index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_at: float = 0.0


@dataclass(slots=True, eq=False)
class RequestState:
    """A request on its way. ``computed``: tokens of its prompt that are in its cache ``rows``;
    ``number``: its place in the order of arrival; ``picks``: the routing of its prompt, a part
    ``[t, L, K]`` per pass, where it was asked for; ``profile [L, E]``: how often ``profiled``
    tokens picked each expert; ``due_at``: tokens that are read before its ``home`` is chosen.
    """

    request_id: RequestId
    prompt: list[int]
    params: SamplingParams
    seed: int
    number: int
    arrival: int = 0
    home: int | None = None
    domain: str | None = None
    computed: int = 0
    due_at: int | None = None  # None: it has a home
    rows: Any = None
    sequences: list[Sequence] = field(default_factory=list)
    picks: list[np.ndarray] = field(default_factory=list)
    profile: np.ndarray | None = None
    profiled: int = 0
    began: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)

    def turn_clocks(self, now: float | None = None) -> None:
        """Make ages of the times of this host, or times of the ages that were taken at ``now``."""
        now = time.monotonic() if now is None else now
        self.began = now - self.began
        for sequence in self.sequences:
            sequence.token_at = now - sequence.token_at

    @property
    def longest(self) -> int:
        """Tokens of a sequence at its end, at most."""
        return len(self.prompt) + (self.params.max_tokens or 0)

    @property
    def reserve(self) -> int:
        """Tokens that its continuations will have in the caches, at most."""
        return self.params.n * self.longest


@dataclass(frozen=True, slots=True)
class Prefill:
    """Read these prompts on, ``chunks [B]`` tokens of each."""

    requests: list[RequestState]
    chunks: list[int]


@dataclass(frozen=True, slots=True)
class Decode:
    """Continue these sequences by one token each."""

    sequences: list[Sequence]


Work = Prefill | Decode
# (the ready ones, those that run) -> which of the ready ones joins next
Choose = Callable[[ListLike[RequestState], ListLike[Sequence]], int]


def _read_to(state: RequestState) -> int:
    return len(state.prompt) if state.due_at is None else state.due_at


def request_age(state: RequestState) -> tuple[int, int]:
    """What requests are ordered by, the oldest first."""
    return state.number, state.arrival


def first_come(ready: ListLike[RequestState], running: ListLike[Sequence]) -> int:
    """Choose the one that came first."""
    del running
    return min(range(len(ready)), key=lambda i: request_age(ready[i]))


class Scheduler:
    """The requests of one rank: waiting, being read, ready, running.

    Args:
        pads: whether prompts of different length are read together.
        choose: which of the ready requests takes a free row. The oldest one does as soon as
            ``patience`` others have overtaken it.
        stages: whether prompts are read here before their home is known. They have half of the
            room: the other half is left to requests that come, so ranks never wait in a circle.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        pads: bool = True,
        choose: Choose = first_come,
        patience: int | None = None,
        stages: bool = False,
    ) -> None:
        self.limits, self.pads, self.choose, self.stages = limits, pads, choose, stages
        self.patience = 4 * limits.max_num_seqs if patience is None else patience
        self.waiting: deque[RequestState] = deque()
        self.reading: list[RequestState] = []
        self.ready: list[RequestState] = []
        self.running: list[Sequence] = []
        self.parked: list[RequestState] = []
        self.incoming, self.holds = 0, False
        self._overtaken, self._read_last = 0, False

    def check(self, state: RequestState) -> None:
        """Raise RequestError where the request can never run here."""
        limits = self.limits
        if len(state.prompt) >= limits.longest:
            raise RequestError(
                f"found a prompt of {len(state.prompt)} tokens, expected fewer than max_model_len="
                f"{limits.longest}: shorten it, or raise max_model_len"
            )
        count, most = state.params.n, limits.max_num_seqs
        if count > most:
            raise RequestError(f"found n={count}, expected at most max_num_seqs={most}")
        half, parts = ("half of ", 2) if self.stages else ("", 1)
        if state.reserve > limits.kv_room // parts:
            raise RequestError(
                f"found a request of {count} x {state.longest} tokens, expected at most "
                f"{half}max_num_kv_tokens={limits.kv_room}: lower max_tokens or n"
            )

    def add(self, state: RequestState) -> None:
        """Take a request: to be read, or ready where its prompt was read elsewhere."""
        if state.sequences:
            self.ready.append(state)
        elif state.computed:
            self.reading.append(state)
        else:
            self.waiting.append(state)

    def __len__(self) -> int:
        running = {id(sequence.request) for sequence in self.running}
        held = (self.waiting, self.reading, self.ready, self.parked, running)
        return sum(map(len, held))

    @property
    def kv_tokens(self) -> int:
        """Tokens in the caches that are reserved."""
        return self._rectangle(self.running) + self._beside_batch()

    def counts(self) -> dict[str, int]:
        """What is held: sequences, requests, tokens in the caches of how many."""
        return {
            "running": len(self.running),
            "waiting": len(self.waiting),
            "ready": len(self.ready),
            "kv_tokens": self.kv_tokens,
            "kv_room": self.limits.kv_room,
        }

    def _beside_batch(self) -> int:
        held = [*self.reading, *self.ready, *(state for state in self.parked if state.computed)]
        return self.incoming + sum(state.reserve for state in held)

    @staticmethod
    def _rectangle(sequences: Iterable[Sequence]) -> int:
        lengths = [sequence.request.longest for sequence in sequences]
        return len(lengths) * max(lengths, default=0)

    def next_work(self) -> Work | None:
        """What this rank runs in the next step; None: nothing."""
        self._join()
        reads = not (self._read_last and self.running)
        work = self._next_prefill() if reads else None
        self._read_last = work is not None
        return Decode(list(self.running)) if work is None and self.running else work

    def _join(self) -> None:
        """Give free rows to requests that are ready."""
        while self.ready:
            index = oldest = first_come(self.ready, self.running)
            if self._overtaken < self.patience:
                index = self.choose(self.ready, self.running)
            index = next((i for i in (index, oldest) if self._fits(self.ready[i])), None)
            if index is None:
                return
            self._overtaken = 0 if index == oldest else self._overtaken + 1
            self.running += self.ready.pop(index).sequences

    def _fits(self, state: RequestState) -> bool:
        after = [*self.running, *state.sequences]
        if len(after) > self.limits.max_num_seqs:
            return False
        others = self._beside_batch() - state.reserve
        return self._rectangle(after) + others <= self.limits.kv_room

    def _next_prefill(self) -> Prefill | None:
        budget = self.limits.max_num_batched_tokens
        if self.reading:
            state = min(self.reading, key=request_age)
            return Prefill([state], [min(budget, _read_to(state) - state.computed)])
        taken: list[RequestState] = []
        longest = 0
        while self.waiting and self._may_read(self.waiting[0]):
            length = _read_to(self.waiting[0])
            uneven = taken and length != longest and not self.pads
            if taken and (uneven or (len(taken) + 1) * max(longest, length) > budget):
                break
            longest = max(longest, length)
            taken.append(self.waiting.popleft())
            self.reading.append(taken[-1])
        if not taken:
            return None
        return Prefill(taken, [min(budget, _read_to(state)) for state in taken])

    def _may_read(self, state: RequestState) -> bool:
        if self.holds or self.kv_tokens + state.reserve > self.limits.kv_room:
            return False
        if state.due_at is not None:
            staged = [s for s in (*self.reading, *self.parked) if s.due_at is not None]
            room = sum(s.reserve for s in staged) + state.reserve <= self.limits.kv_room // 2
            return room and len(staged) < self.limits.max_num_seqs
        held = sum(s.params.n for s in (*self.reading, *self.ready)) + len(self.running)
        return held + state.params.n <= self.limits.max_num_seqs + self.limits.max_num_ready

    def was_read(self, state: RequestState, tokens: int) -> bool:
        """Note that tokens of a prompt are in its cache; return whether it was read to its end."""
        state.computed += tokens
        return state.computed == len(state.prompt)

    def leaves(self, state: RequestState) -> None:
        """Forget a request without sequences in the batch: it ended, or is at another rank."""
        for held in (self.reading, self.ready, self.parked):
            if state in held:
                held.remove(state)

    def park(self, state: RequestState) -> None:
        """Keep a request until its home is chosen and, where that is another rank, it has left."""
        self.leaves(state)
        self.parked.append(state)

    def stays(self, state: RequestState) -> None:
        """Go on with a parked request, whose home is here."""
        self.leaves(state)
        state.due_at = None
        self.add(state)

    def is_ready(self, state: RequestState) -> None:
        """The prompt was read; its continuations wait for rows."""
        self.reading.remove(state)
        self.ready.append(state)

    def drop_finished(self) -> None:
        """Free the rows of sequences that have ended."""
        self.running = [s for s in self.running if s.finish_reason is None]

"""Watch the live routing of an engine; propose another plan, or move the experts between steps.

Every so many steps the ranks send their latest tokens, of prefill and decode, to rank 0. It says
how far their loads are from those that the plan was made for, looks for few exchanges of slots on
half of the requests and judges them on the other half, each token at the rank where it was: the
homes are those that requests really have. All ranks follow its decision. Requests in flight go on:
their caches stay where they are, and the model computes the same function.
"""

import logging
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from moe_locality.analysis.drift import load_drift
from moe_locality.config import DispatchConfig, OnlineConfig
from moe_locality.errors import ConfigError
from moe_locality.integrations.transformers_ep import apply
from moe_locality.layer.agreement import decided_by_first
from moe_locality.placement.counting import picks_by_home
from moe_locality.placement.plan import PlacementPlan, check_equal_slots
from moe_locality.placement.refresh.improve import refresh
from moe_locality.placement.refresh.state import RefreshState
from moe_locality.quantization.formats import row_bytes
from moe_locality.serving.lockstep import LockStep
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.trace.recorder.hooks import model_type_of
from moe_locality.trace.schema import DECODE, PREFILL, RoutingTrace

logger = logging.getLogger(__name__)

MODES = ("off", "propose", "apply")
STAGES = {"prefill": PREFILL, "decode": DECODE}
Part = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Picks ``[T, L, K]``, numbers of requests ``[T]`` and stages ``[T]`` of tokens."""
LEAST_REQUESTS = 8  # that a decision needs: half of them propose, the others judge


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchDecision:
    """One decision. ``plan``: what was proposed, or applied; None where nothing is worth it.

    ``drift_bits``, ``noise_bits``: by stage, divergence of the loads from those of the plan, and
    what two samples of this size would show without drift. ``copies_before``, ``copies_after``: per
    token and layer, on the requests that judge; None where no exchange of slots was found.
    ``seconds``: of the decision, with the move.
    """

    step: int
    num_tokens: int
    reason: str
    drift_bits: dict[str, float]
    noise_bits: dict[str, float]
    moved_slots: int = 0
    copies_before: float | None = None
    copies_after: float | None = None
    applied: bool = False
    seconds: float = 0.0
    plan: PlacementPlan | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, without the plan; ``proposed``: whether there is one."""
        found = asdict(replace(self, plan=None))
        del found["plan"]
        return found | {"proposed": self.plan is not None}


class Watch:
    """The watch of one engine. Making one is collective. ``plan``: the one in effect.

    ``rows``: of the plan, in the order of the picks that are seen. ``mode``: ``propose`` or
    ``apply``. ``config``: how often, within how many steps a move has to pay, the budgets. Raises
    ConfigError where there is no plan, or nothing to place.
    """

    def __init__(
        self,
        lockstep: LockStep,
        rows: list[int],
        plan: PlacementPlan | None,
        mode: str,
        config: OnlineConfig | None = None,
    ) -> None:
        self.model: Any = lockstep.model
        self.lockstep, self.layers = lockstep, lockstep.tap.layers
        self.applies, self.config = mode == "apply", config or OnlineConfig()
        if mode not in MODES or plan is None or not self.layers or lockstep.size == 1:
            raise ConfigError(
                f"found watch={mode!r} for {len(self.layers)} layers on {lockstep.size} ranks, with"
                f"{'' if plan else 'out'} a plan, expected one of {MODES}, experts that are spread "
                "over ranks and their plan: `moe-locality place --method linear` writes one"
            )
        check_equal_slots(plan, "watch")
        self.rows, self.plan, self._load = rows, plan, plan.expert_load
        found = self.layers[0].topology
        assert found is not None  # the warm-up has asked for it
        # the nodes may have other numbers in the plan: who shares one counts
        self.topology: ClusterTopology = replace(found, rank_to_node=plan.topology.rank_to_node)
        self._seen: list[Part] = []
        self._tokens = 0

    def see(self, stage: str, picks: np.ndarray, requests: np.ndarray) -> None:
        """Take the picks ``[T, L, K]`` of tokens of these requests ``[T]`` on this rank."""
        stages = np.full(len(picks), STAGES[stage], dtype=np.uint8)
        self._seen.append((picks, requests.astype(np.int64), stages))
        self._tokens += len(picks)
        kept = sum(len(part[0]) for part in self._seen)
        while kept - len(self._seen[0][0]) >= self.config.sample_tokens:
            kept -= len(self._seen.pop(0)[0])  # the latest are kept

    def step(self, number: int) -> WatchDecision | None:
        """Decide, where it is time for it, after step ``number``. Collective."""
        if number % self.config.every_n_steps:
            return None
        began = time.monotonic()
        with self.lockstep.explained("where the engine watches its routing"):
            mine = (self._seen, self._tokens)
            self._seen, self._tokens = [], 0
            told = decided_by_first(mine, lambda gathered: self._decide(number, gathered))
        if told.plan is not None and self.applies:
            with self.lockstep.explained("where the experts move to another plan"):
                self._apply(told.plan)
            told = replace(told, applied=True)
        told = replace(told, seconds=time.monotonic() - began)
        if self.lockstep.rank == 0:
            words = "applied" if told.applied else "proposed" if told.plan else "nothing to move"
            logger.info("watch, step %d: %s: %s", number, words, told.reason)
        return told

    def _apply(self, plan: PlacementPlan) -> None:
        counters = [layer.traffic for layer in self.layers]
        apply(self.model, plan=plan, topology=self.topology)
        for layer, counter in zip(self.layers, counters, strict=True):
            layer.counter = counter
        self.plan, self._load = plan, plan.expert_load

    # -- rank 0

    def _decide(self, number: int, gathered: list[Any]) -> WatchDecision:
        trace, nodes = self._trace([seen for seen, _ in gathered])
        drift, noise = {}, {}
        for stage, code in STAGES.items():
            part = trace.take(trace.stage == code)
            if part.num_tokens:
                self._load = trace.load() if self._load is None else self._load
                drift[stage], noise[stage] = load_drift(self._load, part)
        bits = {"drift_bits": drift, "noise_bits": noise}
        facts: dict[str, Any] = {"step": number, "num_tokens": trace.num_tokens, **bits}
        tokens = trace.tokens_only("a watch")
        requests = np.unique(tokens.request_id)
        if len(requests) < LEAST_REQUESTS:
            reason = f"found {len(requests)} requests, expected {LEAST_REQUESTS} to decide on"
            return WatchDecision(**facts, reason=reason)
        half = np.random.default_rng(number).permutation(requests)[: len(requests) // 2]
        fits = np.isin(tokens.request_id, half)
        pin = picks_by_home(
            tokens.expert_ids[fits], trace.num_experts, nodes[fits], self.plan.num_nodes
        )
        prices: dict[str, Any] = self._prices(sum(seen for _, seen in gathered))
        found = refresh(
            self.plan,
            RefreshState.from_trace(trace.take(fits)),
            self.topology,
            move_budget=self.config.move_budget,
            max_imbalance=self.config.max_imbalance,
            pin=pin.transpose(0, 2, 1).astype(np.float64),
            judged=(tokens.expert_ids[~fits], tokens.request_id[~fits], nodes[~fits]),
            **prices,
        )
        plan = None
        if found.worth_it is True and found.moved_slots:
            made: dict[str, Any] = {"method": "watch", "start": self.plan.digest(), "step": number}
            made["model_type"] = model_type_of(self.model)
            plan = replace(found.plan, costs={}, provenance=made)
        for name in ("reason", "moved_slots", "copies_before", "copies_after"):
            facts[name] = getattr(found, name)
        return WatchDecision(**facts, plan=plan)

    def _trace(self, seen: list[list[Part]]) -> tuple[RoutingTrace, np.ndarray]:
        """The samples of all ranks, and the node of every token."""
        parts = [(rank, *part) for rank, own in enumerate(seen) for part in own]
        top_k = max((picks.shape[2] for _, picks, _, _ in parts), default=1)
        total = sum(len(picks) for _, picks, _, _ in parts)
        ids = np.full((total, len(self.rows), top_k), -1, dtype=np.int16)
        ranks, numbers = np.zeros(total, np.int64), np.zeros(total, np.int64)
        stages, done = np.zeros(total, np.uint8), 0
        for rank, picks, requests, stage in parts:
            here = slice(done, done + len(picks))
            ids[here, self.rows] = picks
            ranks[here], numbers[here], stages[here] = rank, requests, stage
            done += len(picks)
        # what a request did on one rank is one of its own: its prompt may have been read elsewhere
        _, request = np.unique(np.stack([ranks, numbers]), axis=1, return_inverse=True)
        trace = RoutingTrace(
            model=self.plan.model,
            num_experts=self.plan.num_experts,
            layer_ids=np.asarray(self.plan.layer_ids, np.int32),
            expert_ids=ids,
            request_id=request.reshape(-1).astype(np.int64),
            position=np.arange(total, dtype=np.int32),
            stage=stages,
        )
        return trace, np.asarray(self.topology.rank_to_node)[ranks]

    def _prices(self, tokens: int) -> dict[str, float]:
        """Bytes of an expert, of a copy there and back, and tokens of a step of all ranks."""
        layer = self.layers[0]
        tensors = [*layer.experts.parameters(), *layer.experts.buffers()]  # of a low-bit store
        own = sum(getattr(one, "_local_tensor", one).nbytes for one in tensors)
        width = self.model.config.get_text_config(decoder=True).hidden_size
        return {
            "expert_bytes": own * layer.ep_mesh.size() / layer.num_experts,
            "copy_bytes": copy_bytes(layer.dispatch_config, width, self.model.dtype.itemsize),
            "tokens_per_step": tokens / self.config.every_n_steps,
            "steps": float(self.config.pays_within_steps),
        }


def copy_bytes(config: DispatchConfig, width: int, element_size: int) -> float:
    """Bytes of a token that goes to an expert and back, as the payloads of the config code it."""
    plain, payloads = width * element_size, (config.payload, config.combine_payload)
    return float(sum(plain if p == "none" else row_bytes(p, width) for p in payloads))

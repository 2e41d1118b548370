"""The home of a request: the rank that continues it, and how it gets there.

All ranks choose together: each offers the requests whose homes are due, with a score per rank, and
all of them run the same rule on the same offers. What a request needs at its home (its tokens, and
its rows of the caches where its prompt was read elsewhere) goes there point to point while the
ranks run on.
"""

import logging
import pickle
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moe_locality.arrivals import ArrivingHomes
from moe_locality.compat import default_timeout
from moe_locality.errors import ConfigError
from moe_locality.layer.agreement import LostRanks
from moe_locality.placement.homes.assign import domain_scores
from moe_locality.placement.plan import PlacementPlan
from moe_locality.serving.cache import Rows, pack_row, row_bytes, unpack_row
from moe_locality.serving.scheduler import RequestState
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.topology.groups import discover_topology

AT_ARRIVAL = ("random", "round_robin", "domain")
STUCK_S = 30.0  # a transfer that takes so long is named, again and again: slow, or it never ends
logger = logging.getLogger(__name__)


class HomeRule:
    """Which rank is the home of a request.

    ``homes``: ``arrival`` (where it is), ``random``, ``round_robin``, ``domain`` (the profile that
    the plan has of it), ``predicted`` (from the routing of its prompt) or ``first:N`` (of its first
    N tokens). ``plan``: for the last three. ``rows``: of the plan, for each MoE layer of the model.
    """

    def __init__(
        self,
        homes: str,
        num_ranks: int,
        *,
        plan: PlacementPlan | None = None,
        rows: Sequence[int] = (),
        topology: ClusterTopology | None = None,
        seed: int = 0,
    ) -> None:
        first = re.fullmatch("first:([0-9]*[1-9][0-9]*)", homes)
        if homes not in ("arrival", "predicted", *AT_ARRIVAL) and not first:
            raise ConfigError(
                f"found homes={homes!r}, expected arrival, predicted, first:N (N tokens), domain, "
                "random or round_robin"
            )
        self.homes, self.num_ranks = homes, num_ranks
        self.moves = homes != "arrival" and num_ranks > 1
        self.reads_routes = self.moves and homes not in AT_ARRIVAL
        self._first = int(first[1]) if first else None
        self._rows, self._seed, self._turn = list(rows), seed, 0
        self.plan, self._arriving = plan, None
        if not self.moves or homes in ("random", "round_robin"):
            return
        if plan is None:
            raise ConfigError(f"found homes={homes!r} and no plan, expected the plan of this model")
        if homes == "domain":
            domain_scores(plan, [None], {})  # says what is missing, before anything runs
        self._arriving = ArrivingHomes(plan, topology, predict=homes if first else "prefill")

    def due_at(self, prompt: int) -> int | None:
        """How many tokens of a prompt are read before its home is chosen; None: never."""
        if not self.moves:
            return None
        if not self.reads_routes:
            return 0
        return prompt if self._first is None else min(self._first, prompt)

    def score(self, state: RequestState) -> np.ndarray:
        """[G] how well each rank suits a request."""
        if self.homes == "domain":
            assert self.plan is not None
            return domain_scores(self.plan, [state.domain], {})[0][0]
        if self._arriving is None:
            return np.zeros(self.num_ranks)
        found = np.concatenate(state.picks) if state.picks else np.zeros((0, len(self._rows), 1))
        ids = np.full(found.shape, -1, dtype=np.int16)
        ids[:, self._rows] = found
        return self._arriving.score(ids)

    def assign(self, offers: Sequence["Offer"], scores: np.ndarray) -> list[int]:
        """The homes of the requests that are due, ``scores [n, G]``: on all ranks in one order."""
        if self.homes == "random":
            seeds = [(self._seed, offer.source, offer.number) for offer in offers]
            return [int(np.random.default_rng(s).integers(self.num_ranks)) for s in seeds]
        if self.homes == "round_robin":
            first, self._turn = self._turn, self._turn + len(offers)
            return [(first + place) % self.num_ranks for place in range(len(offers))]
        assert self._arriving is not None
        tokens = np.array([offer.reserve for offer in offers])
        return self._arriving.assign_together(scores, tokens).tolist()

    def follow(self, plan: PlacementPlan) -> None:
        """Take a plan for the same ranks whose experts have moved."""
        self.plan = plan if self.plan is not None else None
        if self._arriving is not None:
            self._arriving.follow(plan)

    def correct(self, surplus: Sequence[int]) -> None:
        """Take back tokens that requests of each rank ``[G]`` were expected to have and had not."""
        for rank, tokens in enumerate(surplus):
            if self._arriving is not None and tokens:
                self._arriving.correct(rank, int(tokens), 0)


# -- the way to the home


@dataclass(slots=True, eq=False)
class Offer:
    """A request whose home is due, as all ranks see it. ``state``: on its rank alone."""

    source: int
    number: int
    reserve: int
    told_bytes: int
    kv_bytes: int
    home: int = -1
    state: RequestState | None = None
    told: bytes = b""
    named_at: float = 0.0
    at: float = field(default_factory=time.monotonic)  # offered, on the clock of each rank


class HandOver:
    """Carries requests between ranks. All methods but :meth:`arrived` are collective.
    ``sent_bytes [3]``: what this rank sent to itself (0), inside its node and across nodes, KV and
    the rest; ``moved``: requests that it sent.
    """

    def __init__(
        self, rule: HomeRule, rank: int, device: torch.device, topology: ClusterTopology | None
    ) -> None:
        self.rule, self.rank, self.device = rule, rank, device
        self.size = rule.num_ranks
        self.due: list[Offer] = []
        self.waiting: list[Offer] = []
        self.under_way: list[tuple[Offer, Tensor, Callable[[], bool]]] = []
        self.sent_bytes, self.moved = [0, 0, 0], 0
        if rule.moves:
            self.group: Any = dist.new_group(list(range(self.size)), timeout=default_timeout())
            topology = topology or discover_topology()
            self.nodes = [topology.node_of(r) for r in range(self.size)]

    def __len__(self) -> int:
        return len(self.due) + len(self.waiting) + len(self.under_way)

    def offer(self, state: RequestState) -> None:
        """Have the home of a request chosen in the next step."""
        rows, state.rows = state.rows, None
        picks, state.picks = state.picks, []
        state.turn_clocks()  # those of hosts differ: ages travel
        told = pickle.dumps(state)
        state.turn_clocks()
        state.rows, state.picks = rows, picks
        sizes = len(told), 0 if rows is None else row_bytes(rows)
        self.due.append(Offer(self.rank, state.number, state.reserve, *sizes, -1, state, told))

    def choose(self, offers_of: Sequence[int]) -> list[RequestState]:
        """Choose homes for the ``offers_of [G]`` of each rank; return this rank's that stay."""
        most = max(offers_of)
        if not most:
            return []
        table = torch.zeros(most, 4 + self.size, dtype=torch.float64)
        for row, offer in enumerate(self.due):
            assert offer.state is not None
            told = [offer.number, offer.reserve, offer.told_bytes, offer.kv_bytes]
            table[row] = torch.tensor([*told, *self.rule.score(offer.state).tolist()])
            offer.state.picks = []
        everyone = torch.empty(self.size * table.numel(), dtype=torch.float64, device=self.device)
        dist.all_gather_into_tensor(everyone, table.reshape(-1).to(self.device))
        tables = everyone.view(self.size, most, -1).cpu().numpy()
        parts = [tables[source, :count] for source, count in enumerate(offers_of)]
        offers: list[Offer] = []
        for source, part in enumerate(parts):
            theirs = (Offer(source, *told) for told in part[:, :4].astype(int).tolist())
            offers += self.due if source == self.rank else theirs
        homes = self.rule.assign(offers, np.concatenate([part[:, 4:] for part in parts]))
        self.due, stay = [], []
        for offer, offer.home in zip(offers, homes, strict=True):
            if offer.state is not None:
                offer.state.home = offer.home
            if offer.home != offer.source:
                self.waiting.append(offer)
            elif offer.state is not None:
                stay.append(offer.state)
        return stay

    def start(self, room: np.ndarray) -> int:
        """Begin the transfers that fit into ``room [G]`` tokens of their homes, first come first;
        return how many tokens of this rank's room they take.
        """
        free, blocked = room.astype(np.int64), set()
        later: list[Offer] = []
        for offer in self.waiting:
            needs = offer.reserve if offer.kv_bytes else 0
            if offer.home in blocked or (needs and needs > free[offer.home]):
                blocked.add(offer.home)
                later.append(offer)
                continue
            free[offer.home] -= needs
            if self.rank in (offer.home, offer.source):
                self._carry(offer)
        self.waiting = later
        return int(room[self.rank] - free[self.rank])

    def _carry(self, offer: Offer) -> None:
        size, offer.named_at = offer.told_bytes + offer.kv_bytes, time.monotonic()
        if offer.source == self.rank:
            assert offer.state is not None
            data = torch.frombuffer(bytearray(offer.told), dtype=torch.uint8).to(self.device)
            if offer.kv_bytes:
                data = torch.cat([data, pack_row(offer.state.rows, 0)])
                offer.state.rows = None
            assert len(data) == size
            work = dist.isend(data, offer.home, group=self.group)
            self.sent_bytes[1 + (self.nodes[offer.home] != self.nodes[self.rank])] += size
            self.moved += 1
        else:
            data = torch.empty(size, dtype=torch.uint8, device=self.device)
            work = dist.irecv(data, offer.source, group=self.group)
        self.under_way.append((offer, data, _watch(work, offer, data.is_cuda)))

    def arrived(self, like: Rows) -> tuple[list[RequestState], list[RequestState]]:
        """Return the requests that have come, and those that have left. ``like``: any row."""
        came, left, still = [], [], []
        for offer, data, done in self.under_way:
            if not done():
                still.append((offer, data, done))
                if time.monotonic() - offer.named_at > STUCK_S:
                    offer.named_at = time.monotonic()
                    logger.warning(
                        "a request (%d bytes) on its way from rank %d to rank %d has not come "
                        "within %g s: the link between them is slow, or one of them hangs; the "
                        "engine waits %g s in all",
                        *(len(data), offer.source, offer.home, STUCK_S),
                        default_timeout().total_seconds(),
                    )
            elif offer.source == self.rank:
                left.append(offer.state)
            else:
                state = pickle.loads(data[: offer.told_bytes].cpu().numpy().tobytes())
                state.turn_clocks(offer.at)  # the way and the wait for room count too
                state.home = self.rank
                if offer.kv_bytes:
                    state.rows = unpack_row(data[offer.told_bytes :], state.computed, like)
                came.append(state)
        self.under_way = still
        return came, left


def _watch(work: Any, offer: Offer, on_cuda: bool) -> Callable[[], bool]:
    """Return a function that says whether a transfer is done. gloo, which carries what is on the
    CPU, knows it only from a thread that waits; the backend's name may be "undefined".
    """
    if work is None:
        raise LostRanks(f"found no transfer of a request from rank {offer.source}")
    failed: list[BaseException] = []

    def wait() -> None:
        try:
            work.wait(default_timeout())
        except BaseException as error:  # noqa: BLE001  raised where it is asked for
            failed.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    if not on_cuda:
        thread.start()

    def done() -> bool:
        ended = work.is_completed() if on_cuda else not thread.is_alive()  # asked before `failed`
        if ended and on_cuda:
            wait()  # NCCL says "completed" of a transfer that failed, and raises here
        if failed:
            raise LostRanks(
                f"a request on its way from rank {offer.source} to rank {offer.home} was lost "
                f"({failed[0]}): one of them exited or hangs; look at their output"
            ) from failed[0]
        return ended

    return done

"""What a figure shows, as plain data: arrays, names, and the basis of the numbers.

Every figure carries a :class:`Basis`, which says whether its numbers were measured or simulated,
how many tokens stand behind them and the seed. :func:`numbers` gives the table behind a figure, so
that a reader can copy it.
"""

import dataclasses
from typing import Literal

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """What stands behind the numbers of a figure.

    ``how`` is "measured" (counted in a run or a recorded trace) or "simulated" (predicted by
    replaying a trace); ``count`` is n, in ``unit``.
    """

    how: Literal["measured", "simulated"]
    count: int
    unit: str = "tokens"
    num_requests: int | None = None
    seed: int | None = None
    synthetic: bool = False
    note: str = ""

    def sentence(self) -> str:
        """Return the caption line: how, n and seed."""
        words = {
            "measured": "Measured",
            "simulated": "Simulated (predicted by replaying the trace)",
        }[self.how]
        source = " on a synthetic trace" if self.synthetic else ""
        count = f"n = {self.count:,} {self.unit}"
        if self.num_requests is not None:
            count += f" of {self.num_requests:,} requests"
        seed = "no random part" if self.seed is None else f"seed {self.seed}"
        return f"{words}{source}; {count}; {seed}." + (f" {self.note}" if self.note else "")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrafficData:
    """Traffic matrices of two placements on one scale. ``before``, ``after`` [n, n]: row = home,
    column = destination.

    ``node_of`` [n] names the node of each row, so that what stays on a node is grayed out; ``per``
    divides both totals (for example the number of tokens) and ``per_name`` names it.
    """

    before: np.ndarray
    after: np.ndarray
    node_of: tuple[int, ...]
    unit: str
    basis: Basis
    title: str = "Traffic between nodes, before and after"
    names: tuple[str, str] = ("baseline", "plan")
    axis: Literal["node", "rank"] = "node"
    per: float = 1.0
    per_name: str = ""

    def crossing(self) -> tuple[float, float]:
        """Return the totals that cross nodes, before and after."""
        nodes = np.asarray(self.node_of)
        far = nodes[:, None] != nodes[None, :]
        return float(self.before[far].sum()) / self.per, float(self.after[far].sum()) / self.per


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadData:
    """Expert load by domain. ``ratio`` [panels, D, E]: load over the load of a uniform router, per
    domain.
    """

    ratio: np.ndarray
    domains: tuple[str, ...]
    panels: tuple[str, ...]
    basis: Basis
    title: str = "Expert load by domain"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SimilarityData:
    """Similarity of domains. ``matrix`` [D, D]; its diagonal is the split-half floor: what sampling
    alone leaves.
    """

    matrix: np.ndarray
    domains: tuple[str, ...]
    measure: str
    basis: Basis
    title: str = "Similarity of domains, with the noise floor on the diagonal"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TradeoffPoint:
    """One plan: load of the busiest node over the mean, and copies per token and layer (an interval
    if known).
    """

    name: str
    imbalance: float
    copies: float
    is_baseline: bool = False
    interval: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TradeoffData:
    """Balance against locality, one point per plan. ``cap`` is the balance limit that the solver
    was given.
    """

    points: tuple[TradeoffPoint, ...]
    basis: Basis
    cap: float | None = None
    title: str = "Balance against locality"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayersData:
    """A cost per MoE layer. ``values`` name -> [L]; the first one is the baseline."""

    layer_ids: tuple[int, ...]
    values: dict[str, np.ndarray]
    unit: str
    basis: Basis
    title: str = "Cross-node copies by layer"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LossData:
    """Loss curves. ``runs`` name -> (steps [n], loss [n]); the first one is the baseline."""

    runs: dict[str, tuple[np.ndarray, np.ndarray]]
    basis: Basis
    title: str = "Training loss"


FigureData = TrafficData | LoadData | SimilarityData | TradeoffData | LayersData | LossData


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of a report: ``rows`` of numbers or words, one entry per column."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]


def numbers(data: FigureData) -> Table:
    """Return the numbers that a figure shows, as one table."""
    if isinstance(data, TrafficData):
        head = ("placement", f"home {data.axis}", *map(str, range(len(data.node_of))))
        pairs = zip(data.names, (data.before, data.after), strict=True)
        rows = [(name, i, *row) for name, matrix in pairs for i, row in enumerate(matrix.tolist())]
    elif isinstance(data, LoadData):
        head = ("layer", "domain", *map(str, range(data.ratio.shape[2])))
        rows = [
            (panel, domain, *data.ratio[i, j].tolist())
            for i, panel in enumerate(data.panels)
            for j, domain in enumerate(data.domains)
        ]
    elif isinstance(data, SimilarityData):
        head = (data.measure, *data.domains)
        pairs = zip(data.domains, data.matrix.tolist(), strict=True)
        rows = [(name, *row) for name, row in pairs]
    elif isinstance(data, TradeoffData):
        head = (
            "plan",
            "load of the busiest node / mean",
            "copies per token and layer",
            "95 % interval",
        )
        rows = [
            (
                p.name,
                p.imbalance,
                p.copies,
                "" if p.interval is None else "{:.4g} to {:.4g}".format(*p.interval),
            )
            for p in data.points
        ]
    elif isinstance(data, LayersData):
        head = ("layer", *data.values)
        columns = [np.asarray(values).tolist() for values in data.values.values()]
        rows = list(zip(data.layer_ids, *columns, strict=True))
    else:
        head = ("run", "step", "loss")
        rows = [
            (name, step, loss)
            for name, (steps, losses) in data.runs.items()
            for step, loss in zip(
                np.asarray(steps).tolist(), np.asarray(losses).tolist(), strict=True
            )
        ]
    return Table(title=data.title, columns=head, rows=tuple(map(tuple, rows)))

"""How evenly the experts of each layer are used.

A *load* is an integer array [..., E] of tokens per expert; the measures work on its last axis.
"""

from __future__ import annotations

import numpy as np

from moe_locality.errors import TraceError
from moe_locality.trace.schema import STAGE_NAMES, RoutingTrace

GROUPINGS = ("domain", "group", "stage", "request", "step")


def load_by(trace: RoutingTrace, by: str = "domain") -> tuple[tuple[str, ...], np.ndarray]:
    """Return the names of the parts of a trace and their loads, int64 [N, L, E].

    Args:
        by: "domain", "group" (coarse domain), "stage", "request" or "step". Rows without a domain
            form the part "(unknown)"; parts without rows are left out.

    Raises:
        TraceError: ``by`` is unknown, or the trace lacks that field.
    """
    names, part = _parts(trace, by)
    loads = np.zeros((len(names), trace.num_layers, trace.num_experts), np.int64)
    for layer in range(trace.num_layers):
        loads[:, layer] = layer_loads(trace, layer, part, len(names))
    return names, loads


def layer_loads(trace: RoutingTrace, layer: int, part: np.ndarray, num_parts: int) -> np.ndarray:
    """int64 [num_parts, E], load of one layer (by its place in ``layer_ids``) for each part.

    Args:
        part: integers [rows], the part of each row, in 0..num_parts-1.
    """
    if trace.expert_load is not None:
        loads = np.zeros((num_parts, trace.num_experts), np.int64)
        np.add.at(loads, part, trace.expert_load[:, layer])
        return loads
    ids = trace.tokens_only("layer_loads").expert_ids[:, layer]
    bins = trace.num_experts + 1  # bin 0 counts the missing picks
    index = (part * bins + 1)[:, None] + ids
    counts = np.bincount(index.ravel(), minlength=num_parts * bins)
    return counts.reshape(num_parts, bins)[:, 1:]


def _parts(trace: RoutingTrace, by: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the parts and int64 [rows], the part of each row."""
    if by == "stage":
        codes, part = np.unique(trace.stage, return_inverse=True)  # type: ignore[arg-type]
        return tuple(STAGE_NAMES[int(code)] for code in codes), part
    if by in ("domain", "group"):
        table = (*(trace.domain if by == "domain" else trace.groups), "(unknown)")
        order = sorted(set(table))
        number = np.array([order.index(name) for name in table])
        present, part = np.unique(number[trace.domain_id], return_inverse=True)
        return tuple(order[i] for i in present), part
    values = {"request": trace.request_id, "step": trace.step}.get(by)
    if values is None:
        if by in GROUPINGS:
            raise TraceError(f"found no {by} in the trace, expected one per row: group by another")
        raise TraceError(f"found grouping {by!r}, expected one of {GROUPINGS}")
    ids, part = np.unique(values, return_inverse=True)
    return tuple(map(str, ids)), part


def imbalance(load: np.ndarray) -> np.ndarray:
    """Busiest expert over average expert, [...]; 1 = even, E = all on one; nan without any load."""
    mean = load.mean(axis=-1)
    return np.divide(load.max(axis=-1), mean, out=np.full(mean.shape, np.nan), where=mean > 0)


def gini(load: np.ndarray) -> np.ndarray:
    """Gini coefficient, [...]: 0 = even, 1 - 1/E = all on one; nan without any load."""
    ordered = np.sort(load, axis=-1).astype(np.float64)
    num = load.shape[-1]
    total = ordered.sum(axis=-1)
    ranks = 2 * np.arange(1, num + 1) - num - 1
    weighted = (ordered * ranks).sum(axis=-1)
    return np.divide(weighted, num * total, out=np.full(total.shape, np.nan), where=total > 0)


def entropy_bits(load: np.ndarray) -> np.ndarray:
    """Shannon entropy of the load as a distribution over experts, in bits, [...]; log2(E) =
    even.
    """
    share = shares(load)
    logs = np.log2(share, out=np.zeros_like(share), where=share > 0)
    return -(share * logs).sum(axis=-1)


def top_share(load: np.ndarray, fraction: float = 0.1) -> np.ndarray:
    """Share of the load that the busiest ``fraction`` of experts takes (at least one expert),
    [...].
    """
    num = max(int(load.shape[-1] * fraction), 1)
    return np.sort(shares(load), axis=-1)[..., -num:].sum(axis=-1)


def shares(load: np.ndarray) -> np.ndarray:
    """Load as a distribution over experts, float64 [..., E]; nan without any load."""
    total = load.sum(axis=-1, keepdims=True).astype(np.float64)
    return np.divide(load, total, out=np.full(load.shape, np.nan), where=total > 0)

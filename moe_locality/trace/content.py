"""The identity of a trace: a hash of its content, whatever the order of rows, layers and tables."""

from __future__ import annotations

import hashlib

import numpy as np

from moe_locality.trace.schema import ROW_FIELDS, RoutingTrace

_CHUNK_ROWS = 65_536


def content_hash(trace: RoutingTrace) -> str:
    """SHA-256 (hex) of a trace; see RoutingTrace.content_hash for what it covers."""
    order = np.argsort(trace.layer_ids, kind="stable")
    if not (order == np.arange(len(order))).all():
        trace = trace.select_layers([int(i) for i in trace.layer_ids[order]])
    domain_id, used = _canonical_domains(trace)
    rows = _canonical_order(trace, domain_id)
    digest = hashlib.sha256()
    header = (trace.kind, trace.model, trace.num_experts, trace.top_k, trace.num_rows)
    digest.update(repr((header, trace.layer_ids.tolist(), used)).encode())
    for name in ROW_FIELDS:
        value = domain_id if name == "domain_id" else getattr(trace, name)
        if value is None:
            continue
        digest.update(name.encode())
        for start in range(0, len(rows), _CHUNK_ROWS):
            wanted = rows[start : start + _CHUNK_ROWS]
            in_order = wanted[-1] - wanted[0] == len(wanted) - 1 and (np.diff(wanted) == 1).all()
            part = value[wanted[0] : wanted[-1] + 1] if in_order else value[wanted]
            part = np.ascontiguousarray(part)
            digest.update(part.astype(part.dtype.newbyteorder("<"), copy=False).data)
    return digest.hexdigest()


def _canonical_domains(trace: RoutingTrace) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Return domain ids [rows] against the sorted table of the domains in use, and that table."""
    present = np.unique(trace.domain_id)  # type: ignore[arg-type]
    used = sorted((trace.domain[i], trace.groups[i]) for i in present if i >= 0)
    lookup = np.full(len(trace.domain) + 1, -1, np.int32)
    place = {name: i for i, (name, _) in enumerate(used)}
    for i in present:
        if i >= 0:
            lookup[i] = place[trace.domain[i]]
    return lookup[trace.domain_id], used


def _canonical_order(trace: RoutingTrace, domain_id: np.ndarray) -> np.ndarray:
    names = ("request_id", "step", "position", "stage", "rank")
    keys = [value for name in names if (value := getattr(trace, name)) is not None]
    keys.append(domain_id)
    order = np.lexsort(keys[::-1])
    if len(order) < 2:
        return order
    ties = np.ones(len(order) - 1, bool)
    for key in keys:
        ties &= key[order[1:]] == key[order[:-1]]
    if not ties.any():
        return order
    return np.lexsort([_fingerprint(trace), *keys[::-1]])


def _fingerprint(trace: RoutingTrace) -> np.ndarray:
    """uint64 [rows], a linear hash of each row's picks; equal rows are equal, others almost surely
    not.
    """
    rng = np.random.default_rng(0x5EED)
    total = np.zeros(trace.num_rows, np.uint64)
    for name in ("expert_ids", "expert_weights", "expert_load", "step_tokens"):
        value = getattr(trace, name)
        if value is None:
            continue
        value = value.view(np.int16) if value.dtype == np.float16 else value
        flat = value.reshape(len(value), -1)
        factors = rng.integers(1, 2**63, flat.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(
            1
        )
        for column, factor in enumerate(factors):
            total += flat[:, column].astype(np.uint64) * factor
    return total

"""What traces have in common: their fields, their join and their identity.

The same layers of other tokens (ranks) are concatenated; other layers of the same tokens (pipeline
stages) are joined. The content hash does not depend on the order of rows, layers and tables.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_locality.errors import TraceError

if TYPE_CHECKING:
    from moe_locality.trace.schema import RoutingTrace

PREFILL, DECODE, TRAIN, UNKNOWN = 0, 1, 2, 255
STAGE_NAMES = {PREFILL: "prefill", DECODE: "decode", TRAIN: "train", UNKNOWN: "unknown"}
STAGE_CODES = {name: code for code, name in STAGE_NAMES.items()}

LAYER_FIELDS = ("expert_ids", "expert_weights", "expert_load")
"""Row fields whose second axis is the MoE layer."""

SCALARS = {
    "request_id": np.int64,
    "position": np.int32,
    "stage": np.uint8,
    "domain_id": np.int32,
    "rank": np.int32,
    "step": np.int64,
    "step_tokens": np.int64,
}
"""Fields with one number per row, and their types."""

ROW_FIELDS = (*LAYER_FIELDS, *SCALARS)
"""Fields with one entry per row: per token (kind "tokens") or per step (kind "load")."""

NOT_KNOWN = {"stage": UNKNOWN, "domain_id": -1}
"""Fields that every trace has, and their value where it is not known."""

_CHUNK_ROWS = 65_536


def present(trace: RoutingTrace, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Those of the named fields that a trace has."""
    return {name: value for name in names if (value := getattr(trace, name)) is not None}


def content_hash(trace: RoutingTrace) -> str:
    """SHA-256 (hex) of a trace; see RoutingTrace.content_hash for what it covers."""
    trace = trace.select_layers(sorted(trace.layer_ids.tolist()))
    domain_id, used = _canonical_domains(trace)
    rows = _canonical_order(trace, domain_id)
    digest = hashlib.sha256()
    header = (trace.kind, trace.model, trace.num_experts, trace.top_k, trace.num_rows)
    digest.update(repr((header, trace.layer_ids.tolist(), used)).encode())
    for name, value in (present(trace, ROW_FIELDS) | {"domain_id": domain_id}).items():
        digest.update(name.encode())
        for start in range(0, len(rows), _CHUNK_ROWS):
            wanted = rows[start : start + _CHUNK_ROWS]
            in_order = wanted[-1] - wanted[0] == len(wanted) - 1 and (np.diff(wanted) == 1).all()
            part = value[wanted[0] : wanted[-1] + 1] if in_order else value[wanted]
            digest.update(np.ascontiguousarray(part, part.dtype.newbyteorder("<")).data)
    return digest.hexdigest()


def _canonical_domains(trace: RoutingTrace) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Return domain ids [rows] against the sorted table of the domains in use, and that table."""
    ids = [i for i in np.unique(trace.domain_id) if i >= 0]  # type: ignore[arg-type]
    used = sorted((trace.domain[i], trace.groups[i]) for i in ids)
    lookup = np.full(len(trace.domain) + 1, -1, np.int32)
    for i in ids:
        lookup[i] = used.index((trace.domain[i], trace.groups[i]))
    return lookup[trace.domain_id], used


def _canonical_order(trace: RoutingTrace, domain_id: np.ndarray) -> np.ndarray:
    names = ("request_id", "step", "position", "stage", "rank")
    keys = [*present(trace, names).values(), domain_id]
    order = np.lexsort(keys[::-1])
    ties = np.ones(max(len(order) - 1, 0), bool)
    for key in keys:
        ties &= key[order[1:]] == key[order[:-1]]
    return np.lexsort([_fingerprint(trace), *keys[::-1]]) if ties.any() else order


def _fingerprint(trace: RoutingTrace) -> np.ndarray:
    """uint64 [rows], a linear hash of each row's picks; almost surely differs where they do."""
    rng = np.random.default_rng(0x5EED)
    total = np.zeros(trace.num_rows, np.uint64)
    for value in present(trace, (*LAYER_FIELDS, "step_tokens")).values():
        value = value.view(np.int16) if value.dtype == np.float16 else value
        flat = value.reshape(len(value), -1)
        numbers = rng.integers(1, 2**63, flat.shape[1], dtype=np.uint64)
        for column, factor in enumerate(numbers * np.uint64(2) + np.uint64(1)):
            total += flat[:, column].astype(np.uint64) * factor
    return total


class Findings(list[str]):
    """What is wrong with traces that are joined, and what was done; an error where ``strict``.
    What is appended otherwise than by ``add`` is a note, no error."""

    def __init__(self, strict: bool) -> None:
        super().__init__()
        self.strict = strict

    def add(self, found: str, expected: str = "", done: str = "") -> None:
        """Note ``found`` with what was done; strict: raise TraceError, with what was expected."""
        if self.strict:
            raise TraceError(found + expected)
        self.append(found + done)


SETTINGS = ("model", "kind", "num_experts", "top_k")
OPTIONAL = ("expert_weights", "rank", "step", "step_tokens")
_KEYS = {"tokens": ("step", "request_id", "position"), "load": ("step", "domain_id", "stage")}


def settings(trace: RoutingTrace) -> tuple[str, str, int, int]:
    """What traces must have in common to be joined: (model, kind, num_experts, top_k)."""
    return trace.model, trace.kind, trace.num_experts, trace.top_k


def concat(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """Join traces of the same model and layers row after row; domains are matched by name.
    TraceError where settings, layers or optional fields differ, or there is no trace at all."""
    traces = _of_one_model(traces)
    first = traces[0]
    layers = first.layer_ids.tolist()
    if any(set(other.layer_ids.tolist()) != set(layers) for other in traces):
        raise TraceError(
            "found traces with different layers, expected the same in each: join pipeline stages "
            "with merge()"
        )
    for name in OPTIONAL:
        _in_all(traces, name, "traces")
    if len(traces) == 1:
        return first
    traces = [trace.select_layers(layers) for trace in unify_domains(traces)]
    names = present(first, ROW_FIELDS)
    rows = {name: np.concatenate([getattr(trace, name) for trace in traces]) for name in names}
    return traces[0].evolve(**rows)


def unify_domains(traces: Sequence[RoutingTrace]) -> list[RoutingTrace]:
    """Give all traces one domain table, in order of first appearance; ids are mapped by name.
    TraceError where a domain belongs to different groups in two traces."""
    if len({(trace.domain, trace.domain_group) for trace in traces}) <= 1:
        return list(traces)
    group_of: dict[str, str] = {}
    for trace in traces:
        for name, group in zip(trace.domain, trace.groups, strict=True):
            if group_of.setdefault(name, group) != group:
                raise TraceError(
                    f"found domain {name!r} in group {group_of[name]!r} and in group {group!r}, "
                    "expected one group: rename one of them"
                )
    names, groups = tuple(group_of), tuple(group_of.values())
    table = {"domain": names, "domain_group": () if groups == names else groups}
    place = {name: i for i, name in enumerate(names)}
    unified = []
    for trace in traces:
        number = np.array([*(place[name] for name in trace.domain), -1], np.int32)
        unified.append(trace.evolve(domain_id=number[trace.domain_id], **table))
    return unified


def merge(traces: Sequence[RoutingTrace], *, strict: bool = True) -> tuple[RoutingTrace, list[str]]:
    """Concatenate traces with the same layers, then join the groups with different layers.

    Rows of two pipeline stages are the same token when step (where every trace has it), request id
    and position agree. The joined row keeps the rank of the first stage.

    Args:
        strict: False: a token that a stage lacks gets -1 there (load: 0), repeated tokens are
            dropped, and what was done is returned as sentences.

    Raises:
        TraceError: settings differ, layers overlap in part, or (strict) stages hold other tokens.
    """
    by_layers: dict[frozenset[int], list[RoutingTrace]] = {}
    for trace in _of_one_model(traces):
        by_layers.setdefault(frozenset(trace.layer_ids.tolist()), []).append(trace)
    findings = Findings(strict)
    groups = _disjoint([concat(group) for group in by_layers.values()], findings)
    return groups[0] if len(groups) == 1 else _join(groups, findings), findings


def _disjoint(groups: Sequence[RoutingTrace], findings: Findings) -> list[RoutingTrace]:
    """Keep groups with layers of their own; of two that share layers, the larger one."""
    kept: list[RoutingTrace] = []
    taken: set[int] = set()
    for group in sorted(groups, key=lambda group: -group.num_rows):
        layers = set(group.layer_ids.tolist())
        if shared := sorted(taken & layers):
            findings.add(
                f"found layers {shared[:8]} in parts with different layer sets, expected equal or "
                "disjoint sets: parts of different runs are mixed; separate them",
                "",
                f"; left out the smaller part of {group.num_rows} rows",
            )
        else:
            kept.append(group)
            taken |= layers
    return kept


def _of_one_model(traces: Sequence[RoutingTrace]) -> Sequence[RoutingTrace]:
    """Check that traces may be joined; return them with the ``model_type`` that one knows."""
    if not traces:
        raise TraceError("found no trace to join, expected at least one")
    known = next((trace.model_type for trace in traces if trace.model_type), "")
    traces = [t.evolve(model_type=known) if known and not t.model_type else t for t in traces]
    for trace in traces[1:]:
        for name in (*SETTINGS, "model_type"):
            expected, found = getattr(traces[0], name), getattr(trace, name)
            if found != expected:
                raise TraceError(
                    f"found {name} {found!r} beside {expected!r}, expected the same in all traces "
                    "that are joined: keep traces of different models apart"
                )
    return traces


def _join(groups: Sequence[RoutingTrace], findings: Findings) -> RoutingTrace:
    groups = sorted(unify_domains(groups), key=lambda g: min(g.layer_ids.tolist(), default=0))
    row_of = _row_table(groups, findings)
    missing = row_of < 0
    if missing.any():
        stage, key = np.argwhere(missing.T)[0][::-1]
        other = int(np.flatnonzero(row_of[:, key] >= 0)[0])
        findings.add(
            f"found {int(missing.any(axis=0).sum())} of {row_of.shape[1]} tokens not recorded in "
            f"every pipeline stage (layers {groups[stage].layer_ids.tolist()[:4]}... lack "
            f"{_describe(groups[other], int(row_of[other, key]))})",
            ", expected the same tokens in each: label requests the same way on all stages, or "
            "read with strict=False to fill the holes with -1",
            ": filled with no pick",
        )
    fields: dict[str, Any] = {"layer_ids": np.concatenate([group.layer_ids for group in groups])}
    for name in LAYER_FIELDS:
        if _in_all(groups, name, "pipeline stages"):
            blocks = [_rows(getattr(g, name), row_of[i], name) for i, g in enumerate(groups)]
            fields[name] = np.concatenate(blocks, axis=1)
    for name in SCALARS:
        fields[name] = _first_known(groups, row_of, name, findings)
    return replace(groups[0], **fields).select_layers(sorted(fields["layer_ids"].tolist()))


def _in_all(groups: Sequence[RoutingTrace], name: str, what: str) -> bool:
    having = [getattr(group, name) is not None for group in groups]
    if any(having) and not all(having):
        raise TraceError(
            f"found {name} in {sum(having)} of {len(groups)} {what}, expected it in all or in "
            "none: record all of them with the same options"
        )
    return all(having)


def _row_table(groups: Sequence[RoutingTrace], findings: Findings) -> np.ndarray:
    """int64 [groups, tokens], row of each token in each group, -1 = absent; order of the first."""
    names = [name for name in _KEYS[groups[0].kind] if _everywhere(groups, name)]
    keys = [np.concatenate([getattr(group, name) for group in groups]) for name in names]
    source = np.repeat(np.arange(len(groups)), [group.num_rows for group in groups])
    row = np.concatenate([np.arange(group.num_rows) for group in groups])
    order = np.lexsort([row, source, *keys[::-1]])
    new = np.arange(len(order)) == 0
    for key in keys:
        new[1:] |= key[order[1:]] != key[order[:-1]]
    number = np.cumsum(new) - 1
    source, row = source[order], row[order]
    repeated = np.zeros(len(order), bool)
    repeated[1:] = ~new[1:] & (source[1:] == source[:-1])
    if repeated.any():
        place = int(np.flatnonzero(repeated)[0])
        findings.add(
            f"found {int(repeated.sum())} repeated tokens, for example "
            f"{_describe(groups[source[place]], int(row[place]))} twice in one pipeline stage",
            ", expected (step, request_id, position) to name one token, for stages are joined by "
            "it: give request ids with annotate(), or read with strict=False to keep the first of "
            "each",
            ": kept the first of each",
        )
    table = np.full((len(groups), int(new.sum())), -1, np.int64)
    keep = ~repeated
    table[source[keep], number[keep]] = row[keep]
    first = np.where(table[0] >= 0, table[0], np.iinfo(np.int64).max)
    return table[:, np.argsort(first, kind="stable")]


def _everywhere(groups: Sequence[RoutingTrace], name: str) -> bool:
    return all(getattr(group, name) is not None for group in groups)


def _describe(trace: RoutingTrace, row: int) -> str:
    keys = present(trace, _KEYS[trace.kind]).items()
    return "the token with " + ", ".join(f"{name} {int(value[row])}" for name, value in keys)


def _rows(block: np.ndarray, rows: np.ndarray, name: str) -> np.ndarray:
    result = block[rows] if len(block) else np.zeros((len(rows), *block.shape[1:]), block.dtype)
    result[rows < 0] = -1 if name == "expert_ids" else 0
    return result


def _first_known(
    groups: Sequence[RoutingTrace], row_of: np.ndarray, name: str, findings: Findings
) -> np.ndarray | None:
    """Take each token's value from the first stage that knows it; stages that disagree are an
    error, but for ``rank``, which differs by nature: the first stage is where the token lived."""
    if not _everywhere(groups, name):
        return None
    unknown = NOT_KNOWN.get(name, -1)  # the others are not below 0
    result = np.full(row_of.shape[1], unknown, getattr(groups[0], name).dtype)
    known = np.zeros(row_of.shape[1], bool)
    for group, rows in zip(groups, row_of, strict=True):
        if not len(getattr(group, name)):
            continue
        value = getattr(group, name)[rows]
        here = (rows >= 0) & (value != unknown)
        clash = here & known & (value != result)
        if name != "rank" and clash.any():
            findings.add(
                f"found {int(clash.sum())} tokens whose {name} differs between pipeline stages, "
                f"for example {_describe(group, int(rows[np.flatnonzero(clash)[0]]))}",
                ", expected the same label on all stages: annotate() them alike",
                ": kept that of the first stage",
            )
        result = np.where(here & ~known, value, result)
        known |= here
    return result

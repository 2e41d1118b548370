"""The fields of a routing trace and their checks; an impossible value is an error that names it."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_locality.errors import TraceError

if TYPE_CHECKING:
    from moe_locality.trace.schema import RoutingTrace

PREFILL, DECODE, TRAIN, UNKNOWN = 0, 1, 2, 255
STAGE_NAMES = {PREFILL: "prefill", DECODE: "decode", TRAIN: "train", UNKNOWN: "unknown"}

ROW_FIELDS = (
    "expert_ids",
    "expert_weights",
    "expert_load",
    "request_id",
    "position",
    "stage",
    "domain_id",
    "rank",
    "step",
    "step_tokens",
)
"""Fields with one entry per row: per token (kind "tokens") or per step (kind "load")."""

LAYER_FIELDS = ("expert_ids", "expert_weights", "expert_load")
"""Row fields whose second axis is the MoE layer."""

MAX_EXPERTS = 32_767
"""Expert ids are int16."""

_CHUNK_ELEMENTS = 1 << 22
_SCALARS = {
    "request_id": np.int64,
    "position": np.int32,
    "stage": np.uint8,
    "domain_id": np.int32,
    "rank": np.int32,
    "step": np.int64,
    "step_tokens": np.int64,
}


def checked(trace: RoutingTrace) -> dict[str, Any]:
    """Return every field in its dtype, defaults filled in.

    Raises:
        TraceError: what was found, what was expected, what to do.
    """
    fields: dict[str, Any] = {"model": str(trace.model), **_tables(trace)}
    num_experts = fields["num_experts"] = _count("num_experts", trace.num_experts, MAX_EXPERTS)
    layer_ids = fields["layer_ids"] = _layer_ids(trace.layer_ids)
    if (trace.expert_ids is None) == (trace.expert_load is None):
        found = "neither" if trace.expert_ids is None else "both"
        raise TraceError(
            f"found {found} of expert_ids and expert_load, expected exactly one: a trace is of "
            "kind 'tokens' or of kind 'load'"
        )
    if trace.expert_ids is not None:
        fields |= _token_fields(trace, num_experts, len(layer_ids))
        num_rows = len(fields["expert_ids"])
    else:
        fields |= _load_fields(trace, num_experts, len(layer_ids))
        num_rows = len(fields["expert_load"])
    for name in _SCALARS:
        fields[name] = _row_scalar(name, getattr(trace, name), num_rows)
    if fields["stage"] is None:
        fields["stage"] = np.full(num_rows, UNKNOWN, np.uint8)
    if fields["domain_id"] is None:
        fields["domain_id"] = np.full(num_rows, -1, np.int32)
    _check_row_values(fields)
    return fields


def all_known(wanted: Collection[Any], known: Collection[Any], word: str) -> None:
    """Raise TraceError when ``wanted`` has an entry that is not in ``known``, naming both."""
    missing = [entry for entry in wanted if entry not in known]
    if missing:
        listing = ", ".join(map(str, list(known)[:20])) + (" ..." if len(known) > 20 else "")
        raise TraceError(
            f"found {word} {missing[0]!r} asked for, expected one of: {listing or '(none)'}: "
            f"correct the {word}"
        )


def _tables(trace: RoutingTrace) -> dict[str, tuple[str, ...]]:
    for name in ("domain", "domain_group"):
        if isinstance(getattr(trace, name), str):
            raise TraceError(
                f"found {name} as one string, expected a sequence of names: use ('x',)"
            )
    domain = tuple(map(str, trace.domain))
    group = tuple(map(str, trace.domain_group))
    if len(set(domain)) != len(domain):
        twice = next(name for name in domain if domain.count(name) > 1)
        raise TraceError(f"found domain {twice!r} twice, expected distinct names: join the two")
    if group and len(group) != len(domain):
        raise TraceError(
            f"found {len(group)} domain groups for {len(domain)} domains, expected one group per "
            "domain or none"
        )
    return {"domain": domain, "domain_group": group if group != domain else ()}


def _count(name: str, value: Any, limit: int) -> int:
    array = np.asarray(value)
    if array.shape != () or array.dtype.kind not in "iu" or not 1 <= int(array) <= limit:
        raise TraceError(f"found {name} = {value!r}, expected a whole number in 1..{limit}")
    return int(array)


def _layer_ids(value: Any) -> np.ndarray:
    array = _integers("layer_ids", value, 1)
    if len(array) and (array.min() < 0 or array.max() > 2**31 - 1):
        raise TraceError(
            f"found layer id {array.min() if array.min() < 0 else array.max()}, expected layer ids "
            "in 0..2**31-1"
        )
    if len(np.unique(array)) != len(array):
        raise TraceError(
            f"found repeated layer ids {array.tolist()}, expected each MoE layer once: drop the "
            "copies"
        )
    return array.astype(np.int32, copy=False)


def _integers(name: str, value: Any, ndim: int) -> np.ndarray:
    array = np.asarray(value)
    if array.size == 0 and array.dtype == np.float64:  # an empty list has no type of its own
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise TraceError(f"found {name} of dtype {array.dtype}, expected integers")
    if array.ndim != ndim:
        raise TraceError(f"found {name} of shape {array.shape}, expected {ndim} dimensions")
    return array


def _row_scalar(name: str, value: Any, num_rows: int) -> np.ndarray | None:
    if value is None:
        return None
    array = _integers(name, value, 1)
    if len(array) != num_rows:
        raise TraceError(
            f"found {len(array)} entries in {name} for {num_rows} rows of the trace, expected one "
            "per row"
        )
    dtype = np.dtype(_SCALARS[name])
    if array.dtype == dtype:
        return array
    limits = np.iinfo(dtype)
    if array.size and (int(array.min()) < limits.min or int(array.max()) > limits.max):
        raise TraceError(
            f"found {name} values {int(array.min())}..{int(array.max())}, expected "
            f"{limits.min}..{limits.max} ({dtype})"
        )
    return array.astype(dtype)


def _check_row_values(fields: dict[str, Any]) -> None:
    for name in ("request_id", "position", "rank", "step", "step_tokens"):
        array = fields[name]
        if array is not None and array.size and array.min() < 0:
            row = int(array.argmin())
            raise TraceError(
                f"found {name} {array[row]} in row {row}, expected non-negative numbers: number "
                "them from 0"
            )
    domain_id, num_domains = fields["domain_id"], len(fields["domain"])
    if domain_id.size and (domain_id.min() < -1 or domain_id.max() >= num_domains):
        worst = domain_id.min() if domain_id.min() < -1 else domain_id.max()
        raise TraceError(
            f"found domain_id {worst}, expected -1 (unknown) to {num_domains - 1}, for the domain "
            f"table has {num_domains} names"
        )
    stage = fields["stage"]
    present = np.bincount(stage, minlength=256) if stage.size else np.zeros(256, np.int64)
    strange = [int(code) for code in np.flatnonzero(present) if code not in STAGE_NAMES]
    if strange:
        raise TraceError(
            f"found stage code {strange[0]}, expected 0 prefill, 1 decode, 2 train or 255 unknown"
        )


def _token_fields(trace: RoutingTrace, num_experts: int, num_layers: int) -> dict[str, Any]:
    for name in ("request_id", "position"):
        if getattr(trace, name) is None:
            raise TraceError(f"found no {name}, expected one entry per token (kind 'tokens')")
    if trace.step_tokens is not None or trace.load_top_k:
        raise TraceError(
            "found step_tokens or load_top_k beside expert_ids, expected them in kind 'load' "
            "only: leave them out"
        )
    ids = _integers("expert_ids", trace.expert_ids, 3)
    if ids.shape[1] != num_layers:
        raise TraceError(
            f"found expert_ids of shape {ids.shape}, expected [T, L, K] with L = {num_layers} "
            "(layer_ids)"
        )
    if not 1 <= ids.shape[2] <= num_experts:
        raise TraceError(
            f"found {ids.shape[2]} picks per token among {num_experts} experts, expected "
            f"1..{num_experts}"
        )
    check_ids(ids, num_experts)
    fields: dict[str, Any] = {"expert_ids": ids.astype(np.int16, copy=False)}
    if trace.expert_weights is not None:
        weights = np.asarray(trace.expert_weights)
        if weights.dtype.kind != "f" or weights.shape != ids.shape:
            raise TraceError(
                f"found expert_weights {weights.dtype} of shape {weights.shape}, expected "
                f"floating-point numbers of shape {ids.shape} (as expert_ids)"
            )
        fields["expert_weights"] = weights.astype(np.float16, copy=False)
    return fields


def check_ids(ids: np.ndarray, num_experts: int) -> None:
    """Range and repeats, in chunks of rows so that the extra memory stays small."""
    per_row = max(ids.shape[1] * ids.shape[2], 1)
    rows = max(_CHUNK_ELEMENTS // per_row, 1)
    for start in range(0, len(ids), rows):
        part = ids[start : start + rows]
        if not part.size:
            continue
        if part.min() < -1 or part.max() >= num_experts:
            token, layer, _ = np.argwhere((part < -1) | (part >= num_experts))[0]
            bad = part[token, layer][
                (part[token, layer] < -1) | (part[token, layer] >= num_experts)
            ]
            raise TraceError(
                f"found expert id {bad[0]} at token {start + token}, layer row {layer}, expected "
                f"-1 (no pick) to {num_experts - 1}: the ids must be logical ids of this model"
            )
        if ids.shape[2] > 1:
            ordered = np.sort(part, axis=2)
            twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
            if twice.any():
                token, layer, pick = np.argwhere(twice)[0]
                raise TraceError(
                    f"found expert {ordered[token, layer, pick]} twice among the picks of token "
                    f"{start + token}, layer row {layer}, expected distinct experts: top-k picks "
                    "never repeat"
                )


def _load_fields(trace: RoutingTrace, num_experts: int, num_layers: int) -> dict[str, Any]:
    for name in ("request_id", "position", "expert_weights"):
        if getattr(trace, name) is not None:
            raise TraceError(
                f"found {name} beside expert_load, expected it in kind 'tokens' only: leave it out"
            )
    load = _integers("expert_load", trace.expert_load, 3)
    if load.shape[1:] != (num_layers, num_experts):
        raise TraceError(
            f"found expert_load of shape {load.shape}, expected [S, L, E] with L = {num_layers}, E "
            f"= {num_experts}"
        )
    if load.size and load.min() < 0:
        raise TraceError(f"found an expert load of {load.min()}, expected counts of at least 0")
    if load.size and int(load.max()) > 2**62:
        raise TraceError(f"found an expert load of {load.max()}, expected counts below 2**62")
    if trace.load_top_k and not 1 <= int(trace.load_top_k) <= num_experts:
        raise TraceError(
            f"found {trace.load_top_k} picks per token among {num_experts} experts, expected "
            f"1..{num_experts}"
        )
    return {
        "expert_load": load.astype(np.int64, copy=False),
        "load_top_k": int(trace.load_top_k),
    }

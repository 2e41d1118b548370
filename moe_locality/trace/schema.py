"""The routing trace: which experts every token of a run picked, as plain numpy arrays.

T tokens, L MoE layers, K picks per token, E experts, S steps (rows of counts), D domains.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

import numpy as np

from moe_locality.errors import TraceError
from moe_locality.trace import merge as joining
from moe_locality.trace import npz
from moe_locality.trace.merge import (
    DECODE,
    LAYER_FIELDS,
    PREFILL,
    ROW_FIELDS,
    SCALARS,
    STAGE_CODES,
    STAGE_NAMES,
    TRAIN,
    UNKNOWN,
)

__all__ = [
    "DECODE",
    "LAYER_FIELDS",
    "PREFILL",
    "ROW_FIELDS",
    "STAGE_NAMES",
    "TRAIN",
    "UNKNOWN",
    "RoutingTrace",
    "TokenView",
]

MAX_EXPERTS = 32_767
"""Expert ids are int16."""

MAX_LAYERS = 65_536
"""Far more transformer layers than a model has, and few enough to list."""

_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutingTrace:
    """The expert choices of the tokens of one model, or (kind "load") counts of them.

    Two traces are compared with ``same_content``: ``==`` is identity, because array comparison has
    no single truth value. Arrays are cast to the dtypes named here and not copied where they
    already have them; treat them as read-only. TraceError where a shape, a value or a combination
    of fields is impossible."""

    model: str
    """Name of the model that was recorded; traces of different models do not mix."""
    num_experts: int
    """E, routed experts per layer (shared experts are not routed and not counted)."""
    layer_ids: np.ndarray
    """int32 [L], transformer layer index of each MoE layer, without repeats."""
    domain: tuple[str, ...] = ()
    """D names of data domains; ``domain_id`` points into it."""
    domain_group: tuple[str, ...] = ()
    """D coarse groups, aligned with ``domain``; empty: every domain is its own group."""
    model_type: str = ""
    """``model_type`` of transformers that was recorded, as "mixtral"; empty = unknown."""

    expert_ids: np.ndarray | None = None
    """int16 [T, L, K], logical expert ids, -1 = no pick (also: dropped by a capacity limit)."""
    request_id: np.ndarray | None = None
    """int64 [T], non-negative number of the request (sequence) that the token belongs to."""
    position: np.ndarray | None = None
    """int32 [T], position of the token in its request."""
    stage: np.ndarray | None = None
    """uint8 [T] or [S]: PREFILL, DECODE, TRAIN or UNKNOWN (taken when not given)."""
    domain_id: np.ndarray | None = None
    """int32 [T] or [S], index into ``domain``, -1 = unknown (taken when not given)."""
    expert_weights: np.ndarray | None = None
    """float16 [T, L, K], router weight of each pick."""
    rank: np.ndarray | None = None
    """int32 [T] or [S], rank on which the token lived when it was recorded."""
    step: np.ndarray | None = None
    """int64 [T] or [S], step in which the row was recorded."""

    expert_load: np.ndarray | None = None
    """int64 [S, L, E], kind "load": how often each expert was picked in a step."""
    step_tokens: np.ndarray | None = None
    """int64 [S], kind "load": tokens of each step, where known."""
    load_top_k: int = 0
    """Kind "load": picks per token, 0 = unknown; kind "tokens" has it in its ``expert_ids``."""

    def __post_init__(self) -> None:
        for name, value in checked(self).items():
            object.__setattr__(self, name, value)

    # -- what it is --

    @property
    def kind(self) -> str:
        """ "tokens" (one row per token) or "load" (one row of counts per step)."""
        return "tokens" if self.expert_ids is not None else "load"

    @property
    def num_rows(self) -> int:
        """T for kind "tokens", S for kind "load"."""
        return len(self.expert_ids if self.expert_ids is not None else self.expert_load)  # type: ignore[arg-type]

    @property
    def num_tokens(self) -> int:
        """Tokens recorded; kind "load": ``step_tokens``, else picks / top_k, else 0 (unknown)."""
        if self.expert_ids is not None:
            return len(self.expert_ids)
        if self.step_tokens is not None:
            return int(self.step_tokens.sum())
        if not self.load_top_k or not self.num_layers:
            return 0
        return int(self.load().sum(axis=1).max()) // self.load_top_k

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layer_ids)

    @property
    def top_k(self) -> int:
        """K; for kind "load" ``load_top_k`` (0 = unknown)."""
        return self.expert_ids.shape[2] if self.expert_ids is not None else self.load_top_k

    @property
    def request_ids(self) -> np.ndarray:
        """int64 [R], the requests present, ascending; empty for kind "load"."""
        return np.unique(self.request_id) if self.request_id is not None else np.zeros(0, np.int64)

    @property
    def groups(self) -> tuple[str, ...]:
        """Coarse group of each domain: ``domain_group``, or the domains themselves."""
        return self.domain_group or self.domain

    def load(self) -> np.ndarray:
        """int64 [L, E], how often each expert of each layer was picked, summed over all rows."""
        if self.expert_load is not None:
            return self.expert_load.sum(axis=0, dtype=np.int64)
        ids = self.tokens_only("load()").expert_ids
        counts = np.empty((self.num_layers, self.num_experts), np.int64)
        for layer in range(self.num_layers):
            picks = ids[:, layer].ravel().astype(np.intp) + 1
            counts[layer] = np.bincount(picks, minlength=self.num_experts + 1)[1:]
        return counts

    def tokens_only(self, purpose: str) -> TokenView:
        """Return the per-token arrays; TraceError, which names ``purpose``, for kind "load"."""
        if self.expert_ids is None:
            raise TraceError(
                f"found a trace of kind 'load' (counts per step), but {purpose} needs kind "
                "'tokens' (expert ids per token): record or import a per-token trace"
            )
        arrays = (self.expert_ids, self.request_id, self.position, self.stage, self.domain_id)
        return TokenView(*arrays)  # type: ignore[arg-type]

    # -- parts and sums --

    def take(self, rows: np.ndarray) -> RoutingTrace:
        """Return the rows named by a boolean mask or by indices; tables and layers stay."""
        parts = {name: value[rows] for name, value in joining.present(self, ROW_FIELDS).items()}
        return self.evolve(**parts)

    def evolve(self, **changes: Any) -> RoutingTrace:
        """Return a copy with fields exchanged, unchecked (``dataclasses.replace`` checks)."""
        result = object.__new__(RoutingTrace)
        for field in fields(RoutingTrace):
            value = changes.pop(field.name) if field.name in changes else getattr(self, field.name)
            object.__setattr__(result, field.name, value)
        if changes:
            raise TypeError(f"RoutingTrace has no fields {sorted(changes)}")
        return result

    def filter(
        self,
        domains: Collection[str] | str | None = None,
        stages: Collection[int | str] | int | str | None = None,
        layers: Collection[int] | None = None,
        requests: Collection[int] | np.ndarray | None = None,
        domain_groups: Collection[str] | str | None = None,
    ) -> RoutingTrace:
        """Return the rows (and layers) that meet every condition given; the domain table stays.

        Args:
            domains, domain_groups: names out of ``domain`` / ``groups``.
            stages: stage codes or their names ("prefill", "decode", "train", "unknown").
            layers: transformer layer indices out of ``layer_ids``, in the order of the result.
            requests: request ids; ids that are not in the trace select nothing.

        Raises:
            TraceError: a domain, group, stage or layer is unknown, or the trace has no requests.
        """
        keep = np.ones(self.num_rows, bool)
        labels = ((domains, self.domain, "domain"), (domain_groups, self.groups, "domain group"))
        for names, table, word in labels:
            if names is not None:
                wanted = {names} if isinstance(names, str) else set(names)
                known = np.array([name in wanted for name in table] + [False])
                all_known(wanted, table, word)
                keep &= known[self.domain_id]  # type: ignore[index]  # -1 takes the last entry: False
        if stages is not None:
            keep &= np.isin(self.stage, _stage_codes(stages))  # type: ignore[arg-type]
        if requests is not None:
            some = requests if isinstance(requests, np.ndarray) else [*requests]
            wanted_ids = np.asarray(some, np.int64)
            keep &= np.isin(self.tokens_only("filter(requests=)").request_id, wanted_ids)
        result = self if keep.all() else self.take(keep)
        return result if layers is None else result.select_layers(layers)

    def select_layers(self, layers: Collection[int]) -> RoutingTrace:
        """Return these layers (transformer layer indices), in this order."""
        known = self.layer_ids.tolist()
        wanted = [int(i) for i in layers]
        if wanted == known:
            return self
        all_known(wanted, known, "layer")
        if len(set(wanted)) != len(wanted):
            raise TraceError(
                f"found layers {wanted} asked for, expected each once: drop the repeats"
            )
        columns = np.array([known.index(i) for i in wanted], np.intp)
        parts = joining.present(self, LAYER_FIELDS).items()
        arrays = {name: value[:, columns] for name, value in parts}
        return self.evolve(layer_ids=np.array(wanted, np.int32), **arrays)

    def split(self, fraction: float = 0.7, seed: int = 0) -> tuple[RoutingTrace, RoutingTrace]:
        """Split into (train, test) by request (kind "load": by step); none is on both sides.

        The same content, fraction and seed give the same split, whatever the order of the rows.

        Args:
            fraction: share of the requests in train, in (0, 1); both sides get at least one.

        Raises:
            TraceError: the fraction is outside (0, 1), or there are fewer than two requests.
        """
        if not 0 < fraction < 1:
            raise TraceError(f"found fraction {fraction}, expected a number between 0 and 1")
        unit = self.step if self.request_id is None else self.request_id
        if unit is None:
            unit = np.arange(self.num_rows)
        ids = np.unique(unit)
        if len(ids) < 2:
            word = "requests" if self.kind == "tokens" else "steps"
            raise TraceError(
                f"found {len(ids)} {word} in the trace, expected at least 2 to split it: use the "
                "whole trace, or record more"
            )
        num_train = min(max(round(fraction * len(ids)), 1), len(ids) - 1)
        chosen = np.random.default_rng(seed).permutation(len(ids))[:num_train]
        in_train = np.isin(unit, ids[chosen])
        return self.take(in_train), self.take(~in_train)

    @classmethod
    def concat(cls, traces: Sequence[RoutingTrace]) -> RoutingTrace:
        """Join traces of the same model and layers row after row; domains are matched by name. A
        field that only some of them have (weights, rank, step) is an error, not dropped."""
        return joining.concat(traces)

    @classmethod
    def merge(cls, traces: Sequence[RoutingTrace], *, strict: bool = True) -> RoutingTrace:
        """Join traces of one run, pipeline stages too: see ``moe_locality.trace.merge.merge``."""
        return joining.merge(traces, strict=strict)[0]

    @classmethod
    def from_npz(cls, path: str | PathLike[str]) -> RoutingTrace:
        """Read the .npz layout of docs/formats.md; raises TraceError for anything else."""
        return npz.read_npz(path, cls)

    # -- identity --

    def content_hash(self) -> str:
        """SHA-256 (hex) of the content, whatever the order of rows, domain table and shards.

        Rows are brought into the order (request_id, step, position, stage, rank, domain), ties
        broken by a fingerprint of the picks; layers and the domains in use are sorted."""
        return joining.content_hash(self)

    def same_content(self, other: RoutingTrace) -> bool:
        """Whether both hold the same rows (in any order), tables and settings."""
        return self.content_hash() == other.content_hash()

    def __repr__(self) -> str:
        return (
            f"RoutingTrace(model={self.model!r}, kind={self.kind!r}, rows={self.num_rows}, "
            f"layers={self.num_layers}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"requests={len(self.request_ids)}, domains={len(self.domain)})"
        )


@dataclass(frozen=True, slots=True)
class TokenView:
    """The arrays that every per-token trace has; shapes as in RoutingTrace."""

    expert_ids: np.ndarray
    request_id: np.ndarray
    position: np.ndarray
    stage: np.ndarray
    domain_id: np.ndarray


def _stage_codes(stages: Collection[int | str] | int | str) -> list[int]:
    given = [stages] if isinstance(stages, (int, str)) else list(stages)
    codes = [STAGE_CODES.get(s, -1) if isinstance(s, str) else int(s) for s in given]
    if any(code not in STAGE_NAMES for code in codes):
        raise TraceError(
            f"found stages {given}, expected codes or names out of {dict(STAGE_NAMES)}: correct "
            "the stage"
        )
    return codes


# -- the checks of its fields: an impossible value is an error that names it --


def checked(trace: RoutingTrace) -> dict[str, Any]:
    """Return every field in its dtype, defaults filled in; TraceError where one is impossible."""
    fields: dict[str, Any] = {"model": str(trace.model), "model_type": str(trace.model_type)}
    fields |= _tables(trace)
    num_experts = np.asarray(trace.num_experts)
    integer = num_experts.shape == () and num_experts.dtype.kind in "iu"
    if not integer or not 1 <= int(num_experts) <= MAX_EXPERTS:
        raise TraceError(
            f"found num_experts = {trace.num_experts!r}, expected a whole number in "
            f"1..{MAX_EXPERTS}"
        )
    fields["num_experts"] = int(num_experts)
    fields["layer_ids"] = _layer_ids(trace.layer_ids)
    if (trace.expert_ids is None) == (trace.expert_load is None):
        found = "neither" if trace.expert_ids is None else "both"
        raise TraceError(
            f"found {found} of expert_ids and expert_load, expected exactly one: a trace is of "
            "kind 'tokens' or of kind 'load'"
        )
    picks = _token_fields if trace.expert_load is None else _load_fields
    fields |= picks(trace, int(num_experts), len(fields["layer_ids"]))
    num_rows = len(fields["expert_ids" if trace.expert_load is None else "expert_load"])
    for name in SCALARS:
        fields[name] = _row_scalar(name, getattr(trace, name), num_rows)
    domain_id, num_domains = fields["domain_id"], len(fields["domain"])
    if num_rows and (domain_id.min() < -1 or domain_id.max() >= num_domains):
        worst = domain_id.min() if domain_id.min() < -1 else domain_id.max()
        raise TraceError(
            f"found domain_id {worst}, expected -1 (unknown) to {num_domains - 1}, for the domain "
            f"table has {num_domains} names"
        )
    codes = np.flatnonzero(np.bincount(fields["stage"])).tolist()
    strange = [code for code in codes if code not in STAGE_NAMES]
    if strange:
        raise TraceError(
            f"found stage code {strange[0]}, expected 0 prefill, 1 decode, 2 train or 255 unknown"
        )
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
    dtype = np.dtype(SCALARS[name])
    if value is None:
        known = joining.NOT_KNOWN.get(name)
        return None if known is None else np.full(num_rows, known, dtype)
    array = _integers(name, value, 1)
    if len(array) != num_rows:
        raise TraceError(
            f"found {len(array)} entries in {name} for {num_rows} rows of the trace, expected one "
            "per row"
        )
    limits = np.iinfo(dtype)
    if array.size and (int(array.min()) < limits.min or int(array.max()) > limits.max):
        raise TraceError(
            f"found {name} values {int(array.min())}..{int(array.max())}, expected "
            f"{limits.min}..{limits.max} ({dtype})"
        )
    if name not in joining.NOT_KNOWN and array.size and array.min() < 0:
        row = int(array.argmin())
        raise TraceError(
            f"found {name} {array[row]} in row {row}, expected non-negative numbers: number them "
            "from 0"
        )
    return array.astype(dtype, copy=False)


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
    if not ids.size:
        return
    rows = max(_CHUNK_ELEMENTS // (ids.shape[1] * ids.shape[2]), 1)
    for start in range(0, len(ids), rows):
        part = ids[start : start + rows]
        if part.min() < -1 or part.max() >= num_experts:
            token, layer, pick = np.argwhere((part < -1) | (part >= num_experts))[0]
            raise TraceError(
                f"found expert id {part[token, layer, pick]} at token {start + token}, layer row "
                f"{layer}, expected -1 (no pick) to {num_experts - 1}: the ids must be logical ids "
                "of this model"
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
    if load.size and not 0 <= load.min() <= load.max() <= 2**62:
        worst = load.min() if load.min() < 0 else load.max()
        raise TraceError(f"found an expert load of {worst}, expected counts in 0..2**62")
    if trace.load_top_k and not 1 <= int(trace.load_top_k) <= num_experts:
        raise TraceError(
            f"found {trace.load_top_k} picks per token among {num_experts} experts, expected "
            f"1..{num_experts}"
        )
    return {"expert_load": load.astype(np.int64, copy=False), "load_top_k": int(trace.load_top_k)}

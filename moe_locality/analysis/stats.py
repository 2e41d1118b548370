"""Measures of routing: balance, co-activation, and similarity of domains, stages and tokens.

A *load* is an integer array [..., E] of tokens per expert; the measures work on its last axis.
Comparisons come with the value that chance alone would give. ``analyze`` is all of them in one
summary, as plain numbers that fit into JSON.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moe_locality.errors import TraceError
from moe_locality.placement.costs import imbalance, warn_of_absent_experts
from moe_locality.placement.counting import count_coactivation
from moe_locality.placement.plan import to_plain
from moe_locality.trace.schema import DECODE, PREFILL, STAGE_NAMES, RoutingTrace

GROUPINGS = ("domain", "group", "stage", "request", "step")
UNKNOWN_PART = "(unknown)"


def load_by(trace: RoutingTrace, by: str = "domain") -> tuple[tuple[str, ...], np.ndarray]:
    """The names of the parts of a trace and their loads, int64 [N, L, E].

    ``by``: of ``GROUPINGS``; "group" is the coarse domain. Rows without a domain form the part
    ``UNKNOWN_PART``; parts without rows are left out.

    Raises:
        TraceError: ``by`` is unknown, or the trace lacks that field.
    """
    names, part = _parts(trace, by)
    loads = np.zeros((len(names), trace.num_layers, trace.num_experts), np.int64)
    for layer in range(trace.num_layers):
        loads[:, layer] = layer_loads(trace, layer, part, len(names))
    return names, loads


def layer_loads(trace: RoutingTrace, layer: int, part: np.ndarray, num_parts: int) -> np.ndarray:
    """int64 [num_parts, E], load of the layer at a place of ``layer_ids``, by ``part [rows]``."""
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
        table = (*(trace.domain if by == "domain" else trace.groups), UNKNOWN_PART)
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


def gini(load: np.ndarray) -> np.ndarray:
    """Gini coefficient, [...]: 0 = even, 1 - 1/E = all on one; nan without any load."""
    ordered = np.sort(load, axis=-1).astype(np.float64)
    num = load.shape[-1]
    total = ordered.sum(axis=-1)
    ranks = 2 * np.arange(1, num + 1) - num - 1
    weighted = (ordered * ranks).sum(axis=-1)
    return np.divide(weighted, num * total, out=np.full(total.shape, np.nan), where=total > 0)


def entropy_bits(load: np.ndarray) -> np.ndarray:
    """Shannon entropy of the load as a distribution over experts, bits, [...]; log2(E) = even."""
    share = shares(load)
    logs = np.log2(share, out=np.zeros_like(share), where=share > 0)
    return -(share * logs).sum(axis=-1)


def top_share(load: np.ndarray, fraction: float = 0.1) -> np.ndarray:
    """Share of the load that the busiest ``fraction`` of experts (at least one) takes, [...]."""
    num = max(int(load.shape[-1] * fraction), 1)
    return np.sort(shares(load), axis=-1)[..., -num:].sum(axis=-1)


def shares(load: np.ndarray) -> np.ndarray:
    """Load as a distribution over experts, float64 [..., E]; nan without any load."""
    total = load.sum(axis=-1, keepdims=True).astype(np.float64)
    return np.divide(load, total, out=np.full(load.shape, np.nan), where=total > 0)


_CHUNK_TOKENS = 65_536


def transition_counts(trace: RoutingTrace) -> np.ndarray:
    """int64 [L - 1, E, E]: how often tokens pick i in a layer, j in the next; all K * K pairs."""
    ids = trace.tokens_only("transition_counts").expert_ids
    num, top_k, bins = trace.num_experts, trace.top_k, trace.num_experts + 1
    counts = np.zeros((max(trace.num_layers - 1, 0), num, num), np.int64)
    for layer in range(len(counts)):
        for start in range(0, len(ids), _CHUNK_TOKENS):
            rows = slice(start, start + _CHUNK_TOKENS)
            here = np.repeat(ids[rows, layer], top_k, axis=1).astype(np.int64) + 1
            there = np.tile(ids[rows, layer + 1], (1, top_k)) + 1  # 0 counts the missing picks
            cells = np.bincount((here * bins + there).ravel(), minlength=bins * bins)
            counts[layer] += cells.reshape(bins, bins)[1:, 1:]
    return counts


def top_pair_share(counts: np.ndarray, fraction: float = 0.05) -> np.ndarray:
    """Share [...] of pairs (symmetric [..., E, E]) in the most frequent ``fraction``; nan: none."""
    upper = counts[(..., *np.triu_indices(counts.shape[-1], 1))].astype(np.float64)
    num = max(int(upper.shape[-1] * fraction), 1)
    total = upper.sum(axis=-1)
    top = np.sort(upper, axis=-1)[..., -num:].sum(axis=-1)
    return np.divide(top, total, out=np.full(total.shape, np.nan), where=total > 0)


def independent_pairs(load: np.ndarray) -> np.ndarray:
    """float64 [..., E, E], weights of pairs if experts were picked independently with these loads.

    p_i * p_j agrees with shuffling the picks between tokens. (Odds p / (1 - p), as in some reports,
    overstate the reference when an expert takes a large share of the tokens.)
    """
    weight = load.astype(np.float64)
    return weight[..., :, None] * weight[..., None, :]


def transition_mutual_information_bits(counts: np.ndarray) -> np.ndarray:
    """Mutual information of ``transition_counts`` [..., E, E], bits, [...]; nan: no count."""
    total = counts.sum(axis=(-2, -1), keepdims=True).astype(np.float64)
    joint = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
    product = joint.sum(axis=-1, keepdims=True) * joint.sum(axis=-2, keepdims=True)
    ratio = np.divide(joint, product, out=np.ones_like(joint), where=joint > 0)
    bits = (joint * np.log2(ratio)).sum(axis=(-2, -1))
    return np.where(total[..., 0, 0] > 0, bits, np.nan)


def jensen_shannon_bits(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence of loads (or distributions) on the last axis, in bits: 0 = equal, 1
    = disjoint, nan where a load is empty (Lin, IEEE Trans. Inf. Theory 37(1), 1991).
    """
    p, q = shares(first), shares(second)
    middle = (p + q) / 2
    return (_relative_bits(p, middle) + _relative_bits(q, middle)) / 2


def _relative_bits(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    used = p > 0
    ratio = np.divide(p, q, out=np.ones_like(p), where=used)
    return (p * np.log2(ratio)).sum(axis=-1)


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosine of two loads on the last axis, [...]."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    norm = np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
    return np.divide((a * b).sum(axis=-1), norm, out=np.full(norm.shape, np.nan), where=norm > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainDivergence:
    """Jensen-Shannon divergence between the expert loads of domains, mean over layers.

    names, tokens: of the N parts with enough tokens. js_bits: float64 [N, N], zero on the diagonal.
    noise_floor_bits: float64 [N], the same measure between two random halves of the part's own
        requests, mean over seeded splits; nan where a part has fewer than two requests.
    cosine: float64 [N, N] of the loads.
    """

    names: tuple[str, ...]
    tokens: tuple[int, ...]
    js_bits: np.ndarray
    noise_floor_bits: np.ndarray
    cosine: np.ndarray

    @property
    def mean_js_bits(self) -> float:
        """Mean over the pairs of parts; nan with fewer than two."""
        return _pair_mean(self.js_bits)

    @property
    def mean_cosine(self) -> float:
        """Mean over the pairs of parts; nan with fewer than two."""
        return _pair_mean(self.cosine)

    @property
    def mean_noise_floor_bits(self) -> float:
        """Mean over the parts that have a floor; nan where none has."""
        return known_mean(self.noise_floor_bits)


def _pair_mean(matrix: np.ndarray) -> float:
    pairs = matrix[np.triu_indices(len(matrix), 1)]
    return float(pairs.mean()) if len(pairs) else float("nan")


def domain_divergence(
    trace: RoutingTrace, *, min_tokens: int = 1_500, num_splits: int = 8, seed: int = 0
) -> DomainDivergence:
    """Compare the expert loads of coarse domains with each other and with sampling alone.

    Args:
        min_tokens: parts with fewer tokens are left out (their divergence would be noise); not
            applied to counts whose number of tokens is unknown.
        num_splits: random halvings per part for the noise floor.
    """
    names, loads = load_by(trace, "group")
    picks = loads.sum(axis=2).max(axis=1, initial=0)
    # of each part; exact unless picks are missing
    tokens = picks / trace.top_k if trace.top_k else np.full(len(loads), np.inf)
    keep = [i for i, n in enumerate(names) if n != UNKNOWN_PART and not tokens[i] < min_tokens]
    names, loads = tuple(names[i] for i in keep), loads[keep]
    count = len(names)
    js, cos = np.zeros((count, count)), np.ones((count, count))
    for i in range(count):
        for j in range(i):
            js[i, j] = js[j, i] = known_mean(jensen_shannon_bits(loads[i], loads[j]))
            cos[i, j] = cos[j, i] = known_mean(cosine(loads[i], loads[j]))
    parts = (trace.filter(domain_groups=name) for name in names)
    floor = [
        known_mean(split_half_js_bits(part, num_splits=num_splits, seed=seed)) for part in parts
    ]
    return DomainDivergence(
        names=names,
        tokens=tuple(int(tokens[i]) for i in keep),
        js_bits=js,
        noise_floor_bits=np.array(floor),
        cosine=cos,
    )


def known_mean(values: np.ndarray) -> float:
    """Mean of the values that are not nan; nan where none is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def split_half_js_bits(trace: RoutingTrace, *, num_splits: int = 8, seed: int = 0) -> np.ndarray:
    """[L, num_splits] divergence between two random halves of a trace's requests (kind "load":
    rows), in bits: what a comparison of two equal domains would show. nan with fewer than two.
    """
    if trace.request_id is not None:
        requests, part = np.unique(trace.request_id, return_inverse=True)
    else:
        requests = part = np.arange(trace.num_rows)
    values = np.full((trace.num_layers, num_splits), np.nan)
    if len(requests) < 2:
        return values
    rng = np.random.default_rng(seed)
    first = np.zeros((num_splits, len(requests)))
    for split in first:
        split[rng.permutation(len(requests))[: len(requests) // 2]] = 1
    for layer in range(trace.num_layers):  # one layer at a time: [requests, E] stays small
        loads = layer_loads(trace, layer, part, len(requests))
        half = first @ loads
        values[layer] = jensen_shannon_bits(half, loads.sum(axis=0) - half)
    return values


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillDecode:
    """Pearson correlation of expert frequencies, prefill of a request against decode of another.

    same_request: mean r between a request's prefill and its own decode; same_domain, other_domain:
    and the decode of other requests. aggregate: r between all prefill and all decode tokens.
    """

    num_requests: int
    same_request: float
    same_domain: float
    other_domain: float
    aggregate: float


def prefill_decode_correlation(
    trace: RoutingTrace, *, min_tokens: int = 8, max_requests: int = 1_000, seed: int = 0
) -> PrefillDecode:
    """How well the experts of a request's prefill predict those of its decode.

    r is taken over all L * E entries of the picks per token at once.

    Args:
        min_tokens: a request counts when it has as many tokens in each stage.
        max_requests: more are sampled down (seeded), for the work grows with the square.

    Raises:
        TraceError: fewer than two requests have enough tokens in both stages.
    """
    view = trace.tokens_only("prefill_decode_correlation")
    requests = trace.request_ids
    enough = np.ones(len(requests), bool)
    for stage in (PREFILL, DECODE):
        place = np.searchsorted(requests, view.request_id[view.stage == stage])
        enough &= np.bincount(place, minlength=len(requests)) >= min_tokens
    requests = requests[enough]
    if len(requests) < 2:
        raise TraceError(
            f"found {len(requests)} requests with at least {min_tokens} prefill and decode tokens, "
            "expected 2 or more: record both stages (annotate(stage=...)), or lower min_tokens"
        )
    if len(requests) > max_requests:
        requests = np.sort(np.random.default_rng(seed).choice(requests, max_requests, False))
    part = trace.filter(requests=requests)
    prefill, decode = part.filter(stages=PREFILL), part.filter(stages=DECODE)
    r = (_frequency(prefill) @ _frequency(decode).T).astype(np.float64)
    first_row = np.unique(part.request_id, return_index=True)[1]  # type: ignore[arg-type]
    domain = part.tokens_only("domains").domain_id[first_row]
    own = np.eye(len(requests), dtype=bool)
    loads = [trace.filter(stages=stage).load().ravel() for stage in (PREFILL, DECODE)]
    alike = (domain[:, None] == domain[None, :]) & ~own
    return PrefillDecode(
        num_requests=len(requests),
        same_request=known_mean(r[own]),
        same_domain=known_mean(r[alike]),
        other_domain=known_mean(r[~alike & ~own]),
        aggregate=float(np.corrcoef(loads)[0, 1]),
    )


def _frequency(trace: RoutingTrace) -> np.ndarray:
    """float32 [R, L * E], picks per token of each request, standardized to mean 0 and length 1."""
    loads = load_by(trace, "request")[1].reshape(len(trace.request_ids), -1)
    centered = (loads - loads.mean(axis=1, keepdims=True)).astype(np.float32)
    length = np.linalg.norm(centered, axis=1, keepdims=True)
    return np.divide(centered, length, out=np.zeros_like(centered), where=length > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOverlap:
    """Share of experts that two tokens have in common, mean over layers: |A and B| / K.

    Of tokens that follow each other in one request (adjacent), of two random ones of one request or
    of the trace (any), and what a uniform router would give: K / E.
    """

    adjacent: float
    same_request: float
    any: float
    uniform: float


def token_overlap(trace: RoutingTrace, *, max_pairs: int = 200_000, seed: int = 0) -> TokenOverlap:
    """Compare the picks of neighbors with those of random pairs, ``max_pairs`` (seeded) at most."""
    view = trace.tokens_only("token_overlap")
    rng = np.random.default_rng(seed)
    order = np.lexsort([view.position, view.request_id])
    request, position = view.request_id[order], view.position[order]
    joined = (request[1:] == request[:-1]) & (position[1:] == position[:-1] + 1)
    left = np.flatnonzero(joined)
    if len(left) > max_pairs:
        left = rng.choice(left, max_pairs, replace=False)
    # of each request, a run
    _, begin, number, length = np.unique(
        request, return_index=True, return_inverse=True, return_counts=True
    )
    size = min(max_pairs, len(order))
    first = rng.integers(0, max(len(order), 1), size)
    part = number[first]
    within = begin[part] + (rng.random(size) * length[part]).astype(int)
    anywhere = rng.integers(0, max(len(order), 1), size)
    ids = view.expert_ids
    return TokenOverlap(
        adjacent=_overlap(ids, order, left, left + 1),
        same_request=_overlap(ids, order, first, within),
        any=_overlap(ids, order, first, anywhere),
        uniform=trace.top_k / trace.num_experts,
    )


_CHUNK_PAIRS = 16_384


def _overlap(ids: np.ndarray, order: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    """Of the tokens order[first] and order[second], where they differ."""
    different = first != second
    first, second = order[first[different]], order[second[different]]
    if not len(first) or not ids.shape[1]:
        return float("nan")
    common = 0
    for start in range(0, len(first), _CHUNK_PAIRS):
        rows = slice(start, start + _CHUNK_PAIRS)
        a, b = ids[first[rows]], ids[second[rows]]
        for pick in range(ids.shape[2]):
            common += int(((a[:, :, pick, None] == b) & (b >= 0)).sum())
    return common / (len(first) * ids.shape[1] * ids.shape[2])


def analyze(trace: RoutingTrace, seed: int = 0) -> dict[str, Any]:
    """Describe a trace: "trace" (its size), "load", "domains", "prefill_decode", "overlap" and
    "coactivation".

    A part that the trace cannot answer (counts only, one stage, one domain) is None, and "left_out"
    says why. Numbers that do not exist (nan) are None. The same trace and seed give the same dict.

    Raises:
        TraceError: the trace is empty.
    """
    load = trace.load()
    if not load.any():
        raise TraceError(
            f"found an empty trace ({trace.num_rows} rows, {trace.num_layers} layers, no picks), "
            "expected tokens to analyze: record a run first, or check the filter"
        )
    left_out: dict[str, str] = {}
    warn_of_absent_experts(load, trace.layer_ids)
    domains, prefill, overlap = _domains(trace, seed, left_out), None, None
    try:
        prefill = asdict(prefill_decode_correlation(trace, seed=seed))
    except TraceError as error:
        left_out["prefill_decode"] = str(error)
    if trace.kind == "tokens":
        overlap = asdict(token_overlap(trace, max_pairs=50_000, seed=seed))
    else:
        left_out["overlap"] = "counts per step do not say which tokens follow each other"
    result = {
        "trace": _describe(trace),
        "load": _load(trace),
        "domains": domains,
        "prefill_decode": prefill,
        "overlap": overlap,
        "coactivation": _coactivation(trace, left_out),
        "left_out": left_out,
    }
    return to_plain(result, "analysis")


def _describe(trace: RoutingTrace) -> dict[str, Any]:
    return {
        "model": trace.model,
        "kind": trace.kind,
        "content_hash": trace.content_hash(),
        "num_rows": trace.num_rows,
        "num_tokens": trace.num_tokens,
        "num_requests": len(trace.request_ids),
        "num_layers": trace.num_layers,
        "layer_ids": trace.layer_ids,
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
        "num_domains": len(trace.domain),
        "missing_picks": int((trace.expert_ids < 0).sum()) if trace.expert_ids is not None else 0,
    }


def _load(trace: RoutingTrace) -> dict[str, Any]:
    counts = trace.load()
    measures = {
        "imbalance": imbalance(counts, empty=math.nan),
        "gini": gini(counts),
        "entropy_bits": entropy_bits(counts),
        "top_10_percent_share": top_share(counts, 0.1),
    }
    found: dict[str, Any] = {name: _spread(values) for name, values in measures.items()}
    found |= {"uniform_entropy_bits": math.log2(trace.num_experts), "by_stage": {}}
    for name, part in zip(*load_by(trace, "stage"), strict=True):
        found["by_stage"][name] = {"imbalance": known_mean(imbalance(part, empty=math.nan))}
    return found


def _domains(trace: RoutingTrace, seed: int, left_out: dict[str, str]) -> dict[str, Any] | None:
    found = domain_divergence(trace, seed=seed)
    if len(found.names) < 2:
        left_out["domains"] = (
            f"found {len(found.names)} domain group(s) with at least 1500 tokens, comparing needs 2"
        )
        return None
    _, counts = load_by(trace.filter(domain_groups=found.names), "group")
    return {
        "names": found.names,
        "tokens": found.tokens,
        "imbalance": [known_mean(imbalance(part, empty=math.nan)) for part in counts],
        "js_bits": found.js_bits,
        "noise_floor_bits": found.noise_floor_bits,
        "cosine": found.cosine,
        "mean_js_bits": found.mean_js_bits,
        "mean_noise_floor_bits": found.mean_noise_floor_bits,
        "mean_cosine": found.mean_cosine,
    }


def _coactivation(trace: RoutingTrace, left_out: dict[str, str]) -> dict[str, Any] | None:
    if trace.kind != "tokens":
        why = "counts per step do not say which experts a token picked together"
        left_out["coactivation"] = why
        return None
    result: dict[str, Any] = {"top_5_percent_pair_share": None, "independent_pair_share": None}
    if trace.top_k > 1:
        pairs = count_coactivation(trace).pairs
        result["top_5_percent_pair_share"] = _spread(top_pair_share(pairs))
        result["independent_pair_share"] = _spread(top_pair_share(independent_pairs(trace.load())))
    else:
        left_out["coactivation_pairs"] = "one pick per token: no pairs within a layer"
    moves = transition_counts(trace)
    bits = _spread(transition_mutual_information_bits(moves)) if len(moves) else None
    return result | {"next_layer_information_bits": bits}


def _spread(values: np.ndarray) -> dict[str, Any]:
    known = values[~np.isnan(values)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (math.nan, math.nan)
    return {"mean": known_mean(values), "min": low, "max": high, "per_layer": values}

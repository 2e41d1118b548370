"""One summary of a trace, as plain numbers that fit into JSON."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from moe_locality.analysis import stats
from moe_locality.errors import TraceError
from moe_locality.placement.costs import imbalance, warn_of_absent_experts
from moe_locality.placement.counting import count_coactivation
from moe_locality.placement.plan import to_plain
from moe_locality.trace.schema import RoutingTrace


def analyze(trace: RoutingTrace, seed: int = 0) -> dict[str, Any]:
    """Describe a trace: size, balance, domains, prefill against decode, co-activation.

    A part that the trace cannot answer (counts only, one stage, one domain) is None, and
    ``left_out`` says why. Numbers that do not exist (nan) are None. The same trace and seed give
    the same dict.

    Returns:
        dict with the keys "trace", "load", "domains", "prefill_decode", "overlap", "coactivation",
        "left_out".

    Raises:
        TraceError: the trace is empty.
    """
    if not trace.num_rows or not trace.num_layers:
        raise TraceError(
            f"found an empty trace ({trace.num_rows} rows, {trace.num_layers} layers), expected "
            "tokens to analyze: record a run first, or check the filter"
        )
    left_out: dict[str, str] = {}
    warn_of_absent_experts(trace.load(), trace.layer_ids)
    result = {
        "trace": _describe(trace),
        "load": _load(trace),
        "domains": _domains(trace, seed, left_out),
        "prefill_decode": _prefill_decode(trace, seed, left_out),
        "overlap": _overlap(trace, seed, left_out),
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
        "gini": stats.gini(counts),
        "entropy_bits": stats.entropy_bits(counts),
        "top_10_percent_share": stats.top_share(counts, 0.1),
    }
    per_stage = {}
    for name, part in zip(*stats.load_by(trace, "stage"), strict=True):
        per_stage[name] = {"imbalance": stats.known_mean(imbalance(part, empty=math.nan))}
    return {
        **{name: _spread(values) for name, values in measures.items()},
        "uniform_entropy_bits": math.log2(trace.num_experts),
        "by_stage": per_stage,
    }


def _domains(trace: RoutingTrace, seed: int, left_out: dict[str, str]) -> dict[str, Any] | None:
    found = stats.domain_divergence(trace, "group", seed=seed)
    if len(found.names) < 2:
        left_out["domains"] = (
            f"found {len(found.names)} domain group(s) with at least 1500 tokens, comparing needs 2"
        )
        return None
    _, counts = stats.load_by(trace.filter(domain_groups=found.names), "group")
    return {
        "names": found.names,
        "tokens": found.tokens,
        "imbalance": [stats.known_mean(imbalance(part, empty=math.nan)) for part in counts],
        "js_bits": found.js_bits,
        "noise_floor_bits": found.noise_floor_bits,
        "cosine": found.cosine,
        "mean_js_bits": found.mean_js_bits,
        "mean_noise_floor_bits": found.mean_noise_floor_bits,
        "mean_cosine": found.mean_cosine,
    }


def _prefill_decode(
    trace: RoutingTrace, seed: int, left_out: dict[str, str]
) -> dict[str, Any] | None:
    try:
        found = stats.prefill_decode_correlation(trace, seed=seed)
    except TraceError as error:
        left_out["prefill_decode"] = str(error)
        return None
    return {name: getattr(found, name) for name in found.__slots__}


def _overlap(trace: RoutingTrace, seed: int, left_out: dict[str, str]) -> dict[str, Any] | None:
    if trace.kind != "tokens":
        left_out["overlap"] = "counts per step do not say which tokens follow each other"
        return None
    found = stats.token_overlap(trace, max_pairs=50_000, seed=seed)
    return {name: getattr(found, name) for name in found.__slots__}


def _coactivation(trace: RoutingTrace, left_out: dict[str, str]) -> dict[str, Any] | None:
    if trace.kind != "tokens":
        left_out["coactivation"] = (
            "counts per step do not say which experts a token picked together"
        )
        return None
    result: dict[str, Any] = {"top_5_percent_pair_share": None, "independent_pair_share": None}
    if trace.top_k > 1:
        pairs = count_coactivation(trace).pairs
        result["top_5_percent_pair_share"] = _spread(stats.top_pair_share(pairs))
        result["independent_pair_share"] = _spread(
            stats.top_pair_share(stats.independent_pairs(trace.load()))
        )
    else:
        left_out["coactivation_pairs"] = "one pick per token: no pairs within a layer"
    moves = stats.transition_counts(trace)
    result["next_layer_information_bits"] = (
        _spread(stats.transition_mutual_information_bits(moves)) if len(moves) else None
    )
    return result


def _spread(values: np.ndarray) -> dict[str, Any]:
    known = values[~np.isnan(values)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (math.nan, math.nan)
    return {"mean": stats.known_mean(values), "min": low, "max": high, "per_layer": values}

"""The experiment of arXiv 2604.23150 on recorded routing, and the paper's figures beside it.

Part of the requests makes plans, clusters and classifiers; the others are judged, on their decode
tokens, whose cost nobody looked at (``analysis.decoding``). Figures are counts over recorded
routing, not a run on a cluster.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_locality.analysis.decoding import (
    Choose,
    FewestExperts,
    classify_domains,
    decode_tokens,
    lockstep,
    step_costs,
)
from moe_locality.analysis.stats import prefill_decode_correlation
from moe_locality.demo.launch import run_training
from moe_locality.errors import TraceError
from moe_locality.placement import PlacementPlan, assign_homes, evaluate, solve
from moe_locality.placement.baselines import cluster_homes
from moe_locality.placement.homes.predictor import default_prediction
from moe_locality.topology import ClusterTopology
from moe_locality.trace import DECODE, RoutingTrace

NUM_RANKS = 4
MAX_NUM_SEQS = 16
MAX_IMBALANCE: float | str = "auto"  # the default cap, from the requests that plans are made from
NODES = (2, 4)
REPLICA_SHARE = 0.125
WITH_REPLICAS = f"ours, {REPLICA_SHARE:.1%} replicas"
BAND = 0.05
ORDERS = 3  # random orders of the requests that figures of steps are means of
ROUNDS = 4  # how often every request is decoded in one of them
COLLAPSED = 0.95  # a router that sends this share of the picks to one expert has collapsed

PAPER = (
    (
        "decode all-to-all data against linear and EPLB",
        "up to 20 % less (Maverick), 6 % (DeepSeek-V3), 12 % (Qwen3)",
        "in part: other models, 64 GPUs; whether they count picks or copies is not said",
    ),
    (
        "time of the exchange and of a layer",
        "9 % and 5.5 % less (Maverick)",
        "no: their exchange pads every message to the largest, ours sends rows that are there",
    ),
    (
        "domain from prefill",
        "above 94 %",
        "in kind: the traces here have other domains, and fewer requests",
    ),
    (
        "prefill-decode correlation",
        "0.82 Maverick, 0.68 Qwen3, 0.55 DeepSeek-V3",
        "yes for Maverick, where 'aggregate' is the same quantity on other requests",
    ),
    (
        "balance of the nodes",
        "not given",
        "theirs is counted here, with their recipe in our own code (--method request_kmeans)",
    ),
)
"""(what, the paper's figure, whether ours is comparable)."""
_Table = tuple[str, tuple[str, ...], list[tuple[object, ...]]]
_PAPER_TABLE: _Table = (
    "The paper (arXiv 2604.23150)",
    ("what", "its figure", "comparable?"),
    [*PAPER],
)


def replay(trace: RoutingTrace, *, nodes: int, seed: int = 0) -> dict[str, Any]:
    """Decode the held-out requests in every condition, 4 ranks on ``nodes`` nodes: plain data.

    "conditions": each with its changes against the first, linear with random homes. "kept", by
    plan: the share of what homes from all decode routes gain (under the same cap) that homes from
    the prefill keep: ``of_all`` against the first condition, ``of_homes`` against random homes
    under the same plan. TraceError: no decode tokens, or too few requests.
    """
    train, test = trace.split(0.7, seed)
    topology = ClusterTopology.uniform(nodes, NUM_RANKS // nodes)
    judged = decode_tokens(test)
    if not judged.num_rows or not train.num_rows:
        raise TraceError(
            "found no decode tokens to judge, expected a trace with stage 'decode': record the "
            "generation too (annotate(stage='decode'))"
        )
    predict = default_prediction(test)
    job = _Job(train=train, test=test, judged=judged, topology=topology, predict=predict, seed=seed)
    conditions = list(job.conditions())
    kept, by_name = {}, {one["name"]: one["copies"] for one in conditions}
    linear = by_name["linear, random homes"]
    for label in ("ours", WITH_REPLICAS):
        anywhere, best = by_name[f"{label}, random homes"], by_name[f"{label}, oracle homes"]
        predicted = by_name[f"{label}, predicted homes"]
        kept[label] = {
            "of_all": share_of_gain(linear, predicted, best),
            "of_homes": share_of_gain(anywhere, predicted, best),
        }
    return {
        "num_nodes": nodes,
        "ranks_per_node": topology.ranks_per_node,
        "solved_tokens": train.num_tokens,
        "judged_tokens": judged.num_tokens,
        "judged_requests": len(judged.request_ids),
        "predicted_from": predict,
        "max_num_seqs": MAX_NUM_SEQS,
        "conditions": [{**one, "change": _change(one, conditions[0])} for one in conditions],
        "kept": kept,
    }


def _change(one: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
    """Changes of a condition in percent."""
    ratios = {name: one[name] / base[name] for name in ("copies", "picks")}
    ratios |= {f"step_{name}": mean / base["steps"][name] for name, mean in one["steps"].items()}
    return {name: 100 * (ratio - 1) for name, ratio in ratios.items()}


def share_of_gain(base: float, found: float, best: float) -> float:
    """What ``found`` keeps of the gain of ``best`` over ``base``; nan where that gains nothing."""
    return (base - found) / (base - best) if base > best else float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    train: RoutingTrace
    test: RoutingTrace
    judged: RoutingTrace
    topology: ClusterTopology
    predict: str
    seed: int

    def conditions(self) -> Iterator[dict[str, Any]]:
        for method in ("linear", "eplb"):
            plan = solve(self.train, self.topology, method=method)
            yield self._costed(f"{method}, random homes", plan, None)
        clusters = solve(self.train, self.topology, method="request_kmeans", seed=self.seed)
        for name, band in (("the paper's recipe", None), ("the paper's recipe, cosine band", BAND)):
            homes = cluster_homes(
                self.test, clusters, self.topology, predict=self.predict, band=band
            )
            yield self._costed(name, clusters, homes)
        extra = -(-round(self.train.num_experts * REPLICA_SHARE) // NUM_RANKS) * NUM_RANKS
        for label, replicas in (("ours", 0), (WITH_REPLICAS, extra)):
            plan = solve(
                self.train,
                self.topology,
                homes="joint",
                num_redundant_experts=replicas,
                max_imbalance=MAX_IMBALANCE,
                seed=self.seed,
            )
            yield from self._ours(label, plan)

    def _ours(self, label: str, plan: PlacementPlan) -> Iterator[dict[str, Any]]:
        yield self._costed(f"{label}, random homes", plan, None)
        homes = assign_homes(self.test, plan, self.topology, predict=self.predict)
        yield self._costed(f"{label}, predicted homes", plan, homes)
        choose = FewestExperts(self.train, self.test, self.predict)
        yield self._costed(f"{label}, predicted homes, grouped", plan, homes, choose)
        oracle = assign_homes(self.judged, plan, self.topology, predict="oracle")
        yield self._costed(f"{label}, oracle homes", plan, oracle)
        choose = FewestExperts(self.train, self.judged, "oracle")
        yield self._costed(f"{label}, oracle homes, grouped with hindsight", plan, oracle, choose)

    def _costed(
        self,
        name: str,
        plan: PlacementPlan,
        homes: dict[int, int] | None,
        choose: Choose | None = None,
    ) -> dict[str, Any]:
        """Rows per token and layer (expected for random homes), and means over ``lockstep``."""
        costs = evaluate(self.judged, plan, self.topology, homes)
        tokens = self.judged.num_tokens
        steps = max(ROUNDS * tokens // (NUM_RANKS * MAX_NUM_SEQS), 1)
        found = []
        for order in range(ORDERS):
            dealt = homes
            if dealt is None:  # at random, as many requests on every rank
                shuffled = np.random.default_rng(order).permutation(self.judged.request_ids)
                dealt = {int(request): at % NUM_RANKS for at, request in enumerate(shuffled)}
            rows = lockstep(
                self.judged,
                dealt,
                NUM_RANKS,
                max_num_seqs=MAX_NUM_SEQS,
                steps=steps,
                choose=choose,
                seed=order,
            )
            found.append(asdict(step_costs(self.judged, plan, self.topology, rows)))
        means = {key: float(np.mean([one[key] for one in found])) for key in found[0]}
        whole = ("copies", "picks", "node_imbalance", "rank_imbalance")
        return {"name": name, **{key: getattr(costs, key) for key in whole}, "steps": means}


def without_collapsed(trace: RoutingTrace) -> tuple[RoutingTrace, list[int]]:
    """(the trace without layers whose router sends nearly all picks to one expert, their ids)."""
    load = trace.load()
    share = load.max(axis=1) * trace.top_k / np.maximum(load.sum(axis=1), 1)
    bad = [int(layer) for layer, one in zip(trace.layer_ids, share, strict=True) if one > COLLAPSED]
    if not bad or len(bad) == trace.num_layers:
        return trace, []
    return trace.filter(layers=[int(i) for i in trace.layer_ids if int(i) not in bad]), bad


def told_domains(trace: RoutingTrace, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Domains of held-out requests told from prefill; see ``Classification``. By kind of label:
    "group", the coarse group of a domain, and "data set", what its name begins with.
    "whole_request": the share told right by ``ridge`` from all tokens, with hindsight.
    """
    train, test = trace.split(0.7, seed)
    group = dict(zip(trace.domain, trace.groups, strict=True))
    kinds: dict[str, Callable[[str], str]] = {
        "group": lambda name: group[name],
        "data set": lambda name: name.split("/")[0],
    }
    found = {}
    for kind, label in kinds.items():
        if len({label(name) for name in trace.domain}) > 1:
            whole = classify_domains(train, test, label, predict="oracle").ridge
            found[kind] = asdict(classify_domains(train, test, label)) | {"whole_request": whole}
    return found


def paper_on_trace(
    trace: RoutingTrace,
    *,
    nodes: tuple[int, ...] = NODES,
    seed: int = 0,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> dict[str, Any]:
    """Everything that a trace of tokens has what it takes for; what is left out is None."""
    trace.tokens_only("bench paper")
    trace, left_out = without_collapsed(trace)
    has_decode = trace.stage is not None and bool((trace.stage == DECODE).any())
    replays = []
    for done, count in enumerate(nodes if has_decode else ()):
        progress(done, len(nodes), f"decode on {count} nodes")
        replays.append(replay(trace, nodes=count, seed=seed))
    correlation = None
    if has_decode and default_prediction(trace) == "prefill":
        with suppress(TraceError):  # too few tokens in both stages
            correlation = asdict(prefill_decode_correlation(trace))
    return {
        "model": trace.model,
        "requests": len(trace.request_ids),
        "num_layers": trace.num_layers,
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
        "collapsed_layers": left_out,
        "replays": replays,
        "domains": told_domains(trace, seed),
        "prefill_decode_correlation": correlation,
    }


def paper_in_decoder(out: Path, *, nodes: int, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Train a small model, or take the one in ``out``, and decode on ``NUM_RANKS`` local ranks that
    stand for ``nodes``: examples/paper_decoder.py, with its further ``arguments``. Return what it
    writes to paper.json; its report is ``out``/report-N-nodes.html.
    """
    words = ["--out", str(out), "--num-nodes", str(nodes), *arguments]
    log = out / f"ranks-{nodes}-nodes.log"
    run_training(words, script="paper_decoder.py", num_ranks=NUM_RANKS, log=log, timeout_s=1800.0)
    (out / "report.html").replace(out / f"report-{nodes}-nodes.html")
    return json.loads((out / "paper.json").read_text(encoding="utf-8"))


def decoder_tables(found: Mapping[str, Any]) -> Iterator[_Table]:
    """(title, head, rows) of ``paper_in_decoder``, and the paper's figures last."""
    title = (
        f"{found['model']}: {found['nodes']} nodes x {found['ranks_per_node']} ranks of one "
        f"machine, {found['requests']} requests x {found['new_tokens']} tokens; bytes are those "
        "that the exchange counts, and there are no times of links"
    )
    metric, head = "decode bytes across nodes per token", ("", "bytes per token", "%")
    rows: list[tuple[object, ...]] = [
        (name, one[metric], f"{one['changes'][metric]:+.1f}", one["node_imbalance"])
        for name, one in found["conditions"].items()
    ]
    yield title, (*head, "node imbalance"), rows
    yield "What prefill tells", ("", "here"), list(found["told"].items())
    yield _PAPER_TABLE


def tables(found: Mapping[str, Any]) -> Iterator[_Table]:
    """(title, head, rows) for each part of ``paper_on_trace``, and the paper's figures last."""
    head = (
        *("", "copies", "copies %", "picks %", "node imbalance"),
        *("largest copy message %", "largest pick message %", "node imbalance, step", "distinct %"),
    )
    for one in found["replays"]:
        title = (
            f"{found['model']}, {one['num_nodes']} nodes x {one['ranks_per_node']} ranks; "
            f"{one['judged_tokens']:,} decode tokens of {one['judged_requests']} held-out requests,"
            f" homes predicted from {one['predicted_from']}, {one['max_num_seqs']} requests a rank"
        )
        rows: list[tuple[object, ...]] = []
        for case in one["conditions"]:
            change = {name: f"{percent:+.1f}" for name, percent in case["change"].items()}
            row = [case["name"], case["copies"], change["copies"], change["picks"]]
            row += [case["node_imbalance"], change["step_largest_copy_message"]]
            row += [change["step_largest_pick_message"], case["steps"]["node_imbalance"]]
            rows.append((*row, change["step_distinct"]))
        yield title, head, rows
    yield _PAPER_TABLE


def lines(found: Mapping[str, Any]) -> list[str]:
    """What prefill tells, in sentences."""
    told = [
        f"{one['num_nodes']} nodes, {label}: predicted homes keep {100 * kept['of_all']:.1f} % of "
        f"what oracle homes gain over linear with random homes, {100 * kept['of_homes']:.1f} % of "
        "what they gain over random homes under the same plan"
        for one in found["replays"]
        for label, kept in one["kept"].items()
    ]
    for kind, one in found["domains"].items():
        told.append(
            f"{kind} told from prefill, {len(one['domains'])} of them, {one['num_requests']} "
            f"held-out requests: {100 * one['ridge']:.1f} % right (nearest center "
            f"{100 * one['nearest_center']:.1f} %, always the largest "
            f"{100 * one['largest_class']:.1f} %; from the whole request "
            f"{100 * one['whole_request']:.1f} %)"
        )
    if pair := found["prefill_decode_correlation"]:
        told.append(
            f"prefill-decode correlation: same request {pair['same_request']:.2f}, same domain "
            f"{pair['same_domain']:.2f}, other domain {pair['other_domain']:.2f}, aggregate "
            f"{pair['aggregate']:.2f}"
        )
    if found["collapsed_layers"]:
        told.append(f"left out, their router has collapsed: layers {found['collapsed_layers']}")
    return told

"""Commands about plans that exist: group, evaluate, bake; and bench, which compares methods."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_locality.commands.inputs import (
    check_writable,
    read_cluster,
    read_fitting_plan,
    read_homes,
    read_judged,
    split,
    write_homes,
)
from moe_locality.commands.output import Result, progress, table
from moe_locality.compare.plans import made_from
from moe_locality.errors import PlacementError
from moe_locality.placement import Costs, PlacementPlan
from moe_locality.placement import evaluate as costs_of
from moe_locality.placement.problem import warnings_once
from moe_locality.topology import ClusterTopology
from moe_locality.trace import RoutingTrace, read_trace

SHOWN = ("copies", "picks", "node_imbalance", "rank_imbalance", "straggler", "distinct")


def brief(costs: Costs) -> dict[str, Any]:
    """Return the costs without the values per layer."""
    return {name: value for name, value in costs.to_dict().items() if name != "per_layer"}


def linear_plan(trace: RoutingTrace, topology: ClusterTopology) -> PlacementPlan | None:
    """Return the contiguous layout, or None where the experts do not divide among the ranks."""
    if trace.num_experts % topology.num_ranks:
        return None
    plan = PlacementPlan.linear(
        trace.num_experts,
        [int(layer) for layer in trace.layer_ids],
        topology.num_nodes,
        topology.ranks_per_node,
        model=trace.model,
    )
    if plan.rank_to_node != topology.rank_to_node:
        return PlacementPlan.from_dict({**plan.to_dict(), "rank_to_node": topology.rank_to_node})
    return plan


def costs_table(title: str, named: Mapping[str, dict[str, Any] | None]) -> Any:
    """Return a rich table of costs, a column per plan and the ratio of the last to the first."""
    known = {name: costs for name, costs in named.items() if costs is not None}
    columns = [*known.values()]
    rows = []
    for metric in SHOWN:
        values = [costs[metric] for costs in columns]
        first, last = values[0], values[-1]
        ratio = round(last / first, 3) if first and last and len(values) > 1 else None
        rows.append((metric, *values, ratio))
    return table(title, ("", *known, "ratio"), rows)


def group(trace: Path, plan: Path, out: Path, predict: str, equal_requests: bool) -> Result:
    """Assign a home rank to every request and write them."""
    from moe_locality.placement.homes.assign import home_assignment

    check_writable(out, "homes", trace, plan)
    with progress(f"grouping {trace}"):
        content = read_trace(trace)
        placed = read_fitting_plan(plan, content)
        found = home_assignment(content, placed, predict=predict, equal_requests=equal_requests)
        homes = found.homes
        before = brief(costs_of(content, placed))
        after = brief(costs_of(content, placed, homes=homes))
    write_homes(homes, out)
    counts = list(found.requests_per_rank)
    payload = {
        "command": "group",
        "homes": out,
        "predict": predict,
        "requests": len(homes),
        "requests_per_rank": counts,
        "tokens_per_rank": list(found.tokens_per_rank),
        "token_imbalance": found.token_imbalance,
        "unpredicted_requests": found.unpredicted,
        "unseen_domains": list(found.unseen_domains),
        "costs": after,
        "homes_at_random": before,
    }

    def show(console: Any) -> None:
        console.print(f"{out}: {len(homes):,} requests, per rank {counts}", soft_wrap=True)
        console.print(f"tokens per rank: max / mean {found.token_imbalance:.3f}")
        if found.unpredicted:
            console.print(f"{found.unpredicted:,} requests had nothing to predict from")
        if found.unseen_domains:
            console.print(f"{len(found.unseen_domains)} domains are unknown to the plan")
        shown = {"homes at random": before, f"homes by {predict}": after}
        console.print(costs_table("Predicted on this trace", shown))

    return Result(payload=payload, show=show)


def evaluate(
    trace: Path,
    plan: Path,
    homes: Path | None,
    baseline: Path | None,
    row_bytes: float | None,
    held_out: float,
    seed: int,
) -> Result:
    """Evaluate a plan, and the linear layout beside it."""
    with progress(f"evaluating {plan}"):
        content = read_judged(trace, held_out, seed)
        placed = read_fitting_plan(plan, content)
        ranks = None if homes is None else read_homes(homes, placed)
        old = None if baseline is None else read_fitting_plan(baseline, content)
        costs = costs_of(content, placed, homes=ranks, row_bytes=row_bytes, baseline=old)
        base = linear_plan(content, topology_of(placed))
        linear = None if base is None else brief(costs_of(content, base, row_bytes=row_bytes))
    payload = {
        "command": "evaluate",
        "trace": trace,
        "plan": plan,
        "digest": placed.digest(),
        "homes": homes,
        "in_sample": made_from(placed, content),
        "held_out": held_out,
        **costs.to_dict(),
        "linear": linear,
    }

    def show(console: Any) -> None:
        words = "homes at random" if homes is None else f"homes of {homes}"
        if held_out:
            words += f", {held_out:.0%} of the requests, held out"
        if payload["in_sample"]:
            words += "; in-sample: the plan was made from these requests"
        console.print(f"{plan} on {trace}: {words}", soft_wrap=True)
        console.print(costs_table("Predicted", {"linear": linear, "plan": brief(costs)}))

    return Result(payload=payload, show=show)


def topology_of(plan: PlacementPlan) -> ClusterTopology:
    """Return the cluster that a plan was made for."""
    return ClusterTopology(rank_to_node=plan.rank_to_node or ())


def bake(
    checkpoint: Path,
    plan: Path,
    out: Path,
    tag: str | None,
    trust_checkpoint: bool,
    trust_parameter_order: bool,
) -> Result:
    """Write a checkpoint with the experts in the order of the plan."""
    placed = PlacementPlan.read(plan)
    if not checkpoint.exists():
        raise PlacementError(
            f"found nothing at {checkpoint}, expected a checkpoint directory: check the path"
        )
    from moe_locality.layer.bake import bake_checkpoint

    with progress(f"baking {checkpoint}"):
        found = bake_checkpoint(
            checkpoint,
            placed,
            out,
            tag=tag,
            trust_checkpoint=trust_checkpoint,
            trust_parameter_order=trust_parameter_order,
        )
    payload = {"command": "bake", "digest": placed.digest(), **found}
    words = [f"{out}: experts in the order of {plan}"]
    if "optimizer" in found:
        words.append(f"optimizer state: {found['optimizer']}")
    return Result(payload=payload, text=words)


@warnings_once()
def bench(
    trace: Path,
    nodes: int | None,
    ranks_per_node: int | None,
    method: list[str] | None,
    max_imbalance: float,
    held_out: float,
    seed: int,
) -> Result:
    """Solve with every method, time it, and judge it on requests that it did not see."""
    from moe_locality.placement.solve import COMPARED, solve

    topology = read_cluster(nodes, ranks_per_node)
    methods = tuple(dict.fromkeys(method or COMPARED))
    train, test = split(read_trace(trace), held_out, seed)
    test = train if test is None else test
    one_layer = train.filter(layers=[int(train.layer_ids[0])])
    rows: list[dict[str, Any]] = []
    with progress("solving") as update:
        for done, name in enumerate(methods):
            update(done, len(methods), f"solving: {name}")
            solve(one_layer, topology, method=name, max_imbalance=max_imbalance)  # compiles
            start = time.perf_counter()
            plan = solve(train, topology, method=name, max_imbalance=max_imbalance, seed=seed)
            seconds = time.perf_counter() - start
            costs = brief(costs_of(test, plan, topology))
            rows.append({"method": name, "seconds": seconds, **costs})
    payload = {
        "command": "bench",
        "trace": train.content_hash(),
        "held_out": held_out,
        "judged_tokens": test.num_tokens,
        "cluster": topology.to_dict(),
        "rows": rows,
    }
    head = ("method", "seconds, measured", *SHOWN)

    def show(console: Any) -> None:
        kind = "held-out" if held_out else "in-sample"
        title = f"{topology.describe()}; costs predicted on {test.num_tokens:,} {kind} tokens"
        cells = [(r["method"], r["seconds"], *(r[name] for name in SHOWN)) for r in rows]
        console.print(table(title, head, cells))

    return Result(payload=payload, show=show)

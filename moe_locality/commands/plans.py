"""Commands about plans that exist: group, evaluate, simulate, export, bake; and bench."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

import moe_locality
from moe_locality.commands import inputs
from moe_locality.commands.output import SHOWN, Result, brief, costs_table, progress, table
from moe_locality.errors import ConfigError, PlacementError, TopologyError

if TYPE_CHECKING:
    from moe_locality import ClusterTopology, PlacementPlan, RoutingTrace

ALLGATHER = (
    "an all-gather sends every token to every node, whatever the plan: a plan can only level the "
    "ranks and leave fewer of them idle"
)


def group(
    trace: inputs.Trace,
    plan: inputs.Plan,
    out: Annotated[Path, Option("-o", "--out", help="Homes to write (JSON).")],
    predict: Annotated[
        str | None,
        Option(
            help="prefill, first:32, domain or oracle; prefill, or first:32 where there is none."
        ),
    ] = None,
    equal_requests: Annotated[
        bool, Option("--equal-requests", help="As many requests on every rank, for training.")
    ] = False,
) -> Result:
    """Give every request a home rank: request id to rank."""
    from moe_locality.placement.homes.assign import home_assignment, write_homes
    from moe_locality.placement.homes.predictor import default_prediction

    inputs.check_writable(out, "homes", trace, plan)
    with progress(f"grouping {trace}"):
        content = moe_locality.read_trace(trace)
        placed = inputs.read_fitting_plan(plan, content)
        predict = predict or default_prediction(content)
        found = home_assignment(content, placed, predict=predict, equal_requests=equal_requests)
        homes = found.homes
        before = brief(moe_locality.evaluate(content, placed))
        after = brief(moe_locality.evaluate(content, placed, homes=homes))
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
    trace: inputs.Trace,
    plan: inputs.Plan,
    homes: inputs.Homes = None,
    baseline: Annotated[
        Path | None, Option(help="Plan to move from, for the cost of moving.")
    ] = None,
    row_bytes: Annotated[float | None, Option(help="Bytes of one token on the wire.")] = None,
    rule: Annotated[
        str | None, Option(help="How an engine serves copies: sglang or in_turn; else as planned.")
    ] = None,
    transport: Annotated[
        str, Option(help="once_per_node, per_pick, per_rank or allgather.")
    ] = "once_per_node",
    batch_tokens: Annotated[
        int, Option(min=1, help="Tokens of a batch, all ranks together.")
    ] = 512,
    held_out: inputs.HeldOut = 0.0,
    seed: inputs.Seed = 0,
) -> Result:
    """Predict what a plan costs on a trace."""
    with progress(f"evaluating {plan}"):
        content, _, placed, ranks, told = _read(trace, plan, homes, held_out, seed)
        old = None if baseline is None else inputs.read_fitting_plan(baseline, content)
        options = {"row_bytes": row_bytes, "batch_tokens": batch_tokens, "transport": transport}
        costs = moe_locality.evaluate(
            content, placed, homes=ranks, baseline=old, rule=rule, **options
        )
        base = inputs.linear_plan(content, placed.topology)
        linear = None if base is None else brief(moe_locality.evaluate(content, base, **options))
    payload = {"command": "evaluate", **told, **costs.to_dict(), "linear": linear}

    def show(console: Any) -> None:
        share = f", {held_out:.0%} of the requests, held out" if held_out else ""
        console.print(_judged_on(payload, share), soft_wrap=True)
        console.print(costs_table("Predicted", {"linear": linear, "plan": brief(costs)}))
        if transport == "allgather":
            console.print(ALLGATHER, soft_wrap=True)

    return Result(payload=payload, show=show)


def _read(
    trace: Path, plan: Path, homes: Path | None, held_out: float, seed: int
) -> tuple[RoutingTrace, RoutingTrace, PlacementPlan, dict[int, int] | None, dict[str, Any]]:
    """The part of a trace to judge on, the other part, the plan, the homes, and what to tell."""
    from moe_locality.compare import made_from

    content, train, origin = inputs.read_judged(trace, held_out, seed)
    placed = inputs.read_fitting_plan(plan, content)
    ranks = inputs.homes_of(homes, placed)
    told = {"trace": trace, "plan": plan, "digest": placed.digest(), "homes": homes}
    told |= {"in_sample": made_from(placed, content, origin), "held_out": held_out}
    return content, train, placed, ranks, told


def _judged_on(found: dict[str, Any], share: str = "") -> str:
    homes = "homes at random" if found["homes"] is None else f"homes of {found['homes']}"
    own = "; in-sample: the plan was made from these requests" if found["in_sample"] else ""
    return f"{found['plan']} on {found['trace']}: {homes}{share}{own}"


def simulate(
    trace: inputs.Trace,
    plan: inputs.Plan,
    homes: inputs.Homes = None,
    cluster: inputs.Cluster = None,
    batch_tokens: Annotated[int, Option(min=1, help="Tokens per rank and step.")] = 512,
    hidden: Annotated[int, Option(min=1, help="Width of a token.")] = 4096,
    ffn: Annotated[int | None, Option(min=1, help="Width of an expert; as a token.")] = None,
    payload: Annotated[str, Option(help="bf16, fp8, mxfp8 or mxfp4.")] = "bf16",
    exchange: Annotated[str, Option(help="flat or hierarchical.")] = "hierarchical",
    compute_us: Annotated[float | None, Option(help="Time of the rest of a step.")] = None,
    expert_us: Annotated[float | None, Option(help="Time per distinct expert.")] = None,
    row_us: Annotated[float | None, Option(help="Time per row of an expert.")] = None,
    groups: Annotated[int | None, Option(min=1, help="Expert-parallel groups.")] = None,
    sweep: Annotated[str | None, Option(help="batch, bandwidth, k or nodes.")] = None,
    figure: Annotated[Path | None, Option(help="Figure of the sweep: .svg, .png.")] = None,
    held_out: inputs.HeldOut = 0.0,
    seed: inputs.Seed = 0,
) -> Result:
    """Simulate step times of a plan on a cluster."""
    from moe_locality import simulator

    if figure is not None and sweep is None:
        raise PlacementError("found --figure without --sweep, expected both: name a sweep")
    inputs.check_writable(figure, "figure", trace, plan, cluster, homes)
    with progress(f"simulating {plan}"):
        content, train, placed, ranks, told = _read(trace, plan, homes, held_out, seed)
        topology, groups = _cluster(placed, cluster, groups)
        sizes = {"hidden_size": hidden, "ffn_size": ffn, "payload": payload, "exchange": exchange}
        model = simulator.StepModel(**sizes, expert_us=expert_us, row_us=row_us)
        base = inputs.linear_plan(content, topology)
        options: dict[str, Any] = {"model": model, "batch_tokens": batch_tokens, "seed": seed}
        options["groups"] = groups
        timing = {**options, "compute_us": compute_us}
        found = simulator.simulate(content, placed, topology, ranks, **timing)
        linear = None if base is None else simulator.simulate(content, base, topology, **timing)
        swept = None
        if sweep is not None:
            swept = _sweep(sweep, content, train, placed, topology, ranks, figure, options)
    speedup = None
    if linear is not None and found.group_step_us:
        speedup = linear.group_step_us / found.group_step_us
    answer = {"command": "simulate", "how": "simulated", **told, "cluster": topology.to_dict()}
    answer |= {"exchange": exchange, "payload": payload, "tau_us": model.tau, **found.to_dict()}
    answer |= {"linear": None if linear is None else linear.to_dict(), "speedup": speedup}
    answer |= {"sweep": swept, "figure": figure}
    return Result(payload=answer, show=lambda console: _show(console, answer, hidden))


def _cluster(
    plan: PlacementPlan, cluster: Path | None, groups: int | None
) -> tuple[ClusterTopology, int]:
    """The nodes of one expert-parallel group with the links of the cluster, and how many groups."""
    own = plan.topology
    if cluster is None:
        return own, groups or 1
    given = moe_locality.ClusterTopology.from_yaml(cluster)
    times = given.num_ranks // own.num_ranks
    if given.num_ranks % own.num_ranks or not times:
        raise TopologyError(
            f"found {given.describe()} in {cluster} for a plan of {own.describe()}, expected the "
            "plan's ranks or a multiple of them: make a plan for this cluster"
        )
    return dataclasses.replace(own, **given.tiers()), groups or times


def _linear(trace: RoutingTrace, topology: ClusterTopology) -> PlacementPlan:
    found = inputs.linear_plan(trace, topology)
    if found is None:
        raise PlacementError(
            "found experts that do not divide among the ranks, expected a linear layout to compare "
            "the sweep with: leave --sweep out"
        )
    return found


def _sweep(
    over: str,
    content: RoutingTrace,
    train: RoutingTrace,
    plan: PlacementPlan,
    topology: ClusterTopology,
    homes: dict[int, int] | None,
    figure: Path | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """The rows of a sweep, and where the plan gains; other clusters get plans of their own."""
    from moe_locality.figures import draw_sweep, write_figure
    from moe_locality.simulator import SWEEPS, gain_ends, sweep

    def plans_of(other: ClusterTopology) -> tuple[PlacementPlan, PlacementPlan]:
        return _linear(train, other), moe_locality.solve(train, other, seed=options["seed"])

    compared = (_linear(content, topology), plan)
    rows = sweep(over, content, compared, topology, (None, homes), plans_of=plans_of, **options)
    if figure is not None:
        title = f"{content.model or 'trace'}: speed-up of the MoE part of a step (simulated)"
        write_figure(draw_sweep(rows, SWEEPS[over], title), figure)
    return {"over": over, "rows": rows, "gain": gain_ends(rows)}


def _show(console: Any, found: dict[str, Any], hidden: int) -> None:
    linear = found["linear"]
    console.print(_judged_on(found), soft_wrap=True)
    console.print(
        f"Simulated: {found['num_steps']} steps of {found['batch_tokens']:,} tokens per rank, "
        f"{found['groups']} group(s), {found['exchange']} exchange, {found['payload']} dispatch of "
        f"width {hidden:,}, bf16 combine; forward, MoE part, all layers",
        soft_wrap=True,
    )
    columns = {"linear": _times(linear)} if linear is not None else {}
    columns["plan"] = _times(found)
    rows = []
    for label in columns["plan"]:
        values = [column[label] for column in columns.values()]
        ratio = round(values[0] / values[1], 3) if len(values) > 1 and values[1] else ""
        rows.append((label, *values, ratio))
    console.print(table("", ("simulated", *columns, "speed-up"), rows))
    link = found["busiest_link"]
    console.print(
        f"Busiest link: node {link['node']}, {link['direction']}, {link['share']:.1%} of what "
        "crosses nodes in dispatch"
    )
    if found["sweep"] is not None:
        _show_sweep(console, found["sweep"])
    if found["figure"] is not None:
        console.print(f"figure: {found['figure']}", soft_wrap=True)


def _times(found: dict[str, Any]) -> dict[str, float]:
    """Label -> value of a column of the table."""
    shown = {"step, us": found["group_step_us"], "mean step of a group, us": found["step_us"]}
    for name, label in (("dispatch", "dispatch"), ("compute", "experts"), ("combine", "combine")):
        shown[f"  {label}, us"] = found["parts_us"][name]
    for name in ("across", "inside"):
        shown[f"links {name} nodes, us"] = found["tiers_us"][name]
    for link in ("cross_node", "same_node", "same_rank"):
        both = found["bytes"]["dispatch"][link] + found["bytes"]["combine"][link]
        shown[f"{link.replace('_', ' ')}, bytes per token"] = both / found["num_tokens"]
    if found["share"] is not None:
        shown["share of the whole step"] = found["share"]
    return shown


def _show_sweep(console: Any, sweep: dict[str, Any]) -> None:
    from moe_locality.simulator.simulate import GAIN, SWEEPS

    head = (SWEEPS[sweep["over"]], "linear, us", "plan, us", "speed-up", "+-", "across, share")
    names = ("value", "baseline_us", "plan_us", "speedup", "speedup_error", "across_share")
    rows = [[row[name] for name in names] for row in sweep["rows"]]
    console.print(table("Simulated sweep", head, rows))
    gain = ", ".join(f"{value:g}" for value in sweep["gain"]) or "none of them"
    console.print(f"At least {GAIN - 1:.0%} faster at: {gain}")


def export(
    plan: Annotated[Path, Argument(help="Placement plan (JSON).")],
    to: Annotated[
        str,
        Option(help="sglang, trtllm, vllm-ascend; read by no release: vllm, vllm-ranks, autoep."),
    ],
    out: Annotated[Path, Option("-o", "--out", help="Map to write: JSON, trtllm YAML.")],
    num_hidden_layers: Annotated[
        int | None, Option(min=1, help="Transformer layers: sglang needs it.")
    ] = None,
    layers: Annotated[
        str | None,
        Option(help="Transformer layers with experts (1-26), where the plan counts 0, 1, 2, ..."),
    ] = None,
) -> Result:
    """Write a plan as the map of a serving engine, and say what starts the engine with it."""
    import numpy as np

    from moe_locality.placement.export import launch_lines, write_export

    inputs.check_writable(out, "map", plan)
    placed = moe_locality.PlacementPlan.read(plan)
    write_export(placed, out, to, num_hidden_layers, inputs.layer_numbers(layers))
    launch = launch_lines(placed, to, out, str(plan))
    if to != "autoep" and np.count_nonzero(np.diff(placed.node_of_rank)) >= placed.num_nodes:
        launch += (
            "engines put consecutive ranks on a node, this plan does not: place with --nodes and "
            "--ranks-per-node",
        )
    replicas = placed.num_redundant_experts
    payload = {"command": "export", "launch": launch, "plan": plan, "digest": placed.digest()}
    payload |= {"target": to, "file": out, "layers": placed.num_layers}
    payload["num_redundant_experts"] = replicas
    kept = f", {replicas} redundant experts per layer" if replicas else ""
    words = f"{out}: {placed.num_layers} MoE layers for {to}, {placed.num_ranks} ranks{kept}"
    return Result(payload=payload, text=(words, *launch))


def bake(
    checkpoint: Annotated[
        Path, Argument(help="Checkpoint of DeepSpeed, or folder of a Hugging Face model.")
    ],
    plan: inputs.Plan,
    out: Annotated[Path, Option(help="Directory of the new checkpoint.")],
    tag: Annotated[str | None, Option(help="Default: what 'latest' names.")] = None,
    trust_checkpoint: Annotated[
        bool, Option("--trust-checkpoint", help="Unpickle objects; they can run code.")
    ] = False,
    trust_parameter_order: Annotated[
        bool, Option("--trust-parameter-order", help="For stock optimizer state.")
    ] = False,
    expert_groups: Annotated[
        int | None,
        Option(min=1, help="Groups that a Hugging Face router picks first (config: n_group)."),
    ] = None,
) -> Result:
    """Write a checkpoint whose contiguous layout is the placement."""
    placed = moe_locality.PlacementPlan.read(plan)
    if not checkpoint.exists():
        raise PlacementError(
            f"found nothing at {checkpoint}, expected a checkpoint directory: check the path"
        )
    trust = {"trust_checkpoint": trust_checkpoint, "trust_parameter_order": trust_parameter_order}
    with progress(f"baking {checkpoint}"):
        found = moe_locality.bake_checkpoint(
            checkpoint, placed, out, tag=tag, num_expert_groups=expert_groups, **trust
        )
    payload = {"command": "bake", "digest": placed.digest(), **found}
    words = [f"{out}: experts in the order of {plan}"]
    if "optimizer" in found:
        words.append(f"optimizer state: {found['optimizer']}")
    if "family" in found:
        words.append(f"{found['family']}: {found['num_layers']} MoE layers, verified by SHA-256")
    if found["left_out"]:
        words.append(f"left out: {', '.join(found['left_out'])}")
    return Result(payload=payload, text=words)


def bench(
    trace: inputs.Trace,
    nodes: inputs.Nodes = None,
    ranks_per_node: inputs.RanksPerNode = None,
    method: Annotated[
        list[str] | None, Option(help="Method; may be repeated. Default: all.")
    ] = None,
    max_imbalance: inputs.MaxImbalance = "auto",
    held_out: inputs.HeldOut = 0.3,
    seed: inputs.Seed = 0,
) -> Result:
    """Time the placement methods on a trace, and show their costs."""
    from moe_locality.placement.problem import warnings_once
    from moe_locality.placement.solve import COMPARED, solve

    topology = inputs.read_cluster(nodes, ranks_per_node)
    methods = tuple(dict.fromkeys(method or COMPARED))
    train, test = inputs.split(moe_locality.read_trace(trace), held_out, seed)
    test = train if test is None else test
    one_layer = train.filter(layers=[int(train.layer_ids[0])])
    rows: list[dict[str, Any]] = []
    with progress("solving") as update, warnings_once():
        for done, name in enumerate(methods):
            update(done, len(methods), f"solving: {name}")
            solve(one_layer, topology, method=name, max_imbalance=max_imbalance)  # compiles
            start = time.perf_counter()
            plan = solve(train, topology, method=name, max_imbalance=max_imbalance, seed=seed)
            seconds = time.perf_counter() - start
            costs = brief(moe_locality.evaluate(test, plan, topology))
            rows.append({"method": name, "seconds": seconds, **costs})
    payload = {"command": "bench", "trace": train.content_hash(), "held_out": held_out}
    payload |= {"judged_tokens": test.num_tokens, "cluster": topology.to_dict(), "rows": rows}

    def show(console: Any) -> None:
        kind = "held-out" if held_out else "in-sample"
        title = f"{topology.describe()}; costs predicted on {test.num_tokens:,} {kind} tokens"
        cells = [(r["method"], r["seconds"], *(r[name] for name in SHOWN)) for r in rows]
        console.print(table(title, ("method", "seconds, measured", *SHOWN), cells))

    return Result(payload=payload, show=show)


def bench_paper(
    trace: Annotated[
        Path | None, Argument(help="Trace to replay; without one a small model decodes.")
    ] = None,
    nodes: Annotated[
        int | None, Option(help="Nodes that the 4 ranks stand for, 2 or 4. Default: both.")
    ] = None,
    seed: inputs.Seed = 0,
    out: Annotated[
        Path | None, Option(help="Of model and reports, without a trace: runs/paper.")
    ] = None,
) -> Result:
    """Repeat the experiment of arXiv 2604.23150, beside the paper's figures: on a trace, or by 4
    local ranks that train a small model, record it and decode."""
    from moe_locality.demo import paper

    if nodes not in (None, *paper.NODES):
        raise ConfigError(f"--nodes: found {nodes}, expected 2 or 4: they share 4 ranks")
    if trace is not None and out is not None:
        raise ConfigError(f"found --out {out} with a trace, which writes no files: leave it out")
    if trace is None and seed:
        raise ConfigError(
            f"found --seed {seed} without a trace, expected 0: the small model has its own"
        )
    counts = paper.NODES if nodes is None else (nodes,)
    if trace is None:
        return _paper_in_decoder(counts, (out or Path("runs/paper")).absolute())
    content = moe_locality.read_trace(trace)
    with progress("replaying decode") as update:
        found = paper.paper_on_trace(content, nodes=counts, seed=seed, progress=update)
    payload = {"command": "bench paper", "trace": content.content_hash(), **found}

    def show(console: Any) -> None:
        for shown in paper.tables(found):
            console.print(table(*shown))
        console.print("\n".join(paper.lines(found)), highlight=False)

    return Result(payload=payload, show=show)


def _paper_in_decoder(nodes: Sequence[int], folder: Path) -> Result:
    """``bench paper`` without a trace."""
    from moe_locality.demo import paper

    folder.mkdir(parents=True, exist_ok=True)
    with progress("training a small model, recording it, decoding"):
        found = [paper.paper_in_decoder(folder, nodes=count) for count in nodes]

    def show(console: Any) -> None:
        for one in found:
            *own, last = paper.decoder_tables(one)
            for shown in (*own, last) if one is found[-1] else own:
                console.print(table(*shown))
        console.print(f"reports and wandb runs: {folder}", highlight=False)

    return Result(payload={"command": "bench paper", "runs": found}, show=show)

"""The command line: ``moe-locality COMMAND ...``.

Here is only what a command is called and takes; what it does is in :mod:`moe_locality.commands`,
imported when it runs, so that ``--help`` answers at once. With ``--json`` a command prints one JSON
object on stdout and nothing else there, also when it fails: ``{"error": {"type", "message"}}``.

Exit codes: 0 done; 1 the input is wrong or does not fit; 2 wrong usage, or something that was asked
for is not available here; 130 interrupted.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from moe_locality.commands import options


class _Commands(TyperGroup):
    """The group of commands; reports usage errors in the form that ``--json`` promises."""

    def main(
        self,
        args: Sequence[str] | None = None,
        *_: Any,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        from moe_locality.commands.output import guard, in_flags

        words = list(sys.argv[1:] if args is None else args)
        code = guard(
            lambda: super(_Commands, self).main(words, standalone_mode=False, **extra),
            as_json=options.JSON_FLAG in words,
            debug=options.DEBUG_FLAG in words,
            reword=lambda message: in_flags(message, self._flags(words), words),
        )
        if standalone_mode:
            sys.exit(code)
        return code

    def _flags(self, words: Sequence[str]) -> dict[str, str]:
        """Parameter of the command that ``words`` name → its longest flag."""
        names = [word for word in words if word in self.commands]
        known = self.commands[names[0]].params if names else []
        flags = {str(one.name): max(one.opts, key=len) for one in known}
        return {name: flag for name, flag in flags.items() if flag.startswith("--")}


app = typer.Typer(
    name="moe-locality",
    cls=_Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Put the experts of a mixture-of-experts model where their tokens are.",
    epilog="Words and formats: docs/design.md, docs/formats.md. Every command takes --json.",
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from moe_locality import __version__

        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _run(name: str, chosen: dict[str, Any]) -> None:
    """Run a command of :mod:`moe_locality.commands` with the options of its function here."""
    from moe_locality.commands import run

    run(name, chosen)


@app.command("import")
def import_(
    files: Annotated[
        list[Path],
        typer.Argument(help="Routing record of another tool, several, or a directory of them."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Directory of the trace.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another trace.")] = False,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="npz, json, csv, megatron, vllm, sglang, sglang-dump, slime or llamacpp. "
            "Default: found from the content.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Name, where F has none.")] = None,
    num_experts: Annotated[
        int | None, typer.Option("--num-experts", min=1, help="Experts, where F does not say.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="Picks per token, where F does not say.")
    ] = None,
    num_layers: Annotated[
        int | None,
        typer.Option(
            "--num-layers", min=1, help="Transformer layers of the model, where F does not say."
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option("--layers", help="Layers to take, as 1,3,5-9. Default: all that hold picks."),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option("--table", help="CSV or JSON: name of a request, its request_id and domain."),
    ] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Turn another tool's routing record into a trace."""
    _run("import", locals())


@app.command()
def export(
    plan: Annotated[Path, typer.Argument(help="Placement plan (JSON).")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="vllm, vllm-ranks, vllm-ascend, sglang; autoep: no released DeepSpeed reads it.",
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Map to write (JSON).")],
    num_hidden_layers: Annotated[
        int | None,
        typer.Option("--num-hidden-layers", min=1, help="Transformer layers, for sglang."),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            help="Transformer layers with experts (1-26), where the plan counts 0, 1, 2, ...",
        ),
    ] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Write a plan as the map of a serving engine or of DeepSpeed's AutoEP."""
    _run("export", locals())


@app.command()
def analyze(
    trace: options.Trace,
    report: options.Report = None,
    nodes: options.Nodes = None,
    ranks_per_node: options.RanksPerNode = None,
    cluster: options.Cluster = None,
    hostfile: options.Hostfile = None,
    against: Annotated[
        Path | None, typer.Option("--against", help="Newer trace: say how far it drifted.")
    ] = None,
    windows: Annotated[
        int | None, typer.Option("--windows", help="Say how far windows of the trace drifted.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="With drift: what this plan loses by it.")
    ] = None,
    seed: options.Seed = 0,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show what a trace holds: balance, domains, co-activation; with a cluster, what it could
    save.
    """
    _run("analyze", locals())


@app.command()
def place(
    trace: options.Trace,
    out: options.PlanOut,
    nodes: options.Nodes = None,
    ranks_per_node: options.RanksPerNode = None,
    cluster: options.Cluster = None,
    hostfile: options.Hostfile = None,
    method: options.Method = "coactivation",
    redundant_experts: options.RedundantExperts = 0,
    max_imbalance: options.MaxImbalance = 1.05,
    homes: options.JointHomes = None,
    max_home_imbalance: options.MaxHomeImbalance = 1.05,
    objective: options.Objective = "copies",
    expert_groups: options.ExpertGroups = None,
    start: options.Start = None,
    move_budget: options.MoveBudget = None,
    held_out: options.HeldOut = 0.0,
    bound: options.Bound = False,
    bound_seconds: options.BoundSeconds = None,
    prove: options.Prove = False,
    seed: options.Seed = 0,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Compute where the experts should live, or improve a plan with few moves."""
    _run("place", locals())


@app.command()
def group(
    trace: options.Trace,
    plan: options.Plan,
    out: Annotated[Path, typer.Option("-o", "--out", help="Homes to write (JSON).")],
    predict: Annotated[
        str, typer.Option("--predict", help="prefill, first:32, domain or oracle.")
    ] = "prefill",
    equal_requests: Annotated[
        bool, typer.Option("--equal-requests", help="As many requests on every rank, for training.")
    ] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Give every request a home rank: request id to rank."""
    _run("group", locals())


@app.command()
def evaluate(
    trace: options.Trace,
    plan: options.Plan,
    homes: options.Homes = None,
    baseline: Annotated[
        Path | None, typer.Option("--baseline", help="Plan to move from, for the cost of moving.")
    ] = None,
    row_bytes: Annotated[
        float | None, typer.Option("--row-bytes", help="Bytes of one token on the wire.")
    ] = None,
    held_out: options.HeldOut = 0.0,
    seed: options.Seed = 0,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Predict what a plan costs on a trace."""
    _run("evaluate", locals())


@app.command()
def simulate(
    trace: options.Trace,
    plan: options.Plan,
    homes: options.Homes = None,
    cluster: options.Cluster = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens per rank and step.")] = 512,
    hidden: Annotated[int, typer.Option(min=1, help="Width of a token.")] = 4096,
    ffn: Annotated[int | None, typer.Option(min=1, help="Width of an expert; as a token.")] = None,
    payload: Annotated[str, typer.Option(help="bf16, fp8, mxfp8 or mxfp4.")] = "bf16",
    exchange: Annotated[str, typer.Option(help="flat or hierarchical.")] = "hierarchical",
    compute_us: Annotated[float | None, typer.Option(help="Time of the rest of a step.")] = None,
    expert_us: Annotated[float | None, typer.Option(help="Time per distinct expert.")] = None,
    row_us: Annotated[float | None, typer.Option(help="Time per row of an expert.")] = None,
    groups: Annotated[int | None, typer.Option(min=1, help="Expert-parallel groups.")] = None,
    sweep: Annotated[str | None, typer.Option(help="batch, bandwidth, k or nodes.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Figure of the sweep: .svg, .png.")] = None,
    held_out: options.HeldOut = 0.0,
    seed: options.Seed = 0,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Simulate step times of a plan on a cluster."""
    _run("simulate", locals())


@app.command()
def bake(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint directory.")],
    plan: options.Plan,
    out: Annotated[Path, typer.Option("--out", help="Directory of the new checkpoint.")],
    tag: Annotated[str | None, typer.Option("--tag", help="Default: what 'latest' names.")] = None,
    trust_checkpoint: Annotated[
        bool, typer.Option("--trust-checkpoint", help="Unpickle objects; they can run code.")
    ] = False,
    trust_parameter_order: Annotated[
        bool, typer.Option("--trust-parameter-order", help="For stock optimizer state.")
    ] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Write a checkpoint whose contiguous layout is the placement."""
    _run("bake", locals())


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Trace, or the directory of the baseline run.")],
    second: Annotated[Path | None, typer.Argument(help="Directory of the other run.")] = None,
    plan: options.Plans = None,
    baseline: Annotated[
        str, typer.Option("--baseline", help="linear, or a plan to compare with.")
    ] = "linear",
    homes: options.Homes = None,
    nodes: options.Nodes = None,
    held_out: options.HeldOut = 0.0,
    report: options.Report = None,
    seed: options.Seed = 0,
    wandb: options.Wandb = None,
    wandb_mode: options.WandbMode = "offline",
    wandb_dir: options.WandbDir = None,
    group: options.Group = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Compare two runs, or plans on a trace: baseline, ours, ratio."""
    _run("compare", locals())


@app.command()
def report(
    trace: options.Trace,
    out: Annotated[Path, typer.Option("-o", "--out", help="HTML file to write.")],
    plan: options.Plans = None,
    method: Annotated[
        list[str] | None, typer.Option("--method", help="Also solve with it; may be repeated.")
    ] = None,
    homes: options.Homes = None,
    held_out: options.HeldOut = 0.0,
    seed: options.Seed = 0,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Write one HTML file: the trace, and the plans on it."""
    _run("report", locals())


@app.command()
def record(
    script: Annotated[str, typer.Argument(help="Training script.")] = "train.py",
    trace: Annotated[str, typer.Option("--trace", help="Directory of the trace.")] = "traces/run1",
    hostfile: options.Hostfile = None,
    deepspeed_config: Annotated[
        Path | None, typer.Option("--deepspeed-config", help="ds_config to check.")
    ] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Print the launch line and the configuration that record a run."""
    _run("record", locals())


@app.command()
def bench(
    trace: options.Trace,
    nodes: options.Nodes = None,
    ranks_per_node: options.RanksPerNode = None,
    method: Annotated[
        list[str] | None, typer.Option("--method", help="Method; may be repeated. Default: all.")
    ] = None,
    max_imbalance: options.MaxImbalance = 1.05,
    held_out: options.HeldOut = 0.3,
    seed: options.Seed = 0,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Time the placement methods on a trace, and show their costs."""
    _run("bench", locals())


@app.command()
def doctor(as_json: options.Json = False, debug: options.Debug = False) -> None:
    """Show what is installed here and what is missing for what."""
    _run("doctor", locals())


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Directory of the results.")],
    trace: Annotated[Path | None, typer.Option("--trace", help="Use this recorded trace.")] = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Nodes of the cluster.")] = 2,
    ranks_per_node: Annotated[int, typer.Option("--ranks-per-node", min=1, help="On each.")] = 2,
    wandb_mode: options.WandbMode = "offline",
    seed: options.Seed = 0,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Record, place, run again and compare, on this machine."""
    _run("demo", locals())


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()

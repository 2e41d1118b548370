"""What commands take and read: options that several of them have, clusters, plans, paths.

Imported at start-up: a module of commands imports nothing heavy outside its functions.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, Option

import moe_locality
from moe_locality.errors import ConfigError, PlacementError, TopologyError, TraceError
from moe_locality.files import is_special

if TYPE_CHECKING:
    from moe_locality import ClusterTopology, PlacementPlan, RoutingTrace
    from moe_locality.compare import SplitFrom

Trace = Annotated[Path, Argument(help="Trace: a Parquet directory or an .npz file.")]
Plan = Annotated[Path, Option(help="Placement plan (JSON).")]
Plans = Annotated[list[Path] | None, Option(help="Plan; may be repeated.")]
Nodes = Annotated[int | None, Option(min=1, help="Nodes of the cluster.")]
RanksPerNode = Annotated[int | None, Option(min=1, help="Ranks on each.")]
Cluster = Annotated[Path | None, Option(help="Cluster description (YAML).")]
Hostfile = Annotated[Path | None, Option(help="DeepSpeed hostfile.")]
Homes = Annotated[Path | None, Option(help="Home rank of each request (JSON).")]
Seed = Annotated[int, Option(min=0, help="Seed of everything random.")]
HeldOut = Annotated[float, Option(help="Share of the requests that no plan is made from.")]
MaxImbalance = Annotated[
    str, Option(help="Cap on max/mean load to expect on new requests: auto, or a number.")
]
Report = Annotated[Path | None, Option(help="Also write an HTML report.")]
WandbMode = Annotated[str, Option(help="offline, online or disabled.")]


def read_cluster(
    nodes: int | None,
    ranks_per_node: int | None,
    cluster: Path | None = None,
    hostfile: Path | None = None,
) -> ClusterTopology:
    """Return the cluster that the options name in exactly one of three ways, else TopologyError."""
    ways = {"--nodes": nodes or ranks_per_node, "--cluster": cluster, "--hostfile": hostfile}
    given = [flag for flag, value in ways.items() if value is not None]
    if len(given) != 1:
        raise TopologyError(
            f"found {' and '.join(given) or 'no cluster'}, expected one of: --nodes with "
            "--ranks-per-node, --cluster FILE.yaml, --hostfile FILE"
        )
    if cluster is not None:
        return moe_locality.ClusterTopology.from_yaml(cluster)
    if hostfile is not None:
        return moe_locality.ClusterTopology.from_hostfile(hostfile)
    if nodes is None or ranks_per_node is None:
        raise TopologyError(
            f"found only {'--ranks-per-node' if nodes is None else '--nodes'}, expected both "
            "--nodes and --ranks-per-node: give the other one too"
        )
    return moe_locality.ClusterTopology.uniform(nodes, ranks_per_node)


def split(
    trace: RoutingTrace, held_out: float, seed: int
) -> tuple[RoutingTrace, RoutingTrace | None]:
    """Split off the share ``held_out`` of the requests (None where it is 0), the same for a trace,
    share and seed in every command; ConfigError: the share is outside [0, 1)."""
    if not 0 <= held_out < 1:
        raise ConfigError(
            f"--held-out: found {held_out}, expected a share of at least 0 and below 1, such as 0.3"
        )
    return trace.split(1 - held_out, seed) if held_out else (trace, None)


def read_judged(
    path: Path, held_out: float, seed: int
) -> tuple[RoutingTrace, RoutingTrace, SplitFrom | None]:
    """Read a trace: the part to judge plans on, which ``place --held-out`` with this seed does not
    see, the other part, and what ``compare.made_from`` asks of both (all of it, twice, and None
    where nothing is held out)."""
    whole = moe_locality.read_trace(path)
    train, test = split(whole, held_out, seed)
    if test is None:
        return whole, whole, None
    return test, train, (whole.content_hash(), train.content_hash())


def read_fitting_plan(path: Path, trace: RoutingTrace) -> PlacementPlan:
    """Read a plan; PlacementError: it is damaged, or for another model or experts than a trace."""
    plan = moe_locality.PlacementPlan.read(path)
    check_plan_fits(plan, path, trace)
    return plan


def check_plan_fits(plan: PlacementPlan, path: Path | None, trace: RoutingTrace) -> None:
    """Raise PlacementError where a plan is for another model, other layers or experts."""
    try:
        plan.check_fits(
            num_experts=trace.num_experts, model=trace.model, model_type=trace.model_type
        )
    except PlacementError as error:
        raise PlacementError(f"{path} does not fit the trace: {error}") from error


def linear_plan(trace: RoutingTrace, topology: ClusterTopology) -> PlacementPlan | None:
    """Return the contiguous layout, or None where the experts do not divide among the ranks."""
    if trace.num_experts % topology.num_ranks:
        return None
    sizes = (trace.num_experts, trace.layer_ids, topology.num_nodes, topology.ranks_per_node)
    return moe_locality.PlacementPlan.linear(
        *sizes, model=trace.model, rank_to_node=topology.rank_to_node
    )


def homes_of(path: Path | None, plan: PlacementPlan) -> dict[int, int] | None:
    """Read a homes file for a plan; None where none is named."""
    from moe_locality.placement.homes.assign import read_homes

    return None if path is None else read_homes(path, plan)


def check_writable(path: Path | None, what: str, *inputs: Path | None) -> None:
    """Refuse an output path early, before minutes of work: ConfigError where it is a directory, a
    device or one of ``inputs``, which the command reads, or where nothing can be made. None: there
    is no output."""
    if path is None:
        return
    # directories that are missing are made when the file is written
    target = Path(os.path.realpath(path))
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    if target in [Path(os.path.realpath(given)) for given in inputs if given is not None]:
        reason = "it is also an input, which would be lost"
    elif is_special(target):
        reason = "it is a device or a pipe"
    elif path.is_dir():
        reason = "it is a directory"
    elif not parent.is_dir():
        reason = f"{parent} is a file"
    elif not os.access(parent, os.W_OK | os.X_OK):
        reason = f"{parent} is not writable"
    else:
        return
    raise ConfigError(
        f"cannot write the {what} {path}: {reason}: give a path in a directory that you may write"
    )


def layer_numbers(text: str | None) -> list[int] | None:
    """The numbers that "1,3,5-9" names, None for None; TraceError: it is no such text."""
    if text is None:
        return None
    from moe_locality.trace.schema import MAX_LAYERS

    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not (last.isdecimal() and int(first) <= int(last))):
            raise TraceError(
                f"found --layers {text!r}, expected numbers and ranges such as 1,3,5-9: number the "
                "transformer layers from 0"
            )
        if int(last or first) >= MAX_LAYERS:  # before a list of them is made
            most = f"below {MAX_LAYERS:,}, more than a model has"
            raise TraceError(f"found --layers {text!r}, expected layers {most}: correct it")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def known_wandb_mode(mode: str) -> Literal["offline", "online", "disabled"]:
    """Return the mode; raise ConfigError for an unknown one."""
    if mode in ("offline", "online", "disabled"):
        return mode
    raise ConfigError(f"--wandb-mode: found {mode!r}, expected offline, online or disabled")

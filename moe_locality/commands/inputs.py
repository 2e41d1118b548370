"""What commands read and write: cluster options, plans, homes, paths that must be writable."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from moe_locality.errors import ConfigError, PlacementError, TopologyError
from moe_locality.placement import PlacementPlan
from moe_locality.report import write_text_atomically
from moe_locality.topology import ClusterTopology
from moe_locality.trace import RoutingTrace, read_trace


def read_cluster(
    nodes: int | None,
    ranks_per_node: int | None,
    cluster: Path | None = None,
    hostfile: Path | None = None,
) -> ClusterTopology:
    """Return the cluster that the options name: exactly one of the three ways.

    Raises:
        TopologyError: none or several are given, or only one of --nodes and --ranks-per-node.
    """
    given = [
        name
        for name, there in (
            ("--nodes", nodes is not None or ranks_per_node is not None),
            ("--cluster", cluster is not None),
            ("--hostfile", hostfile is not None),
        )
        if there
    ]
    if len(given) != 1:
        raise TopologyError(
            f"found {' and '.join(given) or 'no cluster'}, expected one of: --nodes with "
            "--ranks-per-node, --cluster FILE.yaml, --hostfile FILE"
        )
    if cluster is not None:
        return ClusterTopology.from_yaml(cluster)
    if hostfile is not None:
        return ClusterTopology.from_hostfile(hostfile)
    if nodes is None or ranks_per_node is None:
        raise TopologyError(
            f"found only {'--ranks-per-node' if nodes is None else '--nodes'}, expected both "
            "--nodes and --ranks-per-node: give the other one too"
        )
    return ClusterTopology.uniform(nodes, ranks_per_node)


def split(
    trace: RoutingTrace, held_out: float, seed: int
) -> tuple[RoutingTrace, RoutingTrace | None]:
    """Split off the share ``held_out`` of the requests; None where nothing is held out.

    The same trace, share and seed give the same split in every command.

    Raises:
        ConfigError: the share is outside [0, 1).
    """
    if not 0 <= held_out < 1:
        raise ConfigError(
            f"--held-out: found {held_out}, expected a share of at least 0 and below 1, such as 0.3"
        )
    return trace.split(1 - held_out, seed) if held_out else (trace, None)


def read_judged(path: Path, held_out: float, seed: int) -> RoutingTrace:
    """Read a trace, or the part of it that ``place --held-out`` with this seed did not see."""
    train, test = split(read_trace(path), held_out, seed)
    return train if test is None else test


def read_fitting_plan(path: Path, trace: RoutingTrace) -> PlacementPlan:
    """Read a plan and check that it is for the model of the trace.

    Raises:
        PlacementError: the plan is damaged, or is for another model, other layers or experts.
    """
    plan = PlacementPlan.read(path)
    try:
        plan.check_fits(num_experts=trace.num_experts, model=trace.model or None)
    except PlacementError as error:
        raise PlacementError(f"{path} does not fit the trace: {error}") from error
    return plan


def read_homes(path: Path, plan: PlacementPlan | None = None) -> dict[int, int]:
    """Read a homes file: a JSON object, request id to rank.

    Raises:
        PlacementError: it cannot be read, is no such object, or names a rank that the plan lacks.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        homes = {int(request): rank for request, rank in content.items()}
        if not all(isinstance(rank, int) and not isinstance(rank, bool) for rank in homes.values()):
            raise TypeError("a rank is not an integer")
    except OSError as error:
        raise PlacementError(
            f"cannot read the homes {path}: {error.strerror}: check the path"
        ) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise PlacementError(
            f"the homes {path} are damaged ({error}), expected a JSON object request id -> rank: "
            "make them again with `moe-locality group`"
        ) from error
    wrong = [r for r in homes.values() if r < 0 or (plan is not None and r >= plan.num_ranks)]
    if wrong:
        most = "" if plan is None else f" to {plan.num_ranks - 1}"
        raise PlacementError(
            f"the homes {path} name rank {wrong[0]}, expected ranks 0{most}: make homes for this "
            "plan"
        )
    return homes


def write_homes(homes: Mapping[int, int], path: Path) -> None:
    """Write a homes file, whole or not at all; one request per line, ascending."""
    lines = ",\n".join(f'"{request}": {rank}' for request, rank in sorted(homes.items()))
    write_text_atomically(path, f"{{\n{lines}\n}}\n", what="homes")


def check_writable(path: Path, what: str, *inputs: Path | None) -> None:
    """Refuse an output path early, before minutes of work: its directory must be writable.

    Directories that are missing are made when the file is written; here the nearest existing one is
    looked at. ``inputs``: files that the command reads and must not replace.

    Raises:
        ConfigError: the path is a directory or an input, or nothing can be made there.
    """
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if path.resolve() in [given.resolve() for given in inputs if given is not None]:
        reason = "it is also an input, which would be lost"
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

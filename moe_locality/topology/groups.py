"""Process groups of a cluster, and the discovery of the cluster itself: collective functions, which
all ranks call in the same order.

What they agree on travels through the rendezvous store, which needs no device and no interface of
its own; a disagreement raises on all ranks, with the ranks that differ.
"""

import dataclasses
import hashlib
import logging
import os
import pickle
import socket
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from moe_locality import compat
from moe_locality.errors import TopologyError
from moe_locality.topology import cluster
from moe_locality.topology.cluster import ClusterTopology, GroupLayout, Order, layout_groups
from moe_locality.topology.sources import NODE_VARIABLE, RANKS_PER_NODE_VARIABLE

if TYPE_CHECKING:
    from moe_locality.config import ClusterConfig

logger = logging.getLogger(__name__)

_KINDS = ("ep", "edp", "intra_node", "inter_node")

_exchanges: Counter[str] = Counter()
_built: dict[str, Callable[[], "ExpertParallelGroups | None"]] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertParallelGroups:
    """This rank's process groups for one ``ep_size``, and the (ascending) ranks of each;
    ``topology`` is the cluster that they were laid out for, where it is known."""

    layout: GroupLayout
    ep_group: Any
    ep_ranks: tuple[int, ...]
    edp_group: Any
    edp_ranks: tuple[int, ...]
    intra_node_group: Any
    intra_node_ranks: tuple[int, ...]
    inter_node_group: Any
    inter_node_ranks: tuple[int, ...]
    topology: ClusterTopology | None = None


def exchange_objects(value: Any, group: Any = None) -> list[Any]:
    """Return every rank's value (plain data that pickles), by position in ``group`` (default: all
    ranks). Collective: where a rank never calls it, the others wait for the store's timeout."""
    ranks = dist.get_process_group_ranks(group)
    me, store = dist.get_rank(), compat.default_store()
    scope = hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]
    key = f"moe_locality/{scope}/{_exchanges[scope]}"
    _exchanges[scope] += 1
    store.set(f"{key}/{me}", pickle.dumps(value))
    if me == ranks[0]:
        store.set(key, pickle.dumps([store.get(f"{key}/{rank}") for rank in ranks]))
    everyone = pickle.loads(store.get(key))
    store.set(f"{key}/read/{me}", "")
    if me == ranks[0]:
        compat.forget_when_read(store, key, ranks)
    return [pickle.loads(value) for value in everyone]


def _raise_on_all(error: str | None, what: str) -> None:
    """Raise TopologyError on every rank when any rank has an error; ``what`` opens the message."""
    errors = exchange_objects(error)
    found = {rank: e for rank, e in enumerate(errors) if e is not None}
    if found:
        first = next(iter(found.values()))
        raise TopologyError(f"{what} failed on ranks {list(found)} of {len(errors)}: {first}")


# -- the groups ------------------------------------------------------------------------------------


def build_groups(layout: GroupLayout) -> ExpertParallelGroups:
    """Make the process groups of a layout, or return those that exist of it on all ranks.

    Collective over all ranks; TopologyError on all where layouts differ or fit another world."""
    digest = layout.digest()
    found = _built.get(digest, lambda: None)()
    answers = exchange_objects(((digest, layout.num_ranks), found is not None))
    layouts, there = zip(*answers, strict=True)
    world, usual = len(layouts), Counter(layouts).most_common(1)[0][0]
    others = [rank for rank, given in enumerate(layouts) if given != usual]
    if others:
        raise TopologyError(
            f"found another layout of the expert groups on ranks {others} than on the other "
            f"{world - len(others)} of {world}, expected the same on all: give every rank the same "
            "cluster description, ep_size and order"
        )
    if usual[1] != world:
        raise TopologyError(
            f"found a layout for {usual[1]} ranks, expected one for the {world} of this run: "
            "describe the cluster that the launcher uses"
        )
    if found is not None and all(there):
        return found
    kinds = {name: getattr(layout, f"{name}_groups") for name in _KINDS}
    in_one_order = dict.fromkeys(ranks for all_of_kind in kinds.values() for ranks in all_of_kind)
    groups = {ranks: _new_group(ranks) for ranks in in_one_order}
    mine = {name: cluster.group_of(lists, dist.get_rank()) for name, lists in kinds.items()}
    fields: dict[str, Any] = {f"{name}_group": groups[ranks] for name, ranks in mine.items()}
    fields |= {f"{name}_ranks": ranks for name, ranks in mine.items()}
    return _remember(ExpertParallelGroups(layout=layout, **fields))


def _remember(built: ExpertParallelGroups) -> ExpertParallelGroups:
    """Let later calls find the groups, as long as torch has them (they end with the default group).
    Weakly, for a reference keeps the threads of a group (see ``compat.end_distributed``)."""
    groups = {f"{name}_group": weakref.ref(getattr(built, f"{name}_group")) for name in _KINDS}
    rest = dataclasses.replace(built, **dict.fromkeys(groups))

    def recall() -> ExpertParallelGroups | None:
        found: dict[str, Any] = {name: group() for name, group in groups.items()}
        if not all(found.values()):
            return None
        try:
            ranks = [tuple(dist.get_process_group_ranks(group)) for group in found.values()]
        except (KeyError, ValueError):
            return None
        same = ranks == [getattr(rest, f"{name}_ranks") for name in _KINDS]
        return dataclasses.replace(rest, **found) if same else None

    _built[built.layout.digest()] = recall
    return built


def _new_group(ranks: Sequence[int]) -> Any:
    if len(ranks) == 1:
        # nobody to talk to: made by its one member alone, without a barrier of all ranks
        return dist.new_group(list(ranks), use_local_synchronization=True)
    return dist.new_group(list(ranks), timeout=compat.default_timeout())


def register_with_deepspeed(groups: ExpertParallelGroups, ep_size: int) -> None:
    """Hand the EP and EDP groups to DeepSpeed, before ``deepspeed.initialize``, which makes expert
    groups only where none of that ``ep_size`` are registered. Collective; TopologyError on all
    ranks, when the groups are for another ``ep_size`` or DeepSpeed has different ones already."""
    error = None
    found = compat.registered_expert_ranks(ep_size)
    if groups.layout.ep_size != ep_size:
        error = f"found groups of ep_size {groups.layout.ep_size}, expected {ep_size}"
    elif found not in (None, (list(groups.ep_ranks), list(groups.edp_ranks))):
        error = (
            f"found expert groups of DeepSpeed for ep_size {ep_size} (EP ranks {found[0]}, EDP "
            f"ranks {found[1]}), expected none or EP {list(groups.ep_ranks)}, EDP "
            f"{list(groups.edp_ranks)}: register before a MoE model is handed to DeepSpeed"
        )
    _raise_on_all(error, f"registering the expert groups of ep_size {ep_size}")
    compat.register_expert_groups(ep_size, groups)


def prepare_groups(
    topology: ClusterTopology, ep_sizes: Iterable[int], order: Order = "E+D", mpu: Any = None
) -> dict[int, ExpertParallelGroups]:
    """Lay out, build and register groups of several EP sizes. Collective; so is TopologyError."""
    sizes = sorted(set(ep_sizes))
    layouts: list[GroupLayout] = []
    error = None
    try:
        layouts = [layout_groups(topology, size, order, mpu) for size in sizes]
    except TopologyError as caught:
        error = str(caught)
    _raise_on_all(error, f"laying out the expert groups of ep_size {sizes}")
    result: dict[int, ExpertParallelGroups] = {}
    for layout in layouts:
        built = dataclasses.replace(build_groups(layout), topology=topology)
        result[layout.ep_size] = _remember(built)
        register_with_deepspeed(built, layout.ep_size)
    return result


def follow_groups(
    ep_ranks: Sequence[int] | None,
    topology: ClusterTopology | None = None,
    cluster_config: "ClusterConfig | None" = None,
) -> tuple[ClusterTopology, GroupLayout]:
    """Make groups inside and across the nodes for expert groups that exist, follow they the nodes
    or not. Collective. Returns the nodes (default: :func:`discover_topology`) and all expert
    groups. ``ep_ranks``: those of this rank's; None, it has none, is a TopologyError on all ranks.
    """
    if topology is None:
        topology = discover_topology(cluster_config=cluster_config)
    everyone = exchange_objects(None if ep_ranks is None else tuple(sorted(ep_ranks)))
    if None in everyone:
        raise TopologyError(
            f"found no expert group on rank {everyone.index(None)}, expected one on every rank: "
            "call deepspeed.initialize first"
        )
    layout = cluster.layout_of(topology, set(everyone))
    _remember(dataclasses.replace(build_groups(layout), topology=topology))
    return topology, layout


def built_groups(
    ep_ranks: Sequence[int], topology: ClusterTopology | None = None
) -> ExpertParallelGroups | None:
    """Return the groups of this rank whose EP group has these ranks, if they were built; with a
    ``topology``, only for the same nodes (models may have clusters of their own)."""
    wanted = tuple(sorted(ep_ranks))
    for groups in (recall() for recall in _built.values()):
        if groups is None or groups.ep_ranks != wanted:
            continue
        if topology is None or (groups.topology or topology).rank_to_node == topology.rank_to_node:
            return groups
    return None


# -- the cluster -----------------------------------------------------------------------------------


def discover_topology(
    group: Any = None, cluster_config: "ClusterConfig | ClusterTopology | None" = None
) -> ClusterTopology:
    """Find the node of every rank. Collective over ``group`` (default: all ranks).

    The first of these counts: the configuration (read on the first rank, so its files need to be
    there only); MOE_LOCALITY_RANKS_PER_NODE; MOE_LOCALITY_NODE, the name of a rank's node; host
    names. Where all host names are equal and the launcher says that there are several nodes (as in
    a test on one machine), the launcher's node numbers count instead. TopologyError on all ranks
    when the sources contradict each other or the number of ranks."""
    env = os.environ
    launchers = (("CROSS_RANK", "CROSS_SIZE"), ("GROUP_RANK", "GROUP_WORLD_SIZE"))
    numbers = (env.get(n) for n, count in launchers if int(env.get(count, "1")) > 1)
    facts: dict[str, Any] = {
        "host": socket.gethostname(),
        "node": env.get(NODE_VARIABLE),
        "ranks_per_node": env.get(RANKS_PER_NODE_VARIABLE),
        "launcher": next((number for number in numbers if number is not None), None),
    }
    if cluster_config is not None and dist.get_process_group_ranks(group)[0] == dist.get_rank():
        try:
            facts["configured"] = ClusterTopology.from_config(cluster_config)
        except TopologyError as error:
            facts["error"] = str(error)
    topology = _combine_facts(exchange_objects(facts, group))
    logger.info("cluster: %s", topology.describe())
    return topology


def _combine_facts(facts: list[dict[str, Any]]) -> ClusterTopology:
    """Decide from what all ranks said; the same input on all ranks, so the same answer or error."""
    world = len(facts)
    if "error" in facts[0]:
        raise TopologyError(f"the first rank could not read the cluster: {facts[0]['error']}")
    if "configured" in facts[0]:
        topology = facts[0]["configured"]
        if topology.num_ranks != world:
            raise TopologyError(
                f"found {topology.num_ranks} ranks in the cluster description "
                f"({topology.describe()}), expected the {world} of this run: describe the cluster "
                "that the launcher uses, or leave the section out"
            )
        return topology
    names = ("ranks_per_node", "node", "host", "launcher")
    sizes, nodes, hosts, numbers = ([fact[name] for fact in facts] for name in names)
    by_size, by_name = _on_all(RANKS_PER_NODE_VARIABLE, sizes), _on_all(NODE_VARIABLE, nodes)
    if by_size:
        if len(set(sizes)) > 1:
            raise TopologyError(
                f"found {RANKS_PER_NODE_VARIABLE} with values {sorted(set(sizes))}, expected the "
                "same on all ranks"
            )
        of_names = {NODE_VARIABLE: nodes[0]} if by_name else {}  # both: from_env refuses them
        environ = {RANKS_PER_NODE_VARIABLE: sizes[0], "WORLD_SIZE": str(world), **of_names}
        return ClusterTopology.from_env(environ)
    if by_name:
        return ClusterTopology.from_node_names(nodes)
    if len(set(hosts)) == 1 and None not in numbers and len(set(numbers)) > 1:
        hosts = [f"{host}#{number}" for host, number in zip(hosts, numbers, strict=True)]
    return ClusterTopology.from_node_names(hosts)


def _on_all(variable: str, values: Sequence[str | None]) -> bool:
    missing = [rank for rank, value in enumerate(values) if value is None]
    if 0 < len(missing) < len(values):
        raise TopologyError(
            f"found {variable} set, but not on ranks {missing} of {len(values)}, expected it on "
            "all ranks or none"
        )
    return not missing

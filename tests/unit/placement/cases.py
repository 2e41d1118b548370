"""Hypothesis strategies: small valid plans and traces."""

import numpy as np
from hypothesis import strategies as st

from moe_locality.placement.plan import PlacementPlan


def random_plan(rng, *, layers, experts, nodes, ranks_per_node, slots_per_rank, **rest):
    """A valid plan with random replicas, never twice on one rank."""
    ranks = nodes * ranks_per_node
    rows = []
    for _ in range(layers):
        held = [set() for _ in range(ranks)]
        for index, expert in enumerate(rng.permutation(experts)):  # every expert once
            held[index % ranks].add(int(expert))
        for rank in rng.permutation(ranks):
            spare = [e for e in rng.permutation(experts).tolist() if e not in held[rank]]
            held[rank].update(spare[: slots_per_rank - len(held[rank])])
        rows.append([e for h in held for e in rng.permutation(sorted(h)).tolist()])
    return PlacementPlan(
        layer_ids=tuple(range(layers)),
        num_experts=experts,
        num_nodes=nodes,
        ranks_per_node=ranks_per_node,
        physical_to_logical_map=np.array(rows, dtype=np.int32),
        **rest,
    )


@st.composite
def plans(draw, replicas=True, experts=None):
    nodes, per_node = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    ranks = nodes * per_node
    slots = draw(st.integers(1, 3))
    if experts is None:
        fewest = slots if replicas else slots * ranks
        experts = draw(st.integers(max(fewest, 1), slots * ranks))
    layers = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    load = rng.integers(0, 100, (layers, experts)) if draw(st.booleans()) else None
    nodes_of = [r // per_node for r in range(ranks)]
    if draw(st.booleans()):
        nodes_of = rng.permutation(nodes_of).tolist()
    return random_plan(
        rng,
        layers=layers,
        experts=experts,
        nodes=nodes,
        ranks_per_node=per_node,
        slots_per_rank=slots,
        expert_load=load,
        rank_to_node=tuple(nodes_of),
    )

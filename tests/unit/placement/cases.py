"""Hypothesis strategies: small valid plans and traces."""

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from moe_locality.placement.plan import PlacementPlan
from moe_locality.placement.serving import RULES
from moe_locality.trace.schema import RoutingTrace


def random_plan(rng, *, layers, experts, nodes, ranks_per_node, slots_per_rank, **rest):
    """A valid plan with random replicas, never twice on one rank; ``slots_per_rank``: one number,
    or of each layer.
    """
    ranks = nodes * ranks_per_node
    rows = []
    sizes = np.broadcast_to(slots_per_rank, layers).tolist()
    for slots in sizes:
        held = [set() for _ in range(ranks)]
        for index, expert in enumerate(rng.permutation(experts)):  # every expert once
            held[index % ranks].add(int(expert))
        for rank in rng.permutation(ranks):
            spare = [e for e in rng.permutation(experts).tolist() if e not in held[rank]]
            held[rank].update(spare[: slots - len(held[rank])])
        empty = [-1] * (max(sizes) - slots)
        rows.append([e for h in held for e in rng.permutation(sorted(h)).tolist() + empty])
    return PlacementPlan(
        layer_ids=tuple(range(layers)),
        num_experts=experts,
        num_nodes=nodes,
        ranks_per_node=ranks_per_node,
        physical_to_logical_map=np.array(rows, dtype=np.int32),
        **rest,
    )


@st.composite
def plans(draw, replicas=True, experts=None, rules=("home",), uneven=True):
    nodes, per_node = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    ranks = nodes * per_node
    slots = draw(st.integers(1, 3))
    if experts is None:
        fewest = slots if replicas else slots * ranks
        experts = draw(st.integers(max(fewest, 1), slots * ranks))
    layers = draw(st.integers(1, 3))
    fewest = -(-experts // ranks)  # slots of a rank that hold all experts once
    sizes = [slots, *draw(st.lists(st.integers(fewest, slots), min_size=2, max_size=2))]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    load = rng.integers(0, 100, (layers, experts)) if draw(st.booleans()) else None
    nodes_of = [r // per_node for r in range(ranks)]
    if draw(st.booleans()):
        nodes_of = rng.permutation(nodes_of).tolist()
    plan = random_plan(
        rng,
        layers=layers,
        experts=experts,
        nodes=nodes,
        ranks_per_node=per_node,
        slots_per_rank=sizes[:layers] if uneven else slots,
        expert_load=load,
        rank_to_node=tuple(nodes_of),
        serving_rule=draw(st.sampled_from(rules)),
    )
    if plan.serving_rule == "visited" and draw(st.booleans()):
        plan = replace(plan, serving_nodes=random_choices(rng, plan))
    return plan


def random_choices(rng, plan):
    """Lists of some of the nodes that hold an expert, in any order, of all of a plan."""
    found = np.full((plan.num_layers, plan.num_nodes, plan.num_experts, plan.num_nodes), -1)
    for layer, held in enumerate(plan.held_by_node):
        for node in range(plan.num_nodes):
            for expert in range(plan.num_experts):
                some = rng.permutation(np.flatnonzero(held[expert]))[: rng.integers(1, 4)]
                some = [node] if held[expert, node] else some
                found[layer, node, expert, : len(some)] = some
    return found


def random_trace(
    rng, *, tokens, layers, experts, top_k, requests=3, ranks=None, dropped=0.1, skew=0.7
):
    """A small trace of tokens with uneven popularity (less for larger skew), some picks dropped."""
    popularity = rng.gamma(skew, 1.0, (layers, experts)) + 1e-3
    noise = rng.gumbel(size=(tokens, layers, experts))
    ids = np.argsort(-(np.log(popularity) + noise), axis=2)[..., :top_k].astype(np.int16)
    ids[rng.random(ids.shape) < dropped] = -1
    return RoutingTrace(
        model="random",
        num_experts=experts,
        layer_ids=np.arange(layers, dtype=np.int32),
        domain=("a", "b"),
        expert_ids=ids,
        request_id=np.sort(rng.integers(0, requests, tokens)),
        position=np.arange(tokens, dtype=np.int32),
        stage=rng.integers(0, 2, tokens).astype(np.uint8),
        domain_id=rng.integers(-1, 2, tokens).astype(np.int32),
        rank=None if ranks is None else rng.integers(0, ranks, tokens).astype(np.int32),
    )


@st.composite
def plans_with_traces(draw, replicas=True, rules=RULES, uneven=True):
    plan = draw(plans(replicas=replicas, rules=rules, uneven=uneven))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    trace = random_trace(
        rng,
        tokens=draw(st.integers(1, 30)),
        layers=plan.num_layers,
        experts=plan.num_experts,
        top_k=draw(st.integers(1, min(4, plan.num_experts))),
        ranks=plan.num_ranks,
    )
    return plan, trace

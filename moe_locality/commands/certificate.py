"""How far a plan is from the fewest copies of any plan, for the ``place`` command."""

from typing import Any

from moe_locality.placement import PlacementPlan
from moe_locality.topology import ClusterTopology
from moe_locality.trace import RoutingTrace


def certificate_of(
    plan: PlacementPlan,
    trace: RoutingTrace,
    topology: ClusterTopology,
    max_imbalance: float,
    seconds: float,
    prove: bool,
) -> dict[str, Any] | None:
    """Return what the plan finds, the bound and the gap; None where there is no bound.

    There is none for replicas, for a trace of counts, for one node, and where ``seconds`` is 0. A
    plan with home profiles is certified for the homes that it gives the requests of the trace. With
    ``prove``, layers of small models are searched by branch and bound as well.
    """
    from moe_locality.placement.bounds.lower import certify_plan
    from moe_locality.placement.homes.assign import assign_homes

    countable = trace.expert_ids is not None and topology.num_nodes > 1
    if not countable or not plan.is_permutation or seconds <= 0:
        return None
    homes = None
    if plan.home_profiles is not None:
        homes = assign_homes(trace, plan, predict="oracle")
    found = certify_plan(
        trace, plan, topology, homes, max_imbalance=max_imbalance, seconds=seconds, prove=prove
    )
    return {**found.to_dict(), "homes": "uniform" if homes is None else "given"}


def certificate_words(found: dict[str, Any]) -> str:
    """Return one line for people."""
    cap, proved = found["max_imbalance"], found["proved_layers"]
    best = f"; {proved} of {found['layers']} layers are proved to be best" if proved else ""
    return (
        f"copies {found['found']:.4f} on the trace it was made from; no placement without replicas "
        f"has fewer than {found['bound']:.4f} (node loads up to {cap:.3f} x mean): gap "
        f"{found['gap']:.1%}, at most {found['worst_gap']:.1%} (layer {found['worst_layer']})"
        f"{best}"
    )

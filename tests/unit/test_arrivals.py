import numpy as np
import pytest

from moe_locality.arrivals import HORIZON_REQUESTS, ArrivingHomes
from moe_locality.errors import PlacementError
from moe_locality.placement import PlacementPlan, assign_homes, evaluate, solve
from moe_locality.placement.homes.predictor import known_tokens, requests_of
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.trace.schema import RoutingTrace

PLAN = PlacementPlan.linear(8, [0, 1], 2, 2)


def arrive(plan, trace, predict, order, **options):
    requests = requests_of(trace)
    rows = known_tokens(trace, requests, predict)
    online, homes = ArrivingHomes(plan, predict=predict, **options), {}
    for place in order:
        ids = trace.expert_ids[rows[requests.index[rows] == place]]
        homes[int(requests.request_ids[place])] = online.assign(ids, int(requests.tokens[place]))
    return online, homes


def test_each_request_goes_to_its_experts_while_there_is_room():
    rng = np.random.default_rng(0)
    online = ArrivingHomes(PLAN)
    nodes = []
    for number in range(200):
        ids = rng.integers(0, 4, (5, 2, 1)) + 4 * (number % 2)
        rank = online.assign(ids, 10)
        nodes.append(PLAN.rank_to_node[rank])
    assert np.mean(np.array(nodes) == np.arange(200) % 2) >= 0.95
    filled = online.tokens_per_rank
    assert filled.sum() == 2000
    assert filled.max() / filled.mean() <= 1.05


def test_the_cap_holds_when_everybody_wants_the_same_node():
    online = ArrivingHomes(PLAN, max_imbalance=1.1)
    rng = np.random.default_rng(1)
    for _ in range(40 * HORIZON_REQUESTS):
        online.assign(np.zeros((3, 2, 1), dtype=np.int16), int(rng.integers(1, 20)))
    filled = online.tokens_per_rank
    assert filled.max() / filled.mean() <= 1.1
    assert filled[:2].sum() > filled[2:].sum()  # what the cap allows goes to the experts


def test_who_has_most_to_lose_chooses_first_of_those_who_come_together():
    """Sixty whose picks are on node 0 more often than not, then twenty whose picks all are."""
    online = ArrivingHomes(PLAN)
    mild, eager = (np.array(experts).reshape(5, 1, 1) for experts in ([0, 0, 0, 4, 4], [0] * 5))
    asked = [np.repeat(picks, 2, axis=1) for picks in [mild] * 60 + [eager] * 20]
    homes = online.assign_together(
        np.stack([online.score(picks) for picks in asked]), np.full(80, 10)
    )
    nodes = PLAN.node_of_rank[homes]
    assert (nodes[60:] == 0).all()
    filled = online.tokens_per_rank
    assert filled.max() / filled.mean() <= 1.05
    assert filled[:2].sum() == 420  # as many as the cap allows: 21 requests on each of its ranks


def test_corrections_make_room_and_nothing_known_goes_to_the_emptiest():
    online = ArrivingHomes(PLAN)
    nothing = np.zeros((0, 2, 1), dtype=np.int16)
    ranks = [online.assign(nothing, 10) for _ in range(4)]
    assert sorted(ranks) == [0, 1, 2, 3]
    online.correct(2, 10, 0)
    assert online.tokens_per_rank.tolist() == [10, 10, 0, 10]
    assert online.assign(nothing, 10) == 2


@pytest.mark.parametrize(
    ("ids", "tokens", "message"),
    [
        (np.zeros((3, 1, 1), int), 1, "expected integers of shape \\[tokens, 2, top_k\\]"),
        (np.full((3, 2, 1), 8), 1, "expected -1 to 7: give logical ids"),
        (np.zeros((3, 2, 1), int), -1, "tokens: found -1"),
    ],
)
def test_what_is_no_request_is_refused(ids, tokens, message):
    with pytest.raises(PlacementError, match=message):
        ArrivingHomes(PLAN).assign(ids, tokens)


def test_what_cannot_be_known_on_arrival_is_refused():
    with pytest.raises(PlacementError, match="expected 'prefill' or 'first:N'"):
        ArrivingHomes(PLAN, predict="oracle")
    with pytest.raises(PlacementError, match="max_imbalance: found"):
        ArrivingHomes(PLAN, max_imbalance=0.9)


def test_one_by_one_is_nearly_as_good_as_all_at_once(routing_data):
    trace = RoutingTrace.from_npz(routing_data / "gpt_oss_20b_benchmarks.npz")
    train, test = trace.select_layers(trace.layer_ids[::4]).split(0.7, seed=0)
    topology = ClusterTopology.uniform(4, 2)
    plan = solve(train, topology, homes="joint", max_imbalance=1.08)
    linear = evaluate(test, solve(train, topology, method="linear"))
    batch = evaluate(test, plan, homes=assign_homes(test, plan, predict="first:32"))
    order = np.random.default_rng(0).permutation(len(test.request_ids))
    online, homes = arrive(plan, test, "first:32", order)
    filled = online.tokens_per_rank
    assert filled.max() / filled.mean() <= 1.051
    saved = linear.copies - evaluate(test, plan, homes=homes).copies
    assert saved >= 0.93 * (linear.copies - batch.copies)
    assert saved > linear.copies - evaluate(test, plan).copies  # homes at random

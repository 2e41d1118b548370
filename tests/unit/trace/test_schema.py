import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.errors import TraceError
from moe_locality.trace import DECODE, PREFILL, UNKNOWN, RoutingTrace
from tests.unit.trace.cases import assert_equal, make_load_trace, make_trace, traces

GOOD = {
    "model": "m",
    "num_experts": 4,
    "layer_ids": [0, 1],
    "domain": ("a",),
    "expert_ids": [[[0, 1], [2, 3]], [[1, -1], [-1, -1]]],
    "request_id": [0, 0],
    "position": [0, 1],
}
LOAD = {"model": "m", "num_experts": 4, "layer_ids": [0], "expert_load": [[[1, 2, 3, 4]]]}


def test_defaults_and_dtypes():
    trace = RoutingTrace(**GOOD)
    assert (trace.kind, trace.num_tokens, trace.num_layers, trace.top_k) == ("tokens", 2, 2, 2)
    assert trace.expert_ids.dtype == np.int16
    assert trace.request_id.dtype == np.int64
    assert trace.stage.tolist() == [UNKNOWN, UNKNOWN]
    assert trace.domain_id.tolist() == [-1, -1]
    assert trace.load().tolist() == [[1, 2, 0, 0], [0, 0, 1, 1]]
    assert trace.groups == ("a",)


def test_arrays_of_the_right_dtype_are_not_copied():
    ids = np.zeros((5, 2, 1), np.int16)
    trace = RoutingTrace(**GOOD | {"expert_ids": ids, "request_id": range(5), "position": range(5)})
    assert np.shares_memory(trace.expert_ids, ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"expert_ids": [[[0, 4], [2, 3]], [[1, 0], [0, 1]]]},
            r"expert id 4 at token 0, layer row 0",
        ),
        (
            {"expert_ids": [[[0, 1], [2, 3]], [[1, 0], [0, -2]]]},
            r"expert id -2 at token 1, layer row 1",
        ),
        (
            {"expert_ids": [[[0, 1], [3, 3]], [[1, 0], [0, 1]]]},
            r"expert 3 twice .* token 0, layer row 1",
        ),
        ({"expert_ids": np.full((2, 2, 1), 2**16)}, r"expert id 65536"),
        (
            {"expert_ids": np.zeros((2, 3, 1), int)},
            r"shape \(2, 3, 1\), expected \[T, L, K\] with L = 2",
        ),
        ({"expert_ids": np.zeros((2, 2), int)}, r"expected 3 dimensions"),
        ({"expert_ids": np.zeros((2, 2, 1))}, r"dtype float64, expected integers"),
        ({"expert_ids": np.full((2, 2, 5), -1)}, r"5 picks per token among 4 experts"),
        ({"expert_ids": np.zeros((2, 2, 0), int)}, r"0 picks per token"),
        ({"request_id": [0, -3]}, r"request_id -3 in row 1"),
        ({"request_id": [0]}, r"1 entries in request_id for 2 rows"),
        ({"request_id": None}, r"no request_id"),
        ({"position": [0, 2**40]}, r"position values 0..1099511627776"),
        ({"stage": [0, 3]}, r"stage code 3"),
        ({"stage": [0, 999]}, r"stage values 0..999"),
        ({"domain_id": [0, 1]}, r"domain_id 1, .* table has 1 names"),
        ({"domain_id": [0, -2]}, r"domain_id -2"),
        ({"domain": ("a", "b", "a")}, r"domain 'a' twice"),
        ({"domain": "abc"}, r"domain as one string"),
        ({"domain_group": ("x", "y")}, r"2 domain groups for 1 domains"),
        ({"layer_ids": [1, 1]}, r"repeated layer ids"),
        ({"layer_ids": [-1, 1]}, r"layer id -1"),
        ({"num_experts": 0}, r"num_experts = 0"),
        ({"num_experts": 40_000}, r"num_experts = 40000"),
        ({"num_experts": 4.5}, r"num_experts = 4.5"),
        ({"rank": [0, -1]}, r"rank -1 in row 1"),
        ({"expert_weights": np.zeros((2, 2, 1), np.float16)}, r"expert_weights float16 of shape"),
        ({"expert_weights": np.zeros((2, 2, 2), int)}, r"expert_weights int64"),
        ({"expert_load": [[[1]]]}, r"found both of expert_ids and expert_load"),
        ({"expert_ids": None}, r"found neither of expert_ids and expert_load"),
        ({"step_tokens": [1, 1]}, r"step_tokens or load_top_k beside expert_ids"),
    ],
)
def test_impossible_tokens_are_named(change, message):
    with pytest.raises(TraceError, match=message):
        RoutingTrace(**GOOD | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_load": [[[1, 2, 3]]]}, r"shape \(1, 1, 3\)"),
        ({"expert_load": [[[1, 2, 3, -4]]]}, r"expert load of -4"),
        ({"request_id": [0]}, r"request_id beside expert_load"),
        ({"load_top_k": 5}, r"5 picks per token among 4 experts"),
        ({"step_tokens": [-1]}, r"step_tokens -1"),
        ({"step": [1, 2]}, r"2 entries in step for 1 rows"),
    ],
)
def test_impossible_loads_are_named(change, message):
    with pytest.raises(TraceError, match=message):
        RoutingTrace(**LOAD | change)


def test_checks_reach_the_last_chunk():
    """The range and repeat checks run in chunks; an error in the last row must still be found."""
    ids = np.tile(np.arange(8, dtype=np.int16), (300_000, 2, 1))
    rows = {"request_id": np.arange(300_000), "position": np.zeros(300_000, int)}
    ids[-1, 1, 7] = 0
    with pytest.raises(TraceError, match="expert 0 twice among the picks of token 299999"):
        RoutingTrace(**GOOD | {"num_experts": 8, "expert_ids": ids, **rows})
    ids[-1, 1, 7] = 8
    with pytest.raises(TraceError, match="expert id 8 at token 299999"):
        RoutingTrace(**GOOD | {"num_experts": 8, "expert_ids": ids, **rows})


def test_empty_traces_are_allowed():
    trace = make_trace(num_tokens=0)
    assert trace.num_tokens == 0
    assert trace.load().sum() == 0
    assert len(trace.request_ids) == 0
    assert trace.content_hash() == make_trace(seed=3, num_tokens=0).content_hash()


@settings(max_examples=30, deadline=None)
@given(traces())
def test_load_counts_every_pick_once(trace):
    load = trace.load()
    assert load.shape == (trace.num_layers, trace.num_experts)
    assert load.sum() == (trace.expert_ids >= 0).sum()
    for layer in range(trace.num_layers):
        for expert in np.unique(trace.expert_ids[:, layer]):
            if expert >= 0:
                assert load[layer, expert] == (trace.expert_ids[:, layer] == expert).sum()


def test_load_kind():
    trace = make_load_trace()
    assert (trace.kind, trace.top_k) == ("load", 2)
    assert trace.num_tokens == trace.step_tokens.sum()
    assert (trace.load() == trace.expert_load.sum(axis=0)).all()
    unknown = replace(trace, step_tokens=None, load_top_k=0)
    assert unknown.num_tokens == 0
    by_picks = replace(
        unknown,
        load_top_k=2,
        expert_load=np.full((3, 2, 8), 10),
        step=None,
        domain_id=None,
        stage=None,
    )
    assert by_picks.num_tokens == 3 * 8 * 10 // 2
    with pytest.raises(TraceError, match=r"kind 'load' .* but the test needs kind 'tokens'"):
        trace.tokens_only("the test")
    with pytest.raises(TraceError, match="kind 'load'"):
        trace.filter(requests=[0])


def test_filter_keeps_what_meets_every_condition():
    trace = make_trace(num_tokens=200)
    part = trace.filter(domains=["code"], stages=["prefill", DECODE], layers=[5, 1])
    keep = (trace.domain_id == 1) & np.isin(trace.stage, [PREFILL, DECODE])
    assert 0 < part.num_tokens == keep.sum()
    assert part.layer_ids.tolist() == [5, 1]
    np.testing.assert_array_equal(part.expert_ids, trace.expert_ids[keep][:, [2, 0]])
    assert part.domain == trace.domain
    group = trace.filter(domain_groups="formal")
    assert group.num_tokens == (trace.domain_id >= 1).sum()
    some = trace.filter(requests=trace.request_ids[:3])
    assert some.request_ids.tolist() == trace.request_ids[:3].tolist()
    assert trace.filter(requests=[10**9]).num_tokens == 0


def test_filter_leaves_unknown_domains_out():
    trace = make_trace(num_tokens=200)
    assert (trace.domain_id == -1).any()
    everything = trace.filter(domains=trace.domain)
    assert everything.num_tokens == (trace.domain_id >= 0).sum()


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({"domains": ["cooking"]}, r"domain 'cooking' asked for, expected one of: law, code, math"),
        ({"domain_groups": "law"}, r"domain group 'law' asked for, expected one of: text, formal"),
        ({"stages": "middle"}, r"stages \['middle'\]"),
        ({"stages": 7}, r"stages \[7\]"),
        ({"layers": [0]}, r"layer 0 asked for, expected one of: 1, 3, 5"),
        ({"layers": [1, 1]}, r"layers \[1, 1\] asked for, expected each once"),
    ],
)
def test_filter_names_unknown_conditions(condition, message):
    with pytest.raises(TraceError, match=message):
        make_trace().filter(**condition)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.floats(0.01, 0.99), st.integers(0, 5))
def test_split_is_a_partition_by_request(seed, fraction, split_seed):
    trace = make_trace(seed, num_tokens=60)
    train, test = trace.split(fraction, split_seed)
    assert train.num_tokens + test.num_tokens == trace.num_tokens
    assert not set(train.request_ids) & set(test.request_ids)
    assert set(train.request_ids) | set(test.request_ids) == set(trace.request_ids)
    expected = min(max(round(fraction * len(trace.request_ids)), 1), len(trace.request_ids) - 1)
    assert len(train.request_ids) == expected
    rows = np.random.default_rng(seed).permutation(trace.num_tokens)
    again, _ = trace.take(rows).split(fraction, split_seed)
    assert again.request_ids.tolist() == train.request_ids.tolist()


def test_split_of_loads_and_its_limits():
    trace = make_load_trace()
    train, test = trace.split(0.5, 1)
    assert not set(train.step) & set(test.step)
    assert train.num_rows == test.num_rows == 6
    assert train.step.tolist() != trace.split(0.5, 2)[0].step.tolist()
    assert replace(trace, step=None).split(0.5)[0].num_rows == 6
    with pytest.raises(TraceError, match=r"found 1 requests .* at least 2"):
        make_trace(num_tokens=1).split()
    with pytest.raises(TraceError, match="fraction 1"):
        trace.split(1.0)


@settings(max_examples=30, deadline=None)
@given(traces(), st.integers(0, 99))
def test_hash_ignores_the_order_of_rows_layers_and_domains(trace, seed):
    rng = np.random.default_rng(seed)
    shuffled = trace.take(rng.permutation(trace.num_tokens))
    shuffled = shuffled.filter(layers=rng.permutation(trace.layer_ids).tolist())
    renamed = replace(
        shuffled,
        domain=("unused", *trace.domain[::-1]),
        domain_group=("z", *trace.groups[::-1]),
        domain_id=np.where(shuffled.domain_id < 0, -1, 3 - shuffled.domain_id),
    )
    assert renamed.content_hash() == trace.content_hash()
    assert renamed.same_content(trace)


@pytest.mark.parametrize(
    "field",
    ["expert_ids", "request_id", "position", "stage", "domain_id", "rank", "step", "weights"],
)
def test_hash_sees_every_field(field):
    name = "expert_weights" if field == "weights" else field
    trace = make_trace(weights=True, rank=True, step=True, num_experts=300, missing=False)
    changed = np.array(getattr(trace, name))
    if name == "stage" or name == "domain_id":
        changed[7] = 0 if changed[7] else 1
    elif name == "expert_ids":
        changed[7, 1, 0] = next(i for i in range(300) if i not in changed[7, 1])
    else:
        changed[7] += 1
    other = replace(trace, **{name: changed})
    assert other.content_hash() != trace.content_hash()
    assert not other.same_content(trace)


def test_hash_sees_settings_and_repeated_rows():
    trace = make_trace()
    assert replace(trace, model="other").content_hash() != trace.content_hash()
    assert replace(trace, num_experts=9).content_hash() != trace.content_hash()
    twice = RoutingTrace.concat([trace, trace])
    assert twice.content_hash() != trace.content_hash()
    rows = np.random.default_rng(1).permutation(twice.num_tokens)
    assert twice.take(rows).content_hash() == twice.content_hash()


def test_anonymous_tokens_hash_alike_in_any_order():
    """Rows with equal keys are ordered by their picks, so that their order does not matter."""
    trace = make_trace(num_tokens=50, missing=False)
    same = replace(
        trace, request_id=np.zeros(50, int), position=np.zeros(50, int), stage=None, domain_id=None
    )
    rows = np.random.default_rng(0).permutation(50)
    assert same.take(rows).content_hash() == same.content_hash()


def test_pickles_and_describes_itself():
    trace = make_trace(weights=True)
    assert_equal(pickle.loads(pickle.dumps(trace)), trace)
    assert "kind='tokens', rows=40, layers=3, num_experts=8, top_k=2" in repr(trace)
    with pytest.raises(TypeError, match="no fields"):
        trace.evolve(unknown=1)

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.errors import TraceError
from moe_locality.trace import RoutingTrace
from moe_locality.trace.merge import merge
from tests.unit.trace.cases import assert_equal, make_load_trace, make_trace


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(1, 5), st.booleans())
def test_ranks_come_together(seed, parts, weights):
    trace = make_trace(seed, weights=weights, rank=True)
    owner = np.random.default_rng(seed).integers(0, parts, trace.num_tokens)
    pieces = [trace.take(owner == part) for part in range(parts)]
    assert RoutingTrace.concat(pieces).same_content(trace)
    assert RoutingTrace.merge(pieces).same_content(trace)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.booleans(), st.booleans())
def test_pipeline_stages_come_together(seed, weights, step):
    trace = make_trace(seed, num_layers=5, weights=weights, step=step)
    rng = np.random.default_rng(seed)
    layers = rng.permutation(trace.layer_ids)
    stages = [
        trace.filter(layers=part.tolist()).take(rng.permutation(trace.num_tokens))
        for part in np.split(layers, [1, 3])
    ]
    joined = RoutingTrace.merge(stages)
    assert joined.layer_ids.tolist() == trace.layer_ids.tolist()
    assert joined.same_content(trace)


def test_domains_are_matched_by_name():
    first = make_trace(0)
    second = replace(
        make_trace(1), domain=("chat", "math", "law"), domain_group=("text", "formal", "text")
    )
    both = RoutingTrace.concat([first, second])
    assert both.domain == ("law", "code", "math", "chat")
    assert both.domain_group == ("text", "formal", "formal", "text")
    names = [both.domain[i] if i >= 0 else None for i in both.domain_id]
    expected = [t.domain[i] if i >= 0 else None for t in (first, second) for i in t.domain_id]
    assert names == expected
    clash = replace(second, domain_group=("text", "formal", "fun"))
    with pytest.raises(TraceError, match="domain 'law' in group 'text' and in group 'fun'"):
        RoutingTrace.concat([first, clash])


def test_layers_in_another_order_are_aligned():
    trace = make_trace()
    turned = trace.filter(layers=[5, 1, 3])
    both = RoutingTrace.concat([trace, turned])
    np.testing.assert_array_equal(both.expert_ids[40:], trace.expert_ids)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (replace(make_trace(1), model="x"), "model 'x' beside 'toy/model'"),
        (make_trace(1, num_experts=9), "num_experts 9 beside 8"),
        (make_trace(1, top_k=3), "top_k 3 beside 2"),
        (make_load_trace(), "kind 'load' beside 'tokens'"),
        (make_trace(1, weights=True), "expert_weights in 1 of 2 traces"),
        (make_trace(1, step=True), "step in 1 of 2 traces"),
        (make_trace(1, num_layers=2), "different layers, .* join pipeline stages with merge"),
    ],
)
def test_what_does_not_fit_is_named(other, message):
    with pytest.raises(TraceError, match=message):
        RoutingTrace.concat([make_trace(), other])


def test_the_model_type_that_is_known_stays():
    """The first trace's was taken: an older shard in front of newer ones hid it."""
    known = make_trace()
    for traces in ([known, replace(known, model_type="")], [replace(known, model_type=""), known]):
        assert RoutingTrace.concat(traces).model_type == "toy"
        assert RoutingTrace.merge(traces, strict=False).model_type == "toy"
    with pytest.raises(TraceError, match="found model_type 'other' beside 'toy'"):
        RoutingTrace.concat(
            [replace(known, model_type=""), known, known.evolve(model_type="other")]
        )


def test_nothing_to_join():
    for join in (RoutingTrace.concat, RoutingTrace.merge):
        with pytest.raises(TraceError, match="no trace to join"):
            join([])


def stages():
    trace = make_trace(num_layers=4, missing=False)
    return trace, trace.filter(layers=[1, 3]), trace.filter(layers=[5, 7])


def test_missing_tokens_are_an_error_or_filled():
    trace, first, second = stages()
    short = second.take(np.arange(40) != 13)
    with pytest.raises(
        TraceError, match=r"1 of 40 tokens not recorded .*layers \[5, 7\]"
    ) as caught:
        RoutingTrace.merge([first, short])
    assert f"position {trace.position[13]}" in str(caught.value)
    joined, problems = merge([first, short], strict=False)
    assert joined.num_tokens == 40
    assert (joined.expert_ids[13, 2:] == -1).all()
    np.testing.assert_array_equal(joined.expert_ids[13, :2], trace.expert_ids[13, :2])
    assert joined.take(np.arange(40) != 13).same_content(trace.take(np.arange(40) != 13))
    assert len(problems) == 1
    assert RoutingTrace.merge([first, second.take(np.zeros(0, int))], strict=False).num_tokens == 40


def test_repeated_tokens_are_an_error_or_dropped():
    trace, first, second = stages()
    twice = RoutingTrace.concat([second, second.take(np.arange(2))])
    with pytest.raises(TraceError, match=r"2 repeated tokens, .* twice in one pipeline stage"):
        RoutingTrace.merge([first, twice])
    joined, problems = merge([first, twice], strict=False)
    assert joined.same_content(trace)
    assert "kept the first of each" in problems[0]


def test_labels_come_from_the_stage_that_knows_them():
    trace, first, second = stages()
    blank = replace(first, stage=None, domain_id=None)
    assert RoutingTrace.merge([blank, second]).same_content(trace)
    plain = replace(first, stage=np.zeros(40, int))
    wrong = replace(second, stage=(np.arange(40) == 5).astype(int))
    with pytest.raises(TraceError, match="1 tokens whose stage differs between pipeline stages"):
        RoutingTrace.merge([plain, wrong])
    joined, problems = merge([plain, wrong], strict=False)
    assert (joined.stage == 0).all()
    assert "kept that of the first stage" in problems[0]


def test_overlapping_layers_are_an_error_or_left_out():
    trace, first, _ = stages()
    overlap = trace.filter(layers=[3, 5]).take(np.arange(10))
    with pytest.raises(TraceError, match=r"layers \[3\] in parts with different layer sets"):
        RoutingTrace.merge([first, overlap])
    joined, problems = merge([first, overlap], strict=False)
    assert_equal(joined, first)
    assert "left out the smaller part of 10 rows" in problems[0]


def test_rank_is_that_of_the_first_stage():
    _trace, first, second = stages()
    joined = RoutingTrace.merge(
        [replace(second, rank=np.full(40, 4)), replace(first, rank=np.full(40, 1))]
    )
    assert joined.rank.tolist() == [1] * 40
    with pytest.raises(TraceError, match="expert_weights in 1 of 2 pipeline stages"):
        RoutingTrace.merge([first, replace(second, expert_weights=np.zeros((40, 2, 2)))])


def test_loads_are_joined_by_step():
    trace = make_load_trace()
    rows = np.random.default_rng(0).permutation(12)
    parts = [trace.filter(layers=[0]), trace.filter(layers=[7]).take(rows)]
    assert RoutingTrace.merge(parts).same_content(trace)

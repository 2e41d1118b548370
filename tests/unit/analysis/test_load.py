from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.analysis import stats
from moe_locality.errors import TraceError
from moe_locality.placement.costs import imbalance
from moe_locality.trace import RoutingTrace
from tests.unit.trace.cases import make_load_trace, make_trace


def test_measures_of_known_loads():
    even, one = np.full(8, 5), np.array([0, 0, 0, 9, 0, 0, 0, 0])
    assert imbalance(np.stack([even, one])).tolist() == [1, 8]
    np.testing.assert_allclose(stats.gini(np.stack([even, one])), [0, 7 / 8], atol=1e-12)
    np.testing.assert_allclose(stats.entropy_bits(np.stack([even, one])), [3, 0], atol=1e-12)
    np.testing.assert_allclose(stats.top_share(np.stack([even, one]), 0.25), [1 / 4, 1])
    np.testing.assert_allclose(stats.gini(np.array([1, 3])), 0.25)
    np.testing.assert_allclose(imbalance(np.array([1, 3])), 1.5)


def test_no_load_is_nan_not_a_number():
    empty = np.zeros((2, 4), np.int64)
    for measure in (
        partial(imbalance, empty=np.nan),
        stats.gini,
        stats.entropy_bits,
        stats.top_share,
    ):
        assert np.isnan(measure(empty)).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999))
def test_measures_against_their_definitions(seed):
    load = np.random.default_rng(seed).integers(0, 50, 12) + 1
    pairs = np.abs(load[:, None] - load[None, :]).sum()
    np.testing.assert_allclose(stats.gini(load), pairs / (2 * 12 * load.sum()))
    p = load / load.sum()
    np.testing.assert_allclose(stats.entropy_bits(load), -(p * np.log2(p)).sum())


@pytest.mark.parametrize("by", ["domain", "group", "stage", "request", "step"])
def test_parts_are_the_filtered_traces(by):
    trace = make_trace(num_tokens=300, step=True)
    names, loads = stats.load_by(trace, by)
    assert loads.sum(axis=0).tolist() == trace.load().tolist()
    for name, load in zip(names, loads, strict=True):
        if by == "request":
            part = trace.filter(requests=[int(name)])
        elif by == "step":
            part = trace.take(trace.step == int(name))
        elif by == "stage":
            part = trace.filter(stages=name)
        elif name == "(unknown)":
            part = trace.take(trace.domain_id == -1)
        else:
            part = trace.filter(
                **{"domain": {"domains": name}, "group": {"domain_groups": name}}[by]
            )
        assert load.tolist() == part.load().tolist()
        assert part.num_tokens > 0


def test_parts_of_counts():
    trace = make_load_trace()
    names, loads = stats.load_by(trace, "domain")
    assert names == ("code", "law")
    assert loads[0].tolist() == trace.filter(domains="code").load().tolist()
    with pytest.raises(TraceError, match="found no request in the trace"):
        stats.load_by(trace, "request")
    with pytest.raises(TraceError, match="grouping 'color', expected one of"):
        stats.load_by(trace, "color")


# max/mean load and share of the busiest 10 % of experts, mean over layers, published with the data
REAL = {
    "gpt_oss_20b_benchmarks": (2.59, 1.96, 3.72, 0.219),
    "deepseek_v2_lite_chat_prompts": (1.86, 1.29, 2.81, 0.145),
    "deepseek_v2_lite_esft_tasks": (2.73, 1.84, 3.42, 0.2),
    "flame_moe_290m_pretrain_sample": (1.66, 1.44, 1.97, 0.139),
    "llama4_maverick_mmlu": (21.4, 5.3, 127.83, 0.543),
    "mixtral_8x7b_mmlu_request_load": (1.24, 1.06, 1.51, 0.155),
    "smartmoe_24l_32e_training_load": (11.02, 4.47, 15.56, 0.626),
    "olmoe_1b7b_domain_load": (2.80, 2.17, 3.21, 0.212),
}


@pytest.mark.parametrize("name", REAL)
def test_real_traces(routing_data, name):
    load = RoutingTrace.from_npz(routing_data / f"{name}.npz").load()
    values = imbalance(load)
    found = (values.mean(), values.min(), values.max(), stats.top_share(load).mean())
    np.testing.assert_allclose(found, REAL[name], rtol=4e-3)

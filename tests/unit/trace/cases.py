"""Made-up traces for the tests of this folder; every value follows from the seed."""

import numpy as np
from hypothesis import strategies as st

from moe_locality.trace.schema import RoutingTrace


def make_trace(
    seed: int = 0,
    *,
    num_tokens: int = 40,
    num_layers: int = 3,
    num_experts: int = 8,
    top_k: int = 2,
    weights: bool = False,
    rank: bool = False,
    step: bool = False,
    missing: bool = True,
) -> RoutingTrace:
    rng = np.random.default_rng(seed)
    order = rng.random((num_tokens, num_layers, num_experts)).argsort(axis=2)
    ids = order[:, :, :top_k].astype(np.int16)
    if missing:
        ids[rng.random(ids.shape) < 0.1] = -1
    request_id = np.sort(rng.integers(0, max(num_tokens // 5, 1), num_tokens))
    first = np.searchsorted(request_id, request_id)
    return RoutingTrace(
        model="toy/model",
        model_type="toy",
        num_experts=num_experts,
        layer_ids=np.arange(num_layers) * 2 + 1,
        domain=("law", "code", "math"),
        domain_group=("text", "formal", "formal"),
        expert_ids=ids,
        request_id=request_id,
        position=np.arange(num_tokens) - first,
        stage=rng.choice([0, 1, 2, 255], num_tokens),
        domain_id=rng.integers(-1, 3, num_tokens),
        expert_weights=rng.random(ids.shape).astype(np.float16) if weights else None,
        rank=rng.integers(0, 4, num_tokens) if rank else None,
        step=rng.integers(0, 9, num_tokens) if step else None,
    )


def make_load_trace(seed: int = 0, *, num_steps: int = 12) -> RoutingTrace:
    rng = np.random.default_rng(seed)
    return RoutingTrace(
        model="toy/model",
        model_type="toy",
        num_experts=8,
        layer_ids=[0, 7],
        domain=("law", "code"),
        expert_load=rng.integers(0, 10**12, (num_steps, 2, 8)),
        domain_id=rng.integers(0, 2, num_steps),
        step=np.arange(num_steps),
        step_tokens=rng.integers(1, 10**12, num_steps),
        load_top_k=2,
    )


@st.composite
def traces(draw: st.DrawFn) -> RoutingTrace:
    num_experts = draw(st.sampled_from([1, 3, 254, 255, 256, 257, 32_767]))
    return make_trace(
        draw(st.integers(0, 2**32)),
        num_tokens=draw(st.sampled_from([0, 1, 2, 17])),
        num_layers=draw(st.integers(1, 3)),
        num_experts=num_experts,
        top_k=draw(st.integers(1, min(num_experts, 4))),
        weights=draw(st.booleans()),
        rank=draw(st.booleans()),
        step=draw(st.booleans()),
    )


def assert_equal(first: RoutingTrace, second: RoutingTrace) -> None:
    """Every field equal, dtype and row order included."""
    for name in RoutingTrace.__dataclass_fields__:
        left, right = getattr(first, name), getattr(second, name)
        if isinstance(left, np.ndarray):
            assert right is not None, name
            assert left.dtype == right.dtype, name
            np.testing.assert_array_equal(left, right, err_msg=name)
        else:
            assert left == right, name

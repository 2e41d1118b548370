"""Buffers of a fixed size on one rank; the exchange: tests/distributed/test_exchange_fixed.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from moe_locality.config import CapacityConfig, DispatchConfig, read_config
from moe_locality.dispatch import TokenDispatcher, flat
from moe_locality.errors import ConfigError
from moe_locality.kernels import ops


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(0, 9),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 9),
)
def test_the_map_is_its_definition(seed, tokens, top_k, num_slots, capacity):
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randint(-1, num_slots, (tokens, top_k), generator=generator)
    made = flat.fixed_rows(slots, num_slots, capacity, "reference")
    routes = [[] for _ in range(num_slots)]
    for route, slot in enumerate(slots.flatten().tolist()):
        if slot >= 0:
            routes[slot].append(route)
    wanted = [part[i] if i < len(part) else -1 for part in routes for i in range(capacity)]
    assert made.row_route.tolist() == wanted
    assert made.row_token.tolist() == [route // top_k for route in wanted]
    where = {route: row for row, route in enumerate(wanted) if route >= 0}
    assert made.positions.flatten().tolist() == [where.get(r, -1) for r in range(slots.numel())]
    assert made.tokens_per_slot.tolist() == [min(capacity, len(part)) for part in routes]
    assert made.slot_offsets.tolist() == [capacity * p for p in range(num_slots + 1)]
    assert int(made.overflow) == sum(max(0, len(part) - capacity) for part in routes)
    for tensor, dtype in ((made.row_route, torch.int32), (made.positions, torch.int32)):
        assert tensor.dtype == dtype
    x = torch.randn(tokens, 3, generator=generator)
    rows = ops.permute(x, made)
    empty = torch.tensor(wanted) < 0
    assert not rows[empty].any()
    assert torch.equal(rows[~empty], x[made.row_token[~empty]])


class NoWaits(TorchDispatchMode):
    """Refuses what would make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        sized = (kwargs or {}).get("output_size") is not None
        masks = any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in (args[1] if func is torch.ops.aten.index.Tensor else ())
        )
        tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
        known = func is torch.ops.aten.index.Tensor or sized
        if masks or (not known and any(tag in func.tags for tag in tags)):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self._patch = pytest.MonkeyPatch()
        for name in ("tolist", "numpy", "cpu"):  # on the CPU no operator is called for these
            self._patch.setattr(torch.Tensor, name, _refuse)
        return super().__enter__()

    def __exit__(self, *args):
        self._patch.undo()
        super().__exit__(*args)


def _refuse(*_args):
    raise AssertionError("a read of values waits for the device")


@pytest.fixture
def as_if_captured(monkeypatch):
    """As on a GPU inside a capture: every kernel is one operator, and nothing may wait."""
    monkeypatch.setattr(ops, "_PLAIN", ())
    monkeypatch.setattr(flat, "is_capturing", lambda tensor: True)


def experts(rows, counts):
    chunks = rows.split(list(counts))
    return torch.cat([(chunk * (e + 1)).sin() for e, chunk in enumerate(chunks)])


def step(dispatcher, x, slots, weights):
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    routed = dispatcher.dispatch(x, slots, weights)
    out = dispatcher.combine(experts(routed.rows, routed.tokens_per_local_expert), routed.handle)
    return [out, *torch.autograd.grad(out.square().sum(), (x, weights))]


def make(**capacity):
    return TokenDispatcher(num_slots=4, config=DispatchConfig(capacity=CapacityConfig(**capacity)))


@pytest.mark.parametrize("tokens", [12, 0])
def test_the_local_path_never_waits_and_is_the_ragged_one(as_if_captured, tokens):
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(tokens, 6, generator=generator), torch.rand(tokens, 2)
    slots = torch.randint(-1, 4, (tokens, 2), generator=generator)
    dispatcher = make(rows=12)
    dispatcher.transport.lost = torch.zeros(1, dtype=torch.int64)  # of the step before the capture
    with NoWaits():
        found = step(dispatcher, x, slots, weights)
    wanted = step(TokenDispatcher(num_slots=4), x, slots, weights)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    with pytest.raises(AssertionError, match="waits for the device"), NoWaits():
        TokenDispatcher(num_slots=4).dispatch(x, slots, weights)


def test_a_whole_layer_never_waits(as_if_captured):
    pytest.importorskip("deepspeed")
    from moe_locality import MoE

    torch.manual_seed(0)
    mlp = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
    layers = [
        MoE(8, mlp, num_experts=4, k=3, drop_tokens=False, dispatch_config=config)
        for config in ({"capacity": {"factor": 4 / 3}}, None)
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(2, 7, 8)
    found = []
    for layer in layers:
        dispatcher = layer.deepspeed_moe._get_dispatcher()
        fixed_size = dispatcher is not None and layer is layers[0]
        if fixed_size:
            dispatcher.transport.lost = torch.zeros(1, dtype=torch.int64)
        given = x.clone().requires_grad_()
        mode = NoWaits() if fixed_size else torch.enable_grad()
        with mode:
            out, l_aux, _ = layer(given)
            (out.square().sum() + l_aux).backward()
        grads = [p.grad for p in layer.parameters()]
        found.append([out.detach(), given.grad, *grads])
    for ours, ragged in zip(*found, strict=True):
        torch.testing.assert_close(ours, ragged)


def test_a_first_step_inside_a_capture_is_refused(monkeypatch):
    monkeypatch.setattr(flat, "is_capturing", lambda tensor: True)
    with pytest.raises(ConfigError, match="run the model once, then capture"):
        make(rows=3).dispatch(torch.ones(2, 3), torch.zeros(2, 1).long(), torch.ones(2, 1))


def test_the_size_follows_the_shape_of_one_rank():
    for tokens, rows in ((8, 6), (3, 3), (0, 1)):
        routed = make(factor=1.5).dispatch(
            torch.ones(tokens, 2), torch.full((tokens, 2), -1), torch.ones(tokens, 2)
        )
        assert routed.tokens_per_local_expert == (rows,) * 4


def test_it_raises_before_results_are_used_or_drops_by_order():
    x, slots, weights = (
        torch.arange(6.0).view(3, 2),
        torch.tensor([[1], [1], [1]]),
        torch.ones(3, 1),
    )
    routed = (full := make(rows=2)).dispatch(x, slots, weights)
    with pytest.raises(ConfigError, match="found 1 routes beyond"):
        full.combine(routed.rows, routed.handle)
    dropping = make(rows=2, on_overflow="drop")
    routed = dropping.dispatch(x, slots, weights)
    out = dropping.combine(routed.rows, routed.handle)
    assert torch.equal(out, torch.tensor([[0.0, 1], [2, 3], [0, 0]]))


@pytest.mark.parametrize("given", [{}, {"rows": 3, "factor": 1.0}, {"rows": 0}, {"factor": -1.0}])
def test_sizes_that_cannot_be(given):
    with pytest.raises(ConfigError, match=r"dispatch\.capacity"):
        read_config({"dispatch": {"capacity": given}})
    with pytest.raises(ConfigError, match="only the flat exchange"):
        read_config({"dispatch": {"exchange": "hierarchical", "capacity": {"rows": 1}}})
    with pytest.raises(ConfigError, match=r"lower dispatch\.capacity"):
        make(rows=2**30).dispatch(torch.ones(1, 1), torch.zeros(1, 1).long(), torch.ones(1, 1))

"""The kernels of the reference backend against definitions that a reader can check by eye."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.errors import BackendUnavailable, ConfigError
from moe_locality.kernels import cuda_impl, ops
from tests.unit.kernels import oracle

MAPS = st.tuples(st.integers(0, 9), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**32 - 1))


def random_slots(tokens: int, top_k: int, slots: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(-1, slots, (tokens, top_k)))


@settings(max_examples=60, deadline=None)
@given(MAPS)
def test_row_map_is_a_stable_sort_by_slot(shape):
    tokens, top_k, slots, _ = shape
    ids = random_slots(*shape)
    found = ops.row_map(ids, slots)
    flat = ids.reshape(-1).tolist()
    wanted = sorted((s, i) for i, s in enumerate(flat) if s >= 0)
    assert found.row_route.tolist() == [i for _, i in wanted]
    assert found.row_token.tolist() == [i // top_k for _, i in wanted]
    assert found.tokens_per_slot.tolist() == [flat.count(s) for s in range(slots)]
    row_of = {route: row for row, (_, route) in enumerate(wanted)}
    assert found.positions.reshape(-1).tolist() == [row_of.get(i, -1) for i in range(len(flat))]
    assert found.positions.shape == (tokens, top_k)


@settings(max_examples=40, deadline=None)
@given(MAPS)
def test_permute_and_combine_equal_a_loop(shape):
    tokens, _, slots, seed = shape
    ids = random_slots(*shape)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 3, generator=generator)
    weights = torch.rand(ids.shape, generator=generator)
    mapping = ops.row_map(ids, slots)
    rows = ops.permute(x, mapping.row_token)
    expected_rows = [x[t] for t in mapping.row_token.tolist()]
    assert torch.equal(rows, torch.stack(expected_rows) if expected_rows else x[:0])
    scale = (1 + torch.arange(len(rows), dtype=torch.float32))[:, None]
    out = ops.combine(rows * scale, mapping.positions, weights)
    expected = torch.zeros_like(x)
    for t, places in enumerate(mapping.positions.tolist()):
        for k, row in enumerate(places):
            if row >= 0:
                expected[t] += weights[t, k] * (rows[row] * scale[row])
    torch.testing.assert_close(out, expected)


@settings(max_examples=25, deadline=None)
@given(MAPS)
def test_backward_is_the_derivative(shape):
    """Against autograd through plain indexing, in float64."""
    tokens, _, slots, seed = shape
    ids = random_slots(*shape)
    mapping = ops.row_map(ids, slots)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    weights = torch.rand(ids.shape, dtype=torch.float64, generator=generator, requires_grad=True)
    rows = x[mapping.row_token.long()]
    scaled = rows.sin()
    scaled.retain_grad()
    rows.retain_grad()
    token_weight = weights.reshape(-1)[mapping.row_route.long()]
    out = torch.zeros_like(x).index_add(0, mapping.row_token.long(), scaled * token_weight[:, None])
    grad = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    out.backward(grad)
    found_rows, found_weights = ops.combine_backward(grad, scaled.detach(), mapping, weights)
    torch.testing.assert_close(found_rows, scaled.grad)
    torch.testing.assert_close(found_weights, weights.grad)
    torch.testing.assert_close(ops.permute_backward(rows.grad, mapping.positions), x.grad)


def test_what_is_not_needed_is_not_made():
    mapping = ops.row_map(torch.tensor([[0, 1]]), 2)
    grad, weights = torch.ones(1, 2), torch.ones(1, 2)
    rows, gates = ops.combine_backward(grad, None, mapping, weights)
    assert rows is not None
    assert gates is None
    rows, gates = ops.combine_backward(grad, torch.ones(2, 2), mapping, weights, need_rows=False)
    assert rows is None
    assert gates is not None


def test_a_dropped_route_does_not_spread_infinity():
    """Row 0 may hold infinity; a dropped route must not pick it up as 0 * inf."""
    mapping = ops.row_map(torch.tensor([[0], [-1]]), 1)
    rows = torch.full((1, 4), float("inf"))
    out = ops.combine(rows, mapping.positions, torch.zeros(2, 1) + torch.tensor([[1.0], [0.0]]))
    assert torch.isinf(out[0]).all()
    assert torch.equal(out[1], torch.zeros(4))
    total = ops.permute_backward(rows, mapping.positions)
    assert torch.equal(total[1], torch.zeros(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_in_float32(dtype):
    """256 + 1 + 1 is 258 in float32 and 256 when each sum is rounded to bfloat16."""
    mapping = ops.row_map(torch.tensor([[0, 1, 2]]), 3)
    top = 256.0 if dtype is torch.bfloat16 else 2048.0
    rows = torch.tensor([[top], [1.0], [1.0]], dtype=dtype)
    ones = torch.ones(1, 3)
    assert ops.combine(rows, mapping.positions, ones).item() == top + 2
    assert ops.permute_backward(rows, mapping.positions).item() == top + 2
    assert ops.combine(rows, mapping.positions, ones).dtype == dtype


def test_empty_inputs_give_empty_outputs():
    mapping = ops.row_map(torch.empty(0, 2, dtype=torch.int64), 4)
    assert mapping.tokens_per_slot.tolist() == [0, 0, 0, 0]
    assert ops.combine(torch.empty(0, 5), mapping.positions, torch.empty(0, 2)).shape == (0, 5)
    nothing = ops.row_map(torch.full((3, 2), -1), 4)
    assert torch.equal(
        ops.combine(torch.empty(0, 5), nothing.positions, torch.ones(3, 2)), torch.zeros(3, 5)
    )


def test_slot_ids_must_be_whole_numbers_in_two_dimensions():
    with pytest.raises(ConfigError, match=r"expected integers \[T, K\]"):
        ops.row_map(torch.zeros(3, 2), 4)
    with pytest.raises(ConfigError, match=r"expected integers \[T, K\]"):
        ops.row_map(torch.zeros(3, dtype=torch.int64), 4)


# -- the choice of the backend
# ----------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _default_backend(monkeypatch):
    monkeypatch.delenv(ops.ENVIRONMENT_VARIABLE, raising=False)
    yield
    ops.set_backend("auto")
    ops.reset_backend_counts()


def test_calls_are_counted_by_backend():
    ops.reset_backend_counts()
    mapping = ops.row_map(torch.tensor([[0]]), 1)
    ops.permute(torch.ones(1, 1), mapping.row_token)
    ops.permute(torch.ones(1, 1), mapping.row_token, backend="reference")
    assert ops.backend_counts() == {"reference": {"row_map": 1, "gather": 2}}


def test_an_unknown_backend_is_named_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"found kernels='fast', expected auto, reference"):
        ops.set_backend("fast")  # pyright: ignore[reportArgumentType]


def test_a_missing_backend_says_why_and_what_to_do(monkeypatch):
    monkeypatch.setitem(ops._MODULES, "cuda", "moe_locality.kernels.not_there")
    ops.set_backend("reference")
    with pytest.raises(BackendUnavailable, match=r"not_there is not installed.*set kernels to"):
        ops.check_backend("cuda")
    with pytest.raises(BackendUnavailable, match="MOE_LOCALITY_CUDA=1"):
        ops.permute(torch.ones(1, 1), torch.zeros(1, dtype=torch.int32), backend="cuda")


def test_the_argument_counts_before_the_setting_and_that_before_the_environment(monkeypatch):
    monkeypatch.setitem(ops._MODULES, "cuda", "moe_locality.kernels.not_there")
    x, index = torch.ones(1, 1), torch.zeros(1, dtype=torch.int32)
    monkeypatch.setenv(ops.ENVIRONMENT_VARIABLE, "cuda")
    with pytest.raises(BackendUnavailable):
        ops.permute(x, index)
    ops.set_backend("reference")
    assert torch.equal(ops.permute(x, index), x)
    with pytest.raises(BackendUnavailable):
        ops.permute(x, index, backend="cuda")


def test_bfloat16_rows_are_summed_with_all_bits_of_the_weights():
    """Rounded once: what differs from the float64 result, rounded, is next to nothing."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(64, 8, generator=generator).argsort(dim=1)[:, :4]
    mapping = ops.row_map(ids, 8)
    rows = torch.randn(256, 128, generator=generator).bfloat16()
    weights = torch.rand(64, 4, generator=generator)
    exact = (rows.double()[mapping.positions.long()] * weights.double()[..., None]).sum(1)
    wrong = ops.combine(rows, mapping.positions, weights) != exact.to(torch.bfloat16)
    assert wrong.float().mean() < 1e-3
    grad = torch.randn(64, 128, generator=generator).bfloat16()
    found, _ = ops.combine_backward(grad, None, mapping, weights)
    scale = weights.reshape(-1)[mapping.row_route.long()].double()[:, None]
    exact = (grad.double()[mapping.row_token.long()] * scale).to(torch.bfloat16)
    assert (found != exact).float().mean() < 1e-3


@pytest.fixture
def fresh():
    """Backends are looked for once; forget what was found, before and after."""
    forget = (cuda_impl.load_library.cache_clear, ops._load.cache_clear)
    for each in forget:
        each()
    yield
    for each in forget:
        each()


def test_a_gpu_gets_cuda_where_it_was_built_else_triton_else_the_reference(monkeypatch):
    gpu, usable = torch.device("cuda"), {"moe_locality.kernels.reference"}
    monkeypatch.setattr(ops, "_load", lambda name: (object() if name in usable else None, ""))
    assert ops._resolve("auto", gpu) == "reference"
    usable.add("moe_locality.kernels.triton_impl")
    assert ops._resolve("auto", gpu) == "triton"
    usable.add("moe_locality.kernels.cuda_impl")
    assert ops._resolve("auto", gpu) == "cuda"
    assert ops._resolve("auto", torch.device("cpu")) == "reference"
    assert ops._resolve("triton", gpu) == "triton"


@pytest.mark.usefixtures("fresh")
def test_without_its_library_the_cuda_backend_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(cuda_impl, "LIBRARY", "_not_built.so")
    with pytest.raises(BackendUnavailable, match=r"has no CUDA extension.*MOE_LOCALITY_CUDA=1 pip"):
        ops.check_backend("cuda")


@pytest.mark.usefixtures("fresh")
def test_a_library_of_another_torch_says_so(monkeypatch, tmp_path):
    (tmp_path / "a.so").write_bytes(b"no library")
    monkeypatch.setattr(cuda_impl, "LIBRARY", str(tmp_path / "a.so"))
    assert "cannot be loaded by torch" in str(cuda_impl.why_unavailable())


def test_the_environment_chooses_when_nothing_else_does(monkeypatch):
    monkeypatch.setenv(ops.ENVIRONMENT_VARIABLE, "triton")
    assert ops._resolve("auto", torch.device("cpu")) == "triton"
    ops.set_backend("reference")
    assert ops._resolve("auto", torch.device("cpu")) == "reference"


# -- operators of torch.library


def samples():
    ids = oracle.random_ids(5, 2, 4, 0)
    full = ops.row_map(oracle.random_ids(5, 2, 4, 0, drop=0), 4)
    mapping = ops.row_map(ids, 4, num_rows=16)
    x, rows, weights = torch.randn(5, 3), torch.randn(16, 3), torch.rand(5, 2)
    where = (mapping.row_token, mapping.row_route, mapping.positions)
    offsets = mapping.slot_offsets
    back = (True, offsets, "reference")
    slots = torch.tensor([[0, -1], [1, 4], [2, 5], [3, -1]], dtype=torch.int32)
    return {
        "row_map": [(ids, 4, -1, 16, "reference"), (ids, 4, -1, -1, "reference")],
        "serve_visited": [(ids.to(torch.int32), slots, slots.long() // 4, 0, "reference")],
        "gather": [(x, torch.tensor([2, 0]), "reference")],
        "permute": [
            (x, mapping.row_token, mapping.positions, offsets, "auto"),
            (x, full.row_token, full.positions, None, "auto"),
        ],
        "combine": [
            (rows, mapping.positions, weights, "auto"),
            (rows, mapping.positions, None, "auto"),
        ],
        "combine_backward": [(x, rows, *where, weights, *back), (x, None, *where, weights, *back)],
    }


@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_operators_pass_opcheck(name):
    for args in samples()[name]:
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(getattr(torch.ops.moe_locality, name), args, test_utils=tests)


class Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, positions, row_token):
        ctx.save_for_backward(positions)
        return ops.permute(x, row_token)

    @staticmethod
    def backward(ctx, grad):
        (positions,) = ctx.saved_tensors
        return ops.permute_backward(grad.contiguous(), positions), None, None


class Combine(torch.autograd.Function):
    """``fields`` are those of the map, which autograd cannot take as one object."""

    @staticmethod
    def forward(ctx, rows, weights, *fields):
        ctx.save_for_backward(rows, weights, *fields)
        return ops.combine(rows, fields[2], weights)

    @staticmethod
    def backward(ctx, grad):
        rows, weights, *fields = ctx.saved_tensors
        mapping = ops.RowMap(**dict(zip(ops.MAP_FIELDS, fields, strict=True)), padded=True)
        grads = ops.combine_backward(grad.contiguous(), rows, mapping, weights)
        return *grads, *[None] * len(fields)


class Layer(torch.nn.Module):
    """A router and one matrix per expert, with a static number of rows or without."""

    def __init__(self, width: int = 8, experts: int = 4, num_rows: int | None = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = torch.nn.Linear(width, experts, bias=False)
        self.experts = torch.nn.Parameter(torch.randn(experts, width, width) / 3)
        self.num_rows = num_rows

    def forward(self, x):
        weights, ids = self.router(x).softmax(1).topk(2, dim=1)
        weights = weights / weights.sum(1, keepdim=True)
        mapping = ops.row_map(ids, len(self.experts), num_rows=self.num_rows)
        rows = Permute.apply(x, mapping.positions, mapping.row_token.clamp_min(0))
        owner = torch.searchsorted(
            mapping.slot_offsets[1:], torch.arange(len(rows)).int(), right=True
        )
        outs = [torch.where((owner == e)[:, None], rows @ m, 0) for e, m in enumerate(self.experts)]
        fields = [getattr(mapping, name) for name in ops.MAP_FIELDS]
        return Combine.apply(torch.stack(outs).sum(0), weights, *fields)


def dense(layer, x):
    """The same layer without dispatch: every expert on every token."""
    probabilities = layer.router(x).softmax(1)
    top, ids = probabilities.topk(2, dim=1)
    gates = torch.zeros_like(probabilities).scatter(1, ids, top / top.sum(1, keepdim=True))
    return torch.einsum("te,td,edf->tf", gates, x, layer.experts)


@pytest.mark.parametrize("num_rows", [64, None])
@pytest.mark.parametrize("compiler", [None, "eager", "aot_eager"])
def test_a_layer_compiles_without_graph_breaks(compiler, num_rows):
    layer = Layer(num_rows=num_rows)
    x = torch.randn(21, 8, requires_grad=True)
    wanted = dense(layer, x)
    wanted.square().sum().backward()
    grads = [p.grad.clone() for p in (x, *layer.parameters())]
    for tensor in (x, *layer.parameters()):
        tensor.grad = None
    run = layer if compiler is None else torch.compile(layer, backend=compiler, fullgraph=True)
    if compiler and num_rows is None:
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            found = run(x)
    else:
        found = run(x)
    torch.testing.assert_close(found, wanted)
    found.square().sum().backward()
    for tensor, grad in zip((x, *layer.parameters()), grads, strict=True):
        torch.testing.assert_close(tensor.grad, grad)


def test_operators_run_on_tensor_subclasses():
    class Tagged(torch.Tensor):
        pass

    x, index = torch.randn(3, 2), torch.tensor([2, 0])
    assert torch.equal(ops.permute(x.as_subclass(Tagged), index), x[index])

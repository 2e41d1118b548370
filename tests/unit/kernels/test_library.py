"""The kernels as operators of torch.library: schemas, shapes without data, torch.compile."""

import pytest
import torch

from moe_locality.kernels import ops
from tests.unit.kernels import oracle


def samples():
    ids = oracle.random_ids(5, 2, 4, 0)
    full = ops.row_map(oracle.random_ids(5, 2, 4, 0, drop=0), 4)
    mapping = ops.row_map(ids, 4, num_rows=16)
    x, rows, weights = torch.randn(5, 3), torch.randn(16, 3), torch.rand(5, 2)
    where = (mapping.row_token, mapping.row_route, mapping.positions)
    offsets = mapping.slot_offsets
    back = (True, offsets, "reference")
    return {
        "row_map": [(ids, 4, -1, 16, "reference"), (ids, 4, -1, -1, "reference")],
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

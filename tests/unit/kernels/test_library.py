"""The kernels as operators of torch.library: schemas, shapes without data, torch.compile."""

import pytest
import torch

from moe_locality.kernels import library, local, ops
from moe_locality.kernels.backends import GateSpec
from tests.unit.kernels import oracle

SPEC = (2, "softmax", 1, 1, "top2", True, 1.0, "reference")


def samples():
    ids = oracle.random_ids(5, 2, 4, 0)
    full = ops.row_map(oracle.random_ids(5, 2, 4, 0, drop=0), 4)
    mapping = ops.row_map(ids, 4, num_rows=16, alignment=2)
    x, rows, weights = torch.randn(5, 3), torch.randn(16, 3), torch.rand(5, 2)
    where = (mapping.row_token, mapping.row_route, mapping.positions)
    nodes = torch.tensor([0, 0, 1, 1])
    offsets = mapping.slot_offsets
    back = (True, offsets, "reference")
    return {
        "gate": [(torch.randn(5, 4), None, *SPEC), (torch.randn(0, 4), torch.zeros(4), *SPEC)],
        "gate_backward": [(weights, torch.randn(5, 4), ids.clamp_min(0), *SPEC)],
        "row_map": [
            (ids, 4, None, None, -1, 1, 16, nodes, 2, "reference"),
            (ids, 4, None, None, -1, 1, -1, None, 0, "reference"),
        ],
        "gather": [(x, torch.tensor([2, 0]), "reference")],
        "permute": [
            (x, *where, None, offsets, "auto"),
            (x, full.row_token, full.row_route, full.positions, weights, None, "auto"),
        ],
        "combine": [
            (rows, mapping.positions, weights, None, "auto"),
            (rows, mapping.positions, None, rows[:, 0].contiguous(), "auto"),
        ],
        "combine_backward": [(x, rows, *where, weights, *back), (x, None, *where, weights, *back)],
    }


@pytest.mark.parametrize("name", library.SCHEMAS)
def test_operators_pass_opcheck(name):
    for args in samples()[name]:
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(getattr(torch.ops.moe_locality, name), args, test_utils=tests)


class Layer(torch.nn.Module):
    """A router and one matrix per expert, on the local path with a static number of rows."""

    def __init__(self, width: int = 8, experts: int = 4, num_rows: int | None = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = torch.nn.Linear(width, experts, bias=False)
        self.experts = torch.nn.Parameter(torch.randn(experts, width, width) / 3)
        self.num_rows = num_rows

    def forward(self, x):
        ids, weights = local.topk_gate(self.router(x), GateSpec(top_k=2, renormalize=True))
        mapping = ops.row_map(ids, len(self.experts), num_rows=self.num_rows)
        rows = local.dispatch(x, mapping)
        owner = torch.searchsorted(
            mapping.slot_offsets[1:], torch.arange(len(rows)).int(), right=True
        )
        outs = [torch.where((owner == e)[:, None], rows @ m, 0) for e, m in enumerate(self.experts)]
        return local.combine(torch.stack(outs).sum(0), mapping, weights)


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

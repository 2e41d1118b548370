"""The recorder inside a CUDA graph: it goes on under replay; what was overwritten is counted."""

import pytest
import torch

pytest.importorskip("deepspeed")
pytest.importorskip("pyarrow")

from deepspeed.moe.sharded_moe import TopKGate

from moe_locality.trace import read_trace
from moe_locality.trace.recorder import attach

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


class Gates(torch.nn.Module):
    """Real gates alone: what they choose, and nothing that a capture would refuse."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(TopKGate(16, 8, 3, drop_tokens=False) for _ in range(3))

    def forward(self, x):
        for gate in self.blocks:
            x = torch.tanh(3 * x.roll(1, -1)) + gate(x, None, True)[5][0][:, None]
        return x


def test_the_recorder_goes_on_under_replay(tmp_path):
    batches = [torch.randn(10, 16, device="cuda") for _ in range(40)]
    model = Gates().cuda()
    static = batches[0].clone()
    options = {"strict": True, "weights": True, "first_request_id": 0}
    with torch.no_grad(), attach(model, tmp_path / "a", graph_replays=16, **options) as recorder:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(static)
        for count, x in enumerate(batches[1:], start=1):
            static.copy_(x)
            graph.replay()
            if count % 10 == 0:
                recorder.drain()
    with torch.no_grad(), attach(model, tmp_path / "b", **options):
        for x in batches:
            model(x)
    found, wanted = read_trace(tmp_path / "a"), read_trace(tmp_path / "b")
    assert found.num_tokens == 400
    for name in ("expert_ids", "expert_weights", "request_id", "position"):
        assert (getattr(found, name) == getattr(wanted, name)).all(), name


def test_replays_that_were_overwritten_are_counted(tmp_path):
    model = Gates().cuda()
    x = torch.randn(10, 16, device="cuda")
    with torch.no_grad(), attach(model, tmp_path, graph_replays=4) as recorder:
        model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(x)
        for _ in range(9):
            graph.replay()
    report = recorder.close()
    assert (report.recorded_tokens, report.dropped_tokens, report.skipped_forwards) == (50, 50, 5)

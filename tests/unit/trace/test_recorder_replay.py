"""Recording inside a graph: traced once, replayed with other inputs, drained outside.

``make_fx`` stands in for the capture of a CUDA graph: what it traces is a list of tensor operations
without Python, in which every number of the host is a constant. Unlike a capture it also runs them
once. tests/gpu/test_recorder_cuda.py captures.
"""

import logging

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("deepspeed")

from deepspeed.moe.sharded_moe import TopKGate

from moe_locality.errors import TraceError
from moe_locality.trace import read_trace
from moe_locality.trace.recorder import annotate, assembler, attach

WIDTH, EXPERTS, LAYERS = 8, 6, 3


class Block(torch.nn.Module):
    def __init__(self, k):
        super().__init__()
        self.gate = TopKGate(WIDTH, EXPERTS, k, drop_tokens=False)

    def forward(self, x):
        weights = self.gate(x.reshape(-1, WIDTH), None, True)[5]
        return torch.tanh(3 * x.roll(1, -1)) + weights[0].view(*x.shape[:2], 1)


class Gates(torch.nn.Module):
    """Blocks of one real gate each; ``skip``: a block that does not run."""

    def __init__(self, ks=(3, 3, 3)):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(Block(k) for k in ks)
        self.skip = None

    def forward(self, x):
        for index, block in enumerate(self.blocks):
            if index != self.skip:
                x = block(x)
        return x


def inputs(seed, batch=2, length=3):
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def capture(monkeypatch):
    """Trace a model as a capture would see it; the trace runs it once, on ``x``."""

    def run(model, x):
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(assembler, "is_capturing", lambda ids: True)
            return make_fx(lambda x: model(x))(x)

    return run


@torch.no_grad()
def eager(path, batches, **options):
    model = Gates(options.pop("ks", (3, 3, 3)))
    with attach(model, path, strict=True, first_request_id=0, **options):
        for x in batches:
            model(x)
    return read_trace(path)


def same(found, wanted):
    for name in ("expert_ids", "expert_weights", "request_id", "position", "stage"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert (ours is None) == (theirs is None), name
        assert ours is None or np.array_equal(ours, theirs), name


@pytest.mark.parametrize("ks", [(3, 3, 3), (3, 4, 3)])
@pytest.mark.parametrize("weights", [False, True])
def test_a_replay_records_what_the_eager_model_would(tmp_path, capture, ks, weights):
    batches = [inputs(seed) for seed in range(12)]
    model, options = Gates(ks), {"weights": weights, "first_request_id": 0, "strict": True}
    with attach(model, tmp_path / "a", graph_replays=5, **options) as recorder:
        with torch.no_grad():
            model(batches[0])
        graph = capture(model, batches[1])
        for count, x in enumerate(batches[2:], start=2):
            graph(x)
            if count % 4 == 0:
                recorder.drain()
        assert recorder.report().dropped_tokens == 0
    wanted = eager(tmp_path / "b", batches, weights=weights, ks=ks)
    same(read_trace(tmp_path / "a"), wanted)
    assert wanted.num_tokens == 72


def test_what_was_overwritten_is_counted_and_said(tmp_path, capture, caplog):
    batches = [inputs(seed) for seed in range(11)]
    model = Gates()
    with attach(model, tmp_path / "a", graph_replays=4, first_request_id=0) as recorder:
        with torch.no_grad():
            model(batches[0])
        graph = capture(model, batches[1])
        for x in batches[2:]:
            graph(x)
    report = recorder.close()
    assert (report.recorded_tokens, report.dropped_tokens, report.skipped_forwards) == (30, 36, 6)
    assert "found 6 replays of a CUDA graph that later ones had overwritten" in caplog.text
    kept = eager(tmp_path / "b", [batches[0], *batches[7:]])
    assert np.array_equal(read_trace(tmp_path / "a").expert_ids, kept.expert_ids)
    with attach(model, tmp_path / "c", graph_replays=1, strict=True) as recorder:
        with torch.no_grad():
            model(batches[0])
        capture(model, batches[1])(batches[2])
        with pytest.raises(TraceError, match="found 1 replays of a CUDA graph"):
            recorder.drain()
        with pytest.raises(TraceError):
            recorder.close()


def test_labels_of_replays(tmp_path, capture):
    model = Gates()
    prompts, tokens = [inputs(0), inputs(1)], [inputs(seed, 2, 1) for seed in range(2, 9)]
    ids = [[7, 9], [4, 5]]

    def serve(prefill, decode, recorder):
        for turn, prompt in enumerate(prompts):
            with annotate(request_ids=ids[turn], stage="prefill", domains=["code", "chat"]):
                prefill(prompt)
                recorder.replayed()
            with annotate(request_ids=ids[turn], stage="decode", domains=["code", "chat"]):
                for x in tokens[turn : turn + 3]:
                    decode(x)
                    recorder.replayed()

    with attach(model, tmp_path / "a", graph_replays=16, strict=True) as recorder:
        with torch.no_grad():
            model(prompts[0])
            model(tokens[0])
        prefill, decode = capture(model, prompts[0]), capture(model, tokens[0])
        recorder.drain()
        serve(prefill, decode, recorder)
    found = read_trace(tmp_path / "a")
    model = Gates()
    with attach(model, tmp_path / "b", strict=True) as recorder, torch.no_grad():
        serve(model, model, recorder)
    wanted = read_trace(tmp_path / "b")
    rest = slice(2 * (6 + 2), None)  # the passes before serving, and those of the two traces
    for name in ("expert_ids", "request_id", "position", "stage"):
        assert np.array_equal(getattr(found, name)[rest], getattr(wanted, name)), name
    names = np.array(found.domain)[found.domain_id[rest]]
    assert names.tolist() == np.array(wanted.domain)[wanted.domain_id].tolist()


def test_labels_that_do_not_fit_are_said(tmp_path, capture, caplog):
    model = Gates()
    with attach(model, tmp_path, graph_replays=4) as recorder:
        with torch.no_grad():
            model(inputs(0))
        graph = capture(model, inputs(1))
        recorder.drain()
        with annotate(request_ids=[1, 2], stage="decode"):
            graph(inputs(2))
            recorder.replayed()
        graph(inputs(3))
    assert "found 1 calls of replayed() for 2 replays" in caplog.text
    assert recorder.close().recorded_tokens == 24
    assert len(np.unique(read_trace(tmp_path).request_id)) == 8


def test_each_graph_has_its_own_layers_and_mode(tmp_path, capture):
    model = Gates()
    with attach(model, tmp_path, graph_replays=8, strict=True) as recorder:
        with torch.no_grad():
            model(inputs(0))
        trained = capture(model, inputs(1))
        model.eval()
        model.skip = 1
        shorter = capture(model, inputs(2))
        recorder.drain()
        for seed in range(3, 6):
            shorter(inputs(seed))
            trained(inputs(seed))
    trace = read_trace(tmp_path)
    skipped = (trace.expert_ids[:, 1] == -1).all(axis=1).reshape(-1, 6).all(axis=1)
    assert skipped.tolist() == [False, False, True, True, False, True, False, True, False]
    assert trace.stage.reshape(-1, 6)[:, 0].tolist() == [2, 2, 255, 255, 2, 255, 2, 255, 2]
    assert (trace.expert_ids[:, [0, 2]] >= 0).all()


def test_a_capture_without_room_is_said_once(tmp_path, capture, caplog):
    model = Gates()
    for options in ({}, {"graph_replays": 4}):
        caplog.clear()
        with attach(model, tmp_path, **options) as recorder:
            with torch.no_grad():
                model(inputs(0))
            capture(model, inputs(1, 1, 2))(inputs(2, 1, 2))
        assert recorder.close().recorded_tokens == 6
        assert caplog.text.count("found the capture of a CUDA graph with 2 tokens") == 1
    assert all(r.levelno == logging.WARNING for r in caplog.records)


def test_steps_are_sampled_as_eager_ones(tmp_path, capture):
    model = Gates()
    with attach(model, tmp_path, graph_replays=8, every_n_steps=3, strict=True) as recorder:
        with torch.no_grad():
            model(inputs(0))
        graph = capture(model, inputs(1))
        recorder.drain()  # steps 0 and 1
        for step in range(2, 8):
            graph(inputs(step))
    assert recorder.close().recorded_tokens == 18  # steps 0, 3 and 6
    with pytest.raises(TraceError, match="graph_replays=-1"):
        attach(model, tmp_path, graph_replays=-1)

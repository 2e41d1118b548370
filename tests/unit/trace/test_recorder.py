"""RoutingRecorder on stock DeepSpeed layers (and ours) in one process."""

import contextlib
import copy
import logging
import pickle
import threading

import numpy as np
import pytest
import torch

from moe_locality.config import TraceConfig
from moe_locality.errors import TraceError
from moe_locality.trace import DECODE, PREFILL, TRAIN, UNKNOWN, read_trace
from moe_locality.trace.recorder import NullRecorder, RoutingRecorder, annotate, attach
from tests.recorder_models import WIDTH, GateWitness, MoeModel, inputs


def sorted_picks(trace, layer):
    return np.sort(trace.expert_ids[:, layer], axis=1)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_dropless_ids_are_the_top_k_of_the_router(tmp_path, k):
    model = MoeModel(k=k)
    witness = GateWitness(model)
    counts = 0
    with attach(model, tmp_path, strict=True, model="toy") as recorder:
        for seed in range(3):
            model(inputs(seed=seed)).sum().backward()
            counts = counts + np.stack(model.exp_counts)
    trace = read_trace(tmp_path)
    assert (trace.model, trace.num_experts, trace.top_k) == ("toy", 8, k)
    assert trace.layer_ids.tolist() == [0, 1, 2]
    for layer in range(3):
        assert (sorted_picks(trace, layer) == witness.picks(layer)).all()
    assert (trace.load() == counts).all()
    assert (trace.stage == TRAIN).all()
    assert trace.step.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert trace.position.tolist() == list(range(5)) * 6
    assert len(trace.request_ids) == 6
    report = recorder.report()
    assert (report.recorded_tokens, report.dropped_tokens, report.shards) == (30, 0, 1)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_picks_that_the_capacity_drops_are_minus_one(tmp_path, k):
    model = MoeModel(k=k, drop_tokens=True, capacity_factor=0.5, min_capacity=1)
    kept = []
    for block in model.blocks:
        gate = block.deepspeed_moe.gate
        gate.register_forward_hook(lambda _m, _a, out: kept.append((out[3] >= 0).sum().item()))
        gate.register_forward_hook(lambda _m, _a, out: kept.append(out[3].t().clone()))
    with attach(model, tmp_path, strict=True, weights=True):
        model(inputs(batch=4, length=8))
    trace = read_trace(tmp_path)
    assert 0 < (trace.expert_ids == -1).sum() < trace.expert_ids.size
    for layer in range(3):
        assert (trace.expert_ids[:, layer] >= 0).sum() == kept[2 * layer]
        assert (trace.expert_ids[:, layer] == kept[2 * layer + 1].numpy()).all()
    assert (trace.expert_weights[trace.expert_ids == -1] == 0).all()


def test_weights_are_the_gates_in_half_precision(tmp_path):
    model = MoeModel(num_layers=1)
    gates = []
    model.blocks[0].deepspeed_moe.gate.register_forward_hook(
        lambda _m, _a, out: gates.append(out[5].t().detach().half().numpy())
    )
    with attach(model, tmp_path, strict=True, weights=True):
        model(inputs())
    assert (read_trace(tmp_path).expert_weights[:, 0] == gates[0]).all()


def test_a_gate_with_relabelled_weights_is_recorded_in_logical_ids(tmp_path):
    plain, placed = MoeModel(seed=3), MoeModel(seed=3)
    order = np.random.default_rng(0).permutation(8)
    for block in placed.blocks:
        gate, experts = block.deepspeed_moe.gate, block.deepspeed_moe.experts.deepspeed_experts
        with torch.no_grad():
            gate.wg.weight.copy_(gate.wg.weight[torch.from_numpy(order)])
        block.deepspeed_moe.experts.deepspeed_experts = torch.nn.ModuleList(
            [experts[i] for i in order]
        )
        gate.slot_to_logical = order
    for model, name in ((plain, "plain"), (placed, "placed")):
        with attach(model, tmp_path / name, strict=True, first_request_id=0):
            model(inputs())
    a, b = read_trace(tmp_path / "plain"), read_trace(tmp_path / "placed")
    assert (a.expert_ids == b.expert_ids).all()
    assert a.same_content(b)


def test_a_new_map_in_the_middle_of_a_run_is_seen(tmp_path):
    model = MoeModel(num_layers=1)
    gate = model.blocks[0].deepspeed_moe.gate
    gate.slot_to_logical = np.arange(8)
    with attach(model, tmp_path, strict=True):
        model(inputs())
        gate.slot_to_logical[:] = np.arange(8)[::-1]
        model(inputs())
    ids = read_trace(tmp_path).expert_ids
    assert (ids[:10] == 7 - ids[10:]).all()


def test_our_layer_is_recorded_like_the_stock_one_whatever_its_placement(tmp_path):
    from moe_locality.layer.moe import MoE
    from moe_locality.layer.state import set_slot_to_logical

    stock, ours = MoeModel(), MoeModel(layer=MoE)
    for block in ours.blocks:
        set_slot_to_logical(block, np.arange(8)[::-1])
        with torch.no_grad():
            wg = block.deepspeed_moe.gate.wg.weight
            wg.copy_(wg.flip(0))
        experts = block.deepspeed_moe.experts
        experts.deepspeed_experts = torch.nn.ModuleList(reversed(experts.deepspeed_experts))
    for model, name in ((stock, "stock"), (ours, "ours")):
        with attach(model, tmp_path / name, strict=True, first_request_id=0):
            model(inputs())
    assert read_trace(tmp_path / "stock").same_content(read_trace(tmp_path / "ours"))


def test_annotation_reaches_the_rows(tmp_path):
    model = MoeModel(num_layers=1)
    with attach(model, tmp_path, strict=True):
        with annotate(request_ids=[70, 80], domains=["code", "law"], stage="prefill"):
            model(inputs())
        with annotate(request_ids=[80, 90], domains="math", stage="decode", positions=[5, 6]):
            model(inputs(length=1))
        model.eval()
        with torch.no_grad():
            model(inputs(batch=1, length=2))
    trace = read_trace(tmp_path)
    names = [trace.domain[i] if i >= 0 else None for i in trace.domain_id]
    assert trace.request_id[:12].tolist() == [70] * 5 + [80] * 5 + [80, 90]
    assert names == ["code"] * 5 + ["law"] * 5 + ["math"] * 2 + [None] * 2
    assert trace.stage.tolist() == [PREFILL] * 10 + [DECODE] * 2 + [UNKNOWN] * 2
    assert trace.position[10:].tolist() == [5, 6, 0, 1]
    assert len(set(trace.request_id[12:].tolist()) - {70, 80, 90}) == 1


def test_generation_inside_one_annotation(tmp_path):
    model = MoeModel(num_layers=2).eval()
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1]], bool)
    with (
        attach(model, tmp_path, strict=True),
        torch.inference_mode(),
        annotate(request_ids=[1, 2], stage="generate", mask=mask),
    ):
        model(inputs(length=4))
        for seed in range(3):
            model(inputs(length=1, seed=seed))
    trace = read_trace(tmp_path)
    for request, prompt in ((1, 2), (2, 4)):
        mine = trace.filter(requests=[request])
        assert mine.position.tolist() == list(range(prompt + 3))
        assert mine.stage.tolist() == [PREFILL] * prompt + [DECODE] * 3


@pytest.mark.parametrize("every_n_steps", [1, 2])
def test_generation_without_request_ids_and_with_a_context_per_step(tmp_path, every_n_steps):
    model = MoeModel(num_layers=1).eval()
    with attach(model, tmp_path, strict=True, every_n_steps=every_n_steps), torch.inference_mode():
        for _ in range(2):
            with annotate(stage="generate"):  # one context: the recorder numbers the requests
                model(inputs(length=4))
                model(inputs(length=1))
                model(inputs(length=1))
            with annotate(request_ids=[7], stage="prefill"):
                model(inputs(batch=1, length=3))
            for _ in range(2):
                with annotate(request_ids=[7], stage="decode"):
                    model(inputs(batch=1, length=1))
    trace = read_trace(tmp_path)
    seen = {
        request: sorted(trace.filter(requests=[request]).position.tolist())
        for request in trace.request_ids.tolist()
    }
    if every_n_steps == 1:
        assert seen.pop(7) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        assert list(seen.values()) == [[0, 1, 2, 3, 4, 5]] * 4
    else:  # forward passes that are not sampled count all the same
        assert seen.pop(7) == [3, 3]
        assert list(seen.values()) == [[0, 1, 2, 3, 5]] * 4


def test_inference_first_and_training_later(tmp_path):
    model = MoeModel()
    with attach(model, tmp_path, strict=True):
        with torch.inference_mode():
            model(inputs())
        model(inputs()).sum().backward()
    ids = read_trace(tmp_path).expert_ids
    assert (ids[:10] == ids[10:]).all()


@pytest.mark.parametrize("explicit", [False, True])
def test_every_nth_step(tmp_path, explicit):
    model = MoeModel(num_layers=1)
    with attach(model, tmp_path, strict=True, every_n_steps=3) as recorder:
        for step in range(7):
            if explicit and step:
                recorder.step()
            for _ in range(2 if explicit and step else 1):  # gradient accumulation
                model(inputs(seed=step))
    trace = read_trace(tmp_path)
    steps, rows = np.unique(trace.step, return_counts=True)
    assert steps.tolist() == [0, 3, 6]
    assert rows.tolist() == ([10, 20, 20] if explicit else [10, 10, 10])


def test_a_layer_that_did_not_run_has_no_picks(tmp_path):
    model = MoeModel()
    with attach(model, tmp_path, strict=True):
        model(inputs())
        model.skip = {0, 2}
        model(inputs())
        model.skip = {1}
        model(inputs())
    ids = read_trace(tmp_path).expert_ids
    absent = (ids == -1).all(axis=2)
    assert absent[:10].sum() == 0
    assert absent[10:20].tolist() == [[True, False, True]] * 10
    assert absent[20:].tolist() == [[False, True, False]] * 10


def test_layers_called_one_by_one_still_give_rows(tmp_path):
    model = MoeModel()
    with attach(model, tmp_path, strict=True) as recorder:
        for seed in range(
            2
        ):  # the model's forward never runs: a layer that comes again ends a block
            for block in model.blocks:
                block(inputs(seed=seed))
        assert recorder.report().recorded_tokens == 0
        recorder.flush()
        assert recorder.report().recorded_tokens == 20
    assert (read_trace(tmp_path).expert_ids >= 0).all()


def test_layers_of_different_length_in_one_forward_are_skipped_with_one_warning(tmp_path, caplog):
    class Pooling(MoeModel):
        def forward(self, x):
            for block in self.blocks:
                x = block(x)[0][:, :-1]
            return x

    model = Pooling()
    with caplog.at_level(logging.WARNING):
        recorder = attach(model, tmp_path)
        model(inputs())
        model(inputs())
        report = recorder.close()
    assert (report.recorded_tokens, report.dropped_tokens, report.skipped_forwards) == (0, 20, 2)
    messages = [r.getMessage() for r in caplog.records if "expected the same tokens" in r.message]
    assert len(messages) == 1
    assert "found 8 tokens in MoE layer 1 and 10 in the layers before it" in messages[0]
    attach(model, tmp_path / "strict", strict=True)
    with pytest.raises(TraceError, match="expected the same tokens in all layers"):
        model(inputs())


def test_labels_that_do_not_fit_skip_the_forward_and_recording_goes_on(tmp_path, caplog):
    model = MoeModel()
    recorder = attach(model, tmp_path)
    with annotate(request_ids=[1, 2, 3]):
        model(inputs())
    model(inputs())
    report = recorder.close()
    assert (report.recorded_tokens, report.dropped_tokens) == (10, 10)
    assert "found 3 labels in annotate()" in caplog.text
    strict = attach(model, tmp_path / "strict", strict=True)
    with annotate(request_ids=[1, 2, 3]), pytest.raises(TraceError, match="found 3 labels"):
        model(inputs())
    with pytest.raises(TraceError, match="recording stopped: found 3 labels"):
        strict.close()


def test_a_forward_that_raised_is_not_recorded(tmp_path):
    class Failing(MoeModel):
        broken = False

        def forward(self, x):
            if self.broken:
                self.blocks[0](x)
                raise RuntimeError("out of memory")
            return super().forward(x)

    model = Failing()
    recorder = attach(model, tmp_path)
    model.broken = True
    with pytest.raises(RuntimeError, match="out of memory"):
        model(inputs())
    model.broken = False
    model(inputs())
    report = recorder.close()
    assert (report.recorded_tokens, report.dropped_tokens) == (10, 10)
    assert (read_trace(tmp_path).expert_ids >= 0).all()


@pytest.mark.parametrize("then", ["step", "flush", "close"])
@pytest.mark.parametrize("strict", [False, True])
def test_a_last_forward_that_raised_is_not_recorded(tmp_path, then, strict):
    """Where no forward pass came after it, the rows of one that raised were written, its [F11]
    later layers as -1. They are counted as lost, with strict an error; whole passes are kept.
    """
    model = MoeModel()
    recorder = attach(model, tmp_path, strict=strict)
    model(inputs())
    model.blocks[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(inputs())
    refused = pytest.raises(TraceError, match="did not come to its end")
    with refused if strict else contextlib.nullcontext():
        getattr(recorder, then)()
    if then != "close":
        with refused if strict else contextlib.nullcontext():
            recorder.close()
    report = recorder.report()
    assert (report.recorded_tokens, report.dropped_tokens) == (10, 10)
    assert (read_trace(tmp_path).expert_ids >= 0).all()


def test_a_second_thread_is_not_mixed_into_a_running_forward(tmp_path):
    class Threaded(MoeModel):
        def forward(self, x):
            self.blocks[0](x)
            other = threading.Thread(target=lambda: self.blocks[1](x[:, :2]))
            other.start()
            other.join()
            return self.blocks[2](self.blocks[1](x)[0])[0]

    model = Threaded()
    recorder = attach(model, tmp_path)
    model(inputs())
    report = recorder.close()
    assert (report.recorded_tokens, report.skipped_forwards) == (10, 1)
    assert (read_trace(tmp_path).expert_ids >= 0).all()


def test_layer_numbers_and_several_modules(tmp_path):
    first, second = MoeModel(num_layers=2), MoeModel(num_layers=1, seed=1)
    recorder = RoutingRecorder(tmp_path, strict=True)
    recorder.attach(first, layer_ids=[3, 5])
    recorder.attach(second, layer_ids=[9])
    with pytest.raises(TraceError, match="that this recorder is attached to"):
        recorder.attach(second)
    with pytest.raises(TraceError, match=r"found layer_ids \[3\] for 1 MoE layers"):
        recorder.attach(MoeModel(num_layers=1), layer_ids=[3])
    first(inputs())
    second(inputs())
    with pytest.raises(TraceError, match="found 1 more MoE layers after recording began with 3"):
        recorder.attach(MoeModel(num_layers=1))
    recorder.close()
    trace = read_trace(tmp_path)
    assert trace.layer_ids.tolist() == [3, 5, 9]
    assert (trace.expert_ids >= 0).all(axis=2).tolist() == [[True, True, False]] * 10 + [
        [False, False, True]
    ] * 10


def test_detached_and_attached_again(tmp_path):
    model = MoeModel()
    recorder = RoutingRecorder(tmp_path, strict=True)
    handle = recorder.attach(model)
    model(inputs())
    handle.detach()
    handle.detach()
    model(inputs())
    recorder.attach(model)
    model(inputs())
    assert recorder.close().recorded_tokens == 20
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model(inputs())
    with pytest.raises(TraceError, match="found a recorder that is closed"):
        recorder.attach(model)
    assert read_trace(tmp_path).num_tokens == 20


def test_outputs_and_gradients_are_bitwise_unchanged(tmp_path):
    def run(model):
        out = model(inputs())
        out.square().sum().backward()
        return [out, *(p.grad for p in model.parameters())]

    plain, recorded = MoeModel(), MoeModel()
    before = run(plain)
    with attach(recorded, tmp_path, strict=True, weights=True):
        after = run(recorded)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_copy_of_the_model_is_neither_recorded_nor_in_the_way(tmp_path):
    model = MoeModel()
    with attach(model, tmp_path, strict=True) as recorder:
        other, third = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        model(inputs())
        assert torch.equal(other(inputs()), third(inputs()))
        recorder.flush()
        assert recorder.report().recorded_tokens == 10


def test_a_model_without_moe_layers_is_refused(tmp_path):
    with pytest.raises(TraceError, match="found no MoE layer in Linear, expected"):
        attach(torch.nn.Linear(2, 2), tmp_path)


def test_configuration(tmp_path):
    model = MoeModel()
    config = TraceConfig(path=str(tmp_path), weights=True, shard_tokens=4)
    with attach(model, config, model="named", strict=True) as recorder:
        model(inputs())
    trace = read_trace(tmp_path)
    assert (trace.model, trace.num_tokens, recorder.report().shards) == ("named", 10, 3)
    assert trace.expert_weights is not None
    off = attach(model, TraceConfig(enabled=False, path=str(tmp_path / "off")))
    assert isinstance(off, NullRecorder)
    off.step()
    assert off.close().recorded_tokens == 0
    assert not (tmp_path / "off").exists()
    with pytest.raises(TraceError, match="found shard_tokens=0, expected at least 1"):
        attach(model, tmp_path, shard_tokens=0)


def test_compiled_models_are_recorded(tmp_path):
    layer = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), MoeModel(num_layers=1))
    with attach(layer, tmp_path, strict=True) as recorder:
        layer(inputs())
        compiled = torch.compile(layer, backend="eager")
        for _ in range(2):
            compiled(inputs())
        recorder.flush()
    ids = read_trace(tmp_path).expert_ids
    assert len(ids) == 30
    assert (ids[:10] == ids[10:20]).all()
    assert (ids[:10] == ids[20:]).all()


def test_layers_of_different_sizes_are_refused_by_name(tmp_path):
    """They were recorded as if all had the largest number of experts [D3]."""
    model, small = MoeModel(num_layers=2, num_experts=8), MoeModel(num_layers=1, num_experts=4)
    model.blocks.insert(1, small.blocks[0])
    found = r"'blocks.0.*: 8, 'blocks.1.*: 4, 'blocks.2.*: 8\), expected one number.*num_experts=8"
    with pytest.raises(TraceError, match=found):
        attach(model, tmp_path / "all")
    config = TraceConfig(path=str(tmp_path / "section"))
    with pytest.raises(TraceError, match="different numbers of experts"):
        attach(model, config)
    with pytest.raises(TraceError, match="different numbers of experts"):
        attach(model, tmp_path / "none", num_experts=5)
    recorder = RoutingRecorder(tmp_path / "two")
    recorder.attach(small)
    with pytest.raises(TraceError, match="different numbers of experts"):
        recorder.attach(MoeModel(num_layers=1, num_experts=8))
    recorder.close()


def test_one_group_of_layers_is_recorded(tmp_path):
    """What to do with such a model: each group by itself [D3]."""
    model = MoeModel(num_layers=2, num_experts=8)
    model.blocks.insert(1, MoeModel(num_layers=1, num_experts=4).blocks[0])
    witness = GateWitness(model)
    section = TraceConfig(path=str(tmp_path / "4"), num_experts=4)
    with (
        attach(model, tmp_path / "8", strict=True, num_experts=8),
        attach(model, section, strict=True),
    ):
        model(inputs())
    for name, experts, layers in (("8", 8, [0, 2]), ("4", 4, [1])):
        trace = read_trace(tmp_path / name)
        assert (trace.num_experts, trace.num_layers) == (experts, len(layers))
        for row, layer in enumerate(layers):
            assert (sorted_picks(trace, row) == witness.picks(layer)).all()

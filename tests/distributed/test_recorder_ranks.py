"""The recorder on several ranks: DeepSpeed engines, AutoEP, checkpointing, pipeline stages."""

import numpy as np
import pytest
import torch

from moe_locality.trace import RoutingTrace, read_trace
from tests.launch import run_ranks
from tests.recorder_models import WIDTH, GateWitness, MoeModel, inputs

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
}


def engine_of(model, **config):
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    groups = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "parameters"}
    )
    return deepspeed.initialize(
        model=model, model_parameters=groups, config={**CONFIG, **config}, dist_init_required=False
    )[0]


def train_recorded(rank, _world, folder, ep_size):
    """Two steps of two micro-batches; return what this rank saw without the recorder."""
    from moe_locality.trace.recorder import annotate, attach

    model = MoeModel(num_layers=2, k=2, ep_size=ep_size)
    engine = engine_of(model)
    witness = GateWitness(engine.module)
    recorder = attach(engine.module, folder, strict=True)
    counts = 0
    for micro in range(4):
        request = 100 * rank + 2 * micro
        with annotate(request_ids=[request, request + 1], domains=f"domain{rank}"):
            loss = engine(inputs(seed=10 * rank + micro)).square().mean()
        counts = counts + np.stack(model.exp_counts)
        engine.backward(loss)
        engine.step()
        if engine.is_gradient_accumulation_boundary():
            recorder.step()
    report = recorder.close()
    assert (report.recorded_tokens, report.dropped_tokens, report.failure) == (40, 0, None)
    return counts, [witness.picks(layer) for layer in range(2)]


@pytest.mark.parametrize("ep_size", [1, 2])
def test_two_ranks_record_into_one_directory(tmp_path, ep_size):
    seen = run_ranks(train_recorded, 2, str(tmp_path), ep_size, deepspeed=True)
    trace = read_trace(tmp_path)
    assert (trace.num_tokens, trace.top_k, trace.num_experts) == (80, 2, 8)
    assert (trace.load() == seen[0][0] + seen[1][0]).all()
    for rank, (counts, picks) in enumerate(seen):
        mine = trace.take(trace.rank == rank)
        assert (mine.load() == counts).all()
        for layer in range(2):
            assert (np.sort(mine.expert_ids[:, layer], axis=1) == picks[layer]).all()
        assert mine.request_ids.tolist() == [100 * rank + i for i in range(8)]
        assert {trace.domain[i] for i in mine.domain_id} == {f"domain{rank}"}


class Checkpointed(torch.nn.Module):
    """An MoE model whose layers run under one kind of activation checkpointing."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.model = MoeModel(num_layers=2)
        self.calls = 0
        gate = self.model.blocks[0].deepspeed_moe.gate
        gate.register_forward_hook(lambda *_: setattr(self, "calls", self.calls + 1))

    def forward(self, x):
        import deepspeed
        from torch.utils.checkpoint import checkpoint

        for block in self.model.blocks:

            def run(y, block=block):
                return y + block(y)[0]

            if self.kind == "deepspeed":
                x = deepspeed.checkpointing.checkpoint(run, x)
            else:
                x = checkpoint(run, x, use_reentrant=self.kind == "reentrant")
        return x


def record_checkpointed(_rank, _world, folder, kind):
    import deepspeed

    from moe_locality.trace.recorder import attach

    if kind == "deepspeed":
        deepspeed.checkpointing.configure(None, partition_activations=False)
    model = Checkpointed(kind)
    with attach(model, folder, strict=True) as recorder:
        for seed in range(3):
            model(inputs(seed=seed).requires_grad_()).sum().backward()
    return model.calls, recorder.report()


@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant", "deepspeed"])
def test_activation_checkpointing_records_once(tmp_path, kind):
    [(calls, report)] = run_ranks(
        record_checkpointed, 1, str(tmp_path), kind, deepspeed=True, timeout_s=180.0
    )
    assert calls == 6  # every layer did run twice per step
    assert (report.recorded_tokens, report.skipped_forwards) == (30, 0)
    trace = read_trace(tmp_path)
    assert (trace.expert_ids >= 0).all()
    assert trace.step.tolist() == [0] * 10 + [1] * 10 + [2] * 10


def record_autoep(rank, _world, folder):
    import deepspeed
    from transformers import MixtralConfig, MixtralForCausalLM

    from moe_locality import compat
    from moe_locality.trace.recorder import attach

    compat.let_auto_ep_read_recorders()
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
    )
    section = {
        "enabled": True,
        "autoep_size": 2,
        "preset_model": "mixtral",
        "use_grouped_mm": False,
    }
    engine = deepspeed.initialize(
        model=model, config={**CONFIG, "expert_parallel": section}, dist_init_required=False
    )[0]
    recorder = attach(engine.module, folder, strict=True, weights=True)
    assert len(recorder.layer_names) == 2
    chosen = []
    for name in recorder.layer_names:
        router = engine.module.get_submodule(name)
        router.register_forward_hook(lambda _m, _a, out: chosen.append((out[1], out[0])))
    ids = torch.randint(0, 64, (2, 6), generator=torch.Generator().manual_seed(rank))
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    recorder.close()
    return [(i.numpy(), w.detach().half().numpy()) for i, w in chosen]


def test_autoep_routers(tmp_path):
    seen = run_ranks(record_autoep, 2, str(tmp_path), deepspeed=True, timeout_s=240.0)
    trace = read_trace(tmp_path)
    assert (trace.num_tokens, trace.num_experts) == (24, 4)
    for rank, layers in enumerate(seen):
        mine = trace.take(trace.rank == rank)
        assert mine.position.tolist() == [*range(6), *range(6)]
        for layer, (ids, weights) in enumerate(layers):
            assert (mine.expert_ids[:, layer] == ids).all()
            assert (mine.expert_weights[:, layer] == weights).all()


def accumulate(_rank, _world, folder, how):
    """Three optimizer steps of two micro-batches; where asked, only every second is recorded."""
    import moe_locality
    from moe_locality.trace.recorder import attach

    every = 2 if how.endswith("every 2") else 1
    model = MoeModel(num_layers=2, k=2)
    if how.startswith("initialize"):
        section = {"trace": {"path": folder, "every_n_steps": every}}
        engine = moe_locality.initialize(
            model=model,
            model_parameters=list(model.parameters()),
            config={**CONFIG, "moe_locality": section},
        )[0]
        recorder = engine.moe_locality.recorder
    else:
        engine = engine_of(model)
        recorder = attach(engine, folder, strict=True, every_n_steps=every)
    for micro in range(6):
        engine.backward(engine(inputs(seed=micro)).square().mean())
        engine.step()
    assert recorder.close().failure is None


@pytest.mark.parametrize("how", ["initialize", "initialize, every 2", "engine", "engine, every 2"])
def test_the_step_is_the_optimizer_step_from_the_start(tmp_path, how):
    """Before the first optimizer step each micro-batch counted as one: 0 1 2 3 5 5 [D6]."""
    run_ranks(accumulate, 1, str(tmp_path), how, deepspeed=True)
    steps = [0, 2] if how.endswith("every 2") else [0, 1, 2]
    assert read_trace(tmp_path).step.tolist() == np.repeat(steps, 20).tolist()


class Residual(torch.nn.Module):
    """A block of a pipeline, MoE or dense."""

    def __init__(self, moe):
        super().__init__()
        self.mlp = MoeModel(num_layers=1).blocks[0] if moe else torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y = self.mlp(x)
        return x + (y[0] if isinstance(y, tuple) else y)


class Other(Residual):
    """A block of another class."""


def record_pipeline(rank, _world, folder):
    """Stage 0 has the blocks 0 (dense) and 1 (MoE), stage 1 the blocks 2 (dense) and 3 (MoE)."""
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule

    from moe_locality.trace.recorder import attach

    specs = [LayerSpec(Residual, False), LayerSpec(Other, True)]
    specs += [LayerSpec(Residual, False), LayerSpec(Other, True)]
    layers = [torch.nn.Linear(WIDTH, WIDTH), lambda x: x, *specs, torch.nn.Linear(WIDTH, WIDTH)]
    net = PipelineModule(
        layers, num_stages=2, loss_fn=torch.nn.functional.mse_loss, partition_method="uniform"
    )
    engine = deepspeed.initialize(
        model=net,
        model_parameters=list(net.parameters()),
        config=CONFIG,
        dist_init_required=False,
    )[0]
    recorder = attach(engine, folder, strict=True)
    witness = GateWitness(engine.module)
    data = iter([(inputs(seed=seed), inputs(seed=9)) for seed in range(4)])
    for _ in range(2):
        engine.train_batch(data)
    assert recorder.close().failure is None
    return witness.picks(0)


def test_stages_of_a_pipeline_are_numbered_across_the_stages(tmp_path):
    """Both stages recorded layer 0, and reading merged them [F2]."""
    seen = run_ranks(record_pipeline, 2, str(tmp_path), deepspeed=True)
    trace = read_trace(tmp_path)
    assert trace.layer_ids.tolist() == [1, 3]
    assert trace.num_tokens == 40
    assert trace.step.tolist() == [0] * 20 + [1] * 20
    order = np.lexsort([trace.position, trace.request_id])
    for layer, picks in enumerate(seen):
        assert (np.sort(trace.expert_ids[order, layer], axis=1) == picks).all()


def record_stage(rank, _world, folder):
    """Rank 0 has the layers 0 and 1 of a model, rank 1 the layers 2 and 3, one after the other."""
    import torch.distributed as dist

    from moe_locality.trace.recorder import attach

    stage = MoeModel(num_layers=2, seed=rank)
    recorder = attach(
        stage, folder, layer_ids=[2 * rank, 2 * rank + 1], strict=True, first_request_id=0
    )
    witness = GateWitness(stage)
    with torch.no_grad():
        for seed in range(3):
            if rank:
                x = torch.empty(2, 5, WIDTH)
                dist.recv(x, 0)
                stage(x)
            else:
                dist.send(stage(inputs(seed=seed)), 1)
    recorder.close()
    return [witness.picks(layer) for layer in range(2)]


def test_pipeline_stages_join_into_whole_rows(tmp_path):
    seen = run_ranks(record_stage, 2, str(tmp_path))
    trace = read_trace(tmp_path)
    assert isinstance(trace, RoutingTrace)
    assert trace.layer_ids.tolist() == [0, 1, 2, 3]
    assert trace.num_tokens == 30
    order = np.lexsort([trace.position, trace.request_id])
    for layer, picks in enumerate([*seen[0], *seen[1]]):
        assert (np.sort(trace.expert_ids[order, layer], axis=1) == picks).all()

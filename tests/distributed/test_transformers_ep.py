"""transformers models through our exchange: the same results as the unsplit model, whatever the
plan, and the same training as transformers' own exchange. Real models, tiny, on gloo ranks.
"""

import dataclasses
import gc
import json
import logging
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moe_locality.errors import ConfigError, MoeLocalityError
from moe_locality.placement.plan import PlacementPlan
from moe_locality.topology.cluster import ClusterTopology
from tests.launch import run_ranks, skip_without_expert_parallelism
from tests.tolerances import LOGITS, LOSS

transformers = pytest.importorskip("transformers")
skip_without_expert_parallelism()
pytest.importorskip("accelerate")

NUM_EXPERTS = 8
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
NARROW = {"intermediate_size": 48, "moe_intermediate_size": 32}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "shared_expert_intermediate_size": 32,
}
FAMILIES = {
    "Mixtral": {"intermediate_size": 32, "num_local_experts": 8},
    "Qwen3Moe": {**NARROW, "num_experts": 8, "decoder_sparse_step": 1},
    "Qwen3Next": {**NARROW, **LINEAR, "num_experts": 8},
    "DeepseekV3": {
        **NARROW,
        **LATENT,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
    },
    "GptOss": {"intermediate_size": 32, "num_local_experts": 8},
    "Olmoe": {"intermediate_size": 32, "num_experts": 8},
    "Glm4Moe": {**NARROW, "n_routed_experts": 8, "first_k_dense_replace": 1, "n_group": 1},
    "Ernie4_5_Moe": {**NARROW, "moe_num_experts": 8, "moe_k": 2, "moe_layer_start_index": 0},
}


def save_tiny(folder, family, **changes):
    """Write a tiny random model of a family, and return its directory."""
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family], **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():  # routers that tell experts apart, beyond rounding
        for name, parameter in model.named_parameters():
            if name.endswith(("gate.weight", "router.weight")):
                parameter.normal_(std=1.0)
    path = str(folder / family)
    model.save_pretrained(path)
    return path


def load(path, world, name="moe_locality", dtype=torch.float32, **sizes):
    from transformers.distributed import DistributedConfig

    spread = DistributedConfig(
        **{"fsdp_size": world, "ep_size": world, **sizes}, ep_implementation=name
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, distributed_config=spread
    )


def make_plan(kind, layer_ids, num_nodes, ranks_per_node, seed=0, num_experts=NUM_EXPERTS):
    """A random permutation ("moved"), one with replicas ("copied"; fewer in every other layer), or
    no plan (None).
    """
    if kind is None:
        return None
    rng, num_ranks, rows = np.random.default_rng(seed), num_nodes * ranks_per_node, []
    for number, _ in enumerate(layer_ids):
        most = num_experts // 2 if kind == "copied" else 0
        extra = max(most - num_ranks * (number % 2), 0)
        while True:
            slots = rng.permutation([*range(num_experts), *rng.integers(0, num_experts, extra)])
            if all(len(set(rank)) == len(rank) for rank in slots.reshape(num_ranks, -1)):
                break
        empty = np.full((num_ranks, (most - extra) // num_ranks), -1)
        rows.append(np.concatenate([slots.reshape(num_ranks, -1), empty], axis=1).ravel())
    return PlacementPlan(
        layer_ids=tuple(layer_ids),
        num_experts=num_experts,
        num_nodes=num_nodes,
        ranks_per_node=ranks_per_node,
        physical_to_logical_map=np.stack(rows),
    )


def placed(path, world, kind, exchange="auto", seed=0, num_nodes=2, **sizes):
    """A loaded model with our exchange and a plan."""
    import moe_locality
    from moe_locality.integrations.transformers_ep import expert_layers
    from moe_locality.trace.recorder.hooks import moe_layer_ids

    nodes = (num_nodes, world // num_nodes)
    section = {
        "cluster": {"num_nodes": nodes[0], "ranks_per_node": nodes[1]},
        "dispatch": {"exchange": exchange},
    }
    moe_locality.register(section)
    model = load(path, world, **sizes)
    names = [name for name, _ in expert_layers(model)]
    plan = make_plan(kind, moe_layer_ids(model, names), *nodes, seed=seed)
    return moe_locality.apply(model, plan=plan), plan


def inputs(rank, seed=0):
    """Token ids of another number and length on every rank."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    return torch.randint(0, SIZES["vocab_size"], (1 + rank % 2, 5 + 2 * rank), generator=generator)


def whole(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def logical(model, name, tensor):
    """A gathered expert tensor in the order of the logical experts."""
    from moe_locality.integrations.transformers_ep import expert_layers

    for prefix, layer in expert_layers(model):
        if name.startswith(f"{prefix}."):
            return tensor[np.argsort(layer.rows.order)]
    return tensor


def compare_with_whole(rank, world, path, cases, num_nodes=2):
    """Forward, backward, generation and state dict of each case against the unsplit model."""
    whole_model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = inputs(rank)
    sampling = {"max_new_tokens": 2 + rank % 2, "do_sample": True, "top_k": 20}
    greedy = {"max_new_tokens": 2 + rank % 2, "do_sample": False}

    def results(model, average):
        model.eval()
        with torch.no_grad():
            logits = model(ids).logits
            generated = [model.generate(ids, **greedy)]
            torch.manual_seed(7 + rank)
            generated.append(model.generate(ids, **sampling))
        model.train()
        loss = model(ids, labels=ids).loss
        loss.backward()
        grads = {}
        for name, parameter in model.named_parameters():
            if parameter.grad is None:  # Ernie's correction of the router is not trained
                continue
            grad = whole(parameter.grad)
            if average:  # FSDP averages over the ranks
                dist.all_reduce(grad)
                grad /= world
            grads[name] = logical(model, name, grad)
        return logits, loss.detach(), generated, grads

    expected = results(whole_model, True)
    weights = {name: tensor.clone() for name, tensor in whole_model.state_dict().items()}

    def close(found, wanted, table, what):
        rtol, atol = table["float32"]
        torch.testing.assert_close(
            found, wanted, rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}"
        )

    for kind, exchange in cases:
        model, _ = placed(path, world, kind, exchange, num_nodes=num_nodes)
        found = results(model, False)
        where = f"{path}: plan {kind}, exchange {exchange}, {num_nodes} nodes"
        close(found[0], expected[0], LOGITS, f"{where}, logits")
        close(found[1], expected[1], LOSS, f"{where}, loss")
        for ours, theirs in zip(found[2], expected[2], strict=True):
            assert ours.tolist() == theirs.tolist(), where
        assert found[3].keys() == expected[3].keys()
        for name, grad in expected[3].items():
            scale = float(grad.abs().max()) + 1e-12
            close(found[3][name] / scale, grad / scale, LOGITS, f"{where}, gradient of {name}")
        state = model.state_dict()
        for name, tensor in weights.items():
            assert torch.equal(whole(state[name]), tensor), f"{where}: {name}"


CASES = [(None, "flat"), ("moved", "hierarchical"), ("copied", "flat"), ("copied", "hierarchical")]
"""(plan, exchange): in turn, one of the first two and one of the others for each family"""


def compare_rounding(rank, world, path):
    """Distances of bfloat16 logits, loss and gradients from float32 ones, by exchange."""
    ids = inputs(rank)
    whole_model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    wanted = whole_model(ids, labels=ids)
    wanted.loss.backward()
    grads = {}
    for name, parameter in whole_model.named_parameters():
        if parameter.grad is not None:
            grads[name] = parameter.grad / world
            dist.all_reduce(grads[name])
    found = {}
    for kind in ("all_to_all", "moved", "copied"):
        if kind == "all_to_all":
            model = load(path, world, kind, torch.bfloat16)
        else:
            model = placed(path, world, kind, "hierarchical", dtype=torch.bfloat16)[0]
        output = model(ids, labels=ids)
        output.loss.backward()
        found[kind] = {
            "logits": float((output.logits.detach().float() - wanted.logits).square().sum()),
            "loss": abs(float(output.loss.detach().float() / wanted.loss - 1)),
        }
        for name, grad in grads.items():
            ours = logical(model, name, whole(model.get_parameter(name).grad)).float()
            found[kind][name] = float((ours - grad).norm() / grad.norm().clamp_min(1e-12))
    return found


def compare_families(rank, world, paths):
    for number, path in enumerate(paths.values()):
        compare_with_whole(rank, world, path, CASES[number % 2 :: 2])


def compare_roundings(rank, world, paths):
    return {family: compare_rounding(rank, world, path) for family, path in paths.items()}


@pytest.mark.parametrize("half", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_apply_equals_the_whole_model(tmp_path, half):
    """In float32. In bfloat16 ours is no farther from that than transformers' own exchange."""
    paths = {family: save_tiny(tmp_path, family) for family in list(FAMILIES)[half::2]}
    run_ranks(compare_families, 4, paths, timeout_s=400.0)
    everyone = run_ranks(compare_roundings, 2, paths, timeout_s=400.0)
    for family in paths:
        distances = [each[family] for each in everyone]
        theirs = {
            key: [each["all_to_all"][key] for each in distances] for key in distances[0]["moved"]
        }
        for kind in ("moved", "copied"):
            ours = {key: [each[kind][key] for each in distances] for key in theirs}
            # the same roundings but for the sums of a token's experts: ours are in float32
            assert sum(ours.pop("logits")) <= 1.1 * sum(theirs["logits"]), f"{family}, {kind}"
            assert max(ours.pop("loss")) <= LOSS["bfloat16"][0], f"{family}, {kind}"
            for name, (distance, *_) in ours.items():
                most = max(LOGITS["bfloat16"][0], 2 * theirs[name][0])
                assert distance <= most, f"{family}, {kind}, gradient of {name}"


def bytes_held():
    """Bytes of all tensors that Python can reach."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    tensors = [getattr(one, "_local_tensor", one) for one in tensors]
    held = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(held.values())


def check_experts_are_held_once(model, before):
    """What has come since ``before`` is dense weights and caches."""
    from moe_locality.integrations.transformers_ep import expert_layers

    experts = {p for _, layer in expert_layers(model) for p in layer.experts.parameters()}
    dense = sum(p.numel() * p.itemsize for p in model.parameters() if p not in experts)
    held = sum(p.to_local().nbytes for p in experts)
    assert bytes_held() - before < dense + held / 2


def count_bytes(rank, world, path):
    """Bytes of experts that this rank reads, gets from other ranks, has in buffers, and keeps."""
    import safetensors
    from transformers import modeling_utils

    from moe_locality.integrations.transformers_ep import expert_layers

    read, moves = [], []  # (key of the tensor, bytes); (bytes from each rank, of the buffers)
    exchange = dist.all_to_all_single

    def counted_exchange(output, given, output_splits, input_splits, group):
        row = output.nbytes // max(1, len(output))
        moves.append(([row * rows for rows in output_splits], output.nbytes + given.nbytes))
        return exchange(output, given, output_splits, input_splits, group=group)

    class CountedSlice:
        def __init__(self, key, inner):
            self.key, self.inner = key, inner

        def __getitem__(self, index):
            found = self.inner[index]
            read.append((self.key, found.nbytes))
            return found

        def __getattr__(self, name):
            return getattr(self.inner, name)

    class CountedFile:
        def __init__(self, *args, **kwargs):
            self.inner = safetensors.safe_open(*args, **kwargs)

        def get_slice(self, key):
            return CountedSlice(key, self.inner.get_slice(key))

        def __getattr__(self, name):
            return getattr(self.inner, name)

    modeling_utils.safe_open, dist.all_to_all_single = CountedFile, counted_exchange
    model, plan = placed(path, world, "moved")
    experts = sum(size for key, size in read if ".experts." in key)
    kept = [
        parameter.to_local().nbytes
        for _, layer in expert_layers(model)
        for parameter in layer.experts.parameters()
    ]
    dist.all_to_all_single, before = exchange, bytes_held()
    model.set_reshard_after_forward(False)
    with torch.no_grad():
        model(inputs(rank))
    check_experts_are_held_once(model, before)
    return {
        "experts": experts,
        "rest": sum(size for _, size in read) - experts,
        "kept": sum(kept),
        "from": np.sum([sizes for sizes, _ in moves], axis=0),
        "room": max(size for _, size in moves) / max(kept),
        "slots": plan.physical_to_logical_map.reshape(len(plan.layer_ids), world, -1),
    }


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_no_rank_reads_or_holds_all_experts(tmp_path, family):
    """Experts that are files' tensors one by one, and stacked ones, over several files.

    With a plan, the others' rows come once from the ranks that have read them: each rank gets the
    experts of its slots and nothing else, one tensor at a time.
    """
    path = save_tiny(tmp_path, family)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.save_pretrained(f"{path}-split", max_shard_size="40KB")
    assert len(list(tmp_path.glob(f"{family}-split/*.safetensors"))) > 2
    sizes = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        sizes[".experts." in name] += parameter.nbytes
    for rank, found in enumerate(run_ranks(count_bytes, 4, f"{path}-split", timeout_s=120.0)):
        assert found["experts"] == found["kept"] == sizes[True] // 4
        assert 0 < found["rest"] <= sizes[False]
        mine = found["slots"][:, rank].ravel() // (
            NUM_EXPERTS // 4
        )  # the ranks that have read them
        expert = sizes[True] // (2 * NUM_EXPERTS)  # of one of the two layers
        assert found["from"].tolist() == [
            expert * int((mine == reader).sum()) for reader in range(4)
        ]
        assert found["room"] == 2  # one buffer to send and one that is filled


def count_rows(rank, world, path, folder, kind, exchange):
    """Record a forward pass and a backward pass, and count what was sent."""
    import moe_locality
    from moe_locality.dispatch import traffic_report

    model, plan = placed(path, world, kind, exchange)
    recorder = moe_locality.attach(model, folder, strict=True)
    ids = inputs(rank)
    model(ids, labels=ids).loss.backward()
    recorder.close()
    rows = traffic_report(model)["rows_by_link"]
    return plan.to_dict(), {
        kind: rows[kind]["cross_node"] for kind in ("dispatch", "dispatch_grad")
    }


@pytest.mark.parametrize("kind", ["moved", "copied"])
def test_traffic_is_what_evaluate_predicts(tmp_path, kind):
    """A recording through this front end has all experts and the homes; rows are as predicted."""
    from moe_locality.placement import evaluate
    from moe_locality.trace import read_trace

    path = save_tiny(tmp_path, "Qwen3Moe")
    for exchange, cost in (("flat", "total_picks"), ("hierarchical", "total_copies")):
        folder = tmp_path / f"{kind}-{exchange}"
        found = run_ranks(count_rows, 4, path, str(folder), kind, exchange, timeout_s=120.0)
        trace = read_trace(folder)
        assert (trace.num_experts, trace.num_tokens) == (NUM_EXPERTS, 5 + 14 + 9 + 22)
        content, rows = found[0]
        homes = {
            int(request): int(rank)
            for request, rank in zip(trace.request_id, trace.rank, strict=True)
        }
        predicted = evaluate(
            trace,
            PlacementPlan.from_dict(content),
            ClusterTopology.uniform(num_nodes=2, ranks_per_node=2),
            homes,
        )
        wanted = getattr(predicted, cost)
        assert rows == {"dispatch": wanted, "dispatch_grad": wanted}


def train(model, optimizer, rank, steps):
    losses = []
    for step in steps:
        ids = inputs(rank, seed=step % 3)
        loss = model(ids, labels=ids).loss
        loss.backward()
        clip(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def clip(model, most):
    """Clip the norm of all gradients, whose DTensors lie on several meshes, as the Trainer does."""
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = float(sum(whole(grad).double().square().sum() for grad in grads)) ** 0.5
    for grad in grads:
        grad.mul_(min(1.0, most / norm))


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def train_and_resume(rank, world, path, folder):
    """Losses of transformers' own exchange, of ours, and of ours resumed under another plan."""
    from transformers.distributed.checkpoint import (
        load_optimizer_distributed,
        save_optimizer_distributed,
    )

    theirs = load(path, world, "all_to_all")
    found = {"theirs": train(theirs, adam(theirs), rank, range(20))}
    for kind in ("moved", "copied"):
        model, _ = placed(path, world, kind)
        optimizer = adam(model)
        found[kind] = train(model, optimizer, rank, range(20))
    model, _ = placed(path, world, "copied")
    optimizer = adam(model)
    train(model, optimizer, rank, range(10))
    model.save_pretrained(f"{folder}/half", distributed_checkpoint=True)
    save_optimizer_distributed(model, optimizer, f"{folder}/moments")
    model.save_pretrained(f"{folder}/plain")
    for kind, seed in (("moved", 5), ("copied", 6), (None, 0)):
        model, _ = placed(f"{folder}/half", world, kind, seed=seed)
        optimizer = adam(model)
        load_optimizer_distributed(model, optimizer, f"{folder}/moments")
        found[f"resumed {kind}"] = train(model, optimizer, rank, range(10, 20))
    return found


@pytest.mark.slow
def test_apply_trains_as_their_exchange_and_resumes_under_another_plan(tmp_path):
    """Twenty steps of AdamW with clipped gradients: replicas count once in the norm."""
    path = save_tiny(tmp_path, "Qwen3Moe")
    rtol, atol = LOSS["float32"]
    everyone = run_ranks(train_and_resume, 4, path, str(tmp_path), timeout_s=240.0)
    for found in everyone:
        theirs = found.pop("theirs")
        assert theirs[-1] < theirs[0]
        for name, losses in found.items():
            wanted = theirs[-len(losses) :]
            np.testing.assert_allclose(losses, wanted, rtol=20 * rtol, atol=20 * atol, err_msg=name)
    # a plain checkpoint, whose experts are in logical order
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    resumed = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert plain.state_dict().keys() == resumed.state_dict().keys()
    ids = inputs(0, seed=10 % 3)
    loss = float(plain(ids, labels=ids).loss.detach())
    np.testing.assert_allclose(loss, everyone[0]["moved"][10], rtol=20 * rtol, atol=20 * atol)


def train_under_three_plans(rank, world, path):
    """Plan after plan while training, with FSDP's gathered weights kept; compared with no plan."""
    import moe_locality

    found = []
    for kinds in ((None, None, None), (None, "moved", "copied"), ("moved", "copied", "moved")):
        model, _ = placed(path, world, kinds[0])
        optimizer, losses = adam(model), []
        probe = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)
        if rank == 0:  # an optimizer of no expert, which the other rank does not step
            probe.step()
        for seed, kind in enumerate(kinds):
            ids = inputs(rank, seed=seed)
            model(ids, labels=ids).loss.backward()  # gradients wait for the next step
            if kind is not None:
                model.set_reshard_after_forward(False)
                with torch.no_grad():
                    model(ids)
                moe_locality.apply(model, plan=make_plan(kind, (0, 1), 2, 1, seed=seed))
                model.set_reshard_after_forward(True)
            losses += train(model, optimizer, rank, range(2))
        state = {name: whole(tensor) for name, tensor in model.state_dict().items()}
        for number, values in optimizer.state_dict()["state"].items():
            state |= {f"{number} {key}": whole(value) for key, value in values.items()}
        found.append((losses, state))
    for losses, state in found[1:]:
        np.testing.assert_allclose(losses, found[0][0], rtol=1e-5)
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, found[0][1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_apply_again_moves_gradients_and_moments(tmp_path):
    run_ranks(train_under_three_plans, 2, save_tiny(tmp_path, "Qwen3Moe"), timeout_s=120.0)


def train_with_trainer(rank, world, path, folder):
    """Eight steps of a Trainer, with a checkpoint of the model: the losses that it logs."""
    losses = {}
    for name in ("all_to_all", "moved"):
        model = load(path, world, name) if name == "all_to_all" else placed(path, world, name)[0]
        rows = [{"input_ids": row, "labels": row} for row in torch.arange(32 * 8).view(32, 8) % 96]
        arguments = transformers.TrainingArguments(
            output_dir=f"{folder}/{name}",
            per_device_train_batch_size=1,
            learning_rate=1e-2,
            max_steps=8,
            logging_steps=1,
            save_steps=8,
            save_only_model=True,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        losses[name] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses


def test_apply_trains_in_a_trainer_whose_checkpoints_are_in_logical_order(tmp_path):
    path = save_tiny(tmp_path, "Qwen3Moe")
    found = run_ranks(train_with_trainer, 4, path, str(tmp_path), timeout_s=180.0)[0]
    assert found["moved"][-1] < found["moved"][0]
    np.testing.assert_allclose(found["moved"], found["all_to_all"], rtol=2e-4)
    states = [
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / name / "checkpoint-8"
        ).state_dict()
        for name in ("all_to_all", "moved")
    ]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def run_layouts(rank, world, path, folder):
    """Other meshes than one expert group over all ranks of FSDP."""
    import moe_locality

    whole_model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    rtol, atol = LOGITS["float32"]
    for sizes, plan in (
        ({"fsdp_size": 2, "tp_size": 2, "ep_size": 4}, "copied"),  # two ranks share a batch
        ({"fsdp_size": 2, "tp_size": 2, "ep_size": 2}, None),  # and are an expert group
        ({"fsdp_size": 4, "ep_size": 2}, None),  # two copies of every expert, split by FSDP
        ({"dp_replicate_size": 2, "fsdp_size": 2, "ep_size": 2}, None),
    ):
        ids = inputs(rank // sizes.get("tp_size", 1))
        model, _ = placed(path, world, plan, **sizes)
        whole_model.zero_grad()
        recorder = moe_locality.attach(model, f"{folder}/{sizes}", strict=True)
        for each in (model, whole_model):
            each(ids, labels=ids).loss.backward()
        first = rank % sizes.get("tp_size", 1) == 0  # of the ranks that have the same tokens
        assert recorder.close().recorded_tokens == first * ids.numel(), sizes
        for name, parameter in whole_model.named_parameters():
            grad = parameter.grad.clone()
            dist.all_reduce(grad)
            grad /= world
            scale = float(grad.abs().max()) + 1e-12
            ours = logical(model, name, whole(model.get_parameter(name).grad))
            torch.testing.assert_close(
                ours / scale,
                grad / scale,
                rtol=rtol,
                atol=atol,
                msg=lambda text, name=name, sizes=sizes: f"{sizes}, {name}: {text}",
            )
        with torch.no_grad():
            found, wanted = model(ids).logits, whole_model(ids).logits
        torch.testing.assert_close(whole(found), wanted, rtol=rtol, atol=atol)


@pytest.mark.slow
def test_apply_with_tensor_parallelism_and_with_several_expert_groups(tmp_path):
    path = save_tiny(tmp_path, "Qwen3Moe")
    run_ranks(run_layouts, 4, path, str(tmp_path), timeout_s=180.0)


def run_empty(rank, world, path):
    """Tokens on some ranks only, or on none, forward and backward."""
    from moe_locality.integrations.transformers_ep import expert_layers

    model, _ = placed(path, world, "copied", "hierarchical")
    whole_model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = inputs(0)
    model(ids)  # FSDP sets itself up at the first call of the whole model
    name, layer = expert_layers(model)[0]
    wanted = whole_model.get_submodule(name)
    for busy in ((1, 2), ()):
        tokens = 6 if rank in busy else 0
        generator = torch.Generator().manual_seed(rank)
        x = torch.randn(tokens, SIZES["hidden_size"], generator=generator, requires_grad=True)
        picks = torch.stack(
            [torch.randperm(8, generator=generator)[:2] for _ in range(tokens)] or [torch.zeros(2)]
        )[:tokens].long()
        weights = torch.rand(tokens, 2, generator=generator)
        out = layer.experts(x, picks, weights)
        out.square().sum().backward()
        assert out.shape == x.shape == x.grad.shape
        if tokens:
            again = x.detach().clone().requires_grad_()
            expected = wanted(again, picks, weights)
            expected.square().sum().backward()
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(x.grad, again.grad)
    with torch.no_grad():
        model(ids)  # keeps the copies
        for parameter in (*model.parameters(), *whole_model.parameters()):
            parameter.mul_(1.5)
        torch.testing.assert_close(model(ids).logits, whole_model(ids).logits)


def test_apply_serves_ranks_without_tokens_and_sees_weights_that_change(tmp_path):
    run_ranks(run_empty, 4, save_tiny(tmp_path, "Qwen3Moe"), timeout_s=120.0)


def record_checkpointed(rank, world, path, folder):
    import moe_locality

    model, _ = placed(path, world, "moved")
    model.gradient_checkpointing_enable()
    model.train()
    ids = inputs(rank)
    with moe_locality.attach(model, folder) as recorder:
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
    plain = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert float(loss.detach()) == pytest.approx(float(plain(ids, labels=ids).loss), rel=1e-5)
    return recorder.close().recorded_tokens if recorder else ids.numel()


def test_recording_with_gradient_checkpointing_records_once(tmp_path):
    from moe_locality.trace import read_trace

    path = save_tiny(tmp_path, "Qwen3Moe")
    run_ranks(record_checkpointed, 4, path, str(tmp_path / "trace"), timeout_s=120.0)
    assert read_trace(tmp_path / "trace").num_tokens == 5 + 14 + 9 + 22


def record_generation(rank, world, path, folder):
    """Generate with padded prompts and other lengths on every rank, split and whole, and record."""
    import moe_locality

    model, _ = placed(path, world, "copied")
    whole_model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompts = torch.randint(1, 90, (2, 6), generator=torch.Generator().manual_seed(rank))
    mask = torch.ones_like(prompts)
    mask[0, : 1 + rank % 3] = 0
    texts = []
    for each, where in ((model, folder), (whole_model, f"{folder}-{rank}")):
        with (
            moe_locality.attach(each, where),
            moe_locality.annotate(
                request_ids=[10 * rank, 10 * rank + 1], stage="generate", mask=mask
            ),
        ):
            length = 2 + 2 * rank
            made = each.generate(prompts, attention_mask=mask, max_new_tokens=length, min_length=20)
        texts.append(made.tolist())
    assert texts[0] == texts[1]


def test_recording_generation_knows_requests_stages_and_padding(tmp_path):
    """Ranks that are done go on with empty steps until all are: those are not recorded."""
    from moe_locality.trace import read_trace

    path, folder = save_tiny(tmp_path, "Qwen3Moe"), tmp_path / "split"
    run_ranks(record_generation, 4, path, str(folder), timeout_s=120.0)
    split = read_trace(folder)
    for rank in range(4):
        found, wanted = split.take(split.rank == rank), read_trace(tmp_path / f"split-{rank}")
        for trace in (found, wanted):
            assert trace.num_tokens == 2 * (6 + 2 + 2 * rank - 1) - (1 + rank % 3)
        orders = [np.lexsort((trace.position, trace.request_id)) for trace in (found, wanted)]
        for name in ("request_id", "position", "stage", "expert_ids"):
            values = [
                getattr(trace, name)[order]
                for trace, order in zip((found, wanted), orders, strict=True)
            ]
            np.testing.assert_array_equal(*values, err_msg=f"rank {rank}, {name}")


def refuse(rank, world, path, folder):
    """What every rank says to each wrong input, and how long it took."""
    import moe_locality
    from moe_locality.integrations.transformers_ep import LocalityEP

    cluster = {"cluster": {"num_nodes": 2, "ranks_per_node": 2}}
    good = make_plan("moved", (0, 1), 2, 2)
    wrong = {
        "experts": PlacementPlan.linear(16, (0, 1), 2, 2),
        "layers": PlacementPlan.linear(8, (0, 1, 2), 2, 2),
        "ranks": PlacementPlan.linear(8, (0, 1), 4, 2),
        "nodes": PlacementPlan.linear(8, (0, 1), 4, 1),
        "model": dataclasses.replace(good, provenance={"model_type": "mixtral"}),
    }
    moe_locality.register(cluster)
    model = load(path, world)
    calls = {
        name: lambda plan=plan: moe_locality.apply(model, plan=plan) for name, plan in wrong.items()
    }
    mine = good if rank else PlacementPlan.linear(8, (0, 1), 2, 2)
    calls["content"] = lambda: moe_locality.apply(model, plan=good.to_dict())
    calls["wrapped"] = lambda: moe_locality.apply(torch.nn.Sequential(model), plan=good)
    calls["differs"] = lambda: moe_locality.apply(model, plan=mine)
    absent = f"{folder}/absent-{rank}.json"
    if rank == 0:
        good.write(absent)
    calls["missing"] = lambda: moe_locality.apply(model, {"plan": absent, **cluster})
    for name, value in (
        ("trace", {"path": folder}),
        ("online", {}),
        ("tracking", {}),
        ("experts mode", "loop"),
        ("enabled", False),
    ):
        section = {name.split()[0]: value}
        calls[name] = lambda section=section: moe_locality.register(section)
    stock = load(path, world, "all_to_all")
    calls["stock"] = lambda: moe_locality.apply(stock)

    def forget_to_apply():
        good.write(f"{folder}/plan-{rank}.json")
        section = {**cluster, "plan": f"{folder}/plan-{rank}.json"}
        with open(f"{folder}/section-{rank}.json", "w", encoding="utf-8") as file:
            json.dump({"moe_locality": section}, file)
        moe_locality.register(f"{folder}/section-{rank}.json")
        load(path, world)(inputs(rank))

    calls["not applied"] = forget_to_apply

    def place_what_is_placed():
        if rank == 0:
            good.write(f"{path}/moe_locality_plan.json")
        dist.barrier()
        moe_locality.apply(model, plan=good)

    calls["baked"] = place_what_is_placed

    def place_two_copies():
        moe_locality.register({"cluster": {"num_nodes": 2, "ranks_per_node": 2}})
        moe_locality.apply(load(path, world, ep_size=2), plan=PlacementPlan.linear(8, (0, 1), 1, 2))

    calls["two copies"] = place_two_copies
    said = {}
    for name, call in calls.items():
        try:
            call()
            said[name] = None
        except MoeLocalityError as error:
            said[name] = f"{type(error).__name__}: {error}"
    assert all(
        isinstance(m.moe_locality_ep, LocalityEP)
        for m in model.modules()
        if hasattr(m, "moe_locality_ep")
    )
    return said


REFUSALS = {
    "experts": "experts per layer: found 16 in the plan, expected 8",
    "layers": "MoE layers: found 3 in the plan, expected 2",
    "ranks": "expert-parallel ranks: found 8 in the plan, expected 4",
    "nodes": "found a plan whose ranks lie on nodes [0, 1, 2, 3]",
    "model": "model_type: found 'mixtral' in the plan, expected 'qwen3_moe'",
    "baked": "were put into the order of this plan by `moe-locality bake`",
    "content": "found a dict as the plan, expected a PlacementPlan or the path",
    "wrapped": "found a Sequential around a transformers model",
    "differs": "found different placement plans",
    "missing": "cannot read the plan",
    "trace": "moe_locality.attach(model, path)",
    "online": "found online in the moe_locality section of a transformers model",
    "tracking": "found tracking in the moe_locality section of a transformers model",
    "experts mode": "choose experts_implementation",
    "enabled": "name another ep_implementation",
    "stock": "found no experts in FSDPQwen3MoeForCausalLM that exchange through moe_locality",
    "not applied": "expected moe_locality.apply(model) first",
    "two copies": "split over several copies of its expert group",
}


def test_apply_refuses_on_every_rank_with_the_reason(tmp_path):
    path = save_tiny(tmp_path, "Qwen3Moe")
    everyone = run_ranks(refuse, 4, path, str(tmp_path), timeout_s=180.0)
    for said in everyone:
        for name, message in said.items():
            assert message is not None, f"{name} was accepted"
            assert REFUSALS.get(name, "") in message, name


def forget_on_one_rank(rank, world, path, folder):
    import moe_locality

    cluster = {"num_nodes": 2, "ranks_per_node": 1}
    plan = PlacementPlan.linear(8, (0, 1), 2, 1)
    plan.write(f"{folder}/plan-{rank}.json")
    moe_locality.register({"cluster": cluster, "plan": f"{folder}/plan-{rank}.json"})
    model = load(path, world)
    message = ""
    if rank == 1:
        try:
            model(inputs(rank))
        except MoeLocalityError as error:
            message = str(error)
    moe_locality.apply(model, plan=Path(folder) / f"plan-{rank}.json")
    model(inputs(rank))
    return message, len(torch.nn.modules.module._global_forward_pre_hooks)


def test_forward_raises_on_the_one_rank_that_left_apply_out(tmp_path):
    """It waited, with the others, in FSDP2's first gather until their time limit."""
    path = save_tiny(tmp_path, "Qwen3Moe")
    said = run_ranks(forget_on_one_rank, 2, path, str(tmp_path), timeout_s=60.0)
    assert [message[:36] for message, _ in said] == ["", "found a forward pass before the plan"]
    assert [hooks for _, hooks in said] == [0, 0]


def save_on_one_rank(rank, world, path):
    from moe_locality.integrations import expert_rows

    expert_rows._STATE_DICT_TIMEOUT_S = 3.0
    model, _ = placed(path, world, "moved")
    optimizer = torch.optim.Adagrad(model.parameters())  # has state before its first step
    train(model, optimizer, rank, range(1))
    message = ""
    for call in (model.state_dict, optimizer.state_dict):
        if rank == 0:
            try:
                call()
            except MoeLocalityError as error:
                message += str(error)
    dist.barrier()
    return message


def test_state_dict_on_one_rank_is_refused(tmp_path):
    """As a Trainer saves its optimizer: the moments of the experts elsewhere would be lost."""
    path = save_tiny(tmp_path, "Qwen3Moe")
    message = run_ranks(save_on_one_rank, 2, path, timeout_s=120.0)[0]
    assert "found no answer from ranks [1]" in message
    assert "state_dict() is collective: call it on every rank" in message
    assert "the optimizer's state_dict() is collective" in message


def test_apply_refuses_a_model_that_peft_has_wrapped():
    import moe_locality

    class PeftModelForCausalLM(torch.nn.Module):
        """As peft's, of which only the name and the attribute are asked for."""

        peft_config: ClassVar[dict] = {}

    with pytest.raises(ConfigError, match="before peft"):
        moe_locality.apply(PeftModelForCausalLM())


def test_apply_on_one_rank_leaves_the_model_as_it_is(tmp_path, caplog):
    import moe_locality

    model = transformers.AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path, "Qwen3Moe"))
    moe_locality.register()
    with caplog.at_level(logging.WARNING, "moe_locality"):
        assert moe_locality.apply(model) is model
    assert "on one rank" in caplog.text

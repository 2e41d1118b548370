"""transformers models through our exchange: the same results as the unsplit model, whatever the
plan, and the same training as transformers' own exchange. Real models, tiny, on gloo ranks.
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moe_locality.placement.plan import PlacementPlan
from tests.launch import run_ranks
from tests.tolerances import LOGITS, LOSS

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.distributed.expert_parallel", reason="transformers before 5.23")
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


def make_plan(kind, layer_ids, num_nodes, ranks_per_node, seed=0):
    """A random permutation ("moved"), one with replicas ("copied"), or no plan (None)."""
    if kind is None:
        return None
    rng, num_ranks, rows = np.random.default_rng(seed), num_nodes * ranks_per_node, []
    for _ in layer_ids:
        extra = NUM_EXPERTS // 2 if kind == "copied" else 0
        while True:
            slots = rng.permutation([*range(NUM_EXPERTS), *rng.integers(0, NUM_EXPERTS, extra)])
            if all(len(set(rank)) == len(rank) for rank in slots.reshape(num_ranks, -1)):
                break
        rows.append(slots)
    return PlacementPlan(
        layer_ids=tuple(layer_ids),
        num_experts=NUM_EXPERTS,
        num_nodes=num_nodes,
        ranks_per_node=ranks_per_node,
        physical_to_logical_map=np.stack(rows),
    )


def placed(path, world, kind, exchange="auto", seed=0, **sizes):
    """A loaded model with our exchange and a plan; its ranks are on two nodes."""
    import moe_locality
    from moe_locality.integrations.transformers_ep import expert_layers
    from moe_locality.trace.recorder.hooks import moe_layer_ids

    nodes = (2, world // 2) if world > 1 else (1, 1)
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
        if name.startswith(f"{prefix}.") and layer.rows is not None:
            return tensor[np.argsort(layer.rows.order)]
    return tensor


def compare_with_whole(rank, world, path, cases):
    """Forward, backward, generation and state dict of each case against the unsplit model."""
    whole_model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = inputs(rank)
    sampling = {"max_new_tokens": 3 + rank, "do_sample": True, "top_k": 20}
    greedy = {"max_new_tokens": 3 + rank, "do_sample": False}

    def results(model, average):
        model.eval()
        with torch.no_grad():
            logits = model(ids).logits
            generated = [model.generate(ids[:1], **greedy)]
            torch.manual_seed(7 + rank)
            generated.append(model.generate(ids[:1], **sampling))
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
        model, _ = placed(path, world, kind, exchange)
        found = results(model, False)
        where = f"plan {kind}, exchange {exchange}"
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


@pytest.mark.parametrize("family", FAMILIES)
def test_apply_equals_the_whole_model(tmp_path, family):
    path = save_tiny(tmp_path, family)
    run_ranks(compare_with_whole, 4, path, CASES, timeout_s=240.0)


def test_apply_equals_the_whole_model_on_two_ranks(tmp_path):
    path = save_tiny(tmp_path, "Qwen3Moe")
    run_ranks(compare_with_whole, 2, path, CASES, timeout_s=240.0)

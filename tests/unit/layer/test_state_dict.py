"""A relabelled Hugging Face state dict: the same logits, under all presets and both layouts."""

import numpy as np
import pytest
import torch

from moe_locality.errors import ConfigError, PlacementError
from moe_locality.layer.state_dict import PRESETS, relabel_state_dict
from moe_locality.placement import PlacementPlan
from tests import tolerances

EXPERTS, LAYERS = 8, 2


def plan_of(rows, layer_ids=range(LAYERS)):
    return PlacementPlan(
        layer_ids=tuple(layer_ids),
        num_experts=EXPERTS,
        num_nodes=2,
        ranks_per_node=2,
        physical_to_logical_map=np.asarray(rows),
    )


def random_plan(seed, **options):
    rng = np.random.default_rng(seed)
    return plan_of([rng.permutation(EXPERTS) for _ in range(LAYERS)], **options)


def tiny_model(preset):
    import transformers as tf

    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": LAYERS, "head_dim": 8}
    sizes |= {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"pad_token_id": 0, "eos_token_id": 1}
    if preset == "mixtral":
        return tf.MixtralForCausalLM(tf.MixtralConfig(**sizes, num_local_experts=EXPERTS))
    if preset == "qwen3_moe":
        options = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**sizes, **options))
    if preset == "olmoe":
        return tf.OlmoeForCausalLM(tf.OlmoeConfig(**sizes, num_experts=EXPERTS))
    kinds = ["full_attention"] * LAYERS
    return tf.GptOssForCausalLM(
        tf.GptOssConfig(**sizes, num_local_experts=EXPERTS, layer_types=kinds)
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_logits_stay(preset):
    torch.manual_seed(0)
    model = tiny_model(preset).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # GPT-OSS leaves biases at zero, gates near it
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    tokens = torch.randint(64, (3, 11))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = random_plan(1), random_plan(2)
    with torch.no_grad():
        expected = model(tokens).logits
        placed = relabel_state_dict(state, first, preset=preset)
        model.load_state_dict(placed)
        rtol, atol = tolerances.LOGITS["float32"]
        torch.testing.assert_close(model(tokens).logits, expected, rtol=rtol, atol=atol)
    changed = [name for name in state if not torch.equal(state[name], placed[name])]
    assert sum("router" in n or ".gate." in n for n in changed) == LAYERS * (
        2 if preset == "gpt_oss" else 1
    )
    moved = relabel_state_dict(placed, second, preset=preset, current=first)
    direct = relabel_state_dict(state, second, preset=preset)
    back = relabel_state_dict(moved, linear(), preset=preset, current=second)
    assert all(torch.equal(moved[name], direct[name]) for name in state)
    assert all(torch.equal(back[name], state[name]) for name in state)


def linear():
    return plan_of([range(EXPERTS)] * LAYERS)


def hub_state(prefix="model.layers.{}.block_sparse_moe."):
    state = {"model.embed_tokens.weight": np.ones(3)}
    for layer in range(LAYERS):
        head = prefix.format(layer)
        state[head + "gate.weight"] = np.arange(EXPERTS * 2.0).reshape(EXPERTS, 2) + 100 * layer
        for expert in range(EXPERTS):
            state[f"{head}experts.{expert}.w1.weight"] = np.full((2, 2), 10.0 * layer + expert)
    return state


def test_experts_one_by_one_are_renamed():
    plan = random_plan(3)
    placed = relabel_state_dict(hub_state(), plan, preset="mixtral")
    assert list(placed) == list(hub_state())
    for layer in range(LAYERS):
        head = f"model.layers.{layer}.block_sparse_moe."
        order = plan.physical_to_logical_map[layer]
        assert (placed[head + "gate.weight"] == hub_state()[head + "gate.weight"][order]).all()
        for slot in range(EXPERTS):
            assert (placed[f"{head}experts.{slot}.w1.weight"] == 10 * layer + order[slot]).all()


def test_groups_of_a_group_limited_router_stay_whole():
    whole = plan_of([[2, 3, 0, 1, 7, 6, 4, 5], range(8)])
    relabel_state_dict(hub_state(), whole, preset="mixtral", num_expert_groups=4)
    torn = plan_of([range(8), [0, 2, 1, 3, 4, 5, 6, 7]])
    with pytest.raises(PlacementError, match=r"layer 1: found slots 0 to 1 with experts of gro"):
        relabel_state_dict(hub_state(), torn, preset="mixtral", num_expert_groups=4)


def test_running_numbers_fit_and_other_layers_do_not():
    later = {k.replace("layers.", "layers.1"): v for k, v in hub_state().items()}  # 10 and 11
    relabel_state_dict(later, random_plan(1), preset="mixtral")
    relabel_state_dict(later, random_plan(1, layer_ids=(10, 11)), preset="mixtral")
    with pytest.raises(PlacementError, match=r"layer ids: found \(4, 5\)"):
        relabel_state_dict(later, random_plan(1, layer_ids=(4, 5)), preset="mixtral")


def test_what_the_patterns_miss_is_refused():
    extra = hub_state() | {"model.layers.0.mlp.experts.scale": np.ones(EXPERTS)}
    with pytest.raises(ConfigError, match=r"1 expert tensors that no pattern covers"):
        relabel_state_dict(extra, random_plan(1), preset="mixtral")
    with pytest.raises(ConfigError, match="no router named like"):
        relabel_state_dict(hub_state(), random_plan(1), preset="gpt_oss")
    with pytest.raises(ConfigError, match="found the preset 'bert'"):
        relabel_state_dict(hub_state(), random_plan(1), preset="bert")
    with pytest.raises(ConfigError, match="both router_pattern= and expert_patterns="):
        relabel_state_dict(hub_state(), random_plan(1), router_pattern="x")
    short = {k: v for k, v in hub_state().items() if "experts.7." not in k}
    with pytest.raises(PlacementError, match="layer 0: found 7 experts, expected the 8"):
        relabel_state_dict(short, random_plan(1), preset="mixtral")
    few = hub_state() | {"model.layers.0.block_sparse_moe.gate.weight": np.ones((4, 2))}
    with pytest.raises(PlacementError, match=r"found the shape \(4, 2\), expected 8 rows"):
        relabel_state_dict(few, random_plan(1), preset="mixtral")


@pytest.mark.parametrize("what", ["gate.weight", "experts.3.w1.weight"])
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_what_two_layers_share_gets_one_order(what, kind):
    """A shared tensor was put into two orders, of which a loaded model keeps one; now a plan that
    gives the layers two orders is refused, and one order gives both names the same values [D1]
    """
    state = {k: torch.from_numpy(v) if kind == "torch" else v for k, v in hub_state().items()}
    one, two = (f"model.layers.{layer}.block_sparse_moe.{what}" for layer in range(LAYERS))
    state[two] = state[one]
    for rows in ([range(8)[::-1], range(8)], random_plan(1).physical_to_logical_map):
        with pytest.raises(PlacementError, match=r"one tensor under the names model\.layers\.0"):
            relabel_state_dict(state, plan_of(rows), preset="mixtral")
    placed = relabel_state_dict(state, plan_of([range(8)[::-1]] * 2), preset="mixtral")
    at = [name.replace("experts.3", "experts.4") for name in (one, two)]
    assert (placed[at[0]] == placed[at[1]]).all()
    outside = state | {"model.shared.weight": state[one]}
    with pytest.raises(PlacementError, match=r"names .* and model\.shared\.weight"):
        relabel_state_dict(outside, plan_of([range(8)[::-1]] * 2), preset="mixtral")

"""A relabelled Hugging Face state dict; all families are in test_hf_checkpoint.py."""

import dataclasses
import re

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


SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "v_head_dim": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
    "num_experts_per_tok": 2,
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), EXPERTS),
    "moe_num_experts": EXPERTS,
    "moe_k": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "moe_layer_start_index": 0,
}
OTHER_SIZES = {
    "gpt_oss": {"layer_types": ["full_attention"] * LAYERS},
    "lfm2_moe": {"layer_types": ["full_attention"] * LAYERS},
    "nemotron_h": {"layers_block_type": ["moe", "attention"]},
}


def tiny_model(preset):
    """A model of the family ``preset`` with random values everywhere but in its norms: a fresh
    one has biases of zero, which any order suits.
    """
    import transformers as tf

    kind = type(tf.AutoConfig.for_model(preset))
    known = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
    sizes = {key: value for key, value in SIZES.items() if key in known}
    torch.manual_seed(0)
    config = kind(**sizes | OTHER_SIZES.get(preset, {}))
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    for name, value in model.state_dict().items():
        if value.is_floating_point() and "norm" not in name:
            value.copy_(torch.randn(value.shape) * 0.5)
    return model


def grouped_plan(seed, layers):
    """Two groups of experts that stay whole, in random order."""
    rng = np.random.default_rng(seed)
    halves = [[half + rng.permutation(4) for half in rng.permutation([0, 4])] for _ in layers]
    return plan_of([np.concatenate(row) for row in halves], layers)


BIASED = ("afmoe", "deepseek_v3", "ernie4_5_moe", "hy_v3", "lfm2_moe", "minimax_m2", "nemotron_h")


@pytest.mark.parametrize("preset", ["mixtral", "gpt_oss", *BIASED])
def test_relabel_state_dict_logits_stay(preset):
    """Families whose router has a bias per expert had no preset, and that of another family left
    the bias behind; with random biases the logits now stay [F1]
    """
    model = tiny_model(preset)
    tokens = torch.randint(2, 64, (3, 11))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    layers = range(sum(name.endswith(".experts.down_proj") for name in state))
    first, second = grouped_plan(1, layers), grouped_plan(2, layers)
    options = {"preset": preset, "num_expert_groups": 2}
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        placed = relabel_state_dict(state, first, **options)
        model.load_state_dict(placed)
        rtol, atol = tolerances.LOGITS["float32"]
        found = model(tokens, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
        if preset in BIASED:  # the test sees a bias that is left behind
            model.load_state_dict({k: state[k] if "bias" in k else v for k, v in placed.items()})
            assert (model(tokens, use_cache=False).logits - expected).abs().max() > 0.1
    changed = [name for name in state if not torch.equal(state[name], placed[name])]
    tensors = 2 if preset in [*BIASED, "gpt_oss"] else 1  # of a router
    assert sum(".experts." not in name for name in changed) == tensors * len(layers)
    moved = relabel_state_dict(placed, second, **options, current=first)
    direct = relabel_state_dict(state, second, **options)
    back = relabel_state_dict(
        moved, plan_of([range(8)] * len(layers), layers), **options, current=second
    )
    assert all(torch.equal(moved[name], direct[name]) for name in state)
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("preset", BIASED)
def test_relabel_state_dict_a_bias_that_no_pattern_covers_is_named(preset):
    """The weights of routers and experts moved, and biases per expert silently stayed; now the
    tensor is named, and keep_patterns says what shall stay [F1]
    """
    state = tiny_model(preset).state_dict()
    layers = range(sum(name.endswith(".experts.down_proj") for name in state))
    bias = next(name for name in state if name.endswith(("correction_bias", "expert_bias")))
    patterns = {
        "router_pattern": r".*layers\.(?P<layer>\d+)\..*gate\.weight",
        "expert_patterns": [r".*layers\.(?P<layer>\d+)\..*\.experts\.(?:gate_|)(?:up|down)_proj"],
    }
    plan = grouped_plan(1, layers)
    for options in ({"preset": "mixtral"}, patterns):
        if options is patterns or preset not in ("afmoe", "lfm2_moe", "nemotron_h"):
            with pytest.raises(
                ConfigError, match=f"no pattern covers, the first '{re.escape(bias)}'"
            ):
                relabel_state_dict(state, plan, **options)
    kept = relabel_state_dict(state, plan, **patterns, keep_patterns=[r".*bias"])
    assert torch.equal(kept[bias], state[bias])
    if PRESETS[preset].grouped:
        with pytest.raises(ConfigError, match="no num_expert_groups, expected it"):
            relabel_state_dict(state, plan, preset=preset)


@pytest.mark.parametrize("preset", [name for name in PRESETS if not PRESETS[name].grouped])
def test_relabel_state_dict_presets_of_others_refuse_a_group_limited_router(preset):
    """Presets with the same names and no groups moved experts out of their group [F1]"""
    state = tiny_model("deepseek_v3").state_dict()
    layers = range(sum(name.endswith(".experts.down_proj") for name in state))
    with pytest.raises(ConfigError, match=r"no pattern covers|no router named"):
        relabel_state_dict(state, random_plan(1, layer_ids=tuple(layers)), preset=preset)


def test_relabel_state_dict_a_pattern_without_the_layer_is_named():
    with pytest.raises(ConfigError, match="found no group named layer in the pattern"):
        relabel_state_dict(hub_state(), random_plan(1), router_pattern="x", expert_patterns=["y"])


def test_relabel_state_dict_only_tensors_of_experts_have_to_be_covered():
    """A shared expert as wide as there are experts, and what lies beside the MoE block, are left
    alone; integers in the block may be numbers of experts, and are named [F1]
    """
    head = "model.layers.0."
    beside = hub_state() | {
        head + "block_sparse_moe.shared_expert.up_proj.weight": np.ones((EXPERTS, 2)),
        head + "block_sparse_moe.shared_expert_gate.weight": np.ones((1, EXPERTS)),
        head + "self_attn.k_norm.weight": np.ones(EXPERTS),
    }
    relabel_state_dict(beside, random_plan(1), preset="mixtral")
    for extra in (np.ones((2, EXPERTS)), np.zeros(3, np.int64)):
        state = beside | {head + "block_sparse_moe.extra": extra}
        with pytest.raises(
            ConfigError, match=r"the first 'model\.layers\.0\.block_sparse_moe\.extra'"
        ):
            relabel_state_dict(state, random_plan(1), preset="mixtral")
        relabel_state_dict(state, random_plan(1), preset="mixtral", keep_patterns=[r".*\.extra"])
    alone = {k: v for k, v in hub_state().items() if k != head + "block_sparse_moe.gate.weight"}
    with pytest.raises(ConfigError, match=r"layers \[0\]: found experts and no router"):
        relabel_state_dict(alone, plan_of([range(8)], [1]), preset="mixtral")


def hub_state(prefix="model.layers.{}.block_sparse_moe."):
    state = {"model.embed_tokens.weight": np.ones(3)}
    for layer in range(LAYERS):
        head = prefix.format(layer)
        state[head + "gate.weight"] = np.arange(EXPERTS * 2.0).reshape(EXPERTS, 2) + 100 * layer
        for expert in range(EXPERTS):
            state[f"{head}experts.{expert}.w1.weight"] = np.full((2, 2), 10.0 * layer + expert)
    return state


def test_relabel_state_dict_experts_one_by_one_are_renamed():
    plan = random_plan(3)
    placed = relabel_state_dict(hub_state(), plan, preset="mixtral")
    assert list(placed) == list(hub_state())
    for layer in range(LAYERS):
        head = f"model.layers.{layer}.block_sparse_moe."
        order = plan.physical_to_logical_map[layer]
        assert (placed[head + "gate.weight"] == hub_state()[head + "gate.weight"][order]).all()
        for slot in range(EXPERTS):
            assert (placed[f"{head}experts.{slot}.w1.weight"] == 10 * layer + order[slot]).all()


def test_relabel_state_dict_groups_of_a_group_limited_router_stay_whole():
    whole = plan_of([[2, 3, 0, 1, 7, 6, 4, 5], range(8)])
    relabel_state_dict(hub_state(), whole, preset="mixtral", num_expert_groups=4)
    torn = plan_of([range(8), [0, 2, 1, 3, 4, 5, 6, 7]])
    with pytest.raises(PlacementError, match=r"layer 1: found slots 0 to 1 with experts of gro"):
        relabel_state_dict(hub_state(), torn, preset="mixtral", num_expert_groups=4)


def test_relabel_state_dict_running_numbers_fit_and_other_layers_do_not():
    later = {k.replace("layers.", "layers.1"): v for k, v in hub_state().items()}  # 10 and 11
    relabel_state_dict(later, random_plan(1), preset="mixtral")
    relabel_state_dict(later, random_plan(1, layer_ids=(10, 11)), preset="mixtral")
    with pytest.raises(PlacementError, match=r"layer ids: found \(4, 5\)"):
        relabel_state_dict(later, random_plan(1, layer_ids=(4, 5)), preset="mixtral")


def test_relabel_state_dict_what_the_patterns_miss_is_refused():
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
def test_relabel_state_dict_what_two_layers_share_gets_one_order(what, kind):
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

"""DeepSpeed AutoEP with our exchange and placement against stock AutoEP, on several ranks."""

import dataclasses
import sys

import numpy as np
import pytest
import torch

from moe_locality.errors import ConfigError, PlacementError
from moe_locality.placement import PlacementPlan, evaluate
from moe_locality.trace import read_trace
from tests.distributed import replica_nets as nets
from tests.distributed.moe_cases import quiet
from tests.distributed.test_layer_initialize import plan_of
from tests.distributed.test_layer_training import config_of
from tests.launch import run_ranks
from tests.tolerances import LOSS

VOCAB = 32
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}


def qwen():
    import transformers

    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES))


def start(
    world,
    section,
    stage=0,
    dtype="float32",
    model=None,
    universal=False,
    tensor_parallel=None,
    **expert_parallel,
):
    """An engine of a tiny Qwen3-MoE; ``section`` None: stock AutoEP."""
    import deepspeed

    import moe_locality
    from moe_locality import compat

    quiet()
    compat.let_auto_ep_read_recorders()
    config = config_of(stage, dtype)
    config["checkpoint"] = {"load_universal": universal}
    if tensor_parallel is not None:
        config["tensor_parallel"] = tensor_parallel
    config["expert_parallel"] = {
        "enabled": True,
        "autoep_size": world,
        "preset_model": "qwen3_moe",
        "use_grouped_mm": False,
        **expert_parallel,
    }
    model = qwen() if model is None else model
    arguments = {"model": model, "model_parameters": list(model.parameters())}
    if section is None:
        return deepspeed.initialize(config=config, **arguments)[0]
    return moe_locality.initialize(config={**config, "moe_locality": section}, **arguments)[0]


def batch(rank, step, length=8):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randint(0, VOCAB, (4, length), generator=generator)


def train(engine, rank, steps=5, first=0):
    losses = []
    for step in range(first, first + steps):
        tokens = batch(rank, step)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def losses_equal_stock(rank, world, folder, cases):
    for stage, dtype in cases:
        engine = start(world, None, stage, dtype)
        expected = train(engine, rank)
        engine.destroy()
        for section in ({}, {"plan": f"{folder}/plan.json"}):
            section["cluster"] = {"num_nodes": 2, "ranks_per_node": world // 2}
            engine = start(world, section, stage, dtype)
            found = train(engine, rank)
            where = f"stage {stage}, {dtype}, {section}"
            np.testing.assert_allclose(found, expected, *LOSS[dtype], err_msg=where)
            report = engine.moe_locality.traffic_report()
            assert len(report["per_layer"]) == 2, where
            assert report["by_link"]["dispatch"]["cross_node"] > 0
            engine.destroy()


def reversed_plan(folder, world, nodes=2):
    plan_of([[3, 2, 1, 0], [3, 2, 1, 0]], nodes, world // nodes).write(folder / "plan.json")


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("world", [2, 4])
def test_initialize_auto_ep_trains_as_stock(tmp_path, world, dtype):
    reversed_plan(tmp_path, world)
    cases = [(stage, dtype) for stage in ((0, 1, 2) if world == 2 else (1,))]
    run_ranks(losses_equal_stock, world, str(tmp_path), cases, deepspeed=True, timeout_s=240)


def expert_grads(engine, world):
    """Gradients of the experts in logical order, layer by layer: [E, ...] on every rank."""
    from moe_locality.integrations.autoep import LocalityAutoEPMoELayer, auto_ep_layers

    found = {}
    for name, layer in auto_ep_layers(engine.module):
        ours = isinstance(layer, LocalityAutoEPMoELayer)
        order = layer.slot_to_logical if ours else np.arange(layer.num_experts)
        for key, parameter in layer.experts.named_parameters():
            parts = [torch.empty_like(parameter.grad) for _ in range(world)]
            torch.distributed.all_gather(parts, parameter.grad.contiguous())
            found[name, key] = torch.cat(parts)[torch.from_numpy(np.argsort(order))]
    return found


def gradients_equal_stock(rank, world, folder):
    results = []
    sections = [None, {}, {"plan": f"{folder}/plan.json"}]
    sections += [{**sections[2], "dispatch": {"exchange": way}} for way in ("flat", "hierarchical")]
    for section in sections:
        for score_apply in ("post", "pre"):
            if section is not None:
                section["cluster"] = {"num_nodes": 2, "ranks_per_node": world // 2}
            engine = start(world, section, score_apply=score_apply)
            tokens = batch(rank, 0)
            output = engine(input_ids=tokens, labels=tokens)
            engine.backward(output.loss)
            grads = {
                name: parameter.grad.clone()
                for name, parameter in engine.module.named_parameters()
                if ".mlp.experts." not in name
            }
            results.append((output.logits.detach(), grads, expert_grads(engine, world)))
            engine.destroy()
    for number, found in enumerate(results[2:]):
        for mine, stock in zip(found, results[number % 2], strict=True):
            torch.testing.assert_close(mine, stock, rtol=1e-4, atol=1e-6)
    differ = (results[0][0] - results[1][0]).abs().max()
    assert differ > 1e-4  # the order of the scores matters for this model


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_initialize_auto_ep_has_the_gradients_of_stock(tmp_path, world):
    reversed_plan(tmp_path, world)
    run_ranks(gradients_equal_stock, world, str(tmp_path), deepspeed=True, timeout_s=240)


def uneven_tokens(rank, world, score_apply):
    """Rank 1 has no tokens, or no tokens come to its experts, or there are none at all."""
    cases = {"no tokens": [9, 0], "no routes": [5, 7], "nothing": [0, 0]}
    results = []
    for section in (None, {}):
        layer = start(world, section, score_apply=score_apply).module.model.layers[0].mlp
        found = []
        for name, tokens in cases.items():
            if name == "no routes":
                with torch.no_grad():
                    layer.router.gate.weight[2:] = -1.0  # experts 2 and 3 are on rank 1
            generator = torch.Generator().manual_seed(rank)
            x = torch.rand(1, tokens[rank], 16, generator=generator).requires_grad_()
            layer.zero_grad()
            out = layer(x)
            out = out[0] if isinstance(out, tuple) else out
            out.square().sum().backward()
            found += [out.detach(), x.grad, *(p.grad for p in layer.parameters())]
        results.append(found)
    for mine, stock in zip(*results, strict=True):
        assert (mine is None) == (stock is None)
        if mine is not None:
            torch.testing.assert_close(mine, stock)


@pytest.mark.parametrize("score_apply", ["post", "pre"])
def test_initialize_auto_ep_with_empty_ranks(score_apply):
    run_ranks(uneven_tokens, 2, score_apply, deepspeed=True)


def rows_are_predicted(rank, world, folder):
    """Count what each exchange sends while two steps are recorded.

    Something else than the router has the last word on the experts: what is recorded is what the
    exchange got, whether the layers were ours when the recorder was attached or became so.
    """
    import moe_locality
    from moe_locality.dispatch import traffic_report
    from moe_locality.integrations.autoep import auto_ep_layers

    def next_experts(_module, _args, output):
        return output[0], (output[1] + 1) % SIZES["num_experts"], *output[2:]

    found = {}
    for exchange in ("flat", "hierarchical"):
        section = {
            "plan": f"{folder}/plan.json",
            "cluster": {"num_nodes": 2, "ranks_per_node": world // 2},
            "dispatch": {"exchange": exchange},
        }
        traced = {**section, "trace": {"path": f"{folder}/{exchange}"}}
        engine = start(world, traced if exchange == "flat" else None)
        if exchange == "hierarchical":
            recorder = moe_locality.attach(engine, f"{folder}/{exchange}", strict=True)
            moe_locality.apply(engine, section)
        for _, layer in auto_ep_layers(engine.module):
            layer.router.register_forward_hook(next_experts)
        train(engine, rank, steps=2)
        report = traffic_report(engine.module)
        found[exchange] = (report["rows_by_link"], report["by_link"])
        engine.destroy()
    recorder.close()
    return found


def test_auto_ep_sends_what_evaluate_predicts(tmp_path):
    reversed_plan(tmp_path, 4)
    found = run_ranks(rows_are_predicted, 4, str(tmp_path), deepspeed=True, timeout_s=240)[0]
    plan = PlacementPlan.read(tmp_path / "plan.json")
    for exchange, (rows, sizes) in found.items():
        costs = evaluate(read_trace(tmp_path / exchange), plan, homes="trace")
        predicted = costs.total_picks if exchange == "flat" else costs.total_copies
        assert predicted
        for kind in ("dispatch", "combine", "dispatch_grad", "combine_grad"):
            assert rows[kind]["cross_node"] == predicted, (exchange, kind)
            assert sizes[kind]["cross_node"] == predicted * SIZES["hidden_size"] * 4
    assert found["flat"][0]["dispatch"] != found["hierarchical"][0]["dispatch"]


def checkpoints_are_stock(rank, world, folder, stage):
    """Each kind of engine loads what each kind saved, and trains on as that one did."""
    from moe_locality.integrations.autoep import auto_ep_layers
    from moe_locality.layer.bake import bake_checkpoint

    kinds = {
        "stock": None,
        "placed": {"plan": f"{folder}/plan.json"},
        "other": {"plan": f"{folder}/other.json"},
    }
    expected = {}
    for source in ("stock", "placed"):
        engine = start(2, kinds[source], stage)
        train(engine, rank, steps=2)
        engine.save_checkpoint(f"{folder}/{source}", tag="t")
        expected[source] = train(engine, rank, steps=2, first=2)
        with pytest.raises(ValueError, match="save_dir"):
            engine.save_checkpoint("", tag="t")
        expected[f"{source}, on"] = train(engine, rank, steps=1, first=4)
        engine.destroy()
    np.testing.assert_allclose(expected["placed"], expected["stock"], *LOSS["float32"])
    np.testing.assert_allclose(expected["placed, on"], expected["stock, on"], *LOSS["float32"])
    for source, target in (("stock", "placed"), ("placed", "stock"), ("placed", "other")):
        engine = start(2, kinds[target], stage)
        train(engine, rank, steps=1, first=7)
        assert engine.load_checkpoint(f"{folder}/missing")[0] is None
        engine.load_checkpoint(f"{folder}/{source}", tag="t")
        found = train(engine, rank, steps=2, first=2)
        where = f"{source} to {target}, stage {stage}"
        np.testing.assert_allclose(found, expected[source], *LOSS["float32"], err_msg=where)
        engine.destroy()
    if rank == 0:  # a bake, of a baked checkpoint too: stock AutoEP has the placement, and goes on
        plans = [PlacementPlan.read(f"{folder}/{name}.json") for name in ("other", "plan")]
        for plan, source, target in zip(plans, ("stock", "once"), ("once", "baked"), strict=True):
            found = bake_checkpoint(f"{folder}/{source}", plan, f"{folder}/{target}")
            assert found["optimizer"].startswith("left out")
        with pytest.raises(
            PlacementError, match=r"found slots 0 to 1 with experts of groups \[0, 1"
        ):
            bake_checkpoint(f"{folder}/stock", plans[0], f"{folder}/x", num_expert_groups=2)
        file = f"{folder}/once/t/mp_rank_00_model_states.pt"
        states = torch.load(file, weights_only=False)
        states["ds_config"]["expert_parallel"]["preset_model"] = "deepseek_v3"
        torch.save(states, file)
        with pytest.raises(ConfigError, match="--expert-groups; 1: it picks none"):
            bake_checkpoint(f"{folder}/once", plans[0], f"{folder}/x")
    torch.distributed.barrier()
    engine = start(2, None, stage)
    engine.load_checkpoint(f"{folder}/baked", tag="t", load_module_only=True)
    name, layer = auto_ep_layers(engine.module)[1]
    stock = torch.load(
        f"{folder}/stock/t/layer_1_expert_{3 - rank % 2 * 2}_mp_rank_00_model_states.pt"
    )
    torch.testing.assert_close(layer.experts.w1[0], stock[f"{name}.experts.w1.{3 - rank % 2 * 2}"])
    found = train(engine, rank, steps=1, first=2)
    np.testing.assert_allclose(found, expected["stock"][:1], *LOSS["float32"])
    engine.destroy()
    if rank == 0:
        files = [
            f"{folder}/{source}/t/layer_1_expert_1_mp_rank_00_model_states.pt"
            for source in ("stock", "placed")
        ]
        one, other = (torch.load(file) for file in files)
        assert one.keys() == other.keys()
        for key, value in one.items():
            torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("world", "stage"),
    [
        (2, 0),
        (2, 2),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in [(4, 2), (2, 1), (4, 1)]),
    ],
)
def test_auto_ep_checkpoints_hold_logical_experts(tmp_path, world, stage):
    """On four ranks ZeRO splits the masters of an expert between two."""
    reversed_plan(tmp_path, 2, nodes=1)
    plan_of([[1, 3, 0, 2], [0, 2, 1, 3]], 1, 2).write(tmp_path / "other.json")
    run_ranks(checkpoints_are_stock, world, str(tmp_path), stage, deepspeed=True, timeout_s=300)


def applied_during_training(rank, world, folder, stage):
    import moe_locality
    from moe_locality.dispatch import traffic_report
    from moe_locality.integrations.autoep import LocalityAutoEPMoELayer

    section = {
        "plan": f"{folder}/plan.json",
        "cluster": {"num_nodes": 2, "ranks_per_node": world // 2},
        "dispatch": {"exchange": "hierarchical"},
    }
    engine = start(world, None, stage)
    expected = train(engine, rank, steps=6)
    engine.destroy()
    engine = start(world, None, stage)
    found = train(engine, rank, steps=2)
    layer = engine.module.model.layers[1].mlp
    moe_locality.apply(engine.module, {"cluster": section["cluster"]})  # without a plan
    found += train(engine, rank, steps=2, first=2)
    assert type(layer) is LocalityAutoEPMoELayer
    with pytest.raises(ConfigError, match="a bare module, expected an engine"):
        moe_locality.apply(engine.module, section)
    weights = layer.experts.w1.detach().clone()
    moe_locality.apply(engine, section)
    moe_locality.apply(engine, section)
    found += train(engine, rank, steps=2, first=4)
    np.testing.assert_allclose(found, expected, *LOSS["float32"])
    assert not torch.allclose(weights, layer.experts.w1, atol=1e-2)
    assert layer.slot_to_logical.tolist() == [3, 2, 1, 0]
    assert traffic_report(engine)["rows_by_link"]["dispatch"]["cross_node"] > 0
    ids = batch(rank, 6)
    engine.backward(engine(ids, labels=ids).loss)
    with pytest.raises(ConfigError, match="found a gradient that no step has used"):
        moe_locality.apply(engine, section)
    engine.destroy()
    engine = start(world, {"cluster": section["cluster"]}, stage)
    moe_locality.apply(engine, plan=section["plan"])  # the cluster of initialize stays
    assert engine.module.model.layers[1].mlp.slot_to_logical.tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize("stage", [0, 2])
def test_apply_to_an_auto_ep_engine(tmp_path, stage):
    reversed_plan(tmp_path, 2)
    run_ranks(applied_during_training, 2, str(tmp_path), stage, deepspeed=True, timeout_s=240)


def refusals(rank, world, folder):
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    import moe_locality
    from moe_locality.integrations.autoep import auto_ep_layers

    plan = {"plan": f"{folder}/plan.json"}

    def refused(error, why, section, **arguments):
        with pytest.raises(error, match=why):
            start(world, section, **arguments)

    refused(ConfigError, "found async_split_plan=True", {}, async_split_plan=True)
    refused(ConfigError, "combine_impl='fused_weighted_sum'", {}, combine_impl="fused_weighted_sum")
    refused(ConfigError, "a plan and ZeRO stage 3", plan, stage=3)
    refused(PlacementError, "plan with 2 replicas", {"plan": f"{folder}/replicas.json"})
    refused(PlacementError, "found 3 in the plan, expected 2", {"plan": f"{folder}/three.json"})
    refused(PlacementError, "ranks: found 2 in the plan, expected 1", plan, autoep_size=1)
    refused(
        ConfigError, "found experts in the moe_locality section with AutoEP", {"experts": "loop"}
    )
    refused(ConfigError, "such as AutoEP's", {"online": {"enabled": True}})
    engine = start(world, None)
    with pytest.raises(ConfigError, match=r"with moe_locality.apply\(engine, plan=plan\)"):
        moe_locality.relabel(engine, PlacementPlan.read(plan["plan"]))
    for _, layer in auto_ep_layers(engine.module):
        layer.async_split_plan = rank == 1
    with pytest.raises(ConfigError, match="async_split_plan=True"):  # on rank 0 too
        moe_locality.apply(engine, {})
    for _, layer in auto_ep_layers(engine.module):
        layer.async_split_plan = False
    absent = {"plan": f"{folder}/absent.json"} if rank == 1 else plan
    with pytest.raises(PlacementError, match=r"absent\.json"):  # in time, on rank 0 too
        moe_locality.apply(engine, absent)
    other = {"plan": f"{folder}/other.json"} if rank == 1 else plan
    with pytest.raises(PlacementError, match="found different placement plans"):
        moe_locality.apply(engine, other)
    for section, ep_size in (({}, 1), ({"enabled": False}, world)):
        engine = start(world, section, autoep_size=ep_size)
        assert {type(m) for _, m in auto_ep_layers(engine.module)} == {AutoEPMoELayer}
        train(engine, rank, steps=1)
        assert not engine.moe_locality.traffic_report()["per_layer"]


def older_deepspeed(rank, world, folder):
    """Before 0.19.8 AutoEP had no seam: it is left alone, and a plan is refused."""
    from deepspeed.module_inject import auto_ep_comm

    sys.modules.pop("moe_locality.integrations.autoep", None)
    del auto_ep_comm.DEEPEP_BACKEND
    with pytest.raises(ConfigError, match="has no place for another exchange, expected"):
        start(world, {"plan": f"{folder}/plan.json"})
    engine = start(world, {})
    train(engine, rank, steps=1)
    assert not engine.moe_locality.traffic_report()["per_layer"]


def test_initialize_auto_ep_of_an_older_deepspeed(tmp_path):
    reversed_plan(tmp_path, 2, nodes=1)
    run_ranks(older_deepspeed, 2, str(tmp_path), deepspeed=True)


def test_auto_ep_refusals_rise_on_all_ranks(tmp_path):
    reversed_plan(tmp_path, 2, nodes=1)
    plan_of([[0, 1, 2, 3]] * 3, 1, 2).write(tmp_path / "three.json")
    plan_of([[1, 0, 3, 2]] * 2, 1, 2).write(tmp_path / "other.json")
    nets.plan_of(2).write(tmp_path / "replicas.json")
    run_ranks(refusals, 2, str(tmp_path), deepspeed=True, timeout_s=240)


def other_exchanges_stay(rank, world, folder, options, why):
    """AutoEP's own exchange stays where it is another than the one that ours replaces."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    from moe_locality.integrations.autoep import auto_ep_layers

    engine = start(world, {}, **options)
    assert {type(m) for _, m in auto_ep_layers(engine.module)} == {AutoEPMoELayer}
    if "tensor_parallel" in options:  # DeepEP needs a GPU
        train(engine, rank // 2, steps=1)
    with pytest.raises(ConfigError, match=f"found a plan, and {why}"):
        start(world, {"plan": f"{folder}/plan.json"}, **options)


COLUMNS = {"patterns": [r".*self_attn\.[qkv]_proj\.weight$"], "partition_type": "column"}
ROWS = {"patterns": [r".*self_attn\.o_proj\.weight$"], "partition_type": "row"}
FOLDED = {"use_default_specs": False, "layer_specs": [COLUMNS, ROWS]}


@pytest.mark.parametrize(
    ("world", "options", "why"),
    [
        (
            4,
            {
                "autoep_size": 2,
                "tensor_parallel": {"autotp_size": 2, "partition_config": FOLDED},
            },
            "AutoTP folding is on",
        ),
        (
            2,
            {"comm_backend": "deepep", "comm_max_tokens_per_rank": 64, "dtype": "bfloat16"},
            "comm_backend is deepep",
        ),
    ],
    ids=["folding", "deepep"],
)
def test_initialize_auto_ep_leaves_other_exchanges_alone(tmp_path, world, options, why):
    reversed_plan(tmp_path, 2, nodes=1)
    run_ranks(other_exchanges_stay, world, str(tmp_path), options, why, deepspeed=True)


def zero_3_and_recomputation(rank, world):
    for stage in (0, 3):
        runs = []
        for section in (None, {}):
            model = qwen()
            if stage == 0:
                model.gradient_checkpointing_enable()
            engine = start(world, section, stage, model=model)
            runs.append(train(engine, rank, steps=3))
            engine.destroy()
        np.testing.assert_allclose(runs[1], runs[0], *LOSS["float32"])


def test_initialize_auto_ep_with_zero_3_and_with_activation_checkpointing():
    run_ranks(zero_3_and_recomputation, 2, deepspeed=True, timeout_s=240)


def loads_universal(rank, world, folder, kinds):
    """Save, convert, load into stock and placed engines of another size."""
    import argparse

    from deepspeed.checkpoint.ds_to_universal import main as convert

    for source in ("stock", "placed"):
        engine = start(world, kinds[source], 1)
        train(engine, rank, steps=2)
        engine.save_checkpoint(f"{folder}/{source}", tag="t")
        expected = train(engine, rank, steps=2, first=2)
        engine.destroy()
        torch.distributed.barrier()
        if rank == 0:
            convert(
                argparse.Namespace(
                    input_folder=f"{folder}/{source}/t",
                    output_folder=f"{folder}/{source}_universal/t",
                    num_extract_workers=1,
                    num_merge_workers=1,
                    keep_temp_folder=False,
                    strict=True,
                    inject_missing_state=False,
                )
            )
        torch.distributed.barrier()
        for target in ("stock", "placed"):
            if source == target == "stock":
                continue
            engine = start(world, kinds[target], 1, universal=True)
            engine.load_checkpoint(f"{folder}/{source}_universal", tag="t")
            found = train(engine, rank, steps=2, first=2)
            where = f"{source} to {target}"
            np.testing.assert_allclose(found, expected, *LOSS["float32"], err_msg=where)
            engine.destroy()


def test_auto_ep_universal_checkpoints(tmp_path):
    reversed_plan(tmp_path, 2, nodes=1)
    kinds = {"stock": None, "placed": {"plan": f"{tmp_path}/plan.json"}}
    run_ranks(loads_universal, 2, str(tmp_path), kinds, deepspeed=True, timeout_s=300)


def other_families(rank, world, folder):
    """Group-limited routers, shared experts, a dense layer first: the router stays in its order."""
    import transformers as tf

    deepseek = {
        **SIZES,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    }
    mixtral = {**SIZES, "num_local_experts": 4}
    kinds = {
        "deepseek_v3": lambda: tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**deepseek)),
        "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**mixtral)),
    }
    for preset, make in kinds.items():
        runs = []
        for section in (None, {"plan": f"{folder}/{preset}.json"}):
            torch.manual_seed(0)
            engine = start(world, section, model=make(), preset_model=preset)
            runs.append(train(engine, rank))
            engine.destroy()
        np.testing.assert_allclose(runs[1], runs[0], *LOSS["float32"], err_msg=preset)


def test_initialize_auto_ep_places_other_families(tmp_path):
    reversed_plan(tmp_path, 2, nodes=1)
    plan = PlacementPlan.read(tmp_path / "plan.json")
    plan.write(tmp_path / "mixtral.json")
    dataclasses.replace(plan, layer_ids=(1, 2)).write(tmp_path / "deepseek_v3.json")
    run_ranks(other_families, 2, str(tmp_path), deepspeed=True, timeout_s=240)

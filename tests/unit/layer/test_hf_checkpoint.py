"""Folders of Hugging Face models, baked: plain transformers computes the same with them."""

import hashlib
import json
import re
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from moe_locality.cli import app
from moe_locality.errors import ConfigError, PlacementError
from moe_locality.layer.bake import bake_checkpoint
from moe_locality.layer.hf_checkpoint import _check_family, _text_config, family_of
from moe_locality.layer.state_dict import (
    NEVER_GROUPED,
    PRESETS,
    REFUSED,
    Relabelling,
    relabel_state_dict,
)
from moe_locality.placement import PlacementPlan
from moe_locality.trace.recorder.hooks import find_moe_layers, moe_layer_ids
from tests import tolerances
from tests.unit.trace.families import build, families, inputs

FAST = ("deepseek_v3", "deepseek_v4", "glm4_moe", "gpt_oss", "mixtral", "olmoe", "qwen3_moe")
FAST += ("qwen3_next",)
EXPERTS = 8


def plan_of(layers, seed=0, rows=None, experts=EXPERTS):
    rng = np.random.default_rng(seed)
    cycles = [rng.permutation(experts) for _ in layers]  # no expert stays where it is
    rows = [np.roll(c, 1)[np.argsort(c)] for c in cycles] if rows is None else rows
    return PlacementPlan(
        layer_ids=tuple(layers),
        num_experts=experts,
        num_nodes=2,
        ranks_per_node=2,
        physical_to_logical_map=np.asarray(rows),
    )


def layers_of(state, family, experts=EXPERTS):
    """The transformer layers that have experts, as the table sees them."""
    for count in range(1, 9):
        try:
            return Relabelling(state, plan_of(range(count)), PRESETS[family]).layers
        except PlacementError as error:
            if "MoE layers" not in str(error):
                raise
    raise AssertionError(f"{family}: more than 8 MoE layers")


def outputs(model, family):
    with torch.no_grad():
        return model(**inputs(family, model))[0]


def loaded(model, folder, family):
    again = type(model).from_pretrained(folder, experts_implementation="eager").eval()
    return outputs(again, family)


def sized(family, experts):
    """The shapes of a tiny model with another number of experts."""
    from tests.unit.trace import families as tiny

    kept = dict(tiny.SMALL)
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    tiny.SMALL.update(dict.fromkeys(names, experts))
    try:
        return {name: tuple(v.shape) for name, v in build(family).state_dict().items()}
    finally:
        tiny.SMALL.clear()
        tiny.SMALL.update(kept)


@pytest.mark.parametrize(
    "family",
    [f if f in FAST else pytest.param(f, marks=pytest.mark.families) for f in sorted(PRESETS)],
)
def test_bake_checkpoint_every_family(family, tmp_path):
    """Logits of plain transformers stay with a baked folder and with a relabelled state dict, what
    moves is what grows with the number of experts, and layers have the numbers of a trace."""
    model = build(family)
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    layers = layers_of(state, family)
    plan = plan_of(layers, seed=1)
    summary = bake_checkpoint(tmp_path / "model", plan, tmp_path / "placed", num_expert_groups=1)
    recorded = [layer.name for layer in find_moe_layers(model)]
    assert summary["layer_ids"] == layers == (moe_layer_ids(model, recorded) or layers)
    assert len(recorded) == len(layers)
    assert summary["left_out"] == []
    expected, found = (loaded(model, tmp_path / name, family) for name in ("model", "placed"))
    rtol, atol = tolerances.LOGITS["float32"]
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)

    placed = relabel_state_dict(state, plan, preset=family, num_expert_groups=1)
    plain = outputs(model, family)
    model.load_state_dict(placed)
    torch.testing.assert_close(outputs(model, family), plain, rtol=rtol, atol=atol)
    router = re.compile(PRESETS[family].router)
    routers = {n: v if router.fullmatch(n) else state[n] for n, v in placed.items()}
    model.load_state_dict(routers)  # the test sees experts that stay behind
    assert not torch.allclose(outputs(model, family), plain, rtol=rtol, atol=atol)
    shapes, others = sized(family, EXPERTS), sized(family, 12)
    grows = {n for n in shapes if shapes[n] != others[n] or re.search(r"\.expert_\d+\.", n)}
    grows |= {name for name in state if name.endswith("tid2eid")}  # values, not an axis
    grows -= {name for name in grows if ".self_attention." in name}  # JetMoe's attention has others
    assert set(Relabelling(state, plan, PRESETS[family]).roles) == grows


def test_bake_checkpoint_the_table_has_every_family():
    """A family of the installed transformers has names, or a reason why it cannot be relabelled."""
    assert sorted({*PRESETS, *REFUSED}) == families()
    for family in ("doge", "nllb_moe"):
        with pytest.raises(ConfigError, match=f"the family {family}, which no order"):
            family_of({"model_type": family.replace("_", "-")})


def test_bake_checkpoint_config_says_the_family():
    """The config that transformers has for a family leads to its names, and groups of a router are
    asked for where a config can have them."""
    import importlib

    from transformers import PreTrainedConfig

    for family in PRESETS:
        module = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
        kinds = [getattr(module, name) for name in module.__all__ if name.endswith("Config")]
        kinds = [kind for kind in kinds if issubclass(kind, PreTrainedConfig)]
        config = max(kinds, key=lambda kind: len(kind.sub_configs))().to_dict()
        assert PRESETS[family_of(config)] == PRESETS[family], (family, config["model_type"])
        has_groups = bool({"n_group", "num_expert_group"} & set(_text_config(config)))
        assert has_groups == (PRESETS[family].grouped and family not in NEVER_GROUPED), family
    with pytest.raises(ConfigError, match=r"type \['bert'\], expected one of the \d+ families"):
        family_of({"model_type": "bert"})


def names_on_disk(family):
    """Names of experts that transformers' conversions turn into those of this family."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    for kind in (family, f"{family}_text"):
        for step in get_checkpoint_conversion_mapping(kind) or ():
            targets = [str(name) for name in step.target_patterns]
            if (
                any("experts." in name for name in targets)
                and type(step).__name__ != "WeightRenaming"
            ):
                for name in step.source_patterns:
                    yield (
                        name.replace("\\", "").replace("*", "3").lstrip("^").rstrip("$").strip(".")
                    )


def test_bake_checkpoint_names_of_conversions_are_covered():
    """What transformers reads as experts of a family, its patterns cover."""
    seen, blocks = 0, ("", "mlp.", "ffn.", "block_sparse_moe.")
    for family in PRESETS:
        for name in names_on_disk(family):
            if "shared" in name or "vision" in name:
                continue
            inside = blocks if name.startswith("experts") else ("",)
            heads = [f"model.layers.1.{block}{name}" for block in inside]
            patterns = PRESETS[family].experts
            assert any(re.fullmatch(p, head) for p in patterns for head in heads), (family, name)
            seen += 1
    assert seen > 100


def saved(tmp_path, family="mixtral", **options):
    model = build(family)
    model.save_pretrained(tmp_path / "model", **options)
    return model, tmp_path / "model"


def test_bake_checkpoint_files_around_the_weights_stay(tmp_path):
    """Index, config and tokenizer are copied byte for byte, headers stay, other weights are left
    out, and the way back gives the same bytes."""
    _, folder = saved(tmp_path, max_shard_size="40KB")
    (folder / "tokenizer.model").write_bytes(b"\x00tokens")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"x")
    plan = plan_of(range(2), seed=3)
    placed = tmp_path / "placed"
    summary = bake_checkpoint(folder, plan, placed)
    assert summary["left_out"] == ["original/consolidated.00.pth"]
    assert not (placed / "original").exists()
    before = files_of(folder)
    after = files_of(placed)
    shards = [name for name in before if name.endswith(".safetensors")]
    assert len(shards) > 3
    assert {n for n in before if before[n] != after[n]} <= set(shards)
    assert set(after) - set(before) == {"moe_locality_plan.json"}
    assert {n: after[n] for n in shards} == summary["sha256"]
    for name in shards:
        size = 8 + int.from_bytes((folder / name).read_bytes()[:8], "little")
        assert (folder / name).read_bytes()[:size] == (placed / name).read_bytes()[:size]
    with pytest.raises(PlacementError, match="found 'olmoe' in the plan, expected 'mixtral'"):
        bake_checkpoint(folder, replace(plan, provenance={"model_type": "olmoe"}), tmp_path / "no")
    with pytest.raises(ConfigError, match="this one was baked already"):
        bake_checkpoint(placed, plan, tmp_path / "twice")
    (placed / "moe_locality_plan.json").unlink()
    back = plan_of(range(2), rows=np.argsort(plan.physical_to_logical_map, axis=1))
    bake_checkpoint(placed, back, tmp_path / "back")
    assert {n: files_of(tmp_path / "back")[n] for n in before} == before


@pytest.mark.parametrize(
    ("recorded", "on_disk"),
    [("deepseek_v3", "kimi_k2"), ("glm4v_moe_text", "glm4v_moe"), ("new_family", "mixtral")],
)
def test_bake_takes_the_plan_of_a_family_that_is_named_otherwise_on_disk(recorded, on_disk):
    plan = replace(plan_of(range(2)), provenance={"model_type": recorded})
    _check_family(plan, family_of({"model_type": on_disk}))


def files_of(folder):
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()
    }


def test_bake_checkpoint_quantised_experts_move_with_their_scales(tmp_path):
    """MXFP4 blocks and scales as openai/gpt-oss has them, fp8 with inverse scales as
    DeepSeek-V3 has them."""
    rng = np.random.default_rng(0)
    head, tensors = "model.layers.0.mlp.", {}
    for part in ("gate_up_proj", "down_proj"):
        tensors[f"{head}experts.{part}_blocks"] = rng.integers(0, 255, (8, 6, 2, 16), np.uint8)
        tensors[f"{head}experts.{part}_scales"] = rng.integers(0, 255, (8, 6, 2), np.uint8)
        tensors[f"{head}experts.{part}_bias"] = rng.normal(size=(8, 6)).astype(np.float32)
    tensors[f"{head}router.weight"] = rng.normal(size=(8, 4)).astype(np.float32)
    tensors[f"{head}router.bias"] = rng.normal(size=8).astype(np.float32)
    write(tmp_path / "a", {"model_type": "gpt_oss"}, tensors)
    plan = plan_of([0], seed=5)
    order = plan.physical_to_logical_map[0]
    bake_checkpoint(tmp_path / "a", plan, tmp_path / "b")
    found = load_file(tmp_path / "b" / "model.safetensors")
    for name, value in tensors.items():
        assert (found[name].numpy() == value[order]).all(), name

    fp8 = {"model.layers.0.mlp.gate.weight": torch.randn(8, 4)}
    fp8["model.layers.0.mlp.gate.e_score_correction_bias"] = torch.randn(8)
    for expert in range(8):
        name = f"model.layers.0.mlp.experts.{expert}.up_proj.weight"
        fp8[name] = torch.randn(4, 4).to(torch.float8_e4m3fn)
        fp8[f"{name}_scale_inv"] = torch.randn(1, 1)
    fp8["model.layers.1.mlp.experts.0.up_proj.weight"] = torch.randn(4, 4)  # predicts more tokens
    fp8["model.layers.1.mlp.gate.weight"] = torch.randn(8, 4)
    fp8["vision_tower.blocks.1.mlp.gate.weight"] = torch.randn(4, 4)
    config = {"model_type": "deepseek_v3", "n_group": 1, "num_hidden_layers": 1}
    write(tmp_path / "c", config, fp8)
    bake_checkpoint(tmp_path / "c", plan, tmp_path / "d")
    found = load_file(tmp_path / "d" / "model.safetensors")
    for slot, expert in enumerate(order):
        for end in ("", "_scale_inv"):
            name = "model.layers.0.mlp.experts.{}.up_proj.weight" + end
            assert torch.equal(found[name.format(slot)].float(), fp8[name.format(expert)].float())
    assert all(torch.equal(found[n], fp8[n]) for n in fp8 if ".1.mlp." in n)


def write(folder, config, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    values = {n: v if torch.is_tensor(v) else torch.from_numpy(v) for n, v in tensors.items()}
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})


def test_bake_checkpoint_holds_no_more_than_two_shards(tmp_path):
    """Stacked experts of several megabytes: what is allocated stays below two shards."""
    size = 4 << 20
    tensors, index = {}, {}
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    for layer in range(4):
        head, name = f"model.layers.{layer}.mlp.", f"model-{layer}.safetensors"
        tensors = {
            head + "gate.weight": torch.randn(8, 4),
            head + "experts.gate_up_proj": torch.zeros(8, size // 8, dtype=torch.uint8),
            head + "experts.down_proj": torch.zeros(8, size // 8, dtype=torch.uint8),
        }
        index |= dict.fromkeys(tensors, name)
        save_file(tensors, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    tracemalloc.start()
    try:
        bake_checkpoint(folder, plan_of(range(4)), tmp_path / "placed")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size < peak < 2 * 2 * size


def test_bake_checkpoint_what_it_refuses(tmp_path):
    """Nothing is left behind: replicas, torn groups, other plans, names that nobody knows, experts
    that differ, files that are cut off or of another kind."""
    model, folder = saved(tmp_path, "deepseek_v3")
    out = tmp_path / "out"
    config = json.loads((folder / "config.json").read_text())
    layers = layers_of(model.state_dict(), "deepseek_v3")
    plan = plan_of(layers, seed=2)

    def refuses(error, text, plan=plan, **options):
        with pytest.raises(error, match=text):
            bake_checkpoint(folder, plan, out, **options)
        assert not out.exists()
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]

    replicas = PlacementPlan(
        layer_ids=tuple(layers),
        num_experts=EXPERTS,
        num_nodes=2,
        ranks_per_node=2,
        physical_to_logical_map=np.tile([*range(6), 0, 1, 2, 3, 6, 7], (len(layers), 1)),
    )
    refuses(PlacementError, "replicas|redundant", replicas)
    with pytest.raises(ConfigError, match="which is read, expected a folder elsewhere"):
        bake_checkpoint(folder, plan, folder / "deeper" / "baked")
    assert not (folder / "deeper").exists()
    refuses(PlacementError, "this router picks groups first", num_expert_groups=2)
    (folder / "config.json").write_text(json.dumps(config | {"n_group": 4}))
    refuses(PlacementError, "this router picks groups first")
    ungrouped = {name: value for name, value in config.items() if name != "n_group"}
    (folder / "config.json").write_text(json.dumps(ungrouped))
    refuses(ConfigError, "no n_group in the config")
    (folder / "config.json").write_text(json.dumps(config))
    refuses(PlacementError, "MoE layers: found", plan_of(range(7)))
    refuses(PlacementError, "experts", plan_of(layers, experts=16))
    tensors = load_file(folder / "model.safetensors")
    head = f"model.layers.{layers[-1]}.mlp."
    for extra, text in (
        (torch.ones(4, 8), "no pattern covers"),
        (torch.ones(3).int(), "no pattern"),
    ):
        save_file(tensors | {head + "gate.extra": extra}, folder / "model.safetensors")
        refuses(ConfigError, text)
    odd = tensors | {head + "experts.5.up_proj.weight": torch.ones(3, 3)}
    save_file(odd, folder / "model.safetensors")
    refuses(PlacementError, "experts of one layer have to be alike")
    save_file(tensors, folder / "model.safetensors")
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[:-8])
    refuses(ConfigError, "bytes, expected those of its header")
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refuses(ConfigError, "no safetensors file: it begins with b'version '")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuses(ConfigError, "expected the weights as safetensors")


def test_bake_checkpoint_of_a_model_by_the_command_line(tmp_path):
    _, folder = saved(tmp_path)
    plan_of(range(2)).write(tmp_path / "plan.json")
    words = ["bake", folder, "--plan", tmp_path / "plan.json", "--out", tmp_path / "out"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert "experts in the order of" in result.output
    assert "mixtral" in result.output
    assert (tmp_path / "out" / "model.safetensors").exists()

"""Every family of transformers that has experts: built tiny, recorded, and compared with which
experts ran. ``python -m tests.unit.trace.families`` rewrites the table of docs/recording.md.
"""

import importlib
import re
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

from moe_locality.errors import TraceError
from moe_locality.layer.state_dict import PRESETS
from moe_locality.trace import read_trace
from moe_locality.trace.recorder import attach

MODELS = Path(transformers.__file__).parent / "models"
PAGE = Path(__file__).parents[3] / "docs" / "recording.md"

SMALL = {
    **dict.fromkeys(["hidden_size", "d_model", "intermediate_size", "ffn_dim"], 32),
    **dict.fromkeys(["num_hidden_layers", "n_layers", "num_layers", "depth"], 2),
    **dict.fromkeys(["num_attention_heads", "n_heads", "num_heads", "num_key_value_heads"], 2),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 8),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts"], 2),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "moe_intermediate_size"], 16),
    **dict.fromkeys(["head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"], 8),
    **dict.fromkeys(["first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"], 0),
    **dict.fromkeys(["n_group", "topk_group", "bos_token_id"], 1),
    "moe_num_experts": 8,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
"""Values of a tiny model, taken over where a config has the name."""

HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
VITPOSE = {"image_size": [32, 32], "patch_size": [8, 8], "part_features": 16}
UNPADDED = {"unpadded_vocab_size": 64}
OWN = {
    "beam": {"config": SPARSE},
    "bailing_hybrid": {"config": {**HYBRID, **SPARSE}},
    "dbrx": {"config": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}}},
    "deepseek_ocr2": {"config": {"text_config": SPARSE}},
    "diffusion_gemma": {
        "class": "DiffusionGemmaForBlockDiffusion",
        "config": {"text_config": {"per_layer_config": {}}, "canvas_length": 5},
    },
    "doge": {"config": {"is_moe": True}},
    "dots1": {"config": {"n_shared_experts": 1}},
    "ernie4_5_vl_moe": {
        "class": "Ernie4_5_VLMoeTextModel",
        "config": {"hidden_size": 256, "moe_intermediate_size": [16, 8], **SPARSE},
    },
    "flint": {"config": {"mlp_only_layers": []}},
    "gemma4": {
        "config": {
            "enable_moe_block": True,
            "per_layer_config": {},
            "vocab_size_per_layer_input": 64,
            "hidden_size_per_layer_input": 8,
        }
    },
    "glm4v_moe": {
        "config": {
            "text_config": {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}},
            "vision_config": {"out_hidden_size": 32},
        }
    },
    "glm5_next": {
        "class": "Glm5NextTextModel",
        "config": {"qk_rope_head_dim": 0, "linear_num_heads": 2, "linear_head_dim": 8, **SPARSE},
    },
    "granitemoehybrid": {"config": {"mamba_n_heads": 4, **HYBRID}},
    "hy_v4_vl": {
        "config": {"text_config": {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}}}
    },
    "inkling2": {"config": UNPADDED},
    "inkling2_loop": {
        "config": {
            **UNPADDED,
            "num_hidden_layers": 3,
            "n_layers_per_attn_res_block": 1,
            "loop_layer_index_start": 1,
            "loop_layer_index_end": 2,
        }
    },
    "kimi_linear": {"config": HYBRID},
    "lfm2_moe": {"config": {"layer_types": ["conv", "full_attention"]}},
    "longcat_flash": {
        "config": {"ffn_hidden_size": 32, "expert_ffn_hidden_size": 16, "zero_expert_num": 2}
    },
    "mimo_v2_flash": {"config": {"num_key_value_heads": 1}},
    "mistral4": {"config": {"head_dim": 16}},
    "muse_spark": {"class": "MuseSparkTextModel", "config": {"moe_hidden_size": 32}},
    "nemotron3_5_transcribe": {
        "config": {
            "audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 32}}},
            "word_timestamp_config": {"blank_token_id": 63},
        }
    },
    "nemotron_h_omni": {
        "class": "NemotronH_Omni_Reasoning_V3",
        "config": {"vision_config": {"video_temporal_patch_size": 2}, "projector_hidden_size": 32},
    },
    "nllb_moe": {
        "config": {
            **dict.fromkeys(["encoder_layers", "decoder_layers"], 2),
            **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 2),
            **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim"], 32),
            **dict.fromkeys(["encoder_sparse_step", "decoder_sparse_step"], 1),
        }
    },
    "qwen3_omni_moe": {
        "class": "Qwen3OmniMoeThinkerForConditionalGeneration",
        "config": {"audio_config": {"encoder_attention_heads": 2, "output_dim": 32}},
    },
    "step3p7": {"config": {"text_config": {"sliding_window": 4, **SPARSE}}},
    "switch_transformers": {
        "config": {
            "d_kv": 16,
            "d_ff": 32,
            "num_decoder_layers": 2,
            "expert_capacity": 3,
            **dict.fromkeys(["num_sparse_encoder_layers", "num_sparse_decoder_layers"], 2),
        }
    },
    "vitpose": {"class": "VitPoseForPoseEstimation", "config": {"backbone_config": VITPOSE}},
    "vitpose_backbone": {"class": "VitPoseBackbone", "config": VITPOSE},
    "zaya": {"config": {"num_experts_per_tok": 1, "router_hidden_size": 16}},
}
"""What single families need besides; ``class``: which class runs."""


ENCODER = "encoder and decoder have rows (and requests) of their own"
NOTES = {
    "deepseek_v4": "also the layers that look experts up by token id",
    "diffusion_gemma": "prompt and canvas have rows (and requests) of their own",
    "doge": "an expert is a row of two embeddings",
    "ernie4_5_vl_moe": "text only: text and images have experts of their own, which see different "
    "tokens; a pass with both is not recorded, or mixed up where they are as many. Layers count as "
    "0, 1, 2, ...",
    "dots3_note": "the text model's; vision layers have other numbers of experts: give "
    "`num_experts`, or attach to `model.language_model`",
    "inkling2_loop": "its loop runs a layer several times in a forward pass, which is not "
    "recorded; with `loop_num_passes=1` it is",
    "jetmoe": "not the experts of its attention",
    "kimi_k25": "holds a deepseek_v3",
    "longcat_flash": "a zero-computation expert is no pick (-1)",
    "nemotron3_5_transcribe": "holds a nemotron_h",
    "nemotron_h_omni": "holds a nemotron_h",
    "nllb_moe": "what the router picks, -1 = over capacity; but transformers runs experts 0 and 1 "
    f"for every token, whatever is picked; {ENCODER}",
    "qwen3_omni_moe": "attach to `model.thinker`; its talker was not run",
    "switch_transformers": f"-1 = over capacity; {ENCODER}",
    "vitpose": "holds a vitpose_backbone",
    "vitpose_backbone": "nothing is routed: the caller names an expert for a whole image "
    "(`dataset_index`)",
    "zaya": "a token that skips the experts has no pick (-1)",
}
OTHERS_RUN = {"nllb_moe"}
"""Families that do not run the experts that their router picks."""

HAS_EXPERTS = re.compile(r"^class \w*(?:Expert|Moe|MoE)|self\.(?:\w+_)?experts\b", re.MULTILINE)
EXPERTS = re.compile(r"(\w+_)?experts")
PART_OF_EXPERT = re.compile(
    r"(?:^|\.)(?:\w+_)?(?<!shared_)experts\.(?:(?:expert_)?(?P<expert>\d+)\.)?"
    r"|mlp\.(?:(?:input|output)_linear|(?:up|down)_embed)\.weight"
)
TOKENS = torch.arange(3, 19).reshape(2, 8)


def families() -> list[str]:
    """Folders of transformers.models whose code has experts, or whose config names such a one."""
    modeling, configs = MODELS.glob("*/modeling_*.py"), MODELS.glob("*/configuration_*.py")
    found = {p.parent.name for p in modeling if HAS_EXPERTS.search(p.read_text("utf-8"))}
    names = {p.parent.name: set(re.findall(r'"(\w+)"', p.read_text("utf-8"))) for p in configs}
    return sorted(found | {name for name, inside in names.items() if inside & found} - {"auto"})


def small(default, own: dict) -> dict:
    """Arguments of a tiny config of this type, those of its parts included."""
    kind = type(default)
    names = {*kind.__dataclass_fields__, *kind.attribute_map, *default.to_dict()}
    given = {name: value for name, value in SMALL.items() if name in names}
    parts = {name: getattr(default, name, None) for name in kind.sub_configs}
    for name, part in parts.items():
        if isinstance(part, transformers.PreTrainedConfig):
            given[name] = {**small(part, own.get(name, {})), "model_type": part.model_type}
    return {**given, **{name: value for name, value in own.items() if name not in parts}}


def build(family: str):
    """A tiny model of the family, with random weights and biases of routers, and no dropout."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    own = OWN.get(family, {})
    ends = ("ForCausalLM", "ForConditionalGeneration", "Classification")
    names = [name for end in ends for name in module.__all__ if name.endswith(end)]
    kind = getattr(module, own["class"] if "class" in own else names[0])
    config = kind.config_class(**small(kind.config_class(), own.get("config", {})))
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = kind(config).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("tid2eid"):  # DeepSeek-V4's table of experts by token, else all zero
            tensor.copy_(torch.rand(len(tensor), 8).argsort(1)[:, :2])
        elif name.endswith("balancing_biases"):  # Zaya; the last lets tokens skip
            tensor.zero_()
        elif tensor.ndim == 1 and re.search("bias", name) and tensor.numel() <= 10:
            tensor.data.normal_(0, 0.1)
        elif tensor.ndim > 1 and re.search(r"gate\b|_gate|router|classifier", name):
            tensor.data.normal_(0, 0.3)  # tokens differ in their picks
    return model


def inputs(family: str, model) -> dict:
    """What the model is called with: 2 x 8 tokens, and 2 x 5 of the decoder if it has one."""
    if family.startswith("vitpose"):
        return {"pixel_values": torch.zeros(2, 3, 32, 32), "dataset_index": torch.tensor([1, 3])}
    if family == "diffusion_gemma":
        return {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :5]}
    if model.config.is_encoder_decoder:
        return {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :5], "use_cache": False}
    return {"input_ids": TOKENS, "use_cache": False}


def moe_blocks(model) -> dict[str, torch.nn.Module]:
    """What turns hidden states [.., D] into others by experts; of the experts' name where the
    module around them holds an attention as well."""
    found = {}
    for name, module in model.named_modules():
        for child, below in module.named_children():
            if EXPERTS.fullmatch(child) and "shared" not in child:
                attends = hasattr(module, "self_attn")
                found.update({f"{name}.{child}": below} if attends else {name: module})
        if type(module).__name__ in ("JetMoeMoE", "DogeCDMoE"):
            found[name] = module
        if type(module).__name__ == "JetMoeAttention":
            del found[name]
    return found


def which_ran(path: str, block, args, kwargs) -> np.ndarray:
    """bool [T, E]: the tokens whose output changes when the weights of an expert do."""
    hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))

    def output():
        found = block(*args, **kwargs)
        return (found[0] if isinstance(found, tuple) else found).reshape(-1, hidden.shape[-1])

    plain = output()
    changed = torch.zeros(len(plain), 8, dtype=torch.bool)
    for name, tensor in block.named_parameters():
        match = PART_OF_EXPERT.search(f"{path}.{name}")
        if match is None or (match["expert"] is None and (tensor.ndim == 1 or len(tensor) % 8)):
            continue
        stacked = match["expert"] is None
        parts = tensor.data.view(8, -1) if stacked else [tensor.data]
        for expert, part in enumerate(parts, start=int(match["expert"] or 0)):
            kept = part.clone()
            part.normal_()
            changed[:, expert] |= (output() != plain).any(dim=1)
            part.copy_(kept)
    return changed.numpy()


def record(family: str, folder, **options):
    """Trace, its layers' names and, for every MoE block, bool [T, E]: which experts ran.

    Raises:
        TraceError: attach() does not find the MoE layers, or cannot record this pass.
    """
    model, calls = build(family), {}

    def keep(name, args, kwargs):
        values = [value.clone() if isinstance(value, torch.Tensor) else value for value in args]
        named = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        calls.setdefault(name, []).append((values, named))

    blocks, given = moe_blocks(model), inputs(family, model)
    with torch.no_grad():
        before = model(**given)[0]
        with attach(model, folder, strict=True, **options) as recorder:
            hooks = [
                block.register_forward_pre_hook(
                    lambda _m, args, kwargs, name=name: keep(name, args, kwargs), with_kwargs=True
                )
                for name, block in blocks.items()
            ]
            after = model(**given)[0]
        for hook in hooks:
            hook.remove()
        ran = {name: which_ran(name, blocks[name], *call) for name, (call,) in calls.items()}
    assert torch.equal(before, after)
    assert torch.isfinite(after).all()
    return read_trace(folder), recorder.layer_names, ran


def check(family: str, folder) -> None:
    """Assert that the recorded experts are those that ran, for every token and layer."""
    trace, names, ran = record(family, folder)
    assert trace.num_experts == 8
    experts = np.arange(8)
    for layer, name in enumerate(names):
        picked = (trace.expert_ids[:, layer, :, None] == experts).any(axis=1)
        inside = [block for block in ran if f"{name}.".startswith(f"{block}.")]
        found = ran.pop(max(inside, key=len)) if inside else np.zeros((0, 8), dtype=bool)
        assert not inside or picked.any(axis=0).sum() > 2  # else the check could not fail
        rows = [found, np.zeros((trace.num_tokens - len(found), 8), dtype=bool)]
        rows = rows if "encoder" in name.split(".") else rows[::-1]  # its tokens come first
        if family not in OTHERS_RUN:
            assert (picked == np.concatenate(rows)).all(), name
    assert not ran, "MoE layers that are not recorded"


def row(family: str, folder) -> str:
    """The family's line of the table."""
    recorded = "yes"
    try:
        check(family, folder)
    except TraceError as error:
        ran_again = "times in one forward pass" in str(error.__context__)
        if not ran_again and "found no MoE layer" not in str(error):
            raise
        recorded = "no"
    preset = f"`{family}`" if family in PRESETS else ""
    return f"| {family} | {recorded} | {preset} | {NOTES.get(family, '')} |"


def table() -> tuple[str, list[str], str]:
    """docs/recording.md: the text before the rows, the rows, and the text after."""
    before, head, rest = PAGE.read_text(encoding="utf-8").partition("| family |")
    columns, line, rest = rest.partition("|---|---|---|---|\n")
    rows, end, after = rest.partition("\n\n")
    return before + head + columns + line, rows.splitlines(), end + after


def write() -> None:
    """Write the table from what runs here."""
    rows = []
    for family in families():
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(family, folder))
    before, _, after = table()
    PAGE.write_text(before + "\n".join(rows) + after, encoding="utf-8")


if __name__ == "__main__":
    write()

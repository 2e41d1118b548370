"""The weights of a ``transformers`` Llama in the decoder of this example, and the same logits."""

from typing import Any

import torch

from .model import LanguageModel, LMConfig, build_model


def config_from_llama(llama_config: Any) -> LMConfig:
    """Return the dense configuration that matches a ``transformers.LlamaConfig``.

    Raises:
        ValueError: the Llama has biases, scaled rotary embedding, another activation or heads that
            do not divide its width, none of which this decoder has.
    """
    rope = llama_config.rope_parameters
    head_width = llama_config.hidden_size // llama_config.num_attention_heads
    unknown = [
        name
        for name, present in {
            "attention_bias": llama_config.attention_bias,
            "mlp_bias": llama_config.mlp_bias,
            f"rope_type {rope['rope_type']}": rope["rope_type"] != "default",
            f"hidden_act {llama_config.hidden_act}": llama_config.hidden_act != "silu",
            f"head_dim {llama_config.head_dim}": llama_config.head_dim != head_width,
        }.items()
        if present
    ]
    if unknown:
        raise ValueError(f"the Llama has {', '.join(unknown)}, which this decoder does not have")
    return LMConfig(
        vocab_size=llama_config.vocab_size,
        width=llama_config.hidden_size,
        num_layers=llama_config.num_hidden_layers,
        num_heads=llama_config.num_attention_heads,
        num_kv_heads=llama_config.num_key_value_heads,
        expert_width=llama_config.intermediate_size,
        num_experts=0,
        max_seq_len=llama_config.max_position_embeddings,
        rope_base=float(rope["rope_theta"]),
        norm_eps=llama_config.rms_norm_eps,
        tied_embeddings=llama_config.tie_word_embeddings,
    )


def from_llama(llama: Any) -> LanguageModel:
    """Return this decoder, dense, with the weights of a ``transformers.LlamaForCausalLM``."""
    model = build_model(config_from_llama(llama.config))
    weights = {name.removeprefix("model."): value for name, value in llama.state_dict().items()}
    with torch.no_grad():
        model.load_state_dict(weights)
    return model

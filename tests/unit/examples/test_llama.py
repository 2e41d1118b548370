"""Grouped-query attention, rotary embedding and SwiGLU against transformers' own Llama."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from examples.lm.llama import config_from_llama, from_llama
from tests.tolerances import LOGITS


def llama(*, tied: bool = False, kv_heads: int = 2, **changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,  # large enough for every part to matter in the logits
        "rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0},
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_same_logits_as_transformers_llama(tied, kv_heads):
    theirs = llama(tied=tied, kv_heads=kv_heads)
    ours = from_llama(theirs).eval()
    tokens = torch.randint(97, (3, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = theirs(tokens).logits, ours(tokens).logits
    assert expected.abs().max() > 1
    rtol, atol = LOGITS["float32"]
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def test_same_loss_and_gradients_as_transformers_llama():
    theirs = llama().train()
    ours = from_llama(theirs).train()
    tokens = torch.randint(97, (2, 33), generator=torch.Generator().manual_seed(2))
    expected = theirs(tokens, labels=tokens).loss
    output = ours(tokens[:, :-1], tokens[:, 1:])
    rtol, atol = LOGITS["float32"]
    torch.testing.assert_close(output.loss, expected, rtol=rtol, atol=atol)
    expected.backward()
    output.loss.backward()
    gradients = {n.removeprefix("model."): p.grad for n, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=rtol, atol=atol, msg=name)


def test_what_this_decoder_does_not_have_is_refused():
    with pytest.raises(ValueError, match="attention_bias, hidden_act gelu, which this decoder"):
        config_from_llama(llama(attention_bias=True, hidden_act="gelu").config)

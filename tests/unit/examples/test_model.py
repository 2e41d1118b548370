"""The example model: what its parts compute, and that its weights do not depend on the ranks."""

import math

import pytest
import torch
from deepspeed.moe.layer import MoE

from examples.lm.model import (
    LMConfig,
    aux_losses,
    build_model,
    preset,
    rope_table,
    rotate,
)
from tests.tolerances import LOGITS


def tokens_of(config: LMConfig, batch: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (batch, config.max_seq_len), generator=generator)


def test_untrained_loss_is_near_that_of_guessing_and_every_parameter_gets_a_gradient():
    config = preset("tiny", num_experts=4)
    model = build_model(config)
    tokens = tokens_of(config, batch=4)
    output = model(tokens[:, :-1], tokens[:, 1:])
    assert output.lm_loss.item() == pytest.approx(math.log(config.vocab_size), rel=0.1)
    expected = output.lm_loss + config.aux_loss_coef * output.aux_loss
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert output.sequence_loss.mean().item() == pytest.approx(output.lm_loss.item(), rel=1e-5)
    output.loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_a_token_does_not_see_later_tokens():
    config = preset("tiny")
    model = build_model(config).eval()
    tokens = tokens_of(config)
    changed = tokens.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % 256
    with torch.no_grad():
        a, b = model(tokens).logits, model(changed).logits
    rtol, atol = LOGITS["float32"]
    torch.testing.assert_close(a[:, :40], b[:, :40], rtol=rtol, atol=atol)
    assert (a[:, 40] - b[:, 40]).abs().max() > 0.01


def test_rotary_scores_depend_on_the_distance_alone():
    cos, sin = rope_table(16, 32, 500_000.0)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator).expand(2, 1, 1, 32, 16)
    scores = rotate(q, cos, sin)[0, 0] @ rotate(k, cos, sin)[0, 0].T
    for distance in (0, 3, 11):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert (scores[5, 5] - scores[5, 2]).abs() > 1e-3


def test_balance_loss_is_the_mean_of_the_layers_and_zero_for_a_dense_model():
    config = preset("tiny")
    model = build_model(config)
    output = model(tokens_of(config))
    parts = [layer.mlp.moe.deepspeed_moe.l_aux.item() for layer in model.layers]
    assert output.aux_loss.item() == pytest.approx(sum(parts) / len(parts), rel=1e-6)
    dense = build_model(preset("tiny", num_experts=0))
    assert dense(tokens_of(config)).aux_loss.item() == 0
    assert aux_losses(torch.nn.Linear(2, 2)).item() == 0


def test_routing_is_a_function_of_weights_and_tokens():
    """No pick is lost, and neither the mode nor the random state matters."""
    config = preset("tiny")
    model = build_model(config)
    picks = []

    def keep(_gate, _inputs, output):
        picks.append(output[3].clone())

    for layer in model.layers:
        layer.mlp.moe.deepspeed_moe.gate.register_forward_hook(keep)
    tokens = tokens_of(config)
    for mode, seed in ((True, 1), (True, 2), (False, 3)):
        torch.manual_seed(seed)
        model.train(mode)(tokens)
    first, second, third = picks[:2], picks[2:4], picks[4:]
    assert all((pick >= 0).all() for pick in picks)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_every_expert_has_weights_of_its_own_that_do_not_depend_on_the_ranks():
    config = preset("tiny", num_experts=4)
    whole = dict(build_model(config, seed=3).named_parameters())
    for rank in range(2):
        part = build_model(config, ep_size=2, ep_rank=rank, seed=3)
        for name, value in part.named_parameters():
            head, marker, tail = name.partition("deepspeed_experts.")
            if marker:  # this rank's expert j is expert 2 * rank + j of the model
                name = f"{head}{marker}{2 * rank + int(tail[0])}{tail[1:]}"
            assert torch.equal(value, whole[name]), name
    experts = [
        whole[f"layers.0.mlp.moe.deepspeed_moe.experts.deepspeed_experts.{e}.up_proj.weight"]
        for e in range(4)
    ]
    assert all(not torch.equal(experts[0], other) for other in experts[1:])
    other_seed = dict(build_model(config, seed=4).named_parameters())
    assert not torch.equal(other_seed["embed_tokens.weight"], whole["embed_tokens.weight"])


def test_the_factory_gets_deepspeeds_arguments_and_experts_are_marked():
    config = preset("tiny")
    seen = []

    def factory(**arguments):
        seen.append(arguments)
        return MoE(**arguments)

    model = build_model(config, factory)
    assert len(seen) == config.num_layers
    assert seen[0]["drop_tokens"] is False
    assert seen[0]["top2_2nd_expert_sampling"] is False
    marked = {n for n, p in model.named_parameters() if getattr(p, "allreduce", True) is False}
    assert marked == {n for n, _ in model.named_parameters() if "deepspeed_experts" in n}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 33}, "width 33 does not give 2 heads of an even size"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"top_k": 9}, r"top_k is 9, expected 1 to num_experts \(8\)"),
    ],
)
def test_wrong_sizes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        preset("tiny", **changes)


def test_unknown_preset_and_too_long_sequence_are_named():
    with pytest.raises(ValueError, match="found preset 'huge', expected one of tiny, demo"):
        preset("huge")
    model = build_model(preset("tiny"))
    with pytest.raises(ValueError, match="sequences have 65 tokens, the model was built for 64"):
        model(torch.zeros(1, 65, dtype=torch.int64))

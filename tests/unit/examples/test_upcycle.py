"""Sparse upcycling keeps the function of the dense model, for both kinds of model."""

import copy

import pytest
import torch
from torch import nn

from examples.lm.model import aux_losses, build_model, moe_feed_forwards, preset
from examples.lm.upcycle import upcycle
from tests.tolerances import LOGITS
from tests.unit.examples.test_llama import llama


def own_dense() -> nn.Module:
    return build_model(preset("tiny", num_experts=0), seed=5).eval()


def logits(model: nn.Module, vocab: int = 97) -> torch.Tensor:
    tokens = torch.randint(vocab, (2, 48), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(tokens).logits


MODELS = {"own": own_dense, "transformers": llama}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("k", [2, 4])
def test_logits_stay_those_of_the_dense_model(kind, k):
    dense = MODELS[kind]()
    expected = logits(dense)
    sparse = upcycle(copy.deepcopy(dense), num_experts=8, k=k, router_init_std=0.5)
    picks = [ff.moe.deepspeed_moe for ff in moe_feed_forwards(sparse)]
    found = logits(sparse)
    rtol, atol = LOGITS["float32"]
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    # the router is at work: tokens went to different experts, k each
    for layer in picks:
        assert int(layer.exp_counts.sum()) == 2 * 48 * k
        assert int((layer.exp_counts > 0).sum()) > k
    # and draws nothing at random
    counts = [layer.exp_counts.clone() for layer in picks]
    logits(sparse)
    assert all(torch.equal(a, layer.exp_counts) for a, layer in zip(counts, picks, strict=True))


def test_expert_parameters_are_marked_for_deepspeed_and_router_is_not():
    model = upcycle(llama(), num_experts=4, k=2)
    experts = [(n, p) for n, p in model.named_parameters() if "deepspeed_experts" in n]
    assert len(experts) == 3 * 4 * 3
    assert all(p.allreduce is False and p.group_name == "ep_size_1" for _, p in experts)
    rest = [p for n, p in model.named_parameters() if "deepspeed_experts" not in n]
    assert all(getattr(p, "allreduce", True) for p in rest)


def test_training_moves_the_experts_apart():
    model = upcycle(own_dense(), num_experts=4, k=2, router_init_std=0.5).train()
    tokens = torch.randint(256, (4, 33), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    first = model(tokens[:, :-1], tokens[:, 1:])
    first.loss.backward()
    optimizer.step()
    with torch.no_grad():
        second = model(tokens[:, :-1], tokens[:, 1:])
    assert second.lm_loss < first.lm_loss
    experts = model.layers[0].mlp.moe.deepspeed_moe.experts.deepspeed_experts
    assert not torch.equal(experts[0].up_proj.weight, experts[1].up_proj.weight)


def test_only_the_chosen_layers_change():
    model = upcycle(llama(), num_experts=4, k=2, layers=[1])
    kinds = [type(layer.mlp).__name__ for layer in model.model.layers]
    assert kinds == ["LlamaMLP", "MoEFeedForward", "LlamaMLP"]
    logits(model)
    assert aux_losses(model).item() > 0


def test_router_and_noise_follow_the_seed_and_not_the_number_of_ranks():
    options = {"num_experts": 4, "k": 2, "experts_init_noise": 0.1}
    whole = upcycle(own_dense(), seed=1, **options)
    same = upcycle(own_dense(), seed=1, **options)
    other = upcycle(own_dense(), seed=2, **options)
    gate = "layers.0.mlp.moe.deepspeed_moe.gate.wg.weight"
    weights = [dict(model.named_parameters()) for model in (whole, same, other)]
    assert torch.equal(weights[0][gate], weights[1][gate])
    assert not torch.equal(weights[0][gate], weights[2][gate])
    name = "layers.1.mlp.moe.deepspeed_moe.experts.deepspeed_experts.{}.down_proj.weight"
    assert not torch.equal(weights[0][name.format(0)], weights[0][name.format(1)])
    second_rank = upcycle(own_dense(), seed=1, ep_size=2, ep_rank=1, **options)
    part = dict(second_rank.named_parameters())
    assert torch.equal(part[name.format(0)], weights[0][name.format(2)])
    assert torch.equal(part[gate], weights[0][gate])


def test_noise_is_relative_to_the_weights():
    dense = own_dense()
    before = dense.layers[0].mlp.up_proj.weight.clone()
    model = upcycle(dense, num_experts=2, k=2, experts_init_noise=0.1)
    after = model.layers[0].mlp.moe.deepspeed_moe.experts.deepspeed_experts[1].up_proj.weight
    assert ((after - before).std() / before.std()).item() == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 8, "k": 1}, "k is 1, expected 2 or more: DeepSpeed's gate multiplies"),
        ({"num_experts": 4, "k": 5}, r"k is 5, expected 2 to num_experts \(4\)"),
        ({"num_experts": 6, "ep_size": 4}, "6 experts cannot be shared by ep_size 4 ranks"),
        ({"num_experts": 4, "ep_size": 2, "ep_rank": 2}, "ep_rank is 2, expected 0 to 1"),
        ({"num_experts": 4, "layers": [2]}, r"layers are \[2\], the model has layers 0 to 1"),
        ({"num_experts": 4, "mlp_attribute": "ffn"}, "no decoder layers with an attribute 'ffn'"),
    ],
)
def test_what_cannot_be_upcycled_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        upcycle(own_dense(), **options)


def test_a_second_upcycling_is_refused():
    with pytest.raises(ValueError, match="is a mixture of experts already"):
        upcycle(upcycle(own_dense(), num_experts=4), num_experts=4)

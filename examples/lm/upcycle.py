"""Turn a dense Llama-style model into a mixture of experts that computes the same at the start.

Sparse upcycling (arXiv 2212.05055): every expert of a layer begins as a copy of the dense MLP, the
router is new. With weights that sum to one over the experts of a token and no dropped tokens, the
mixture of equal experts is the MLP itself, whatever the router says. DeepSpeed's gate normalizes
the weights for k >= 2; for k = 1 it multiplies by the raw probability, so k = 1 is refused.

Works on the dense model of this example and on ``transformers``' Llama, and on any model whose
decoder layers hold, under one attribute, an MLP that maps one tensor [..., D] to another.
"""

from collections.abc import Collection

import torch
from torch import nn

from .model import MoEFactory, MoEFeedForward, normal

EXPERTS = "deepspeed_moe.experts.deepspeed_experts"


def upcycle(
    model: nn.Module,
    *,
    num_experts: int,
    k: int = 2,
    ep_size: int = 1,
    ep_rank: int = 0,
    moe_class: MoEFactory | None = None,
    layers: Collection[int] | None = None,
    mlp_attribute: str = "mlp",
    router_init_std: float = 0.02,
    experts_init_noise: float = 0.0,
    seed: int = 0,
) -> nn.Module:
    """Replace the MLPs of ``model`` by MoE layers, in place, and return the model.

    Args:
        num_experts: of each layer, of which this rank holds ``num_experts // ep_size``, from
            ``ep_rank * num_experts // ep_size`` on. Every rank begins with the same dense model.
        k: experts of a token, at least 2.
        moe_class: ``deepspeed.moe.layer.MoE`` (default), ``moe_locality.MoE`` or the like.
        layers: which decoder layers (default: all); the paper upcycles every other one.
        mlp_attribute: name of the MLP in a decoder layer.
        router_init_std: standard deviation of the router's weights; 0 makes all experts tie.
        experts_init_noise: standard deviation of what is added to expert weights, relative to that
            of each weight; 0 keeps the function exactly.
        seed: of router and noise. They do not depend on the number of ranks.

    The balance loss is not part of the model's own loss: add ``lm.model.aux_losses(model)``.

    Raises:
        ValueError: k is not between 2 and num_experts, ep_size does not divide num_experts, a
            layer number is wrong, or the model has no decoder layers with such an MLP.
    """
    _check(num_experts, k, ep_size, ep_rank)
    if moe_class is None:
        from deepspeed.moe.layer import MoE as moe_class
    decoder = decoder_layers(model, mlp_attribute)
    wanted = range(len(decoder)) if layers is None else sorted(layers)
    if any(not 0 <= index < len(decoder) for index in wanted):
        raise ValueError(
            f"layers are {list(wanted)}, the model has layers 0 to {len(decoder) - 1}: correct them"
        )
    for index in wanted:
        dense = getattr(decoder[index], mlp_attribute)
        moe = _upcycled(dense, moe_class, num_experts, k, ep_size)
        _draw_router(moe, router_init_std, f"{seed}/router/{index}")
        _add_noise(moe, experts_init_noise, ep_rank, f"{seed}/expert/{index}")
        moe.train(dense.training)
        setattr(decoder[index], mlp_attribute, MoEFeedForward(moe))
    return model


def decoder_layers(model: nn.Module, mlp_attribute: str = "mlp") -> nn.ModuleList:
    """Return the list of decoder layers: the longest ModuleList whose members all have an MLP.

    Raises:
        ValueError: there is none, or a layer is a mixture of experts already.
    """
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(isinstance(getattr(layer, mlp_attribute, None), nn.Module) for layer in module)
    ]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no decoder layers with an attribute {mlp_attribute!r}:"
            " give the name of its MLPs as mlp_attribute"
        )
    layers = max(found, key=len)
    if any(isinstance(getattr(layer, mlp_attribute), MoEFeedForward) for layer in layers):
        raise ValueError("the model is a mixture of experts already: upcycle a dense one")
    return layers


def _check(num_experts: int, k: int, ep_size: int, ep_rank: int) -> None:
    if k == 1:
        raise ValueError(
            "k is 1, expected 2 or more: DeepSpeed's gate multiplies by the raw probability for"
            " k=1, so the upcycled model would not compute what the dense one does"
        )
    if not 2 <= k <= num_experts:
        raise ValueError(f"k is {k}, expected 2 to num_experts ({num_experts})")
    if ep_size < 1 or num_experts % ep_size:
        raise ValueError(
            f"{num_experts} experts cannot be shared by ep_size {ep_size} ranks equally: change one"
        )
    if not 0 <= ep_rank < ep_size:
        raise ValueError(f"ep_rank is {ep_rank}, expected 0 to {ep_size - 1}")


def _upcycled(
    dense: nn.Module, moe_class: MoEFactory, num_experts: int, k: int, ep_size: int
) -> nn.Module:
    weight = next(dense.parameters())
    moe = moe_class(
        hidden_size=_input_width(dense),
        expert=dense,
        num_experts=num_experts,
        ep_size=ep_size,
        k=k,
        drop_tokens=False,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    return moe.to(device=weight.device, dtype=weight.dtype)


def _input_width(dense: nn.Module) -> int:
    """Return the width of the model, read from the first linear layer of the MLP."""
    for module in dense.modules():
        if isinstance(module, nn.Linear):
            return module.in_features
    raise ValueError(f"{type(dense).__name__} has no linear layer to read the model width from")


def _draw_router(moe: nn.Module, std: float, key: str) -> None:
    weight = moe.get_submodule("deepspeed_moe.gate.wg").weight
    with torch.no_grad():
        weight.copy_(normal(weight.shape, std, key))


def _add_noise(moe: nn.Module, noise: float, ep_rank: int, key: str) -> None:
    if noise == 0:
        return
    experts = moe.get_submodule(EXPERTS)
    for local, expert in enumerate(experts):
        logical = ep_rank * len(experts) + local
        for name, parameter in expert.named_parameters():
            scale = noise * float(parameter.detach().float().std(correction=0))
            with torch.no_grad():
                drawn = normal(parameter.shape, scale, f"{key}/{logical}/{name}")
                parameter.add_(drawn.to(parameter))

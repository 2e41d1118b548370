"""A small decoder in the style of Llama 3 whose every MLP is a mixture of experts, or dense.

Architecture after arXiv 2407.21783 (Llama 3): RMSNorm before each block, rotary embedding with base
500,000, grouped-query attention, SwiGLU. Parameter names follow ``transformers``' Llama, so weights
can be copied by name.

Shapes: B sequences, S tokens of a sequence, D model width, F expert width, H query heads, V
vocabulary.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norms import build_rms_norm

MoEFactory = Callable[..., nn.Module]
"""``deepspeed.moe.layer.MoE``, ``moe_locality.MoE`` or any callable with that signature."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LMConfig:
    """Sizes of the model. ``num_experts=0`` is the dense model."""

    vocab_size: int = 258
    width: int = 96
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    expert_width: int = 64
    num_experts: int = 16
    top_k: int = 2
    max_seq_len: int = 128
    rope_base: float = 500_000.0
    norm_eps: float = 1e-5
    norm: str = "auto"
    tied_embeddings: bool = True
    init_std: float = 0.1
    """standard deviation of the weights: about 1 / sqrt(width)"""
    router_init_std: float = 0.02
    aux_loss_coef: float = 0.02

    def __post_init__(self) -> None:
        if self.width % self.num_heads or (self.width // self.num_heads) % 2:
            raise ValueError(
                f"width {self.width} does not give {self.num_heads} heads of an even size: change"
                " one of them"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.num_experts and not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"top_k is {self.top_k}, expected 1 to num_experts ({self.num_experts})"
            )

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads


PRESETS = {
    "tiny": LMConfig(
        width=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        expert_width=32,
        num_experts=8,
        max_seq_len=64,
    ),
    "demo": LMConfig(),
}


class LMOutput(NamedTuple):
    """What a forward pass returns; the losses are None without targets."""

    loss: Tensor | None
    """``lm_loss + aux_loss_coef * aux_loss``"""
    lm_loss: Tensor | None
    aux_loss: Tensor
    logits: Tensor
    """[B, S, V], float32"""
    sequence_loss: Tensor | None
    """[B], mean over the tokens of each sequence, without gradient"""


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (arXiv 2002.05202): a dense MLP, or one expert."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rope_table(head_width: int, length: int, base: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin [length, head_width] of rotary embedding (arXiv 2104.09864), in halves."""
    inverse = base ** (-torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys [B, H, S, head_width] by their position."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


class Attention(nn.Module):
    """Causal grouped-query attention (arXiv 2305.13245) through torch's SDPA."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.kv_heads = config.num_kv_heads
        self.head_width = config.head_width
        kv_width = self.kv_heads * self.head_width
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(config.width, kv_width, bias=False)
        self.v_proj = nn.Linear(config.width, kv_width, bias=False)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        q = self._split(self.q_proj(x), self.heads)
        k = self._split(self.k_proj(x), self.kv_heads)
        v = self._split(self.v_proj(x), self.kv_heads)
        y = F.scaled_dot_product_attention(
            rotate(q, cos, sin),
            rotate(k, cos, sin),
            v,
            is_causal=True,
            enable_gqa=self.kv_heads != self.heads,
        )
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, width))

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(*x.shape[:2], heads, self.head_width).transpose(1, 2)


class MoEFeedForward(nn.Module):
    """An MoE layer in the place of an MLP: takes and returns one tensor.

    ``aux_loss`` keeps DeepSpeed's balance loss of the last forward pass for ``aux_losses(model)``.
    """

    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.moe = moe
        self.aux_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y, self.aux_loss, _ = self.moe(x)
        return y


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, config: LMConfig, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = build_rms_norm(config.width, config.norm_eps, config.norm)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = build_rms_norm(config.width, config.norm_eps, config.norm)
        self.mlp = mlp

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    """The decoder. Build it with ``build_model``, which also draws the weights."""

    def __init__(self, config: LMConfig, mlps: list[nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config, mlp) for mlp in mlps)
        self.norm = build_rms_norm(config.width, config.norm_eps, config.norm)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        cos, sin = rope_table(config.head_width, config.max_seq_len, config.rope_base)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> LMOutput:
        """Predict the next token of ``tokens`` [B, S] int64; ``targets`` [B, S] give losses."""
        length = tokens.shape[1]
        if length > self.config.max_seq_len:
            raise ValueError(
                f"sequences have {length} tokens, the model was built for {self.config.max_seq_len}"
            )
        x = self.embed_tokens(tokens)
        cos, sin = self.rope_cos[:length].to(x.dtype), self.rope_sin[:length].to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = self.lm_head(self.norm(x)).float()
        aux = aux_losses(self)
        if targets is None:
            return LMOutput(None, None, aux, logits, None)
        per_token = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        lm_loss = per_token.mean()
        loss = lm_loss + self.config.aux_loss_coef * aux
        return LMOutput(loss, lm_loss, aux, logits, per_token.detach().view_as(targets).mean(1))


def build_model(
    config: LMConfig,
    moe_class: MoEFactory | None = None,
    *,
    ep_size: int = 1,
    ep_rank: int = 0,
    seed: int = 0,
) -> LanguageModel:
    """Build the decoder with weights that depend on ``seed`` alone, not on the number of ranks.

    ``moe_class`` makes the MoE layers (default: DeepSpeed's). Routing is dropless and without
    sampling, so the experts of a token are a function of weights and tokens. ``ep_rank`` says which
    experts this rank holds: experts ``ep_rank * E / ep_size`` onwards, DeepSpeed's layout.
    """
    if config.num_experts and moe_class is None:
        from deepspeed.moe.layer import MoE as moe_class
    mlps: list[nn.Module] = [
        MoEFeedForward(
            make_moe(moe_class, SwiGLU(config.width, config.expert_width), config, ep_size)
        )
        if config.num_experts
        else SwiGLU(config.width, config.expert_width)
        for _ in range(config.num_layers)
    ]
    model = LanguageModel(config, mlps)
    draw_weights(model, seed=seed, ep_rank=ep_rank)
    return model


def make_moe(moe_class: MoEFactory, expert: nn.Module, config: LMConfig, ep_size: int) -> nn.Module:
    """Call a factory with DeepSpeed's MoE signature: dropless, and nothing random in the gate."""
    return moe_class(
        hidden_size=config.width,
        expert=expert,
        num_experts=config.num_experts,
        ep_size=ep_size,
        k=config.top_k,
        drop_tokens=False,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )


def draw_weights(model: LanguageModel, *, seed: int, ep_rank: int = 0) -> None:
    """Draw every weight from a generator of its own, named by layer and logical expert.

    DeepSpeed copies one expert into all of them; here expert e of a layer has the same weights on
    every number of ranks, so runs of different sizes can be compared.
    """
    config = model.config
    out_std = config.init_std / math.sqrt(2 * config.num_layers)
    for name, parameter in model.named_parameters():
        if parameter.dim() != 2:
            continue
        std = out_std if name.endswith(("o_proj.weight", "down_proj.weight")) else config.init_std
        if name.endswith("gate.wg.weight"):
            std = config.router_init_std
        with torch.no_grad():
            key = f"{seed}/{logical_name(name, model, ep_rank)}"
            parameter.copy_(normal(parameter.shape, std, key))


def logical_name(name: str, model: nn.Module, ep_rank: int) -> str:
    """Return the parameter's name with the local number of its expert replaced by the logical."""
    marker = "deepspeed_experts."
    if marker not in name:
        return name
    head, tail = name.split(marker, 1)
    local, rest = tail.split(".", 1)
    num_local = len(model.get_submodule(head + "deepspeed_experts"))
    return f"{head}{marker}{ep_rank * num_local + int(local)}.{rest}"


def normal(shape: torch.Size, std: float, key: str) -> Tensor:
    """Return normal numbers drawn from a generator that is seeded by ``key``."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "little")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def moe_feed_forwards(model: nn.Module) -> Iterator[MoEFeedForward]:
    """Yield the MoE layers of this model, or of any model upcycled with ``upcycle``."""
    return (module for module in model.modules() if isinstance(module, MoEFeedForward))


def aux_losses(model: nn.Module) -> Tensor:
    """Return the balance loss of the last forward pass, mean over the MoE layers (0 if none)."""
    parts = [ff.aux_loss for ff in moe_feed_forwards(model) if ff.aux_loss is not None]
    if not parts:
        return next(model.parameters()).new_zeros(())
    return torch.stack(parts).mean()


def preset(name: str, **changes: Any) -> LMConfig:
    """Return a preset by name with some fields changed.

    Raises:
        ValueError: there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"found preset {name!r}, expected one of {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)

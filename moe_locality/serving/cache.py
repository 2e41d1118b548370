"""The KV cache of a batch of sequences of different length, made of transformers' own layers.

All rows of a batch end in the same column: a shorter row is padded on the left, and the attention
mask hides its padding. The distance of two tokens of a row is then that of their columns, so one
length for all rows, as a sliding layer has it, is right for each of them. Rows are put together and
taken apart by copies of their columns; recurrent states have no columns.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from moe_locality.errors import ConfigError

KNOWN = (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)
"""The layers whose rows can be put together. Others, such as the compressed and indexed attention
of DeepSeek-V3.2 and V4, have columns that are not those of the tokens."""


def check_cache(model: nn.Module) -> bool:
    """Return whether the model has recurrent states.

    Raises:
        ConfigError: its caches cannot be put together; names the layer.
    """
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"found a {type(model).__name__}, expected a language model of transformers, its MoE "
            "layers DeepSpeed's or not: the engine continues texts from transformers' caches"
        )
    config: Any = model.config
    if config.is_encoder_decoder:
        raise ConfigError(
            f"found the encoder-decoder {type(model).__name__}, expected a decoder alone: use "
            "model.generate for it"
        )
    text = config.get_text_config(decoder=True)
    unknown = {type(layer).__name__ for layer in _layers(text) if type(layer) not in KNOWN}
    if "chunked_attention" in (getattr(text, "layer_types", None) or ()) or getattr(
        text, "attention_chunk_size", None
    ):
        unknown.add("chunked_attention")
    if hasattr(text, "keep_window_size"):  # Doge keeps the best columns, padding counts
        unknown.add("dynamic mask attention")
    if hasattr(config, "canvas_length"):  # DiffusionGemma writes many tokens at once
        unknown.add("block diffusion")
    if unknown:
        raise ConfigError(
            f"found {sorted(unknown)} in the cache of {type(model).__name__}, expected full, "
            "sliding or recurrent layers: use model.generate for this model"
        )
    return any(isinstance(layer, LinearAttentionLayer) for layer in _layers(text))


def _layers(text_config: Any) -> list[Any]:
    return DynamicCache(config=text_config).layers


@dataclass(slots=True)
class Rows:
    """The cache of some sequences, and how many tokens of each are in it (``lengths [B]``)."""

    cache: DynamicCache
    lengths: list[int]

    @classmethod
    def empty(cls, config: Any, count: int) -> Rows:
        """Return ``count`` rows without tokens."""
        return cls(DynamicCache(config=config), [0] * count)

    @property
    def width(self) -> int:
        """Columns, those of padding included."""
        return max(self.lengths, default=0)


def assemble(picks: Sequence[tuple[Rows, int]]) -> Rows:
    """Return a batch of the given rows (source, row), in that order; the sources stay as they are.

    Every row has at least one token.
    """
    lengths = [rows.lengths[i] for rows, i in picks]
    width = max(lengths)
    runs: list[tuple[Rows, list[int]]] = []
    for rows, i in picks:  # neighbours of one source are copied together
        if runs and runs[-1][0] is rows:
            runs[-1][1].append(i)
        else:
            runs.append((rows, [i]))
    layers = [
        _assemble_layer([(rows.cache.layers[number], index) for rows, index in runs], width)
        for number in range(len(picks[0][0].cache.layers))
    ]
    cache = copy.copy(picks[0][0].cache)
    cache.layers = layers
    return Rows(cache, lengths)


def _assemble_layer(runs: Sequence[tuple[Any, list[int]]], width: int) -> Any:
    first = runs[0][0]
    made = copy.copy(first)
    if isinstance(first, LinearAttentionLayer):
        for name in ("conv_states", "recurrent_states"):
            states: dict[int, Tensor | None] = {}
            for key, state in getattr(first, name).items():
                states[key] = state  # None where a model has no such state
                if state is not None:
                    parts = [_row(getattr(layer, name)[key], index) for layer, index in runs]
                    states[key] = torch.cat(parts)
            setattr(made, name, states)
        for name, value in vars(first).items():
            if name.startswith(("is_conv", "is_rec", "has_prev", "conv_kernel")):
                setattr(made, name, dict(value))
    if isinstance(first, DynamicLayer) and first.is_initialized:
        columns = _columns(first, width)
        for name in ("keys", "values"):
            parts = [_fit(_row(getattr(layer, name), index), columns) for layer, index in runs]
            setattr(made, name, parts[0] if len(parts) == 1 else torch.cat(parts))
        if isinstance(first, DynamicSlidingWindowLayer):
            made.cumulative_length = width
    return made


def _row(tensor: Tensor, index: list[int]) -> Tensor:
    if len(index) == 1:
        return tensor[index[0] : index[0] + 1].clone()
    return tensor[index]


def _columns(layer: Any, width: int) -> int:
    """How many columns a layer holds for sequences of that length."""
    if isinstance(layer, DynamicSlidingWindowLayer):
        return min(width, layer.sliding_window - 1)
    return width


def _fit(tensor: Tensor, columns: int) -> Tensor:
    """Cut ``[B, H, S, D]`` on the left, or fill it with zeros there, to ``columns``."""
    missing = columns - tensor.shape[-2]
    if missing <= 0:
        return tensor[..., -missing:, :]
    return nn.functional.pad(tensor, (0, 0, missing, 0))


# -- what a forward pass is given


def pass_inputs(rows: Rows, tokens: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Return ids, positions and mask for the next tokens of each row, on the CPU.

    ``tokens``: where rows have tokens already, as many for each; else of any number, padded on the
    left. The mask is left out where no column is padding. ``valid [B, S]`` goes to no model: False
    where a token is padding, and left out where none is.
    """
    width, longest = rows.width, max(map(len, tokens))
    missing = [longest - len(row) for row in tokens]
    ends = [past + len(row) for past, row in zip(rows.lengths, tokens, strict=True)]
    found = {
        "input_ids": torch.tensor(
            [[0] * gap + list(row) for gap, row in zip(missing, tokens, strict=True)]
        ),
        "position_ids": torch.tensor(
            [
                [past] * gap + list(range(past, end))
                for past, gap, end in zip(rows.lengths, missing, ends, strict=True)
            ]
        ),
    }
    columns = torch.arange(width + longest)
    if any(missing):
        found["valid"] = columns[:longest] >= torch.tensor(missing)[:, None]
    if min(ends) < width + longest:
        begins = torch.tensor([width + longest - end for end in ends])
        found["attention_mask"] = (columns >= begins[:, None]).long()
    return found


# -- rows that travel


def row_tensors(cache: DynamicCache) -> Iterator[Tensor]:
    """Yield the tensors of a cache, always in the same order."""
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionLayer):
            for states in (layer.conv_states, layer.recurrent_states):
                yield from (state for state in states.values() if state is not None)
        if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
            yield from (layer.keys, layer.values)


def row_bytes(rows: Rows) -> int:
    """How many bytes :func:`pack_row` gives for a batch of one row."""
    return sum(tensor.numel() * tensor.element_size() for tensor in row_tensors(rows.cache))


def pack_row(rows: Rows, row: int) -> Tensor:
    """Return the bytes of one row: uint8 ``[N]``, its own columns without padding."""
    alone = assemble([(rows, row)])
    parts = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in row_tensors(alone.cache)]
    return torch.cat(parts)


def unpack_row(data: Tensor, length: int, like: Rows) -> Rows:
    """Undo :func:`pack_row`. ``like``: any row of the same model, for shapes and types."""
    made = assemble([(like, 0)])
    offset = 0

    def take(tensor: Tensor, shape: Sequence[int]) -> Tensor:
        nonlocal offset
        size = math.prod(shape) * tensor.element_size()
        piece = data[offset : offset + size].clone()  # aligned for its type
        offset += size
        return piece.view(tensor.dtype).view(*shape)

    for layer in made.cache.layers:
        if isinstance(layer, LinearAttentionLayer):
            for states in (layer.conv_states, layer.recurrent_states):
                for key, state in states.items():
                    states[key] = state if state is None else take(state, state.shape)
        if isinstance(layer, DynamicLayer) and layer.is_initialized:
            for name in ("keys", "values"):
                tensor = getattr(layer, name)
                shape = (*tensor.shape[:2], _columns(layer, length), tensor.shape[-1])
                setattr(layer, name, take(tensor, shape))
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = length
    made.lengths = [length]
    return made

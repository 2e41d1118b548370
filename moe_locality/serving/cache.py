"""The KV cache of a batch of sequences of different length, made of transformers' own layers.

All rows of a batch end in the same column: a shorter row is padded on the left, and the attention
mask hides its padding. The distance of two tokens of a row is then that of their columns, so one
length for all rows, as a sliding layer has it, is right for each of them. Rows are put together and
taken apart by copies of their columns; recurrent states have no columns.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from moe_locality.errors import ConfigError

KNOWN = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    cache_utils.DummyLayer,
    cache_utils.LinearAttentionAndFullAttentionLayer,
    cache_utils.LinearAttentionAndSlidingWindowAttentionLayer,
)
"""The layers whose rows can be put together. Others, such as the compressed and indexed attention
of DeepSeek-V3.2 and V4, have columns that are not those of the tokens."""
WITH_COLUMNS = ("keys", "values")


def check_cache(model: nn.Module) -> bool:
    """Return whether the model has recurrent states; ConfigError: no rows can join its caches."""
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
    layers = DynamicCache(config=text).layers
    unknown = {type(layer).__name__ for layer in layers if type(layer) not in KNOWN}
    kinds = getattr(text, "layer_types", None) or ()
    if "chunked_attention" in kinds or getattr(text, "attention_chunk_size", None):
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
    return any(isinstance(layer, LinearAttentionLayer) for layer in layers)


@dataclass(slots=True)
class Rows:
    """The cache of some sequences, and how many tokens of each are in it (``lengths [B]``)."""

    cache: DynamicCache
    lengths: list[int]

    @classmethod
    def empty(cls, config: Any, count: int) -> "Rows":
        """Return ``count`` rows without tokens."""
        return cls(DynamicCache(config=config), [0] * count)

    @property
    def width(self) -> int:
        """Columns, those of padding included."""
        return max(self.lengths, default=0)


def assemble(picks: Sequence[tuple[Rows, int]]) -> Rows:
    """Return a batch of rows (source, row) that have tokens; the sources stay as they are."""
    lengths = [rows.lengths[i] for rows, i in picks]
    width = max(lengths)
    runs: list[tuple[list[Any], list[int]]] = []
    # neighbours of one source are copied together
    for _, group in groupby(picks, key=lambda pick: id(pick[0])):
        sources, index = zip(*group, strict=True)
        runs.append((sources[0].cache.layers, list(index)))
    cache = copy.copy(picks[0][0].cache)
    cache.layers = [
        _assemble_layer([(layers[number], index) for layers, index in runs], width)
        for number in range(len(cache.layers))
    ]
    return Rows(cache, lengths)


def _places(layer: Any) -> Iterator[tuple[dict[Any, Any], Any]]:
    """Yield (holder, key) of every tensor of a layer, always in the same order."""
    if isinstance(layer, LinearAttentionLayer):
        for states in (layer.conv_states, layer.recurrent_states):
            yield from ((states, number) for number, state in states.items() if state is not None)
    if isinstance(layer, DynamicLayer) and layer.keys is not None:
        yield from ((vars(layer), name) for name in WITH_COLUMNS)


def _assemble_layer(runs: Sequence[tuple[Any, list[int]]], width: int) -> Any:
    made = copy.copy(runs[0][0])
    by_number = {name: dict(value) for name, value in vars(made).items() if isinstance(value, dict)}
    vars(made).update(by_number)  # recurrent states, and what is known of them
    # the same tensor in the new layer and in each of the runs; made's are written in the loop
    places = zip(list(_places(made)), *(_places(layer) for layer, _ in runs), strict=True)
    for (holder, key), *sources in places:
        parts = [_row(of[key], rows) for (of, key), (_, rows) in zip(sources, runs, strict=True)]
        if key in WITH_COLUMNS:
            parts = [_fit(part, _columns(made, width)) for part in parts]
        holder[key] = parts[0] if len(parts) == 1 else torch.cat(parts)
    _note_length(made, width)
    return made


def _row(tensor: Tensor, index: list[int]) -> Tensor:
    return tensor[index] if len(index) > 1 else tensor[index[0] : index[0] + 1].clone()


def _columns(layer: Any, width: int) -> int:
    """How many columns a layer holds for sequences of that length."""
    slides = isinstance(layer, DynamicSlidingWindowLayer)
    return min(width, layer.sliding_window - 1) if slides else width


def _note_length(layer: Any, length: int) -> None:
    """Say it to a layer that counts the tokens which have passed it."""
    if isinstance(layer, DynamicSlidingWindowLayer) and layer.is_initialized:
        layer.cumulative_length = length


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
    ids, positions, ends = [], [], []
    for past, gap, row in zip(rows.lengths, missing, tokens, strict=True):
        ends.append(past + len(row))
        ids.append([0] * gap + list(row))
        positions.append([past] * gap + list(range(past, ends[-1])))
    found = {"input_ids": torch.tensor(ids), "position_ids": torch.tensor(positions)}
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
        yield from (holder[key] for holder, key in _places(layer))


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
    made, offset = assemble([(like, 0)]), 0
    for layer in made.cache.layers:
        for holder, key in _places(layer):
            dtype, shape = holder[key].dtype, list(holder[key].shape)
            if key in WITH_COLUMNS:
                shape[-2] = _columns(layer, length)
            end = offset + math.prod(shape) * dtype.itemsize
            piece = data[offset:end].clone()  # aligned for its type
            holder[key], offset = piece.view(dtype).view(shape), end
        _note_length(layer, length)
    made.lengths = [length]
    return made

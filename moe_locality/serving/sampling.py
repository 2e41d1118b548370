"""Choose the next token of every row of a batch. Its randomness is a function of seed, continuation
and position: a request gives the same tokens on every rank and in every batch.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_locality.serving.requests import RequestId, SamplingParams


def seed_of(params: SamplingParams, request_id: RequestId, engine_seed: int) -> int:
    """The seed of a request: its own, or one made of the engine's and its id."""
    if params.seed is not None:
        return int(params.seed) % (1 << 64)
    told = f"{engine_seed}/{type(request_id).__name__}/{request_id}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.sha256(told).digest()[:8], "little")


def draw(seed: int, index: int, position: int) -> float:
    """A number in [0, 1): that of token ``position`` of continuation ``index``."""
    words = [seed & 0xFFFFFFFF, seed >> 32, index, position]
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)
    return float(state[0] >> np.uint64(11)) * 2.0**-53


@dataclass(frozen=True, slots=True)
class Choice:
    """A token, and {token: log-probability} where it was asked for (the token's own with them)."""

    token: int
    logprobs: dict[int, float] | None = None


def choose(
    logits: Tensor, params: Sequence[SamplingParams], draws: Sequence[float]
) -> list[Choice]:
    """Choose one token per row of ``logits [B, V]``, which may have any float type. ``draws [B]``:
    numbers in [0, 1), see :func:`draw`; greedy rows do not use theirs.
    """
    if not params:
        return []
    scores = logits.float()
    tokens = scores.argmax(-1)
    random = [i for i, p in enumerate(params) if p.temperature > 0]
    if random:
        chosen = _random(scores[random], [params[i] for i in random], [draws[i] for i in random])
        tokens[random] = chosen
    wanted = [i for i, p in enumerate(params) if p.logprobs is not None]
    found: dict[int, dict[int, float]] = {}
    if wanted:
        logs = scores[wanted].log_softmax(-1)
        most = min(max(params[i].logprobs or 0 for i in wanted), logs.shape[1])
        best = logs.topk(most, dim=-1)
        own = logs.gather(1, tokens[wanted, None])[:, 0].tolist()
        ids, values = best.indices.tolist(), best.values.tolist()
        for row, i in enumerate(wanted):
            count = params[i].logprobs or 0
            top = zip(ids[row][:count], values[row][:count], strict=True)
            found[i] = {**dict(top), int(tokens[i]): own[row]}
    return [Choice(token, found.get(i)) for i, token in enumerate(tokens.tolist())]


def _random(scores: Tensor, params: Sequence[SamplingParams], draws: Sequence[float]) -> Tensor:
    """The token at the drawn place of the distribution, the most probable tokens first: [B]."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=scores.device)[:, None]

    temperature = column([p.temperature for p in params])
    size = scores.shape[1]
    top_k = column([p.top_k if p.top_k > 0 else size for p in params])
    top_p = column([p.top_p for p in params])
    ordered, ids = (scores.double() / temperature).sort(dim=-1, descending=True, stable=True)
    place = torch.arange(size, device=scores.device)[None]
    probability = ordered.masked_fill(place >= top_k, -torch.inf).softmax(-1)
    before = probability.cumsum(-1) - probability
    probability = probability.masked_fill((before >= top_p) & (place > 0), 0.0)
    reached = probability.cumsum(-1)
    target = column(draws) * reached[:, -1:]
    index = torch.searchsorted(reached, target, right=True).clamp_max(size - 1)
    last = (probability > 0).sum(-1, keepdim=True) - 1  # rounding may pass the last one
    return ids.gather(1, torch.minimum(index, last))[:, 0]

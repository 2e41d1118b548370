"""Requests, how they are sampled, and their results: the words of vLLM's offline interface."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_locality.errors import ConfigError

RequestId = int | str


class RequestError(ConfigError):
    """One request is malformed or too long; it is refused alone. ``request_id``: where known."""

    request_id: RequestId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of a request are chosen, and when it ends.

    Args:
        n: continuations of the prompt.
        temperature: 0 is greedy.
        top_p, top_k: the most probable tokens only; 1 and 0 (or -1) take all of them.
        seed: of this request: the same tokens on any rank, in any batch. Without one it is made of
            the engine's seed and the id of the request.
        max_tokens: new tokens of each continuation; None: up to the engine's ``max_model_len``.
        stop: texts that end a continuation; they are left out of its text. Needs a tokenizer.
        stop_token_ids: further tokens that end a continuation, beside the model's own.
        logprobs: log-probabilities of that many best tokens, and of the chosen one.
        ignore_eos: go on after the model's end-of-sequence token.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int | None = 16
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        one = isinstance(self.stop, str)
        object.__setattr__(self, "stop", (self.stop,) if one else tuple(self.stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        try:
            wrong = {
                "n": not self.n >= 1,
                "temperature": not 0 <= self.temperature < float("inf"),
                "top_p": not 0 < self.top_p <= 1,
                "top_k": not self.top_k >= -1,
                "max_tokens": self.max_tokens is not None and not self.max_tokens >= 1,
                "logprobs": self.logprobs is not None and not self.logprobs >= 0,
                "seed": self.seed is not None and not isinstance(self.seed, int),
                "stop": not all(isinstance(s, str) and s for s in self.stop),
                "stop_token_ids": not all(isinstance(t, int) for t in self.stop_token_ids),
            }
            names = ("n", "top_k", "max_tokens", "logprobs")
            wrong |= {name: True for name in names if isinstance(getattr(self, name), (float, str))}
        except TypeError as error:
            raise RequestError(f"found sampling parameters {self} ({error})") from error
        for name, bad in wrong.items():
            if bad:
                raise RequestError(
                    f"found {name}={getattr(self, name)!r}, expected {_EXPECTED[name]}: correct it"
                )


_EXPECTED = {
    "n": "a whole number of at least 1",
    "temperature": "a number of at least 0 (0 is greedy)",
    "top_p": "a number above 0 and at most 1",
    "top_k": "a whole number, 0 or -1 for all tokens",
    "max_tokens": "a whole number of at least 1, or none",
    "logprobs": "a whole number of at least 0, or none",
    "seed": "a whole number, or none",
    "stop": "texts that are not empty",
    "stop_token_ids": "token ids",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt, as tokens or as a text (then the engine needs a tokenizer).

    ``domain``: its name among those of the plan, for homes by domain and for recordings.
    """

    request_id: RequestId
    prompt_token_ids: Sequence[int] | None = None
    prompt: str | None = None
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    domain: str | None = None


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One continuation.

    ``finish_reason``: "stop", "length" or "abort"; ``stop_reason``: the token or text that ended
    it, None for the model's own. ``logprobs``: per token, {token id: log-probability}.
    """

    index: int
    token_ids: list[int] = field(default_factory=list)
    text: str | None = None
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, float]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """What became of a request.

    ``error``: why it was refused. ``arrival`` and ``home``: the ranks where it arrived and where it
    was decoded. ``seconds``: since its arrival, to the "first_token" and until "finished".
    """

    request_id: RequestId
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True
    error: str | None = None
    arrival: int = 0
    home: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return it as one line."""
        return json.dumps(dataclasses.asdict(self))


def as_request(value: Any, number: int, default: SamplingParams) -> Request:
    """Make a request of a dict (a line of JSONL), of token ids or of a text.

    A dict has ``prompt`` (a text, or token ids) or ``prompt_token_ids``, perhaps ``request_id`` and
    ``domain``, and sampling parameters under ``sampling_params`` or beside them.

    Raises:
        RequestError: it has an unknown key or a value that cannot be.
    """
    if isinstance(value, Request):
        return value
    if isinstance(value, str):
        return Request(request_id=number, prompt=value, sampling_params=default)
    if not isinstance(value, Mapping):
        return Request(request_id=number, prompt_token_ids=value, sampling_params=default)
    given = dict(value)
    own = {key: given.pop(key, None) for key in ("prompt", "prompt_token_ids", "domain")}
    if isinstance(own["prompt"], (list, tuple)) and own["prompt_token_ids"] is None:
        own["prompt_token_ids"], own["prompt"] = own["prompt"], None
    request_id = given.pop("request_id", number)
    nested = given.pop("sampling_params", None) or {}
    if not isinstance(nested, Mapping):
        raise RequestError(f"found sampling_params {nested!r}, expected an object of parameters")
    given |= nested
    known = {item.name for item in dataclasses.fields(SamplingParams)}
    if unknown := sorted(given.keys() - known):
        raise RequestError(f"found {unknown} in a request, expected of {sorted(known)}")
    params = dataclasses.replace(default, **given)
    return Request(request_id=request_id, sampling_params=params, **own)


def check_prompt(ids: Any, vocab_size: int) -> list[int]:
    """Return the tokens of a prompt as a list.

    Raises:
        RequestError: there are none, or they are no tokens of the model.
    """
    try:
        tokens = [int(token) for token in ids]
        same = all(token == found for token, found in zip(tokens, ids, strict=True))
    except (TypeError, ValueError):
        tokens, same = [], False
    if not same or not tokens or min(tokens) < 0 or max(tokens) >= vocab_size:
        shown = repr(ids)
        raise RequestError(
            f"found prompt tokens {shown[:60]}{'...' if len(shown) > 60 else ''}, expected at least"
            f" one, each from 0 to {vocab_size - 1}: tokenize with the tokenizer of this model"
        )
    return tokens


def read_requests(path: str | Path) -> Iterator[Any]:
    """Yield the requests of a JSONL file: objects, texts or lists of token ids, one a line.

    Those without a ``request_id`` get the number of their line, from 0. A line that is no JSON
    comes as a :class:`RequestError`.
    """
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                wrong = RequestError(f"found no JSON in line {number + 1} of {path} ({error})")
                wrong.request_id = number
                yield wrong
                continue
            if not isinstance(value, dict):
                name = "prompt" if isinstance(value, str) else "prompt_token_ids"
                value = {name: value}
            yield {"request_id": number, **value}

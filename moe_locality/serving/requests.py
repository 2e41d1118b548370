"""Requests, how they are sampled, and their results: the words of vLLM's offline interface."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
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
        for name in ("stop", "stop_token_ids"):
            given = getattr(self, name)
            some = given if isinstance(given, (list, tuple)) else (given,)
            object.__setattr__(self, name, () if given is None else tuple(some))
        for name, (fits, expected) in _RULES.items():
            found = getattr(self, name)
            if not fits(found):
                raise RequestError(f"found {name}={shown(found)}, expected {expected}: correct it")


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


_AT_LEAST_1 = "a whole number of at least 1"
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "n": (lambda v: _whole(v) and v >= 1, _AT_LEAST_1),
    "temperature": (lambda v: _number(v) and 0 <= v <= 1e300, "a number from 0 (greedy) to 1e300"),
    "top_p": (lambda v: _number(v) and 0 < v <= 1, "a number above 0 and at most 1"),
    "top_k": (lambda v: _whole(v) and -1 <= v < 1 << 63, "a whole number, 0 or -1 for all tokens"),
    "max_tokens": (lambda v: v is None or (_whole(v) and v >= 1), f"{_AT_LEAST_1}, or none"),
    "logprobs": (lambda v: v is None or (_whole(v) and v >= 0), "a whole number from 0, or none"),
    "seed": (lambda v: v is None or _whole(v), "a whole number, or none"),
    "stop": (lambda v: all(isinstance(s, str) and s for s in v), "texts that are not empty"),
    "stop_token_ids": (lambda v: all(map(_whole, v)), "token ids"),
}


def shown(value: Any) -> str:
    """Return what a message says of a value: 80 characters of it at most."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, or too deeply nested
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}..."


def is_request_id(value: Any) -> bool:
    """Whether it names a request: a text, or a number that traces can hold."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, str) or (whole and -(1 << 63) <= value < 1 << 63)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt, as tokens or as a text (then the engine needs a tokenizer). ``domain``: its name
    among those of the plan, for homes by domain and for recordings.
    """

    request_id: RequestId
    prompt_token_ids: Sequence[int] | None = None
    prompt: str | None = None
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    domain: str | None = None


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One continuation. ``finish_reason``: "stop", "length" or "abort"; ``stop_reason``: the token
    or text that ended it, None for the model's own. ``logprobs``: {id: log-probability} per token.
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
    """What became of a request. ``error``: why it was refused. ``arrival``, ``home``: the ranks
    where it arrived and was decoded. ``seconds``: since it came, to "first_token" and "finished".
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
    """Make a request of a dict (a line of JSONL), of token ids or of a text. A dict has ``prompt``
    (a text, or token ids) or ``prompt_token_ids``, perhaps ``request_id`` and ``domain``, and
    parameters of sampling in ``sampling_params`` or beside it. RequestError: a wrong key or value.
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
        found = shown(nested)
        raise RequestError(f"found sampling_params {found}, expected an object of parameters")
    given |= nested
    known = {item.name for item in dataclasses.fields(SamplingParams)}
    if unknown := sorted(given.keys() - known):
        raise RequestError(f"found {unknown} in a request, expected of {sorted(known)}")
    params = dataclasses.replace(default, **given)
    return Request(request_id=request_id, sampling_params=params, **own)


def check_prompt(ids: Any, vocab_size: int) -> list[int]:
    """Return the tokens of a prompt; RequestError: there are none, or not of this model."""
    try:
        tokens = [int(token) for token in ids]
        same = all(token == found for token, found in zip(tokens, ids, strict=True))
    except (TypeError, ValueError, OverflowError):
        tokens, same = [], False
    if not same or not tokens or min(tokens) < 0 or max(tokens) >= vocab_size:
        raise RequestError(
            f"found prompt tokens {shown(ids)}, expected at least one, each from 0 to "
            f"{vocab_size - 1}: tokenize with the tokenizer of this model"
        )
    return tokens


def read_requests(path: str | Path) -> Iterator[Any]:
    """Yield the requests of a JSONL file: objects, texts or lists of token ids, one a line. Those
    without a ``request_id`` get "line N" (from 1). A line that is no JSON in UTF-8 comes as a
    :class:`RequestError`.
    """
    with Path(path).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                wrong = RequestError(f"found no JSON in line {number} of {path} ({error})")
                wrong.request_id = f"line {number}"
                yield wrong
                continue
            if not isinstance(value, dict):
                value = {"prompt" if isinstance(value, str) else "prompt_token_ids": value}
            yield {"request_id": f"line {number}", **value}

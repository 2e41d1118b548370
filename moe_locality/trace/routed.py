"""Importers of the picks that serving engines return with a request (routing replay, "R3"), and of
slime's rollouts; where they stand in each is said in docs/formats.md.

vLLM (vllm-project/vllm PR 28284) returns an array [tokens, layers, K] per completion. A base64 .npy
file in ``choices[i].routed_experts`` (PR 38939, 0.22 and later) has prompt and answer, without its
last token, which is not fed back, less the prompt rows that the request asked to omit (PR 51906);
nested lists (0.21) have the answer alone, with the prompt in ``prompt_routed_experts`` of the
response.

SGLang (sgl-project/sglang PR 12162, 17434; srt/entrypoints of 0.5.23) returns base64 of
little-endian int32 [tokens, layers, K], flat. The response says neither K nor, mostly, at which
token it starts: pass ``top_k``, and ``num_layers`` where requests asked for a later start.

slime: THUDM/slime, slime/observability/rollout_data_utils.py.

Every completion is a request, in the order of the files, under its place or the number that its
file or a table gives it. One that is damaged is left out with a warning. Layers that are zero
throughout (dense ones, for which engines keep a row) are left out. The ids are logical.
"""

from __future__ import annotations

import base64
import contextlib
import io
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_locality.errors import TraceError
from moe_locality.trace import reading
from moe_locality.trace.reading import ImportOptions
from moe_locality.trace.schema import DECODE, MAX_EXPERTS, PREFILL, UNKNOWN, RoutingTrace, check_ids

_log = logging.getLogger(__name__)
_DTYPES = ("uint8", "int8", "uint16", "int16", "int32", "int64")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """The picks [tokens, layers, K] of one request; ``prompt``: how many tokens of it are prompt
    (None: unknown), ``start``: position of the first, ``names``: what a table may call it,
    ``derived``: the number of layers follows from that of the picks."""

    ids: np.ndarray
    where: str = ""
    prompt: int | None = None
    start: int = 0
    names: tuple[str, ...] = ()
    domain: str | None = None
    derived: bool = False

    def positions(self) -> np.ndarray:
        return self.start + np.arange(len(self.ids))

    def stages(self) -> np.ndarray:
        if self.prompt is None:
            return np.full(len(self.ids), UNKNOWN)
        return np.where(np.arange(len(self.ids)) < self.prompt, PREFILL, DECODE)


Json = dict[str, Any]
Item = Sequence | TraceError
"""A request, or what is wrong with one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file, its reader, and what its place in a directory says: a name and a domain."""

    path: Path
    read: Callable[[Path, ImportOptions, int], Iterator[Item]]
    name: str
    domain: str | None = None


# -- what a file holds --


def array_file(path: Path, options: ImportOptions, number: int = 0) -> Iterator[Item]:
    """Yield the arrays of a .npy or .npz file, never unpickled; TraceError where it is damaged."""
    try:
        content = np.load(path, allow_pickle=False)
        names = content.files if isinstance(content, np.lib.npyio.NpzFile) else [""]
        for name in names:
            where = f"{path}, array {name}" if name else str(path)
            array = content[name] if name else content
            yield _item(where, _named_array, array, (name,) if name else ())
    except Exception as error:  # a hostile header raises whatever its parser meets
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TraceError(
            f"found that {path} cannot be read as arrays: {detail}; expected .npy or .npz with "
            "[tokens, layers, picks] per request: save it again"
        ) from error


def _named_array(array: Any, names: tuple[str, ...]) -> Sequence:
    return Sequence(ids=reading.id_block(array), names=names)


def _item(where: str, decode: Callable[..., Sequence], *args: Any) -> Item:
    """What is decoded, or what is wrong with it, at its place."""
    try:
        with reading.named(where):
            return replace(decode(*args), where=where)
    except TraceError as error:
        return error


def responses(path: Path, options: ImportOptions, number: int) -> Iterator[tuple[str, Any]]:
    """Yield (place, response or what is wrong) of a JSON file: an object per line, or one value."""
    line, text = next(reading.text_lines(path, ImportOptions()), (1, ""))
    has_lines = path.suffix.lower() == ".jsonl"
    with contextlib.suppress(TraceError):  # or the first is an object by itself
        reading.json_line(path, line, text)
        has_lines = True
    if has_lines:
        for line, text in reading.text_lines(path, options, (number, 2)):
            if text.strip():
                try:
                    response: Any = reading.json_line(path, line, text)
                except TraceError as error:
                    response = error
                yield f"{path}, line {line}", response
        return
    content = reading.whole_json(path)
    if isinstance(content, list) and all(isinstance(entry, dict) for entry in content):
        for place, entry in enumerate(content):
            yield f"{path}, entry {place}", entry
    else:
        yield str(path), content


def vllm_responses(path: Path, options: ImportOptions, number: int) -> Iterator[Item]:
    """Yield the completions of responses of vLLM, see the head of this file."""
    for where, response in responses(path, options, number):
        if isinstance(response, list):
            yield from _nested(where, response)
        else:
            yield from _completions(_vllm_choice, where, response, options)


def _completions(
    decode: Callable[..., Sequence], where: str, response: Any, options: ImportOptions
) -> Iterator[Item]:
    """Yield what ``decode`` makes of each choice of a response, its only one if it has no list."""
    if isinstance(response, TraceError):
        yield response
        return
    is_object = isinstance(response, dict)
    choices = response.get("choices", [response]) if is_object else None
    if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
        found = "no list of objects in choices" if is_object else f"a {type(response).__name__}"
        yield TraceError(f"{where}: found {found}, expected a response")
        return
    for number, choice in enumerate(choices):
        place = f"{where}, choice {number}" if "choices" in response else where
        yield _item(place, decode, response, choice, options)


def _vllm_choice(response: Json, choice: Json, _: ImportOptions) -> Sequence:
    """``usage`` tells prompt and answer in one array apart, and what was omitted in front."""
    found, prompt = choice.get("routed_experts"), response.get("prompt_routed_experts")
    names = (response["id"],) if isinstance(response.get("id"), str) else ()
    if found is None:
        raise TraceError(
            "found no routed_experts, expected them: start vLLM with --enable-return-routed-experts"
        )
    ids = _decoded(found)
    if prompt is not None:
        head = _decoded(prompt)
        if head.shape[1:] != ids.shape[1:] and len(ids):
            raise TraceError(
                f"found {head.shape[1:]} layers and picks in the prompt and {ids.shape[1:]} in the "
                "answer, expected the same"
            )
        ids = np.concatenate([head, ids]) if len(ids) else head
        return Sequence(ids=ids, prompt=len(head), names=names)
    prompt, answer = _usage(response.get("usage"))[1:]
    counted = reading.is_count(prompt) and reading.is_count(answer)
    if not counted or len(response.get("choices", [0])) > 1:
        return Sequence(ids=ids, names=names)
    start = max(prompt + answer - 1 - len(ids), 0)
    return Sequence(ids=ids, prompt=max(prompt - start, 0), start=start, names=names)


def _usage(usage: Any) -> tuple[Json, Any, Any]:
    """(object, or an empty one where it is none; tokens of prompt and of answer)"""
    usage = usage if isinstance(usage, dict) else {}
    return usage, usage.get("prompt_tokens"), usage.get("completion_tokens")


def _nested(where: str, content: list[Any]) -> Iterator[Item]:
    """Arrays as nested lists: [tokens][layers][K], or a list of such."""
    depth, probe = 0, content
    while isinstance(probe, list) and probe and depth < 5:
        depth, probe = depth + 1, probe[0]
    for place, entry in enumerate(content if depth == 4 else [content]):
        yield _item(f"{where}, request {place}", _named_array, entry, (str(place),))


def _decoded(value: Any) -> np.ndarray:
    """Picks [tokens, layers, K] from any of the encodings."""
    if isinstance(value, dict):
        shape, dtype = value.get("shape"), value.get("dtype")
        if not isinstance(shape, list) or not all(reading.is_count(n) for n in shape):
            raise TraceError(f"found shape {shape!r}, expected three numbers")
        if dtype not in _DTYPES:
            raise TraceError(f"found dtype {dtype!r}, expected one of {_DTYPES}")
        raw = np.frombuffer(_base64(value.get("data"), np.dtype(dtype).itemsize), dtype)
        if len(shape) != 3 or int(np.prod(shape, dtype=object)) != raw.size:
            raise TraceError(f"found {raw.size} numbers for the shape {shape}")
        return reading.id_block(raw.reshape(shape))
    if isinstance(value, str):
        raw = _base64(value, 1)
        try:
            value = np.load(io.BytesIO(raw), allow_pickle=False)
        except Exception as error:  # hostile bytes raise whatever the parser meets
            raise TraceError(
                f"found no .npy file in the base64 text ({error}), expected vLLM's "
                "routed_experts; SGLang's are imported with format 'sglang'"
            ) from error
    return reading.id_block(value)


def _base64(text: Any, itemsize: int) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except (ValueError, TypeError) as error:
        raise TraceError(f"found no base64 text ({error}), expected picks") from error
    if len(raw) % itemsize:
        raise TraceError(f"found {len(raw)} bytes, expected a multiple of {itemsize}")
    return raw


def sglang_responses(path: Path, options: ImportOptions, number: int) -> Iterator[Item]:
    """Yield the completions of responses of SGLang, see the head of this file."""
    if options.top_k is None:
        raise TraceError(
            f"found SGLang responses in {path}, which do not say how many experts a token picks: "
            "pass top_k="
        )
    for where, response in responses(path, options, number):
        yield from _completions(_sglang_choice, where, response, options)


def _sglang_choice(response: Json, choice: Json, options: ImportOptions) -> Sequence:
    """What stands at a response, and not at one of its several choices, is of the first."""
    choices = response.get("choices", [response])
    spots = [choice.get("sgl_ext"), choice.get("sglext"), choice.get("meta_info"), choice]
    if choices[0] is choice:
        spots += [response.get("sglext"), response.get("sgl_ext")]
    for spot in spots:
        if isinstance(spot, dict) and spot.get("routed_experts") is not None:
            usage = choice.get("meta_info") or {}
            if len(choices) == 1 and not usage:
                usage = response.get("usage")
            return _sglang_picks({"id": response.get("id"), **spot}, usage, options)
    raise TraceError(
        "found no meta_info, sgl_ext or sglext with routed_experts, expected a response "
        "to a request with return_routed_experts (SGLang returns those of the first choice only)"
    )


def _sglang_picks(spot: Json, usage: Any, options: ImportOptions) -> Sequence:
    """``spot`` has the picks, ``usage`` the numbers of tokens; None where choices share one."""
    flat = np.frombuffer(_base64(spot["routed_experts"], 4), "<i4")
    usage, prompt, answer = _usage(usage)
    said = spot.get("routed_experts_start_len", usage.get("routed_experts_start_len"))
    if said is not None and not reading.is_count(said):
        raise TraceError(f"found routed_experts_start_len {said!r}, expected a position")
    top_k, layers, tokens, start = options.top_k or 1, options.num_layers, None, said or 0
    if usage or layers is None:
        counted = reading.is_count(prompt) and reading.is_count(answer)
        if not counted or not 1 < prompt + answer < 2**31:
            raise TraceError(
                f"found prompt_tokens {prompt!r} and completion_tokens {answer!r}, "
                "expected whole numbers that are 2 together at least (several choices share one "
                "usage: give num_layers=)"
            )
        tokens = prompt + answer - 1
        if layers is None:
            rows, later = tokens - start, f" from {start} on" if start else ""
            if rows < 1 or flat.size == 0 or flat.size % (rows * top_k):
                raise TraceError(
                    f"found {flat.size} picks for {tokens} tokens{later} and top_k = "
                    f"{top_k}, expected tokens x layers x picks: give the right one, or "
                    "num_layers= where the request had a routed_experts_start_len"
                )
            layers = flat.size // (rows * top_k)
    rows, rest = divmod(flat.size, layers * top_k)
    if tokens is not None and said is None:
        start = tokens - rows
    if rest or start < 0 or (tokens is not None and start + rows != tokens):
        raise TraceError(
            f"found {flat.size} picks, which are {rows} tokens of {layers} layers and "
            f"top_k = {top_k} and {rest} more, expected {tokens} tokens less those before "
            f"routed_experts_start_len ({said}): give the right top_k= and num_layers="
        )
    return Sequence(
        ids=reading.id_block(flat.reshape(rows, layers, top_k)),
        prompt=max(prompt - start, 0) if tokens is not None and prompt is not None else None,
        start=start,
        names=(spot["id"],) if isinstance(spot.get("id"), str) else (),
        derived=options.num_layers is None and said is None,
    )


def slime_samples(path: Path, options: ImportOptions, number: int) -> Iterator[Item]:
    """Yield the samples of a rollout that slime saved, see the head of this file."""
    content = reading.read_torch_file(path)
    samples = content.get("samples") if isinstance(content, dict) else None
    if not isinstance(samples, list):
        raise TraceError(
            f"{path}: found no list of samples, expected what slime's --save-debug-rollout-data "
            "writes"
        )
    for place, sample in enumerate(samples):
        yield _item(f"{path}, sample {place}", _slime_sample, sample)


def _slime_sample(sample: Any) -> Sequence:
    if not isinstance(sample, dict) or sample.get("rollout_routed_experts") is None:
        raise TraceError(
            "found no rollout_routed_experts, expected them: run slime with "
            "--use-rollout-routing-replay"
        )
    ids = reading.id_block(sample["rollout_routed_experts"])
    tokens, answer = sample.get("tokens"), sample.get("response_length")
    if (
        not isinstance(tokens, list)
        or not reading.is_count(answer)
        or not len(ids) < len(tokens) + 1
    ):
        raise TraceError(
            f"found picks of {len(ids)} tokens and response_length {answer!r}, expected "
            "at most as many as there are tokens"
        )
    names = (str(sample["index"]),) if reading.is_count(sample.get("index")) else ()
    return Sequence(ids=ids, prompt=max(len(tokens) - answer, 0), names=names)


# -- what becomes of it --


@dataclass(frozen=True, slots=True)
class _Facts:
    """What the first reading learns of a request."""

    where: str
    shape: tuple[int, ...]
    empty: np.ndarray
    highest: int
    names: tuple[str, ...]
    domain: str | None
    derived: bool


def parts(sources: list[Source], options: ImportOptions) -> Iterator[RoutingTrace]:
    """Yield the trace of the requests of all sources, in parts; TraceError where none can be read,
    or they differ in layers or picks so that it is open which of them are right."""
    facts = _survey(sources, options)
    where = sources[0].path if len(sources) == 1 else sources[0].path.parent
    layer_ids = _routed_layers(where, facts, options)
    highest = max(one.highest for one in facts.values())
    top_k = next(iter(facts.values())).shape[1]
    labels = _labels(facts, sources, options)
    table = sorted({domain for _, domain in labels.values() if domain is not None})
    place = {None: -1, **{name: i for i, name in enumerate(table)}}
    num_experts = options.num_experts or reading.guess_num_experts(where, highest, top_k)
    taken = (
        (item, *labels[number])
        for number, item in enumerate(_items(sources, options, 1))
        if number in facts and not isinstance(item, TraceError)
    )
    for block in reading.in_parts(taken, lambda entry: entry[0].ids.size):
        lengths = [len(one.ids) for one, _, _ in block]
        requests = np.array([request for _, request, _ in block], np.int64)
        domains = np.array([place[domain] for _, _, domain in block], np.int32)
        with reading.named(block[0][0].where):
            yield RoutingTrace(
                model=options.model or "",
                num_experts=num_experts,
                layer_ids=layer_ids,
                domain=tuple(table),
                expert_ids=np.concatenate([one.ids[:, layer_ids] for one, _, _ in block]),
                request_id=np.repeat(requests, lengths),
                position=np.concatenate([one.positions() for one, _, _ in block]),
                stage=np.concatenate([one.stages() for one, _, _ in block]),
                domain_id=np.repeat(domains, lengths),
            )


def _items(sources: list[Source], options: ImportOptions, number: int) -> Iterator[Item]:
    """Yield the requests of all sources under all their names."""
    alone = replace(options, report=None) if len(sources) > 1 else options
    for place, source in enumerate(sources):
        if options.report is not None and len(sources) > 1:
            options.report(number * len(sources) + place, 2 * len(sources))
        try:
            for item in source.read(source.path, alone, number):
                if isinstance(item, TraceError):
                    yield item
                    continue
                own = [name for one in item.names for name in (f"{source.name}/{one}", one)]
                yield replace(item, names=(*own, source.name), domain=source.domain)
        except TraceError as error:
            yield error


def _survey(sources: list[Source], options: ImportOptions) -> dict[int, _Facts]:
    """What is known of each request that is taken, by its place; the others are warned of."""
    facts: dict[int, _Facts] = {}
    broken: list[TraceError] = []
    doubt = _Doubt(options)
    for number, item in enumerate(_items(sources, options, 0)):
        if isinstance(item, TraceError):
            broken.append(item)
        elif len(item.ids):
            try:
                facts[number] = _facts(item, options)
                doubt.look(item, facts[number].empty)
            except TraceError as error:
                broken.append(error)
    _same_shape(facts, broken)
    if facts and not options.layers:
        _same_layers(facts, broken)
    if not facts:
        if broken:
            raise broken[0]
        raise TraceError(
            f"found no routed token in {sources[0].path}, expected picks of at least one"
        )
    doubt.decide()
    for error in broken:
        options.leave_out(error)
    if any(one.derived for one in facts.values()):
        first = next(iter(facts.values()))
        _log.warning(
            "%s does not say at which token it begins: taken as the first, which makes %d layers; "
            "pass num_layers (--num-layers) to be sure",
            first.where,
            first.shape[0],
        )
    return facts


def _facts(item: Sequence, options: ImportOptions) -> _Facts:
    empty = reading.empty_layers(item.ids)
    if empty.all() and item.ids.shape[2] > 1:
        raise TraceError(f"{item.where}: {_ALL_ZERO}")
    hint = f" (read with top_k = {options.top_k}: is that right?)" if item.derived else ""
    with reading.named(item.where, hint):
        check_ids(item.ids[:, ~empty], options.num_experts or MAX_EXPERTS)
    shape, highest = item.ids.shape[1:], int(item.ids.max())
    return _Facts(item.where, shape, empty, highest, item.names, item.domain, item.derived)


_ALL_ZERO = (
    "found no routed token: every pick is 0 (or none), as in a buffer that the engine never "
    "filled; expected expert numbers: record it again"
)


def _same_shape(facts: dict[int, _Facts], broken: list[TraceError]) -> None:
    """Take out the requests with other layers or picks than most have."""
    shapes = Counter(one.shape for one in facts.values())
    if len(shapes) < 2:
        return
    first = next(iter(facts.values()))
    (common, count), *_ = shapes.most_common()
    other = next(one for one in facts.values() if one.shape != first.shape)
    if any(one.derived for one in facts.values()):
        raise TraceError(
            f"{other.where}: found {other.shape[0]} layers, and {first.shape[0]} in {first.where}, "
            "where the responses do not say at which token they begin: give num_layers="
        )
    if 2 * count <= len(facts):
        raise TraceError(
            f"{other.where}: found {other.shape} layers and picks, expected {first.shape} as in "
            "the first request: import one model at a time"
        )
    for number, one in list(facts.items()):
        if one.shape != common:
            del facts[number]
            text = f"found {one.shape} layers and picks, expected {common} as in most requests"
            broken.append(TraceError(f"{one.where}: {text}: import one model at a time"))


def _same_layers(facts: dict[int, _Facts], broken: list[TraceError]) -> None:
    """Take out the requests in which other layers are empty than in most."""
    if next(iter(facts.values())).shape[1] == 1:  # one pick: zeros may be routing
        return
    dense = 2 * np.sum([one.empty for one in facts.values()], axis=0) > len(facts)
    for number, one in list(facts.items()):
        if len(differing := np.flatnonzero(one.empty != dense)):
            layer = differing[0]
            del facts[number]
            here, there = ("no", "some") if one.empty[layer] else ("some", "no")
            text = f"found {here} routing in layer {layer}, expected {there} as in most requests"
            broken.append(TraceError(f"{one.where}: {text}: record it again"))


class _Doubt:
    """Whether two "layers" are one: with too small a top_k the picks of a token are cut into layers
    that never share an expert, as layers of a model do by chance."""

    FACTORS, ENOUGH = (2, 3, 5, 7), 30

    def __init__(self, options: ImportOptions) -> None:
        self.top_k = options.top_k or 1
        self.shared = dict.fromkeys(self.FACTORS, 0)
        self.expected = dict.fromkeys(self.FACTORS, 0.0)

    def look(self, item: Sequence, empty: np.ndarray) -> None:
        tokens, layers, top_k = item.ids.shape
        for factor in self.FACTORS if item.derived else ():
            if layers % factor:
                continue
            full = ~empty.reshape(-1, factor).any(axis=1)
            groups = np.sort(item.ids.reshape(tokens, -1, factor * top_k)[:, full], axis=2)
            self.shared[factor] += int((groups[..., 1:] == groups[..., :-1]).sum())
            experts = int(item.ids.max()) + 1
            pairs = factor * (factor - 1) / 2 * top_k * top_k
            self.expected[factor] += groups.shape[0] * groups.shape[1] * pairs / experts

    def decide(self) -> None:
        for factor in self.FACTORS:
            if not self.shared[factor] and self.expected[factor] > self.ENOUGH:
                raise TraceError(
                    f"found no expert twice in any {factor} successive layers of a token, expected "
                    f"about {self.expected[factor]:.0f} cases, for they are layers of their own: "
                    f"top_k = {self.top_k} is too small (is it {self.top_k * factor}?); give the "
                    "right one, or num_layers= if it is"
                )


def _routed_layers(where: Path, facts: dict[int, _Facts], options: ImportOptions) -> np.ndarray:
    """Transformer layers that are taken; says which are not, and which may be none."""
    shape = next(iter(facts.values())).shape
    empty = np.all([one.empty for one in facts.values()], axis=0)
    if options.layers is not None:
        absent = [layer for layer in options.layers if not 0 <= layer < shape[0]]
        if absent:
            raise TraceError(
                f"found {shape[0]} layers in {where}, expected one numbered {absent[0]} as asked: "
                "number them from 0, dense ones counted"
            )
        return np.array(sorted(set(options.layers)))
    if empty.all():
        raise TraceError(f"{where}: {_ALL_ZERO}")
    names = ", ".join(map(str, np.flatnonzero(empty)))
    if names and shape[1] == 1:
        _log.warning(
            "%s: in layers %s every token picks expert 0, as engines write for dense layers; with "
            "one pick per token that cannot be told from routing: they are kept; pass layers "
            "(--layers, the MoE layers) to leave them out",
            where,
            names,
        )
        return np.arange(shape[0])
    if names:
        _log.warning("%s: left out layers %s, which hold no picks (dense layers)", where, names)
    return np.flatnonzero(~empty)


def _labels(
    facts: dict[int, _Facts], sources: list[Source], options: ImportOptions
) -> dict[int, tuple[int, str | None]]:
    """Request id and domain of each request: from the table, else the files, else its place."""
    known: Mapping[str, tuple[int | None, str | None]] = options.table or {}
    files = Counter(one.names[-1] for one in facts.values())
    numbered = len(sources) > 1 and all(
        count == 1 and name.rsplit("/", 1)[-1].isdecimal() for name, count in files.items()
    )
    labels: dict[int, tuple[int | None, str | None]] = {}
    unknown = []
    for number, one in facts.items():
        said = [known[name] for name in one.names if name in known]
        if not said and options.table is not None:
            unknown.append(one.names[0])
        request, domain = said[0] if said else (None, None)
        if request is None and numbered:
            request = int(one.names[-1].rsplit("/", 1)[-1])
        labels[number] = request, one.domain if domain is None else domain
    if unknown:
        _log.warning("%d requests are not in the table: %s", len(unknown), ", ".join(unknown[:8]))
    given = [request for request, _ in labels.values() if request is not None]
    repeated = [request for request, count in Counter(given).items() if count > 1]
    if (repeated and not numbered) or max(given, default=0) >= 2**62:
        twice = repeated[0] if repeated else max(given)
        raise TraceError(
            f"found request id {twice} for two requests, or above 2**62, expected a number of its "
            "own for each: correct the table"
        )
    if repeated:  # math/0.npy and law/0.npy
        given = []
        labels |= {number: (None, domain) for number, (_, domain) in labels.items()}
    first = max(given, default=-1) + 1
    return {n: (first + n if r is None else r, domain) for n, (r, domain) in labels.items()}

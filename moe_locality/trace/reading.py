"""What the importers share. Each is a function ``parts(path, options)`` that yields RoutingTraces
of bounded size with the same settings. It reads a text twice: once to check every line and to learn
what all parts must agree on (experts, picks per token), once to convert, so that nothing is written
for a bad file.

``read_torch_file`` reads what ``torch.save`` wrote, without torch and without running anything that
the file names. The zip form of torch >= 1.6 (docs of ``torch.save``) has ``<name>/data.pkl``, a
pickle in which every storage is a persistent id ``("storage", type, key, device, elements)``, and
``<name>/data/<key>`` with its bytes. Only the calls that rebuild plain tensors are known here; any
other name in the pickle is refused before it is looked up.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import logging
import math
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import numpy as np

from moe_locality.errors import TraceError
from moe_locality.trace.merge import STAGE_CODES, STAGE_NAMES, UNKNOWN

_log = logging.getLogger(__name__)
PART_PICKS = 1 << 21
"""Picks (tokens x layers x K) that a part holds at most, about: 4 MB of ids and what they were read
from."""

Report = Callable[[int, int], None]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """What a file does not say, and whom to tell how far the reading is.

    model, num_experts, top_k, num_layers: None: from the file, or guessed with a warning.
    layers: the transformer layers to take; None: all that hold picks.
    table: name of a request or file → its request id and domain (None: not said).
    report: called with (bytes done, bytes in all).
    left_out: filled with a sentence for every request or file that was left out.
    """

    model: str | None = None
    num_experts: int | None = None
    top_k: int | None = None
    num_layers: int | None = None
    layers: tuple[int, ...] | None = None
    table: Mapping[str, tuple[int | None, str | None]] | None = None
    report: Report | None = None
    left_out: list[str] = field(default_factory=list)

    def leave_out(self, sentence: object) -> None:
        """Warn that a request or file is left out, and keep it for the caller."""
        self.left_out.append(str(sentence))
        _log.warning("left out: %s", sentence)


@contextlib.contextmanager
def named(where: object, hint: str = "") -> Iterator[None]:
    """Put the place in front of a TraceError, and a hint behind it."""
    try:
        yield
    except TraceError as error:
        raise TraceError(f"{where}: {error}{hint}") from error


def in_parts(items: Iterable[_T], picks: Callable[[_T], int]) -> Iterator[list[_T]]:
    """Yield successive items together, about as many as have the picks of a part."""
    block: list[_T] = []
    size = 0
    for item in items:
        block.append(item)
        size += picks(item)
        if size > PART_PICKS:
            yield block
            block, size = [], 0
    if block:
        yield block


def text_lines(path: Path, options: ImportOptions, share: tuple[int, int] = (0, 1)):
    """Yield (number, text) of the lines of a UTF-8 file, telling ``options.report``; ``share`` is
    (k, n) in pass k of n over the file. TraceError where it cannot be read."""
    try:
        size = max(path.stat().st_size, 1)
        done, told = share[0] * size, 0
        with open(path, encoding="utf-8-sig") as file:
            for number, text in enumerate(file, 1):
                done += len(text)
                if options.report is not None and done - told > size >> 8:
                    options.report(done, share[1] * size)
                    told = done
                yield number, text
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(
            f"found that {path} cannot be read as text ({error}), expected lines in UTF-8: check "
            "the file"
        ) from error


def json_lines(
    path: Path, options: ImportOptions, share: tuple[int, int] = (0, 1)
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number, object) of a file with one JSON object per line; empty lines are skipped."""
    for line, text in text_lines(path, options, share):
        if text.strip():
            yield line, json_line(path, line, text)


def json_line(path: Path, line: int, text: str) -> dict[str, Any]:
    """Return the JSON object of a line; a TraceError names the line where it is none."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TraceError(
            f"{path}, line {line}: found no JSON ({error}), expected one object per line: correct "
            "or remove the line"
        ) from error
    if not isinstance(record, dict):
        raise TraceError(
            f"{path}, line {line}: found a {type(record).__name__}, expected an object"
        )
    return record


def whole_json(path: Path) -> Any:
    """Return the content of a JSON file; TraceError where it cannot be read as JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise TraceError(
            f"found that {path} cannot be read as JSON: {error}; expected one object: correct the "
            "file"
        ) from error


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a JSON value is a whole number that fits 64 bits and is not negative."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def stage_code(where: str, stage: Any) -> int:
    """Return the code of a stage given by name or code (None: unknown); else TraceError."""
    if stage is None:
        return UNKNOWN
    code = STAGE_CODES.get(stage) if isinstance(stage, str) else stage
    if isinstance(code, bool) or not isinstance(code, int) or code not in STAGE_NAMES:
        raise TraceError(
            f"{where}: found stage {stage!r}, expected one of {sorted(STAGE_CODES)} or its code"
        )
    return code


def guess_num_experts(path: Path, highest: int, top_k: int) -> int:
    """Highest id + 1, with a warning: experts that were never picked leave no mark in the file."""
    guess = max(highest + 1, top_k, 1)
    _log.warning(
        "%s does not say how many experts a layer has; taking %d, the highest id seen plus one: "
        "pass num_experts (--num-experts) if the model has more",
        path,
        guess,
    )
    return guess


def one_size(where: str, sizes: Mapping[int, int]) -> int:
    """Return the number of experts of layers, given {layer: experts}; TraceError if they differ."""
    if len(set(sizes.values())) > 1:
        layers_of: dict[int, list[int]] = {}
        for layer, experts in sizes.items():
            layers_of.setdefault(experts, []).append(layer)
        found = ", ".join(f"{experts} in layers {ids}" for experts, ids in layers_of.items())
        some = ",".join(map(str, layers_of[max(layers_of)]))
        raise TraceError(
            f"{where}: found layers with different numbers of experts ({found}), expected one "
            "number, as a trace has one: import the layers of one number at a time, such as "
            f"layers {some} (--layers {some}), each into a directory of its own"
        )
    return max(sizes.values(), default=0)


def id_block(value: Any) -> np.ndarray:
    """Return picks [tokens, layers, K] as int64; TraceError: another shape, no numbers, or
    above 2**31."""
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError, MemoryError) as error:
        raise TraceError(f"found no even table of numbers ({error})") from error
    if array.ndim != 3 or array.dtype.kind not in "iu" or 0 in array.shape[1:]:
        raise TraceError(
            f"found {array.dtype} of shape {array.shape}, expected whole numbers of shape "
            "[tokens, layers, picks]"
        )
    if array.size and (array.max() >= 2**31 or array.min() < -1):
        raise TraceError("found ids outside -1..2**31, expected expert numbers")
    return array.astype(np.int64)


def empty_layers(ids: np.ndarray) -> np.ndarray:
    """bool [L]: layers where every pick of every token [T, L, K] is 0, or every one "no pick", as
    engines leave dense ones. With two or more picks that is no routing: those of a token differ."""
    return (ids == 0).all(axis=(0, 2)) | (ids == -1).all(axis=(0, 2))


_STORAGES = {
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
}
MAX_PICKLE_BYTES = 1 << 30


def read_torch_file(path: Path) -> Any:
    """Return the content of a ``.pt`` file: dicts, lists, numbers, tensors (of a GPU too) as numpy
    arrays; TraceError where it is damaged, in the old form, or names anything but plain tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("data.pkl")]
            if len(names) != 1:
                raise ValueError(f"found {len(names)} entries named data.pkl, expected one")
            root = names[0][: -len("data.pkl")]
            order = f"{root}byteorder"
            if order in archive.namelist() and archive.read(order) != b"little":
                raise ValueError("found tensors in big-endian order, expected little-endian")
            if archive.getinfo(names[0]).file_size > MAX_PICKLE_BYTES:
                raise ValueError(f"found a pickle above {MAX_PICKLE_BYTES} bytes")
            return _Reader(archive.read(names[0]), archive, root).load()
    except Exception as error:  # hostile bytes: whatever the parser meets becomes one message
        if isinstance(error, TraceError):
            raise
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TraceError(
            f"found that {path} cannot be read as a torch file: {detail}; expected plain tensors, "
            "lists and dicts written by torch.save of torch 1.6 or later: save it again"
        ) from error


class _Reader(pickle.Unpickler):
    """An unpickler that knows a handful of harmless names."""

    def __init__(self, content: bytes, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(content))
        self.archive = archive
        self.root = root

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return np.dtype(_STORAGES[name])
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("collections", "OrderedDict"): collections.OrderedDict,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(
                f"the file asks for {module}.{name}, which is no plain tensor; nothing was run"
            )
        return known[module, name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, dtype, key, _, elements = pid
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise pickle.UnpicklingError(f"found the persistent id {kind!r}, expected a storage")
        array = np.frombuffer(self.archive.read(f"{self.root}data/{key}"), dtype)
        if len(array) != elements:
            raise ValueError(f"found {len(array)} numbers in storage {key}, expected {elements}")
        return array


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> np.ndarray:
    """The tensor as a copy; refuses one that reaches outside its storage, or repeats it."""
    plain = all(type(i) is int and i >= 0 for i in (offset, *shape, *stride))
    plain &= isinstance(storage, np.ndarray) and len(shape) == len(stride) <= 8
    if not plain:
        raise ValueError(f"found a tensor of shape {shape!r} and stride {stride!r}")
    count = math.prod(shape)
    if count == 0:
        return np.zeros(shape, storage.dtype)
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if last >= len(storage) or count > len(storage):
        raise ValueError(f"found a tensor of shape {shape} outside its {len(storage)} numbers")
    index = np.full((), offset, np.int64)
    for length, step in zip(shape, stride, strict=True):
        index = index[..., None] + np.arange(length) * step
    return storage[index]

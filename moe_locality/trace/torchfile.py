"""Reads what ``torch.save`` wrote, without torch and without running anything that the file names.

The zip form of torch >= 1.6 (docs of ``torch.save``): ``<name>/data.pkl``, a pickle in which every
storage is a persistent id ``("storage", type, key, device, elements)``, and ``<name>/data/<key>``
with its bytes. Only the calls that rebuild plain tensors are known here; any other name in the
pickle is refused before it is looked up, so a hostile file can run nothing. Tensors come back as
numpy arrays, also those that were on a GPU.
"""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from moe_locality.errors import TraceError

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
    """Return the content of a ``.pt`` file: dicts, lists and numbers, tensors as numpy arrays.

    Raises:
        TraceError: it is damaged, in the old form, or names anything but plain tensors.
    """
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
            return _StorageType(name)
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
        kind, storage, key, _, elements = pid
        if kind != "storage" or not isinstance(storage, _StorageType):
            raise pickle.UnpicklingError(f"found the persistent id {kind!r}, expected a storage")
        content = self.archive.read(f"{self.root}data/{key}")
        array = np.frombuffer(content, storage.dtype)
        if len(array) != elements:
            raise ValueError(f"found {len(array)} numbers in storage {key}, expected {elements}")
        return array


class _StorageType:
    """Stands for ``torch.LongStorage`` and its kin."""

    def __init__(self, name: str) -> None:
        self.dtype = np.dtype(_STORAGES[name])


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> np.ndarray:
    """The tensor as a copy; refuses one that reaches outside its storage, or repeats it."""
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, np.ndarray) or not all(type(i) is int and i >= 0 for i in numbers):
        raise ValueError(f"found a tensor of shape {shape!r} and stride {stride!r}")
    if len(shape) != len(stride) or len(shape) > 8:
        raise ValueError(f"found a tensor of shape {shape!r} and stride {stride!r}")
    count = 1
    for length in shape:
        count *= length
    if count == 0:
        return np.zeros(shape, storage.dtype)
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if last >= len(storage) or count > len(storage):
        raise ValueError(f"found a tensor of shape {shape} outside its {len(storage)} numbers")
    index = np.full((), offset, np.int64)
    for length, step in zip(shape, stride, strict=True):
        index = index[..., None] + np.arange(length) * step
    return storage[index]

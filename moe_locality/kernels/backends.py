"""Which backend runs a kernel, why another one cannot, and a count of what really ran.

The choice is, first to last: the ``backend`` argument of a call, :func:`set_backend`, the
environment variable ``MOE_LOCALITY_BACKEND``, the device: on a GPU ``cuda`` where it was built,
else ``triton`` where it is installed, else ``reference``; on the CPU ``reference``.
"""

import importlib
import os
from collections import Counter
from functools import cache
from types import ModuleType
from typing import Any, Literal

import torch

from moe_locality.errors import BackendUnavailable, ConfigError

Backend = Literal["auto", "reference", "triton", "cuda"]
BACKENDS = ("reference", "triton", "cuda")
ENVIRONMENT_VARIABLE = "MOE_LOCALITY_BACKEND"

# A backend is a module with the functions of reference.py and, where it may be missing on this
# machine, ``why_unavailable() -> str | None``.
MODULES = {
    "reference": "moe_locality.kernels.reference",
    "triton": "moe_locality.kernels.triton_impl",
    "cuda": "moe_locality.kernels.cuda_impl",
}
_HOW_TO_GET = {
    "triton": "pip install triton on a machine with an NVIDIA GPU (without a GPU, start Python "
    "with TRITON_INTERPRET=1 to try the kernels slowly)",
    "cuda": "build it on a machine with a CUDA torch and nvcc: MOE_LOCALITY_CUDA=1 pip install "
    "--no-build-isolation moe-locality",
}

_counts: Counter[tuple[str, str]] = Counter()
_chosen: Backend = "auto"


def set_backend(backend: Backend) -> None:
    """Choose the backend of every call that names none; ``"auto"`` undoes it.

    Raises:
        ConfigError: no such backend. BackendUnavailable: it is not usable here.
    """
    global _chosen
    if backend != "auto":
        module_of(backend)
    _chosen = backend


def check_backend(backend: Backend) -> None:
    """Raise now what a call with this backend would raise later."""
    if backend != "auto":
        module_of(backend)


def backend_counts() -> dict[str, dict[str, int]]:
    """Return ``{backend: {op: calls}}`` since the start or :func:`reset_backend_counts`."""
    counts: dict[str, dict[str, int]] = {}
    for (backend, op), calls in sorted(_counts.items()):
        counts.setdefault(backend, {})[op] = calls
    return counts


def reset_backend_counts() -> None:
    """Forget the calls counted so far."""
    _counts.clear()


def select(op: str, device: torch.device, backend: str) -> Any:
    """Return the function ``op`` of the backend that this call gets, and count the call."""
    name = _resolve(backend, device)
    function = getattr(module_of(name), op)
    _counts[name, op] += 1
    return function


def module_of(backend: str) -> ModuleType:
    """Return the module of a backend.

    Raises:
        ConfigError: no such backend. BackendUnavailable: it is not usable here, with the reason.
    """
    if backend not in MODULES:
        raise ConfigError(
            f"found kernels={backend!r}, expected auto, {', '.join(BACKENDS)}: correct the name"
        )
    module, why = _load(MODULES[backend])
    if module is None:
        raise BackendUnavailable(
            f"kernels={backend!r} was asked for, but {why}, expected a usable {backend} backend: "
            f"{_HOW_TO_GET[backend]}, or set kernels to 'auto'"
        )
    return module


def _resolve(backend: str, device: torch.device) -> str:
    for wish in (backend, _chosen, os.environ.get(ENVIRONMENT_VARIABLE, "auto")):
        if wish != "auto":
            return wish
    if device.type == "cuda":
        for name in ("cuda", "triton"):
            if _load(MODULES[name])[0] is not None:
                return name
    return "reference"


@cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    """Import a backend once; ``(None, why)`` where it cannot be used on this machine."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        return None, f"{error.name} is not installed here"
    why = getattr(module, "why_unavailable", lambda: None)()
    return (None, why) if why else (module, "")

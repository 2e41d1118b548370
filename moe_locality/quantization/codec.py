"""The payload codec of the dispatch: encoded rows, by the kernels that the device has.

``reference`` is torch on any device (``rows``); ``triton`` (``mx_triton``) and ``cuda``
(``mx_cuda``) are the same bytes on a GPU. ``auto`` takes, for tensors on a GPU and formats that
have a kernel, CUDA where it was built, else Triton where it is installed.
"""

import importlib
import importlib.util
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from moe_locality.errors import BackendUnavailable, ConfigError
from moe_locality.kernels import cuda_impl

CodecBackend = Literal["auto", "reference", "triton", "cuda"]
MODULES = {
    "reference": "moe_locality.quantization.rows",
    "triton": "moe_locality.quantization.mx_triton",
    "cuda": "moe_locality.quantization.mx_cuda",
}


def encode_rows(x: Tensor, format: str, *, backend: CodecBackend = "auto") -> Tensor:
    """Encode activations ``x [N, D]`` as bytes ``[N, row_bytes(format, D)]`` uint8.

    Raises:
        ConfigError: a format without rows of their own, or x is not a matrix of floats.
        BackendUnavailable: the backend asked for by name is not usable here.
    """
    return _module(x, backend, format).encode_rows(x, format)


def decode_rows(
    buffer: Tensor,
    format: str,
    width: int,
    dtype: torch.dtype,
    *,
    index: Tensor | None = None,
    backend: CodecBackend = "auto",
) -> Tensor:
    """Return the floats ``[N, width]`` of encoded rows ``[N, row_bytes(format, width)]``.

    With ``index [M]``, ``[M, width]``: these rows in this order, zeros where it is -1. So received
    rows go straight into the order of the experts.
    """
    return _module(buffer, backend, None).decode_rows(buffer, format, width, dtype, index=index)


def permute_encode(
    x: Tensor,
    row_token: Tensor,
    format: str,
    *,
    positions: Tensor | None = None,
    backend: CodecBackend = "auto",
) -> Tensor:
    """Encode each token of ``x [T, D]`` once; return the rows ``[R, row_bytes]`` of ``row_token
    [R]``, zeros where it is -1.

    ``positions [T, K]``, the rows of each token (-1 for none), saves the GPU kernel a sort.
    """
    module = _module(x, backend, format)
    if module.__name__ == MODULES["reference"]:
        return module.permute_encode(x, row_token, format)
    return module.permute_encode(x, row_token, format, positions=positions)


def _module(x: Tensor, backend: str, format: str | None) -> ModuleType:
    if backend not in ("auto", *MODULES):
        raise ConfigError(f"found backend {backend!r}, expected auto, {', '.join(MODULES)}")
    if backend == "auto":
        backend = _choose(x, format)
    elif (why := _why_not(backend)) is not None:
        raise BackendUnavailable(
            f"found backend={backend!r}, but {why}: leave the choice to 'auto', or {_GET[backend]}"
        )
    return importlib.import_module(MODULES[backend])


_GET = {
    "triton": "pip install triton",
    "cuda": "build it: MOE_LOCALITY_CUDA=1 pip install --no-build-isolation moe-locality",
}


def _choose(x: Tensor, format: str | None) -> str:
    if not x.is_cuda or format == "mxfp4-mbs-d":  # it is searched, and has no kernel
        return "reference"
    return next((name for name in ("cuda", "triton") if _why_not(name) is None), "reference")


def _why_not(backend: str) -> str | None:
    if backend == "cuda":
        return cuda_impl.why_unavailable()
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None

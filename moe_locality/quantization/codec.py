"""The payload codec of the dispatch: encoded rows, by the kernels that the device has.

``reference`` is torch on any device (``rows``), ``triton`` the same bytes on a GPU (``mx_triton``).
``auto`` takes Triton for tensors on a GPU where Triton is installed and has the format.
"""

import importlib
import importlib.util
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from moe_locality.errors import BackendUnavailable, ConfigError

CodecBackend = Literal["auto", "reference", "triton"]


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
    backend: CodecBackend = "auto",
) -> Tensor:
    """Return the floats ``[N, width]`` of encoded rows ``[N, row_bytes(format, width)]``."""
    return _module(buffer, backend, None).decode_rows(buffer, format, width, dtype)


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
    if module.__name__.endswith("mx_triton"):
        return module.permute_encode(x, row_token, format, positions=positions)
    return module.permute_encode(x, row_token, format)


def _module(x: Tensor, backend: str, format: str | None) -> ModuleType:
    if backend not in ("auto", "reference", "triton"):
        raise ConfigError(f"found backend {backend!r}, expected auto, reference or triton")
    installed = importlib.util.find_spec("triton") is not None
    if backend == "triton" and not installed:
        raise BackendUnavailable(
            "found no Triton, which backend='triton' needs: pip install triton, or leave the "
            "choice to 'auto'"
        )
    searched = format == "mxfp4-mbs-d"  # no kernel: see mx_triton
    if backend == "triton" or (backend == "auto" and x.is_cuda and installed and not searched):
        return importlib.import_module("moe_locality.quantization.mx_triton")
    return importlib.import_module("moe_locality.quantization.rows")

"""RMSNorm for the example model: NVIDIA apex's fused one where it is really there, else torch's.

The package called ``apex`` on PyPI is a toolkit for web applications and has nothing to do with
NVIDIA's apex (https://github.com/NVIDIA/apex, installed from source). Importing the wrong one runs
its code, so it is recognized by its files and never imported.
"""

import importlib.util
import logging
from importlib import metadata
from pathlib import Path
from typing import Literal

from torch import nn

logger = logging.getLogger(__name__)

ApexState = Literal["absent", "wrong", "python-only", "cuda"]


def nvidia_apex_state() -> tuple[ApexState, str]:
    """Say which ``apex`` is installed, and what to do about it.

    Returns ``absent``, ``wrong`` (another package of that name), ``python-only`` (NVIDIA's, without
    the compiled kernels of its normalization layers) or ``cuda`` (usable), with a sentence for
    people.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "absent", "NVIDIA apex is not installed"
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if not any(
        (f / "normalization").is_dir() and (f / "multi_tensor_apply").is_dir() for f in folders
    ):
        return "wrong", (
            f"the installed 'apex' is not NVIDIA apex ({_describe('apex')}): pip uninstall apex,"
            " then install https://github.com/NVIDIA/apex from source with its CUDA extensions"
        )
    if importlib.util.find_spec("fused_layer_norm_cuda") is None:
        return "python-only", (
            "NVIDIA apex is installed without fused_layer_norm_cuda: install it from source with"
            " its CUDA extensions"
        )
    return "cuda", "NVIDIA apex with fused_layer_norm_cuda"


def build_rms_norm(width: int, eps: float, kind: str = "auto") -> nn.Module:
    """Return an RMSNorm over the last dimension of ``width`` elements (arXiv 1910.07467).

    ``kind`` is ``torch``, ``apex`` (an error where it cannot be had) or ``auto``.

    Raises:
        ValueError: another ``kind``.
        RuntimeError: ``apex`` is asked for and NVIDIA apex with its kernels is not there.
    """
    if kind not in ("auto", "torch", "apex"):
        raise ValueError(f"norm is {kind!r}, expected 'auto', 'torch' or 'apex'")
    if kind == "torch":
        return nn.RMSNorm(width, eps=eps)
    state, reason = nvidia_apex_state()
    if state == "cuda":
        from apex.normalization import FusedRMSNorm

        return FusedRMSNorm(width, eps=eps)
    if kind == "apex":
        raise RuntimeError(f"norm='apex' was asked for, but {reason}; or use norm='torch'")
    if state == "wrong":
        logger.warning("%s; torch.nn.RMSNorm is used", reason)
    return nn.RMSNorm(width, eps=eps)


def _describe(distribution: str) -> str:
    try:
        fields = metadata.metadata(distribution)
    except metadata.PackageNotFoundError:
        return "unknown distribution"
    return f"{fields['Version']}: {fields['Summary']}"

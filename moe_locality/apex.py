"""Which ``apex`` is installed: NVIDIA's, or the package of that name on PyPI.

PyPI's ``apex`` is a toolkit for web applications and has nothing to do with NVIDIA's apex
(https://github.com/NVIDIA/apex, installed from source). Importing the wrong one runs its code, so
it is recognized by its files and never imported.
"""

import importlib.util
from importlib import metadata
from pathlib import Path
from typing import Literal

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


def _describe(distribution: str) -> str:
    try:
        fields = metadata.metadata(distribution)
    except metadata.PackageNotFoundError:
        return "unknown distribution"
    return f"{fields['Version']}: {fields['Summary']}"

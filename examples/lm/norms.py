"""RMSNorm for the example model: NVIDIA apex's fused one where it is really there, else torch's."""

import logging

from torch import nn

from moe_locality.compat import nvidia_apex_state

logger = logging.getLogger(__name__)


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

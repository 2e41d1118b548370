"""How a row travels: as it is, or in a low-bit format (lossy, and only where asked for).

Every row is coded, also one that stays on its rank: what the model computes does not depend on
where an expert lives. Gradients travel as they are and pass the coding unchanged (the
straight-through estimator, arXiv 1308.3432): as if rows had not been rounded.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_locality import quantization
from moe_locality.kernels import ops
from moe_locality.kernels.backends import RowMap


@dataclass(frozen=True, slots=True)
class Codec:
    """``format`` is a row format of ``moe_locality.quantization``, or None: rows as they are."""

    format: str | None

    def encode(self, rows: Tensor) -> Tensor:
        """``[N, D]`` to what travels: the rows, or uint8 ``[N, row_bytes]``."""
        return rows if self.format is None else quantization.encode_rows(rows, self.format)

    def decode(
        self,
        coded: Tensor,
        width: int,
        dtype: torch.dtype,
        order: Tensor | None = None,
        backend: ops.Backend = "auto",
    ) -> Tensor:
        """The inverse of :meth:`encode`, with its rounding: ``[N, width]`` in ``dtype``.

        With ``order``, those rows in that order: decoded to where they belong, not moved first.
        """
        if self.format is None:
            return coded if order is None else ops.permute(coded, order, backend=backend)
        return quantization.decode_rows(coded.contiguous(), self.format, width, dtype, index=order)

    def permute(self, x: Tensor, row_map: RowMap, backend: ops.Backend) -> Tensor:
        """Return the coded row of every row of the map; a token is coded once."""
        if self.format is not None:
            return quantization.permute_encode(
                x, row_map.row_token, self.format, positions=row_map.positions
            )
        return ops.permute(x, row_map, backend=backend)


def codec_of(payload: str) -> Codec:
    """Return the codec of a ``dispatch.payload`` of the configuration."""
    return Codec(None if payload == "none" else payload)

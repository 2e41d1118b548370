"""Several values per row in one buffer: ``[row | slots | weights]`` as bytes. Pure arithmetic.

Each part begins at a multiple of 16 bytes and the packed row is as long as one, so that a part can
be seen in its own type where it lies, and a GPU copies rows with 16-byte accesses.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class WireFormat:
    """``parts``: (width, dtype) of each part of a row, in order."""

    parts: tuple[tuple[int, torch.dtype], ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of a packed row."""
        return self._starts()[-1]

    @property
    def extra_bytes(self) -> int:
        """Bytes of a packed row beyond its first part: the other parts, and the padding."""
        return self.row_bytes - self._sizes()[0]

    def pack(self, parts: Sequence[Tensor]) -> Tensor:
        """Return uint8 ``[N, row_bytes]`` of parts ``[N, width]``; one part travels as it is."""
        if len(self.parts) == 1:
            return parts[0]
        buffer = parts[0].new_empty(len(parts[0]), self.row_bytes, dtype=torch.uint8)
        starts, sizes = self._starts(), self._sizes()
        for part, start, size, stop in zip(parts, starts, sizes, starts[1:], strict=False):
            buffer[:, start : start + size].view(part.dtype).copy_(part)
            buffer[:, start + size : stop].zero_()
        return buffer

    def unpack(self, buffer: Tensor) -> list[Tensor]:
        """Return views of the parts; the inverse of :meth:`pack`."""
        if len(self.parts) == 1:
            return [buffer]
        found = zip(self.parts, self._starts(), self._sizes(), strict=False)
        return [buffer[:, start : start + size].view(dtype) for (_, dtype), start, size in found]

    def _sizes(self) -> list[int]:
        return [width * dtype.itemsize for width, dtype in self.parts]

    def _starts(self) -> list[int]:
        if len(self.parts) == 1:
            return [0, self._sizes()[0]]
        starts = [0]
        for size in self._sizes():
            starts.append(starts[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
        return starts


def wire_format(*parts: Tensor | None) -> WireFormat:
    """Return the format of rows with these parts ``[N, width]``, None for one that is not there."""
    return WireFormat(tuple((part.shape[1], part.dtype) for part in parts if part is not None))

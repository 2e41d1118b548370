"""How fast this GPU copies when it reads R arrays and writes W: the ceiling of a move of rows.

A plain copy reads as much as it writes. A permute reads one row and writes K; memory that is mostly
written can top out elsewhere. So each operation is also held against a copy of its own mix, all of
it contiguous (identity indices): what is missing to that ceiling is lost to indices and sums.

Import it only where Triton is installed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BYTES = 2**30
BLOCKS = (1024, 2048, 4096)


@triton.jit
def mix_kernel(
    source, target, count, READS: tl.constexpr, WRITES: tl.constexpr, BLOCK: tl.constexpr
):
    """A word of the target is the exclusive or of the words of the sources: nothing is left out."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    word = tl.load(source + at, mask=inside, other=0)
    for r in tl.static_range(1, READS):
        word = word ^ tl.load(source + at + r * count, mask=inside, other=0)
    for w in tl.static_range(WRITES):
        tl.store(target + at + w * count, word, mask=inside)


def mixed_copy(source: Tensor, target: Tensor, block: int) -> None:
    """Write the exclusive or of the rows of ``source [R, n] int32`` to all of ``target [W, n]``."""
    count = source.shape[1]
    grid = (-(-count // block),)
    mix_kernel[grid](source, target, count, len(source), len(target), block)


def buffers(
    reads: int, writes: int, device: str, total_bytes: int = BYTES
) -> tuple[Tensor, Tensor]:
    """Random words to read, poison to write over: ``total_bytes`` together."""
    count = total_bytes // 4 // (reads + writes) // 4096 * 4096
    generator = torch.Generator(device)  # see kernel_timing.copy_gbps
    source = torch.empty((reads, count), dtype=torch.int32, device=device)
    source.random_(generator=generator)
    return source, torch.full((writes, count), -1, dtype=torch.int32, device=device)


def expected(source: Tensor) -> Tensor:
    word = source[0].clone()
    for row in source[1:]:
        word ^= row
    return word

"""Fused permute and quantize: ours on each backend, in two passes, and Megatron-core's MXFP8.

The contract of the others is looser than bytes: scales may be rounded another way. What they write
must decode to the rows of the permute within :data:`ROUNDING` of their norm. Triton's interpreter
loses the carry of a mantissa that it rounds to fp8 (seen with 3.7: one element in eighteen), so a
dry run allows four times that.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from kernel_cases import Case
from torch import Tensor

from moe_locality.kernels import ops
from moe_locality.quantization import decode_rows, encode_rows, permute_encode, row_bytes

FORMATS = ("fp8", "mxfp8", "mxfp4")
ROUNDING = {"fp8": 0.04, "mxfp8": 0.05, "mxfp4": 0.2}
MEGATRON = "map, fused permute and quantize mxfp8 | Megatron-core"

Steps = dict[str, list[Callable[[], Any]]]


def candidates(
    cases: Sequence[Case], backends: Sequence[Any]
) -> tuple[Steps, dict[str, dict[str, str]], dict[str, int]]:
    """Return what to time, what to say of each, and the bytes that each cannot avoid."""
    steps: Steps = {}
    notes: dict[str, dict[str, str]] = {}
    floors: dict[str, int] = {}
    tokens, width = cases[0].x.shape
    rows = cases[0].num_rows
    for format in FORMATS:
        size = row_bytes(format, width)
        for backend in backends:
            made = [ours(case, format, backend) for case in cases]
            for op in made[0]:
                steps[f"{op} {format} | {backend}"] = [calls[op] for calls in made]
            once = tokens * width * 2 + rows * size
            floors[f"fused permute and quantize {format} | {backend}"] = once
            floors[f"dequantize in order {format} | {backend}"] = rows * (size + width * 2)
    try:
        steps[MEGATRON] = [megatron(case) for case in cases]
        why = check_megatron(cases[0])
        notes[MEGATRON] = {"left_out": f"not comparable: {why}"} if why else {}
    except Exception as error:  # noqa: BLE001 - a peer may fail in any way
        kind = "absent" if isinstance(error, ImportError) else f"not run: {type(error).__name__}"
        line = (str(error).splitlines() or [""])[0][:160]
        notes[MEGATRON] = {"left_out": f"{kind}: {line}"}
    notes[MEGATRON]["read_from"] = "megatron-core 0.19.2"
    if "left_out" in notes[MEGATRON]:
        steps.pop(MEGATRON, None)
    return steps, notes, floors


def ours(case: Case, format: str, backend: Any) -> dict[str, Callable[[], Any]]:
    where = ops.row_map(case.ids, case.num_experts, num_rows=case.num_rows, backend=backend)
    order = torch.randperm(case.num_rows, generator=torch.Generator().manual_seed(0))
    order = order.to(case.x.device, torch.int32)

    def encode(x: Tensor, mapping: Any) -> Tensor:
        return permute_encode(
            x, mapping.row_token, format, positions=mapping.positions, backend=backend
        )

    def with_map() -> Tensor:
        ids, slots = case.ids, case.num_experts
        return encode(case.x, ops.row_map(ids, slots, num_rows=case.num_rows, backend=backend))

    def in_two_passes() -> Tensor:
        rows = ops.permute(case.x, where, backend=backend)
        return encode_rows(rows, format, backend=backend)

    encoded, width, dtype = encode(case.x, where), case.x.shape[1], case.x.dtype
    wanted = permute_encode(case.x, where.row_token, format, backend="reference")
    if not torch.equal(encoded, wanted) or not torch.equal(in_two_passes(), wanted):
        raise AssertionError(f"{format} on {backend} differs from the reference: not to be timed")
    return {
        "fused permute and quantize": lambda: encode(case.x, where),
        "permute, then quantize": in_two_passes,
        "map, fused permute and quantize": with_map,
        "dequantize in order": lambda: decode_rows(
            encoded, format, width, dtype, index=order, backend=backend
        ),
    }


def megatron(case: Case) -> Callable[[], Any]:
    """``permute_and_quantize_mxfp8``: counts, offsets, and the row once per pick."""
    from kernel_peers_nvidia import megatron as module

    moe = module("inference.moe.permute")
    valid = torch.full((), len(case.x), dtype=torch.int32, device=case.x.device)
    return lambda: moe.permute_and_quantize_mxfp8(
        case.x, case.weights, case.ids, 0, case.num_experts, valid
    )


def check_megatron(case: Case) -> str:
    """Decode its rows (scales in the layout that cuBLAS wants) and compare with the tokens."""
    made, _, where, ends = megatron(case)()
    used = int(ends[-1])
    where, width = where[:used], case.x.shape[1]
    kept = where >= 0
    if int(kept.sum()) != case.num_rows:
        return f"it has {int(kept.sum())} rows, expected {case.num_rows}"
    row = torch.arange(used, device=where.device)[:, None]
    column = torch.arange(width // 32, device=where.device)[None, :]
    columns = -(-(width // 32) // 4)
    tile = row // 128 * columns + column // 4
    at = tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4
    exponent = made.scale.view(torch.uint8)[at].float() - 127
    values = made.data[:used].float() * torch.exp2(exponent).repeat_interleave(32, dim=1)
    tokens = case.x.float()[where[kept].long()]
    error = float((values[kept] - tokens).norm() / tokens.norm())
    bound = ROUNDING["mxfp8"] * (1 if case.x.is_cuda else 4)
    return "" if error <= bound else f"its rows are off by {error:.1e} of their norm"

"""Low-bit formats: reference numerics, encoded rows for the dispatch, and their Triton kernels.

``mx_formats`` is the table of formats and sizes, ``elements`` the bit level, ``mx`` quantizes
tensors, ``rows`` packs rows into bytes, ``mx_triton`` does the same on a GPU.
"""

from moe_locality.quantization.mx import (
    FORMATS,
    QuantizedTensor,
    dequantize,
    fake_quantize,
    quantize,
)
from moe_locality.quantization.mx_formats import Format, bytes_per_row, get_format, row_bytes

__all__ = [
    "FORMATS",
    "Format",
    "QuantizedTensor",
    "bytes_per_row",
    "dequantize",
    "fake_quantize",
    "get_format",
    "quantize",
    "row_bytes",
]

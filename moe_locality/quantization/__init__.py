"""Low-bit formats: reference numerics, encoded rows for the dispatch, and their Triton kernels.

``mx_formats`` is the table of formats and sizes, ``elements`` the bit level, ``mx`` quantizes
tensors, ``rows`` packs rows into bytes, ``mx_triton`` does the same on a GPU, ``codec`` chooses
between the two.
"""

from moe_locality.quantization.codec import decode_rows, encode_rows, permute_encode
from moe_locality.quantization.mx import (
    FORMATS,
    QuantizedTensor,
    dequantize,
    fake_quantize,
    quantize,
)
from moe_locality.quantization.mx_formats import Format, bytes_per_row, get_format, row_bytes
from moe_locality.quantization.rows import ROW_FORMATS

__all__ = [
    "FORMATS",
    "ROW_FORMATS",
    "Format",
    "QuantizedTensor",
    "bytes_per_row",
    "decode_rows",
    "dequantize",
    "encode_rows",
    "fake_quantize",
    "get_format",
    "permute_encode",
    "quantize",
    "row_bytes",
]

"""Low-bit formats: reference numerics, and encoded rows for the dispatch on every backend.

``formats`` is the table of formats, their bytes and their bits; ``mx`` quantizes tensors; ``rows``
packs rows into bytes, by torch, by the CUDA extension or by the kernels of ``triton_codec``.
"""

from moe_locality.quantization.formats import FORMATS, Format, bytes_per_row, get_format, row_bytes
from moe_locality.quantization.mx import QuantizedTensor, dequantize, fake_quantize, quantize
from moe_locality.quantization.rows import ROW_FORMATS, decode_rows, encode_rows, permute_encode

__all__ = ["FORMATS", "Format", "bytes_per_row", "get_format", "row_bytes"]
__all__ += ["QuantizedTensor", "dequantize", "fake_quantize", "quantize"]
__all__ += ["ROW_FORMATS", "decode_rows", "encode_rows", "permute_encode"]

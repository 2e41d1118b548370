"""The Triton kernels without a GPU, compiled ahead to PTX."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_locality.errors import BackendUnavailable, ConfigError
from moe_locality.kernels import cuda_impl
from moe_locality.quantization import rows

ROOT = Path(__file__).parents[3]

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moe_locality.quantization import triton_codec as m
from moe_locality.quantization.formats import get_format

def compile(kernel, pointers, constants):
    signature = {**pointers, **{name: "constexpr" for name in constants}}
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    options = {"enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    assert ".target sm_90" in ptx
    assert "fma.rn" not in ptx, "sums and products must not be contracted"

for name in ("fp8", "mxfp8", "mxfp4", "mxfp4-mbs-s"):
    fmt = get_format(name)
    constants = m._constants(fmt, 2048, encodes=True) | {"K": 8, "PERMUTE": True, "BF16": True}
    pointers = {"x_ptr": "*i16", "positions_ptr": "*i32", "out_ptr": "*u8", "x_stride": "i32"}
    compile(m.encode_kernel, pointers, constants)
    constants = m._constants(fmt, 2048, encodes=False)
    constants |= {"OUT": 1, "LARGEST": 3.3895313892515355e38}
    pointers = {"in_ptr": "*u8", "index_ptr": "*i32", "out_ptr": "*i16"}
    compile(m.decode_kernel, pointers, constants | {"IN_ORDER": True})
pointers = {"row_token_ptr": "*i32", "out_ptr": "*u8", "num_rows": "i32"}
compile(m.zero_padding_kernel, pointers, {"ROW_BYTES": 1168, "ROWS": 32})
"""


@pytest.mark.slow
def test_triton_codec_kernels_compile_for_sm_90(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_encode_and_decode_rows_take_the_reference_on_the_cpu():
    x = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))
    reference = {"backend": "reference"}
    encoded = rows.encode_rows(x, "mxfp4-mbs-s")
    assert torch.equal(encoded, rows.encode_rows(x, "mxfp4-mbs-s", **reference))
    back = rows.decode_rows(encoded, "mxfp4-mbs-s", 70, torch.bfloat16)
    row_token = torch.tensor([4, -1, 0])
    in_order = rows.decode_rows(encoded, "mxfp4-mbs-s", 70, torch.bfloat16, index=row_token)
    assert torch.equal(in_order[[0, 2]], back[[4, 0]])
    assert not in_order[1].any()
    found = rows.permute_encode(x, row_token, "fp8")
    assert torch.equal(found, rows.permute_encode(x, row_token, "fp8", **reference))


def test_encode_rows_names_what_a_backend_lacks(monkeypatch):
    x = torch.zeros(1, 4)
    with pytest.raises(ConfigError, match="expected auto, reference, triton, cuda"):
        rows.encode_rows(x, "fp8", backend="fast")  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(cuda_impl, "why_unavailable", lambda: "there is no extension")
    with pytest.raises(BackendUnavailable, match=r"there is no extension.*MOE_LOCALITY_CUDA=1"):
        rows.encode_rows(x, "fp8", backend="cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match="pip install triton"):
        rows.encode_rows(x, "fp8", backend="triton")

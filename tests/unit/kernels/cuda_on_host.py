"""csrc/serve.cu on the CPU: its source, launcher and kernel, built by the C++ compiler and run by
one thread per CUDA thread, behind the schema of csrc/binding.cpp.

It shows what integers the kernel computes, where it reads and writes, and that its barriers are
enough; neither the compiler for the device nor its memory model. Kernels that exchange values
inside a warp cannot run so.
"""

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from moe_locality.kernels import cuda_impl

CSRC = Path(__file__).parents[3] / "csrc"
RUNTIME = """
#include <algorithm>
#include <barrier>
#include <cstddef>
#include <thread>
#include <vector>
#define __global__
#define __shared__
#define __launch_bounds__(threads)
using std::min;
using cudaStream_t = void*;
enum { cudaSuccess, cudaErrorInvalidValue, cudaErrorOverrun };
inline int last_error = cudaSuccess;
inline int cudaGetLastError() { return last_error; }
struct Index { unsigned x; };
inline thread_local Index threadIdx, blockIdx;
inline std::barrier<>* block;
inline void __syncthreads() { block->arrive_and_wait(); }
inline int64_t picks[1 << 13];  // the shared memory of a block
template <class Kernel>
auto launch(Kernel kernel, unsigned blocks, int threads, size_t bytes, cudaStream_t) {
  return [=](auto... args) {
    std::fill(std::begin(picks), std::end(picks), -7);
    for (unsigned b = 0; b < blocks; ++b) {
      std::barrier<> all(threads);
      block = &all;
      std::vector<std::jthread> team;
      for (int t = 0; t < threads; ++t)
        team.emplace_back([=] { threadIdx.x = t, blockIdx.x = b, kernel(args...); });
    }
    for (size_t i = bytes / 8; i < std::size(picks); ++i)
      if (picks[i] != -7) last_error = cudaErrorOverrun;
  };
}
"""
CALL = """
extern "C" int call(const void* ids, int wide, int64_t stride_t, int64_t stride_k,
                    const int32_t* slots, const int64_t* nodes, void* found, int64_t t, int64_t e,
                    int k, int x, int h) {
  return moe_locality::serve_visited(
      {ids, wide, stride_t, stride_k, slots, nodes, found, t, e, k, x, h}, nullptr);
}
"""


@functools.cache
def build() -> "ctypes.CDLL":
    """Compile once; skip the test where there is no compiler."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler is here (install g++)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "cuda_runtime.h").write_text("#pragma once\n#include <cstdint>" + RUNTIME)
        source = (CSRC / "serve.cu").read_text()
        source = re.sub(r"(\w+)<<<(.+?)>>>", r"launch(\1, \2)", source, flags=re.S)
        source = source.replace("extern __shared__ int64_t picks[];", "")
        (folder / "serve.cpp").write_text(source + CALL)
        flags = ["-std=c++20", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-pthread"]
        command = [compiler, *flags, f"-I{folder}", f"-I{CSRC}", "serve.cpp", "-o", "serve.so"]
        subprocess.run(command, cwd=folder, check=True, timeout=120)
        return ctypes.CDLL(str(folder / "serve.so"))


@functools.cache
def operators() -> torch.library.Library:
    """Register the operator of the extension on the CPU, by the schema of the binding."""
    (schema,) = re.findall(r'm\.def\("(serve_visited\(.+?)"\);', (CSRC / "binding.cpp").read_text())
    library = torch.library.Library("moe_locality_cuda", "FRAGMENT")
    if cuda_impl.load_library() is not None:  # the extension, where it is, has defined it
        library.define(schema)
    library.impl("serve_visited", call, "CPU")
    return library


def call(ids, slots, nodes, found, home_node) -> None:
    """What the binding does."""
    assert (slots.dtype, nodes.dtype, found.dtype) == (torch.int32, torch.int64, ids.dtype)
    assert all(t.is_contiguous() for t in (slots, nodes, found))
    wide = {torch.int32: 0, torch.int64: 1}[ids.dtype]
    size = [ctypes.c_int64(n) for n in ids.stride()]
    tables = [ctypes.c_void_p(t.data_ptr()) for t in (slots, nodes, found)]
    counts = [ctypes.c_int64(len(ids)), ctypes.c_int64(len(slots))]
    rest = [ids.shape[1], slots.shape[1], home_node]
    code = build().call(ctypes.c_void_p(ids.data_ptr()), wide, *size, *tables, *counts, *rest)
    assert code == 0, f"the launcher returned {code}"


def serve_visited(ids, slots, nodes, home_node) -> torch.Tensor:
    """The CUDA backend's function, its kernel on the host."""
    build()
    operators()
    return cuda_impl.serve_visited(ids, slots, nodes, home_node)

"""Compile every Triton kernel to PTX and a cubin without a GPU; print what each became as JSON.

Run by ``test_triton.py`` without ``TRITON_INTERPRET``. One argument: the compute capabilities, as
in ``80,90,100``.
"""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe_locality.kernels import triton_impl, triton_kernels

POINTERS = {
    "rows": "*bf16", "x": "*bf16", "out": "*bf16", "grad": "*bf16", "grad_rows": "*bf16",
    "weights": "*fp32", "grad_weights": "*fp32", "index": "*i64", "nodes": "*i64",
    "tokens_per_slot": "*i64",
}  # fmt: skip
NUMBERS = {"num_", "token_blocks", "stride", "capacity"}
WIDE = {"D": 4096, "K": 8, "BT": 1, "BD": 2048, "BR": 2}
MOVES = {
    "permute_kernel": WIDE | {"PADDED": True},
    "gather_kernel": {"D": 4096, "BR": 1, "BD": 2048},
    "combine_kernel": {k: WIDE[k] for k in ("D", "K", "BT", "BD")}
    | {"ACC": triton.language.float32, "HAS_WEIGHTS": True},
    "combine_backward_kernel": WIDE
    | {"BD": 4096, "K2": 8, "TILES": 1, "ACC": triton.language.float32}
    | {"NEED_ROWS": True, "NEED_WEIGHTS": True, "PADDED": True},
}


def cases():
    """Yield (name, kernel, constants)."""
    for name, constants in MOVES.items():
        yield name, getattr(triton_kernels, name), constants
    serve = {"K": 8, "K2": 8, "X": 3, "BT": 64}
    yield "serve_kernel", triton_kernels.serve_kernel, serve
    for label, tokens in (("", 4096), (" of one block", 64)):
        shape = triton_impl.map_shape(tokens, 8, 256)
        one = shape.pop("blocks") == 1
        if not one:
            count = {k: shape[k] for k in ("K", "K2", "TB", "P2")}
            yield "count_kernel", triton_kernels.count_kernel, count
        place = shape | {"FILL": one, "ONE_BLOCK": one}
        yield f"place_kernel{label}", triton_kernels.place_kernel, place


def type_of(name: str) -> str:
    if name in POINTERS:
        return POINTERS[name]
    return "i32" if any(name.startswith(prefix) for prefix in NUMBERS) else "*i32"


def compile_one(kernel, constants, capability: int) -> dict[str, int]:
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else type_of(n) for n in names}
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")
    }
    values = {(names.index(n),): value for n, value in constants.items()}
    source = ASTSource(kernel, signature, values, attributes)
    made = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8}
    )
    ptx = made.asm["ptx"]
    return {
        "vector_loads": ptx.count("ld.global.v4") + ptx.count("ld.global.v2.b64"),
        "vector_stores": ptx.count("st.global.v4") + ptx.count("st.global.v2.b64"),
        "local_bytes": sum(".local " in line for line in ptx.splitlines()),
        "cubin_bytes": len(made.asm["cubin"]),
        "global_atomics": ptx.count("atom.global") + ptx.count("red.global"),
    }


if __name__ == "__main__":
    found = {
        f"{name} sm_{capability}": compile_one(kernel, constants, capability)
        for capability in map(int, sys.argv[1].split(","))
        for name, kernel, constants in cases()
    }
    sys.stdout.write(json.dumps(found))

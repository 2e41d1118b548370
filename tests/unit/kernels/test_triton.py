"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled ahead to PTX.

Each in a process of its own, since Triton reads ``TRITON_INTERPRET`` when it is first imported.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_locality.errors import BackendUnavailable
from moe_locality.kernels import ops

pytest.importorskip("triton", reason="triton is not installed (pip install triton)")
ROOT = Path(__file__).parents[3]


def run(*command: str, interpret: bool) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0"}
    environment.pop("PYTEST_ADDOPTS", None)
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases", ["kernels/interpreted_backend.py", "quantization/triton_cases.py"]
)
def test_the_kernels_under_the_interpreter(cases):
    done = run("pytest", "-q", f"tests/unit/{cases}", interpret=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.slow
def test_the_kernels_compile_for_hopper(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = run("tests.unit.kernels.compile_ahead", "90", interpret=False)
    assert done.returncode == 0, done.stderr[-4000:]
    made = json.loads(done.stdout)
    for name, facts in made.items():
        assert facts["cubin_bytes"] > 0, name
        assert facts["local_bytes"] == 0, f"{name} spills to local memory"
        assert facts["global_atomics"] == 0, f"{name} would depend on the order of blocks"
    for name in ("permute", "gather", "combine", "combine_backward"):
        facts = made[f"{name}_kernel sm_90"]
        assert facts["vector_loads"] > 0, f"{name} does not load 16 bytes at a time"
        assert facts["vector_stores"] > 0, f"{name} does not store 16 bytes at a time"
    # a token is read once, however many rows it becomes
    assert made["permute_kernel sm_90"]["vector_loads"] == 1


def test_without_a_gpu_the_backend_says_so():
    import torch

    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton kernels run here")
    with pytest.raises(BackendUnavailable, match=r"sees no GPU here.*TRITON_INTERPRET=1"):
        ops.check_backend("triton")

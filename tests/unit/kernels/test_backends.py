"""Which backend a call gets, and what a missing one says."""

import pytest
import torch

from moe_locality.errors import BackendUnavailable
from moe_locality.kernels import cuda_impl, ops


@pytest.fixture(autouse=True)
def _default_backend(monkeypatch):
    monkeypatch.delenv(ops.ENVIRONMENT_VARIABLE, raising=False)
    yield
    ops.set_backend("auto")


@pytest.fixture
def fresh():
    """Backends are looked for once; forget what was found, before and after."""
    forget = (cuda_impl.load_library.cache_clear, ops._load.cache_clear)
    for each in forget:
        each()
    yield
    for each in forget:
        each()


def test_a_gpu_gets_cuda_where_it_was_built_else_triton_else_the_reference(monkeypatch):
    gpu, usable = torch.device("cuda"), {"moe_locality.kernels.reference"}
    monkeypatch.setattr(ops, "_load", lambda name: (object() if name in usable else None, ""))
    assert ops._resolve("auto", gpu) == "reference"
    usable.add("moe_locality.kernels.triton_impl")
    assert ops._resolve("auto", gpu) == "triton"
    usable.add("moe_locality.kernels.cuda_impl")
    assert ops._resolve("auto", gpu) == "cuda"
    assert ops._resolve("auto", torch.device("cpu")) == "reference"
    assert ops._resolve("triton", gpu) == "triton"


@pytest.mark.usefixtures("fresh")
def test_without_its_library_the_cuda_backend_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(cuda_impl, "LIBRARY", "_not_built.so")
    with pytest.raises(BackendUnavailable, match=r"has no CUDA extension.*MOE_LOCALITY_CUDA=1 pip"):
        ops.check_backend("cuda")


@pytest.mark.usefixtures("fresh")
def test_a_library_of_another_torch_says_so(monkeypatch, tmp_path):
    (tmp_path / "a.so").write_bytes(b"no library")
    monkeypatch.setattr(cuda_impl, "LIBRARY", str(tmp_path / "a.so"))
    assert "cannot be loaded by torch" in str(cuda_impl.why_unavailable())


def test_the_environment_chooses_when_nothing_else_does(monkeypatch):
    monkeypatch.setenv(ops.ENVIRONMENT_VARIABLE, "triton")
    assert ops._resolve("auto", torch.device("cpu")) == "triton"
    ops.set_backend("reference")
    assert ops._resolve("auto", torch.device("cpu")) == "reference"

"""What the wheel and the sdist hold: a pure-Python package that needs no compiler, and the sources
of the kernels.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the sources: setuptools writes build/ and egg-info beside them."""
    folder = tmp_path_factory.mktemp("checkout") / "src"
    ignore = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=ignore)
    return folder


def attempt(checkout: Path, command: str, out: Path, **environment: str):
    code = f"import setuptools.build_meta as b; print(b.build_{command}({str(out)!r}))"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def build(checkout: Path, command: str, out: Path, **environment: str) -> Path:
    result = attempt(checkout, command, out, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    (made,) = out.iterdir()
    return made


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def cuda_torch_and_broken_nvcc(tmp_path) -> dict[str, str]:
    """A machine as setup.py sees it: a torch with CUDA, and an nvcc that only fails."""
    folder = tmp_path / "site" / "torch"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "version.py").write_text("cuda: Optional[str] = '13.0'\n")
    program(folder / "include/torch/csrc/stable/library.h", "")
    program(tmp_path / "cuda/bin/nvcc", "#!/bin/sh\necho no device code today >&2\nexit 1\n")
    return {"PYTHONPATH": str(folder.parent), "CUDA_HOME": str(tmp_path / "cuda")}


def test_the_wheel_is_pure_python_and_complete(checkout, tmp_path):
    wheel = build(checkout, "wheel", tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "moe_locality").rglob("*.py")}
    assert modules <= names
    shipped = {str(p.relative_to(ROOT)) for p in (ROOT / "examples").rglob("*.py")}
    assert {f"moe_locality/{name}" for name in shipped} <= names, "the demo needs its model"
    assert not [
        n for n in names if n.endswith((".npz", ".parquet", ".so")) or n.startswith("tests")
    ]


def test_the_sdist_holds_kernels_examples_and_tests(checkout, tmp_path):
    sdist = build(checkout, "sdist", tmp_path)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    assert {"csrc/binding.cpp", "csrc/kernels.h", "csrc/vectors.cuh", "csrc/row_map.cu"} <= sources
    assert sources <= names
    assert {"setup.py", "LICENSE", "Makefile"} <= names
    assert {"tests/launch.py", "examples/train_lm.py", "launch/train.sh"} <= names
    assert not [n for n in names if n.endswith((".npz", ".parquet"))]


def test_a_failing_build_does_not_fail_an_install(checkout, tmp_path, cuda_torch_and_broken_nvcc):
    out = tmp_path / "out"
    environment = {**cuda_torch_and_broken_nvcc, "MOE_LOCALITY_CUDA": "auto"}
    result = attempt(checkout, "wheel", out, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    said = result.stdout + result.stderr
    assert "no device code today" in said, "nvcc was not asked, so nothing was tested"
    (wheel,) = out.iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    assert "moe_locality/kernels/cuda_impl.py" in names
    assert not [name for name in names if name.endswith(".so")]


def test_a_demanded_build_fails_loudly(checkout, tmp_path, cuda_torch_and_broken_nvcc):
    environment = {**cuda_torch_and_broken_nvcc, "MOE_LOCALITY_CUDA": "1"}
    result = attempt(checkout, "wheel", tmp_path / "out", **environment)
    assert result.returncode != 0
    first = min(path.name for path in (ROOT / "csrc").glob("*.cu"))
    assert f"nvcc failed on {first}" in result.stdout + result.stderr
    nothing = {"CUDA_HOME": str(tmp_path), "PYTHONPATH": environment["PYTHONPATH"]}
    result = attempt(checkout, "wheel", tmp_path / "out", MOE_LOCALITY_CUDA="1", **nothing)
    assert result.returncode != 0
    assert "MOE_LOCALITY_CUDA=1 needs nvcc: install it, or unset it" in result.stderr


def test_an_unknown_wish_is_refused(checkout, tmp_path):
    result = attempt(checkout, "wheel", tmp_path, MOE_LOCALITY_CUDA="yes")
    assert "MOE_LOCALITY_CUDA=yes is unknown, expected auto, 0, 1, check" in result.stderr


def test_version_is_said_once():
    import moe_locality

    text = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in text
    assert moe_locality.__version__.count(".") == 2

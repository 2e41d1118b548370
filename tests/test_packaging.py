"""What the wheel and the sdist hold: a pure-Python package that needs no compiler, and the sources
of the kernels.
"""

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


def build(checkout: Path, command: str, out: Path) -> Path:
    code = f"import setuptools.build_meta as b; print(b.build_{command}({str(out)!r}))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (made,) = out.iterdir()
    return made


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
    assert {"csrc/permute.cu", "csrc/permute.cuh", "setup.py", "LICENSE", "Makefile"} <= names
    assert {"tests/launch.py", "examples/train_lm.py", "launch/train.sh"} <= names
    assert not [n for n in names if n.endswith((".npz", ".parquet"))]


def test_version_is_said_once():
    import moe_locality

    text = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in text
    assert moe_locality.__version__.count(".") == 2

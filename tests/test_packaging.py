"""What the wheel and the sdist hold: a pure-Python package that needs no compiler, and the sources
of the kernels.
"""

import ast
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the sources: setuptools writes build/ and egg-info beside them."""
    folder = tmp_path_factory.mktemp("checkout") / "src"
    ignore = shutil.ignore_patterns(
        ".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "*.so"
    )
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
    wheel = build(checkout, "wheel", tmp_path, MOE_LOCALITY_CUDA="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "moe_locality").rglob("*.py")}
    assert modules <= names
    assert "moe_locality/py.typed" in names
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


def test_one_python_version_is_the_oldest_everywhere():
    """The README said 3.11, pyproject.toml 3.10, for which numpy and others are too new. [A4]"""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (oldest,) = re.fullmatch(r">=(3\.\d+)", project["project"]["requires-python"]).groups()
    short = oldest.replace(".", "")
    assert f"Python {oldest} or newer" in (ROOT / "README.md").read_text()
    assert f"Python ≥ {oldest}" in (ROOT / "docs" / "design.md").read_text()
    assert project["tool"]["ruff"]["target-version"] == f"py{short}"
    assert project["tool"]["pyright"]["pythonVersion"] == oldest
    setup = (ROOT / "setup.py").read_text()
    assert f'"cp{short}"' in setup
    assert f'"0x03{int(short[1:]):02X}0000"' in setup
    assert f"sys.version_info < (3, {short[1:]})" in (ROOT / "Makefile").read_text()
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints-dev.txt").read_text(), re.MULTILINE)
    for name in pinned:
        with contextlib.suppress(metadata.PackageNotFoundError):
            needed = SpecifierSet(metadata.metadata(name).get("Requires-Python", ""))
            assert f"{oldest}.99" in needed, f"{name} as pinned needs Python {needed}"


def test_installing_prints_one_line_for_each_step(tmp_path):
    """pip printed 60 lines of warnings on some machines. [A4]"""
    log = tmp_path / "calls"
    python = tmp_path / "python"
    program(
        python,
        "#!/bin/sh\n"
        f'echo "$@" >> {log}\n'
        'if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi\n'
        'case "$*" in *"pip install"*) case "$*" in *-qq*) ;; *) echo WARNING >&2;; esac;; esac\n',
    )
    line = [
        "make",
        f"VENV={tmp_path / 'venv'}",
        f"PYTHON={python}",
        str(tmp_path / "venv/.installed"),
    ]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert [row[:3] for row in done.stdout.splitlines()] == [f"{i}/5" for i in range(1, 6)]
    assert len([row for row in log.read_text().splitlines() if "pip install -qq" in row]) == 4


def test_types_are_checked_against_the_environment_and_examples_drawn_on_request():
    """pyright saw none of the packages: 202 warnings. [A1, A4]"""
    made = subprocess.run(
        ["make", "-n", "-o", "some/.installed", "VENV=some", "check", "test-random"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    ).stdout  # fmt: skip
    assert "some/bin/pyright --pythonpath some/bin/python" in made
    assert "MOE_LOCALITY_HYPOTHESIS=random some/bin/python -m pytest" in made


def test_everyone_tests_the_same_examples_unless_others_are_asked_for(tmp_path):
    """Whether `make test` passed hung on what hypothesis drew. [A1]"""
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_drawn.py").write_text(
        "from hypothesis import given, strategies as st\n"
        "@given(st.integers(0, 10**9))\n"
        "def test_drawn(number):\n"
        "    with open('drawn', 'a') as file:\n"
        "        file.write(f'{number} ')\n"
        "    assert number < 10**8\n"
    )

    plugins = ["-p", "no:cacheprovider", "-p", "_hypothesis_pytestplugin"]  # and no others

    def drawn(**environment):
        environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        (tmp_path / "drawn").unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *plugins, "test_drawn.py"],
            cwd=tmp_path, capture_output=True, text=True, timeout=120,
            env={**os.environ, "MOE_LOCALITY_HYPOTHESIS": "same", **environment},
        )  # fmt: skip
        assert done.returncode == 1
        return (tmp_path / "drawn").read_text(), done.stdout

    same = drawn()[0]
    assert drawn()[0] == same
    other, output = drawn(MOE_LOCALITY_HYPOTHESIS="random")
    assert other != same
    assert "@reproduce_failure(" in output


MODULES = {"pillow": "PIL", "pyyaml": "yaml", "accelerate": "transformers"}
"""Package → module that our code imports; transformers loads no spread model without accelerate."""


def imported() -> set[str]:
    """Top modules that the package and the examples import, in functions too."""
    found = set()
    for folder in ("moe_locality", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    found.add(node.module.partition(".")[0])
    return found


def test_what_is_installed_and_looked_for_is_imported_by_some_code():
    """The extras named prometheus-client and safetensors, and doctor asked for them, [C2]
    though no code imported either.
    """
    from moe_locality.commands.doctor import WANTED

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {**project["optional-dependencies"], "dependencies": project["dependencies"]}
    del named["dev"]
    used, lists = imported(), {**named, "doctor": [wanted[0] for wanted in WANTED]}
    for name, packages in lists.items():
        for entry in packages:
            package = re.match(r"[\w-]+", entry)[0]
            module = MODULES.get(package, package.replace("-", "_"))
            assert module in used, f"{name} names {package}, which nothing imports"
    extras = {wanted[3] for wanted in WANTED} - {None}
    assert extras <= project["optional-dependencies"].keys()

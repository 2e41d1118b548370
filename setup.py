"""Build rules. ``pip install .`` makes a pure-Python package and needs no compiler.

``MOE_LOCALITY_CUDA`` says what happens to the CUDA kernels of ``csrc/``:

* ``auto`` (default): built where a CUDA torch, nvcc and a C++ compiler are there; what fails is
  left out with a warning, and the package works without.
* ``1``: built, or the install fails and says why. ``0``: not built.
* ``check``: every .cu is compiled for every architecture below, and the binding against the torch
  that is installed, without linking or a GPU.

Building needs the torch that it will run with: ``pip install --no-build-isolation``.
``TORCH_CUDA_ARCH_LIST`` (such as ``9.0a``) chooses other architectures.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = ROOT / "csrc"
ARCHITECTURES = "8.0;9.0a;10.0a"
STABLE_ABI = "0x020a000000000000"  # LibTorch 2.10: one library for this and later versions
LIMITED_API = "0x030B0000"  # CPython 3.11
LIBRARY = "moe_locality._C_cuda"
MODES = ("auto", "0", "1", "check")


def find_torch() -> Path | None:
    """The folder of the installed torch, if it has the stable ABI; it is not imported."""
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        return None
    folder = Path(spec.origin).parent if spec and spec.origin else None
    header = "include/torch/csrc/stable/library.h"
    return folder if folder and (folder / header).exists() else None


def is_cuda_torch(folder: Path) -> bool:
    return re.search(r"^cuda\b.*=\s*['\"]\d", (folder / "version.py").read_text(), re.M) is not None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def find_cxx() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++").split()[0]) or shutil.which("g++")


def cuda_libraries(nvcc: str) -> list[str]:
    """Ask nvcc where its toolkit is: nvcc may be a wrapper elsewhere."""
    command = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    found = re.search(r"^#\$ TOP=(.*)$", said, re.M)
    top = Path(found.group(1)).resolve() if found else Path(nvcc).resolve().parents[1]
    folders = (top / "lib64", top / "lib", top / "targets/x86_64-linux/lib")
    return [str(folder) for folder in folders if folder.is_dir()]


def nvcc_flags() -> list[str]:
    flags = ["-std=c++17", "-O3", "--Werror", "all-warnings", "--threads", "0"]
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
    for name in re.split(r"[;\s]+", wanted.strip()):
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def binding_flags(torch: Path) -> list[str]:
    defines = [f"-DTORCH_TARGET_VERSION={STABLE_ABI}", f"-DPy_LIMITED_API={LIMITED_API}"]
    return ["-std=c++17", "-O3", "-g0", "-Wall", "-fvisibility=hidden", "-DUSE_CUDA", *defines]


class BuildKernels(build_ext):
    """.cu files go through nvcc, the binding through the C++ compiler."""

    def run(self):
        if MODE == "check":
            check(NVCC, TORCH, CXX)
        super().run()

    def build_extension(self, ext):
        for source in sorted(SOURCES.glob("*.cu")):
            made = Path(self.build_temp, source.name + ".o")
            made.parent.mkdir(parents=True, exist_ok=True)
            hidden = ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
            command = [NVCC, "-c", str(source), "-o", str(made), *nvcc_flags(), *hidden]
            try:
                subprocess.run(command, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                from distutils.errors import CompileError  # what Extension(optional=True) catches

                raise CompileError(f"nvcc failed on {source.name}: {error}") from error
            ext.extra_objects.append(str(made))
        super().build_extension(ext)


def check(nvcc: str | None, torch: Path | None, cxx: str | None) -> None:
    """Compile everything, link nothing; the first error ends the build."""
    if not nvcc:
        sys.exit("MOE_LOCALITY_CUDA=check needs nvcc, found none: set CUDA_HOME or install it")
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(SOURCES.glob("*.cu")):
            output = str(Path(folder, source.stem + ".fatbin"))
            subprocess.run([nvcc, "-fatbin", str(source), "-o", output, *nvcc_flags()], check=True)
            wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
            sys.stdout.write(f"csrc/{source.name}: compiled for {wanted}\n")
        if not torch or not cxx:
            sys.stdout.write("csrc/binding.cpp: not compiled, it needs torch 2.10 and a compiler\n")
            return
        include = [f"-I{torch / 'include'}", f"-I{SOURCES}"]
        command = [cxx, "-c", str(SOURCES / "binding.cpp"), "-o", str(Path(folder, "binding.o"))]
        subprocess.run([*command, *binding_flags(torch), *include, "-Werror"], check=True)
        sys.stdout.write("csrc/binding.cpp: compiled against the installed torch\n")


def extension(nvcc: str, torch: Path, *, must: bool) -> Extension:
    return Extension(
        LIBRARY,
        ["csrc/binding.cpp"],
        language="c++",
        py_limited_api=True,
        optional=not must,
        include_dirs=[str(torch / "include"), "csrc"],
        library_dirs=[str(torch / "lib"), *cuda_libraries(nvcc)],
        libraries=["torch_cpu", "c10", "cudart_static", "dl", "rt", "pthread"],
        extra_compile_args=binding_flags(torch),
        # libtorch must stay needed, or the linker drops it and with it libtorch_cuda, where the
        # stream comes from
        extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-s"],
    )


def extensions() -> list[Extension]:
    missing = [
        name
        for name, found in (
            ("torch >= 2.10 in this environment (pip install --no-build-isolation)", TORCH),
            ("nvcc", NVCC),
            ("a C++ compiler", CXX),
        )
        if not found
    ]
    if MODE == "1":
        if missing:
            sys.exit(f"MOE_LOCALITY_CUDA=1 needs {', '.join(missing)}: install it, or unset it")
        return [extension(NVCC, TORCH, must=True)]  # pyright: ignore[reportArgumentType]
    if MODE == "auto" and not missing and is_cuda_torch(TORCH):  # pyright: ignore
        try:
            return [extension(NVCC, TORCH, must=False)]  # pyright: ignore[reportArgumentType]
        except OSError as error:
            warnings.warn(f"moe_locality without its CUDA kernels: {error}", stacklevel=1)
    return []


MODE = os.environ.get("MOE_LOCALITY_CUDA", "auto")
if MODE not in MODES:
    sys.exit(f"MOE_LOCALITY_CUDA={MODE} is unknown, expected {', '.join(MODES)}")
TORCH, NVCC, CXX = find_torch(), find_nvcc(), find_cxx()
BUILT = extensions()

# The demo runs the example model, so an installed package carries the examples; a checkout uses
# its own folder.
EXAMPLES = ["", *(f".{name}" for name in find_packages("examples"))]

setup(
    packages=[
        *find_packages(include=["moe_locality*"]),
        *(f"moe_locality.examples{e}" for e in EXAMPLES),
    ],
    package_dir={"moe_locality.examples": "examples"},
    package_data={"moe_locality": ["py.typed"]},
    ext_modules=BUILT,
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if BUILT else {},
)

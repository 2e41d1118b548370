"""Build rules. ``pip install .`` makes a pure-Python package and needs no compiler.

``MOE_LOCALITY_CUDA=check`` compiles every kernel of ``csrc/`` for every architecture below and
links nothing: the test of the kernels on a machine without a GPU. The kernels have no Python
binding yet, so ``MOE_LOCALITY_CUDA=1`` (which must build or fail) fails, and ``auto`` and ``0``
build nothing.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
ARCHITECTURES = ("80", "90a", "100a")
MODE = os.environ.get("MOE_LOCALITY_CUDA", "auto")


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if not found:
        sys.exit("MOE_LOCALITY_CUDA=check needs nvcc, found none: set CUDA_HOME or install it")
    return found


class CheckKernels(build_ext):
    """Compile each .cu to one fat binary; the first error ends the build."""

    def run(self):
        if MODE == "check":
            nvcc = [find_nvcc(), "-fatbin", "-std=c++17", "-O3", "--Werror", "all-warnings"]
            nvcc += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
            with tempfile.TemporaryDirectory() as folder:
                for source in sorted((ROOT / "csrc").glob("*.cu")):
                    output = Path(folder, source.stem + ".fatbin")
                    subprocess.run([*nvcc, str(source), "-o", str(output)], check=True)
                    compiled = ", ".join(f"sm_{a}" for a in ARCHITECTURES)
                    sys.stdout.write(f"csrc/{source.name}: compiled for {compiled}\n")
        super().run()


if MODE not in ("auto", "0", "1", "check"):
    sys.exit(f"MOE_LOCALITY_CUDA={MODE} is unknown, expected auto, 0, 1 or check")
if MODE == "1":
    sys.exit(
        "MOE_LOCALITY_CUDA=1: the CUDA extension cannot be built yet; "
        "unset it for the pure-Python package"
    )

# The demo runs the example model, so an installed package carries the examples; a checkout uses
# its own folder.
EXAMPLES = ["", *(f".{name}" for name in find_packages("examples"))]

setup(
    packages=[
        *find_packages(include=["moe_locality*"]),
        *(f"moe_locality.examples{e}" for e in EXAMPLES),
    ],
    package_dir={"moe_locality.examples": "examples"},
    cmdclass={"build_ext": CheckKernels},
)

"""Build rules. ``pip install .`` makes a pure-Python package and needs no compiler.

``MOE_LOCALITY_CUDA=check`` compiles every kernel of ``csrc/`` for every architecture below and links nothing: the
test of the kernels on a machine without a GPU. The kernels have no Python binding yet, so ``MOE_LOCALITY_CUDA=1``
(which must build or fail) fails, and ``auto`` and ``0`` build nothing.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
ARCHITECTURES = ("80", "90a", "100a")
MODE = os.environ.get("MOE_LOCALITY_CUDA", "auto")


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if not found:
        sys.exit("MOE_LOCALITY_CUDA=check needs nvcc, found none: set CUDA_HOME or install nvidia-cuda-nvcc")
    return found


class CheckKernels(build_ext):
    """Compile each .cu to one fat binary; the first error ends the build."""

    def run(self):
        if MODE == "check":
            gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
            with tempfile.TemporaryDirectory() as folder:
                for source in sorted((ROOT / "csrc").glob("*.cu")):
                    output = Path(folder, source.stem + ".fatbin")
                    command = [find_nvcc(), "-fatbin", str(source), "-o", str(output), "-std=c++17", "-O3"]
                    subprocess.run([*command, "--Werror", "all-warnings", *gencode], check=True)
                    print(f"csrc/{source.name}: compiled for {', '.join('sm_' + a for a in ARCHITECTURES)}")
        super().run()


if MODE not in ("auto", "0", "1", "check"):
    sys.exit(f"MOE_LOCALITY_CUDA={MODE} is unknown, expected auto, 0, 1 or check")
if MODE == "1":
    sys.exit("MOE_LOCALITY_CUDA=1: the CUDA extension cannot be built yet; unset it for the pure-Python package")

setup(cmdclass={"build_ext": CheckKernels})

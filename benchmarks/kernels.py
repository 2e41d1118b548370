"""The local kernels on a GPU: build, tests, memory checks, timings against peers. ``make gpu``.

    python benchmarks/kernels.py [--part build,test,sanitize,ours,...] [--dry]
    python benchmarks/kernels.py --part cpu --csv benchmarks/results.csv

Times are of CUDA graphs of the work (what cannot be captured is timed as launched, and says so),
rotating over several inputs, in rounds that interleave all candidates: medians of the rounds with
bootstrap intervals of 95 %. Shares are of the copy bandwidth measured in the same process, plain
and with the operation's own mix of reads and writes, over the bytes that it cannot avoid: u = T * D
* element bytes; permute (1 + K) u, combine (K + 1) u, its backward (2K + 1) u, and (5K + 4) u for
everything. Nothing is timed before its result is that of the reference. ``--dry`` runs all of it on
the CPU, the reference and (where it is installed) Triton's interpreter, on tiny shapes, and reports
no time. docs/kernels.md says how peers get onto a machine without internet.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

PARTS = ("build", "test", "sanitize", "ours", "peers", "quantize", "layer")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", default=",".join(PARTS), help="comma-separated, all by default")
    parser.add_argument("--dry", action="store_true", help="on the CPU, tiny, no figures")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "kernels")
    parser.add_argument("--csv", type=Path, help="append rows of measured figures here")
    args = parser.parse_args()
    parts = args.part.split(",")
    unknown = sorted(set(parts) - {*PARTS, "cpu"})
    if unknown:
        parser.error(f"found part {unknown[0]!r}, expected some of {', '.join(PARTS)}, cpu")
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    import kernel_measures as measures
    import torch
    from kernel_report import print_tables, write_rows

    if not args.dry and parts != ["cpu"] and not torch.cuda.is_available():
        print("torch sees no CUDA device here: use --dry, or run on a machine with an NVIDIA GPU")
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    steps: dict[str, Callable[[bool], Any]] = {
        "build": build,
        "test": run_tests,
        "sanitize": sanitize,
        "ours": measures.measure_ours,
        "peers": measures.measure_peers,
        "quantize": measures.measure_quantize,
        "layer": measures.measure_layer,
        "cpu": measures.measure_cpu,
    }
    on_cpu = args.dry or parts == ["cpu"]
    report: dict[str, Any] = {"dry": args.dry, "machine": machine(on_cpu)}
    for part in parts:
        report[part] = steps[part](args.dry)
        path = args.out / report_name(parts, args.dry)
        path.write_text(json.dumps(report, indent=1) + "\n")
    print_tables(report)
    print(f"written: {path}")
    if args.csv and not args.dry:
        write_rows(args.csv, report)
    failed = [part for part in parts if report[part] == "failed"]
    print("dry run: no figure was measured" if args.dry else f"failed parts: {failed or 'none'}")
    return 1 if failed else 0


def report_name(parts: list[str], dry: bool) -> str:
    """A call for some parts must not write over the report of another."""
    which = "" if parts == list(PARTS) else "-" + "-".join(parts)
    return f"kernels{'_dry' if dry else ''}{which}.json"


def machine(on_cpu: bool) -> dict[str, str]:
    """What a figure depends on; clocks are read, never set."""
    import torch
    from kernel_peers import all_peers

    found = {"python": platform.python_version(), "torch": torch.__version__, "device": "cpu"}
    if not on_cpu:
        found["device"] = torch.cuda.get_device_name()
        found["capability"] = "{}.{}".format(*torch.cuda.get_device_capability())
        found |= driver_and_clocks()
    for name in sorted({"triton"} | {peer.distribution for peer in all_peers()} - {"torch"}):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def driver_and_clocks() -> dict[str, str]:
    fields = ("driver_version", "clocks.sm", "clocks.mem")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", "0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, done.stdout.strip().split(", "), strict=False))


# -- build, tests, memory checks
# -------------------------------------------------------------------


def _run(command: list[str], seconds: int, cwd: Path = ROOT, **environment: str) -> str:
    print("+", " ".join(command), flush=True)
    try:
        done = subprocess.run(
            command, cwd=cwd, env={**os.environ, **environment}, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return "failed"
    return "ok" if done.returncode == 0 else "failed"


def build(dry: bool) -> str:
    """Build the extension beside a copy of setup.py alone: an older setuptools than the one that
    pyproject.toml asks for is enough, and nothing is installed.
    """
    if dry:
        return "left out: a dry run builds nothing"
    import torch

    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}.{minor}a" if major >= 9 else f"{major}.{minor}"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(ROOT / "setup.py", folder)
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        (folder / "moe_locality").mkdir()
        wanted = {"MOE_LOCALITY_CUDA": "1", "TORCH_CUDA_ARCH_LIST": arch}
        done = _run(command, 420, cwd=folder, **wanted)
        for library in (folder / "moe_locality").glob("*.so"):
            shutil.copy(library, ROOT / "moe_locality")
    return done


def run_tests(dry: bool) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "tests/gpu"]
    if dry:  # collected and skipped: every test needs the GPU
        return _run([*command, "-m", "gpu", "--collect-only"], 120)
    return _run([*command, "-m", "gpu"], 420)


def sanitize(dry: bool) -> str:
    tool = shutil.which("compute-sanitizer")
    if dry or tool is None:
        return "left out: " + ("a dry run has no GPU" if dry else "no compute-sanitizer on PATH")
    test = ["tests/gpu", "-m", "gpu", "-k", "smallest", "-q"]
    checks = ("memcheck", "racecheck")
    done = [
        _run(
            [tool, "--tool", check, "--error-exitcode", "1", sys.executable, "-m", "pytest", *test],
            200,
        )
        for check in checks
    ]
    return "failed" if "failed" in done else "ok"


if __name__ == "__main__":
    start = time.perf_counter()
    code = main()
    print(f"{time.perf_counter() - start:.0f} s")
    sys.exit(code)

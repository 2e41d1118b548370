"""The local kernels on a GPU: build, tests, memory checks, timings against peers. ``make gpu``.

    python benchmarks/kernels.py [--part build,test,sanitize,ours,peers] [--dry] [--out DIR] [--csv]
    python benchmarks/kernels.py --part cpu

Times are of CUDA graphs of the work (what cannot be captured is timed as launched, and says so),
rotating over several inputs, in rounds that interleave all candidates; medians of the rounds. The
share is of the copy bandwidth measured in the same process, over the bytes that an operation cannot
avoid: u = T * D * element bytes; permute (1 + K) u, combine (K + 1) u, its backward (2K + 1) u, and
(5K + 4) u for everything. ``--dry`` runs all of it on the CPU, the reference and (where it is
installed) Triton's interpreter, on tiny shapes, and reports no time.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

PARTS = ("build", "test", "sanitize", "ours", "peers")
CPU_SHAPE = (8192, 1024, 64, 8)
SHAPES = {  # T, D, E, K
    "A Mixtral": (8192, 4096, 8, 2),
    "B Qwen3-30B": (8192, 2048, 128, 8),
    "C DeepSeek-V3": (4096, 7168, 256, 8),
    "D OLMoE": (16384, 2048, 64, 8),
    "E Switch": (8192, 4096, 64, 1),
    "F decode": (128, 7168, 256, 8),
}
DRY_SHAPES = {"dry": (6, 16, 4, 2), "dry, one expert": (5, 8, 1, 1)}
ROUNDS, WARM_UP, BUFFERS = 7, 5, 4
BOUND = 3e-2  # of results in bfloat16, relative to their largest


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
        "ours": measure_ours,
        "peers": measure_peers,
        "cpu": measure_cpu,
    }
    on_cpu = args.dry or parts == ["cpu"]
    report: dict[str, Any] = {"dry": args.dry, "machine": machine(on_cpu)}
    for part in parts:
        report[part] = steps[part](args.dry)
        path = args.out / ("kernels_dry.json" if args.dry else "kernels.json")
        path.write_text(json.dumps(report, indent=1) + "\n")
    print_tables(report)
    print(f"written: {path}")
    if args.csv and not args.dry:
        write_rows(args.csv, report)
    failed = [part for part in parts if report[part] == "failed"]
    print("dry run: no figure was measured" if args.dry else f"failed parts: {failed or 'none'}")
    return 1 if failed else 0


def machine(dry: bool) -> dict[str, str]:
    import platform

    import torch

    found = {"python": platform.python_version(), "torch": torch.__version__, "device": "cpu"}
    if not dry:
        found["device"] = torch.cuda.get_device_name()
        found["capability"] = "{}.{}".format(*torch.cuda.get_device_capability())
    for name in ("triton", "deepspeed", "transformer_engine", "megatron-core"):
        from importlib import metadata

        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


# -- build, tests, memory checks
# -------------------------------------------------------------------


def _run(command: list[str], seconds: int, **environment: str) -> str:
    print("+", " ".join(command), flush=True)
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **environment}, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return "failed"
    return "ok" if done.returncode == 0 else "failed"


def build(dry: bool) -> str:
    if dry:
        return "left out: a dry run builds nothing"
    import torch

    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}.{minor}a" if major >= 9 else f"{major}.{minor}"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return _run(command, 420, MOE_LOCALITY_CUDA="1", TORCH_CUDA_ARCH_LIST=arch)


def run_tests(dry: bool) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "tests/gpu/test_local_kernels.py"]
    if dry:  # collected and skipped: every test needs the GPU
        return _run([*command, "-m", "gpu", "--collect-only"], 120)
    return _run([*command, "-m", "gpu"], 420)


def sanitize(dry: bool) -> str:
    tool = shutil.which("compute-sanitizer")
    if dry or tool is None:
        return "left out: " + ("a dry run has no GPU" if dry else "no compute-sanitizer on PATH")
    test = ["tests/gpu/test_local_kernels.py", "-m", "gpu", "-k", "smallest", "-q"]
    checks = ("memcheck", "racecheck")
    done = [
        _run(
            [tool, "--tool", check, "--error-exitcode", "1", sys.executable, "-m", "pytest", *test],
            200,
        )
        for check in checks
    ]
    return "failed" if "failed" in done else "ok"


# -- timings
# ---------------------------------------------------------------------------------------


def make_case(name: str, shape: tuple[int, int, int, int], seed: int, dry: bool):
    import torch
    from kernel_peers import Case

    tokens, width, experts, top_k = shape
    device = "cpu" if dry else "cuda"
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :top_k].int()
    weights = torch.rand(tokens, top_k, generator=generator)
    weights /= weights.sum(dim=1, keepdim=True)
    x, grad = (torch.randn(tokens, width, generator=generator).bfloat16() for _ in range(2))
    return Case(
        name=name,
        x=x.to(device),
        grad=grad.to(device),
        ids=ids.to(device),
        weights=weights.to(device),
        num_experts=experts,
    )


def time_gpu(candidates: dict[str, list[Callable[[], Any]]]) -> dict[str, dict[str, Any]]:
    """Median microseconds of one call: a candidate is a list of the same work on other buffers."""
    import torch

    plays = {}
    for name, calls in candidates.items():
        for _ in range(WARM_UP):
            for call in calls:
                call()
        torch.cuda.synchronize()
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
            plays[name] = (graph.replay, True)
        except RuntimeError:
            torch.cuda.synchronize()
            plays[name] = (lambda calls=calls: [call() for call in calls], False)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(ROUNDS):
        for name, (play, _) in plays.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            play()
            begin.record()
            play()
            end.record()
            torch.cuda.synchronize()
            times[name].append(1e3 * begin.elapsed_time(end) / len(candidates[name]))
    return {
        name: {
            "median_us": statistics.median(t),
            "min_us": min(t),
            "max_us": max(t),
            "captured": plays[name][1],
        }
        for name, t in times.items()
    }


def run_once(candidates: dict[str, list[Callable[[], Any]]]) -> dict[str, dict[str, Any]]:
    """What a dry run does instead of timing."""
    for calls in candidates.values():
        calls[0]()
    return {name: {"ran": True} for name in candidates}


def copy_gbps() -> float:
    """Bytes read and written per nanosecond by a copy of 1 GiB."""
    import torch

    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    found = time_gpu({"copy": [lambda: target.copy_(source)]})["copy"]
    return 2 * 2**30 / found["median_us"] / 1e3


def usable_backends() -> list[str]:
    from moe_locality.errors import BackendUnavailable
    from moe_locality.kernels import ops

    found = []
    for name in ops.BACKENDS:
        try:
            ops.check_backend(name)  # pyright: ignore[reportArgumentType]
            found.append(name)
        except BackendUnavailable as error:  # noqa: PERF203
            print(f"{name}: {error}")
    return found


def measure_ours(dry: bool) -> dict[str, Any]:
    """Each operation of each backend, its share of the copy bandwidth over its own floor."""
    backends = usable_backends()
    peak = None if dry else copy_gbps()
    report: dict[str, Any] = {"copy_gbps": peak, "backends": backends, "shapes": {}}
    for name, shape in (DRY_SHAPES if dry else SHAPES).items():
        cases = [make_case(name, shape, seed, dry) for seed in range(1 if dry else BUFFERS)]
        candidates: dict[str, list[Callable[[], Any]]] = {}
        for backend in backends:
            for case in cases:
                for op, call in operations(case, backend).items():
                    candidates.setdefault(f"{op} | {backend}", []).append(call)
        found = run_once(candidates) if dry else time_gpu(candidates)
        floors = floors_bytes(shape)
        for label, facts in found.items():
            floor = floors.get(label.split(" | ")[0])
            if peak and floor:
                facts["gbps"] = floor / facts["median_us"] / 1e3
                facts["share_of_copy"] = facts["gbps"] / peak
        report["shapes"][name] = found
        del cases, candidates
    return report


def operations(case: Any, backend: Any) -> dict[str, Callable[[], Any]]:
    import torch
    from kernel_peers import ours

    from moe_locality.kernels import ops
    from moe_locality.kernels.types import GateSpec

    spec = GateSpec(top_k=case.ids.shape[1], renormalize=True)
    logits = torch.randn(len(case.x), case.num_experts, device=case.x.device)
    where = ops.row_map(case.ids, case.num_experts, num_rows=case.num_rows, backend=backend)
    rows = ops.permute(case.x, where, backend=backend)
    nodes = torch.arange(case.num_experts, device=case.x.device, dtype=torch.int32) % 4
    options = {"num_rows": case.num_rows, "node_of_slot": nodes, "num_nodes": 4}
    return {
        "gate": lambda: ops.gate(logits, spec, backend=backend),
        "row_map": lambda: ops.row_map(case.ids, case.num_experts, **options, backend=backend),
        "permute": lambda: ops.permute(case.x, where, backend=backend),
        "combine": lambda: ops.combine(rows, where.positions, case.weights, backend=backend),
        "permute_backward": lambda: ops.permute_backward(rows, where.positions, backend=backend),
        "combine_backward": lambda: ops.combine_backward(
            case.grad, rows, where, case.weights, backend=backend
        ),
        "everything": ours(case, backend),
    }


def floors_bytes(shape: tuple[int, int, int, int]) -> dict[str, int]:
    tokens, width, _, top_k = shape
    unit = tokens * width * 2
    return {
        "permute": (1 + top_k) * unit,
        "combine": (1 + top_k) * unit,
        "permute_backward": (1 + top_k) * unit,
        "combine_backward": (1 + 2 * top_k) * unit,
        "everything": (4 + 5 * top_k) * unit,
    }


def measure_peers(dry: bool) -> dict[str, Any]:
    """Map, permute, combine and both backwards, ours and theirs, after their results agree."""
    from kernel_peers import PEERS, ours, ours_with_autograd

    backends = usable_backends()
    report: dict[str, Any] = {"shapes": {}}
    for name, shape in (DRY_SHAPES if dry else SHAPES).items():
        cases = [make_case(name, shape, seed, dry) for seed in range(1 if dry else BUFFERS)]
        wanted = ours(cases[0], "reference")()
        makers = {f"ours, {b}": (lambda case, b=b: ours(case, b)) for b in backends}
        makers[f"ours, {backends[-1]}, autograd"] = lambda c: ours_with_autograd(c, backends[-1])
        steps, notes = {}, {}
        for label, make in {**makers, **PEERS}.items():
            try:
                steps[label] = [make(case) for case in cases]
                notes[label] = disagreement(steps[label][0](), wanted)
            except Exception as error:  # noqa: BLE001, PERF203 - a peer may fail in any way
                notes[label] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        agreeing = {label: calls for label, calls in steps.items() if not notes[label]}
        found = run_once(agreeing) if dry else time_gpu(agreeing)
        report["shapes"][name] = found | {n: {"left_out": why} for n, why in notes.items() if why}
        del cases, steps, agreeing
    return report


def measure_cpu(dry: bool) -> dict[str, Any]:
    """Map, permute, combine and both backwards on the CPU, against index_select and index_add."""
    import torch
    from kernel_peers import ours_with_autograd, torch_index_add

    shape = DRY_SHAPES["dry"] if dry else CPU_SHAPE
    case = make_case("cpu", shape, 0, dry=True)
    steps = {"ours": ours_with_autograd(case, "reference"), "index_add": torch_index_add(case)}
    for label, step in steps.items():
        why = disagreement(step(), steps["index_add"]())
        assert not why, f"{label}: {why}"
    if dry:
        return {"shapes": {"cpu": run_once({label: [step] for label, step in steps.items()})}}
    times: dict[str, list[float]] = {label: [] for label in steps}
    for _ in range(ROUNDS):
        for label, step in steps.items():
            begin = time.perf_counter()
            step()
            times[label].append(1e6 * (time.perf_counter() - begin))
    tokens, width, experts, top_k = shape
    threads = torch.get_num_threads()
    name = f"CPU, {threads} threads, T={tokens} D={width} E={experts} K={top_k} bf16"
    facts = {
        label: {"median_us": statistics.median(t), "min_us": min(t), "max_us": max(t)}
        for label, t in times.items()
    }
    return {"shapes": {name: {n: f | {"captured": True} for n, f in facts.items()}}}


def disagreement(found: tuple, wanted: tuple) -> str:
    for name, ours, theirs in zip(("out", "grad_x", "grad_weights"), wanted, found, strict=True):
        scale = float(ours.float().abs().max()) or 1.0
        error = float((ours.float() - theirs.float()).abs().max()) / scale
        if not error <= BOUND:
            return f"its {name} differs from the reference by {error:.1e} of the largest value"
    return ""


if __name__ == "__main__":
    start = time.perf_counter()
    code = main()
    print(f"{time.perf_counter() - start:.0f} s")
    sys.exit(code)

"""What ``benchmarks/kernels.py`` measures: our operations, peers, the fused codec, the CPU."""

from collections.abc import Callable
from typing import Any

import torch
from kernel_cases import (
    CPU_SHAPE,
    DRY_SHAPES,
    SHAPES,
    Case,
    disagreement,
    floors_bytes,
    make_case,
    mixes,
    ours,
    ours_forward,
    ours_with_autograd,
)
from kernel_timing import BUFFERS, copy_gbps, mix_gbps, run_once, time_cpu, time_gpu

from moe_locality.errors import BackendUnavailable
from moe_locality.kernels import ops


def usable_backends() -> list[Any]:
    """The backends that run here, the fastest last; why another one does not is printed."""
    found = []
    for name in ops.BACKENDS:
        try:
            ops.check_backend(name)  # pyright: ignore[reportArgumentType]
            found.append(name)
        except BackendUnavailable as error:
            print(f"{name}: {error}")
    return found


def cases_of(name: str, shape: tuple[int, int, int, int], dry: bool) -> list[Case]:
    device = "cpu" if dry else "cuda"
    return [make_case(name, shape, seed, device=device) for seed in range(1 if dry else BUFFERS)]


def measure_ours(dry: bool) -> dict[str, Any]:
    """Each operation of each backend, its share of two copies over its own floor of bytes."""
    backends = usable_backends()
    copy = None if dry else copy_gbps()
    ceilings: dict[tuple[int, int], float | None] = {}
    report: dict[str, Any] = {"copy_gbps": copy, "backends": backends, "shapes": {}}
    for name, shape in (DRY_SHAPES if dry else SHAPES).items():
        cases = cases_of(name, shape, dry)
        candidates: dict[str, list[Callable[[], Any]]] = {}
        for backend in backends:
            for case in cases:
                for op, call in operations(case, backend).items():
                    candidates.setdefault(f"{op} | {backend}", []).append(call)
        found = run_once(candidates) if dry else time_gpu(candidates)
        for mix in mixes(shape[3]).values():
            if mix not in ceilings:
                ceilings[mix] = mix_gbps(*mix, dry=dry)
        for label, facts in found.items():
            op = label.split(" | ")[0]
            floor, mix = floors_bytes(shape).get(op), mixes(shape[3]).get(op)
            if copy and floor:
                facts |= shares(facts, floor, copy, ceilings[mix] if mix else None)
        report["shapes"][name] = found
        del cases, candidates
    report["mix_gbps"] = {f"{reads}:{writes}": rate for (reads, writes), rate in ceilings.items()}
    return report


def shares(
    facts: dict[str, Any], floor_bytes: int, copy: float, mixed: float | None
) -> dict[str, float]:
    """The rate over the bytes that cannot be avoided, and its shares, with the interval's ends."""
    gbps = floor_bytes / facts["median_us"] / 1e3
    found = {
        "gbps": gbps,
        "share_of_copy": gbps / copy,
        "share_of_copy_low": floor_bytes / facts["high_us"] / 1e3 / copy,
        "share_of_copy_high": floor_bytes / facts["low_us"] / 1e3 / copy,
    }
    return found | ({"share_of_mix": gbps / mixed} if mixed else {})


def operations(case: Case, backend: Any) -> dict[str, Callable[[], Any]]:
    where = ops.row_map(case.ids, case.num_experts, num_rows=case.num_rows, backend=backend)
    rows = ops.permute(case.x, where, backend=backend)
    expert = torch.arange(case.num_experts, device=case.ids.device)[:, None]
    nodes = (expert + torch.arange(2, device=case.ids.device)) % 4  # two of four hold each expert
    slots = (nodes * case.num_experts + expert).int()
    return {
        "serve_visited": lambda: ops.serve_visited(case.ids, slots, nodes, 0, backend=backend),
        "row_map": lambda: ops.row_map(
            case.ids, case.num_experts, num_rows=case.num_rows, backend=backend
        ),
        "permute": lambda: ops.permute(case.x, where, backend=backend),
        "combine": lambda: ops.combine(rows, where.positions, case.weights, backend=backend),
        "permute_backward": lambda: ops.permute_backward(rows, where.positions, backend=backend),
        "combine_backward": lambda: ops.combine_backward(
            case.grad, rows, where, case.weights, backend=backend
        ),
        "everything": ours(case, backend),
    }


def require_equal(steps: dict[str, list[Any]], wanted: Any, where: str = "") -> None:
    """Raise where the first step of a candidate has another result than ``wanted``."""
    for label, made in steps.items():
        why = disagreement(made[0](), wanted)
        if why:
            raise AssertionError(f"{label}{where}: {why}; nothing may be timed")


def with_notes(found: dict[str, Any], notes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What was measured of each candidate, with what is to be said of it."""
    return found | {label: found.get(label, {}) | facts for label, facts in notes.items()}


def measure_peers(dry: bool) -> dict[str, Any]:
    """Map, permute, combine and both backwards, ours and theirs, after their results agree."""
    from kernel_peers import all_peers, prepare

    backends = usable_backends()
    best = backends[-1]
    report: dict[str, Any] = {"shapes": {}, "best": best}
    for name, shape in (DRY_SHAPES if dry else SHAPES).items():
        cases = cases_of(name, shape, dry)
        steps: dict[str, list[Any]] = {}
        notes: dict[str, dict[str, Any]] = {}
        for backend in backends:
            steps[f"ours, {backend}"] = [ours(case, backend) for case in cases]
        steps[f"ours, {best}, again"] = [ours(case, best) for case in cases]
        steps[f"ours, {best}, autograd"] = [ours_with_autograd(case, best) for case in cases]
        steps[f"ours, {best}, forward"] = [ours_forward(case, best) for case in cases]
        wanted = ours(cases[0], "reference")()
        require_equal(steps, wanted, f" on {name}")
        for peer in all_peers():
            made, notes[peer.name] = prepare(peer, cases, wanted)
            notes[peer.name]["forward_only"] = peer.forward_only
            if made:
                steps[peer.name] = made
        found = run_once(steps) if dry else time_gpu(steps)
        report["shapes"][name] = with_notes(found, notes)
        del cases, steps
    return report


def measure_quantize(dry: bool) -> dict[str, Any]:
    """Fused permute and quantize against permute then quantize, and Megatron-core's MXFP8."""
    import kernel_quantize

    copy = None if dry else copy_gbps()
    report: dict[str, Any] = {"shapes": {}, "copy_gbps": copy}
    for name, shape in (DRY_SHAPES if dry else SHAPES).items():
        cases = cases_of(name, shape, dry)
        steps, notes, floors = kernel_quantize.candidates(cases, usable_backends())
        found = run_once(steps) if dry else time_gpu(steps)
        for label, facts in found.items():
            if copy and label in floors:
                facts |= shares(facts, floors[label], copy, None)
        report["shapes"][name] = with_notes(found, notes)
        del cases, steps
    return report


def measure_layer(dry: bool) -> dict[str, Any]:
    """A whole MoE layer, ours and DeepSpeed's, experts and router the same."""
    import kernel_layer
    from kernel_peers import prepare

    best = usable_backends()[-1]
    report: dict[str, Any] = {"shapes": {}, "best": best}
    for name, shape in (kernel_layer.DRY_SHAPES if dry else kernel_layer.SHAPES).items():
        layer = kernel_layer.make_layer(name, shape, "cpu" if dry else "cuda")
        steps = {f"layer, ours, {best}": [kernel_layer.ours(layer, best)]}
        wanted = kernel_layer.ours(layer, "reference")()
        require_equal(steps, wanted, f" on {name}")
        notes = {}
        for peer in kernel_layer.peers():
            made, notes[peer.name] = prepare(peer, [layer], wanted)
            if made:
                steps[peer.name] = made
        found = run_once(steps) if dry else time_gpu(steps)
        report["shapes"][name] = with_notes(found, notes)
        del layer, steps
    return report


def measure_cpu(dry: bool) -> dict[str, Any]:
    """Map, permute, combine and both backwards on the CPU, against index_select and index_add."""
    from kernel_peers_pytorch import index_add

    shape = DRY_SHAPES["dry"] if dry else CPU_SHAPE
    case = make_case("cpu", shape, 0, device="cpu")
    steps = {"ours": ours_with_autograd(case, "reference"), "index_add": index_add(case)}
    wanted = ours(case, "reference")()
    require_equal({label: [step] for label, step in steps.items()}, wanted)
    if dry:
        return {"shapes": {"cpu": run_once({label: [step] for label, step in steps.items()})}}
    tokens, width, experts, top_k = shape
    threads = torch.get_num_threads()
    name = f"CPU, {threads} threads, T={tokens} D={width} E={experts} K={top_k} bf16"
    return {"shapes": {name: time_cpu(steps)}}

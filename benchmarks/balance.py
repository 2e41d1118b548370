"""Balance-only placement: time for 58 x 256 experts, and the largest rank load beside EPLB's.

    python benchmarks/balance.py [--csv benchmarks/results.csv] [--peer NAME=FILE.py ...]

Loads: seeded random ones (58 x 256 + 32 slots, 8 nodes x 4 ranks) and, with MOE_LOCALITY_DATA,
those of every trace there. A peer is a file with the function of deepseek-ai/EPLB,
``rebalance_experts(weight, num_replicas, num_groups, num_nodes, num_gpus)``; SGLang's
``srt/eplb/eplb_algorithms/deepseek.py`` has it too. Times are of the call alone, warm: the compiled
code was loaded and ran once. A layer where a peer puts an expert twice on a rank is no valid
placement here (nor one that an engine can run without care); such layers are counted apart.
"""

import argparse
import importlib.util
import inspect
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from _results import append_rows, table_path

from moe_locality.placement import baselines
from moe_locality.placement.balance import balance, rank_loads
from moe_locality.trace import read_trace

NODES, PER_NODE, LAYERS, EXPERTS, EXTRA = 8, 4, 58, 256, 32
REPEATS = 21
Rebalance = Callable[[np.ndarray, int, int, int, int], np.ndarray]


def random_loads(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (LAYERS, EXPERTS)
    ranks = np.tile(np.arange(1, EXPERTS + 1), (LAYERS, 1))
    return {
        "cubed": rng.random(shape) ** 3 * 1e4,
        "zipf": rng.permuted(1e6 / ranks, axis=1),
        "uniform": rng.integers(900, 1100, shape).astype(float),
        "lognormal": np.exp(rng.normal(size=shape)) * 1000,
        "one expert": np.eye(EXPERTS)[rng.integers(0, EXPERTS, LAYERS)] * 1000,
    }


def real_cases() -> Iterator[tuple[str, np.ndarray, int, int, int]]:
    """(name, load, nodes, ranks per node, slots) for every trace and some clusters."""
    folder = os.environ.get("MOE_LOCALITY_DATA")
    for path in sorted(Path(folder).glob("*.npz")) if folder else ():
        load = read_trace(path).load().astype(float)
        experts = load.shape[1]
        for nodes, per_node in ((2, 4), (4, 2), (4, 8), (8, 4)):
            ranks = nodes * per_node
            for extra in (0, ranks):
                slots = -(-experts // ranks) * ranks + extra
                if slots // ranks <= experts:
                    yield (
                        f"{path.stem} {nodes}x{per_node} {slots} slots",
                        load,
                        nodes,
                        per_node,
                        slots,
                    )


def read_peer(text: str) -> tuple[str, Rebalance]:
    """Load ``NAME=FILE.py``."""
    import torch

    name, _, file = text.partition("=")
    spec = importlib.util.spec_from_file_location(f"peer_{name}", file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"--peer: found {text!r}, expected NAME=FILE.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    extended = "enable_hierarchical" in inspect.signature(module.rebalance_experts).parameters

    def run(load: np.ndarray, slots: int, groups: int, nodes: int, ranks: int) -> np.ndarray:
        more = {"enable_hierarchical": groups % nodes == 0} if extended else {}
        weight = torch.from_numpy(load)
        found = module.rebalance_experts(weight, slots, groups, nodes, ranks, **more)[0]
        return found.numpy().reshape(len(load), ranks, -1)

    return name, run


def ours_of_eplb(load, nodes, per_node, slots, groups) -> np.ndarray:
    """Our own code of EPLB's rule; ``groups`` = 1: all ranks at once."""
    ranks = nodes * per_node
    if groups == 1:
        return np.array([baselines.pack_replicas(row, ranks, slots) for row in load])
    group_of = np.arange(load.shape[1]) // (load.shape[1] // groups)
    return np.array([baselines.eplb(row, nodes, per_node, slots, group_of) for row in load])


def largest(load: np.ndarray, table: np.ndarray) -> np.ndarray:
    """[L] max / mean of the rank loads, every replica with an even share."""
    by_rank = rank_loads(load, table)
    mean = by_rank.mean(axis=1)
    return np.divide(by_rank.max(axis=1), mean, out=np.ones(len(load)), where=mean > 0)


def milliseconds(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """(median wall time, median processor time) of warm calls."""
    call()
    wall, busy = [], []
    for _ in range(repeats):
        start, start_busy = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - start)
        busy.append(time.process_time() - start_busy)
    return 1e3 * float(np.median(wall)), 1e3 * float(np.median(busy))


def compare(name, load, nodes, per_node, slots, peers) -> list[dict]:
    """Rows of one case: mean max/mean of ours and of others, and the layers where ours is worse."""
    ranks, experts = nodes * per_node, load.shape[1]
    settings = {"global": 1}
    if experts % nodes == 0 and slots // ranks <= experts // nodes:
        settings["by node"] = experts
    ours = largest(load, balance(load, nodes, per_node, slots))
    rows = [row(name, "max/mean", ours.mean(), "ratio", "")]
    for setting, groups in settings.items():
        found = {"eplb": ours_of_eplb(load, nodes, per_node, slots, groups)}
        for peer, run in peers:
            found[peer] = run(load, slots, groups, nodes, ranks)
        for other, table in found.items():
            theirs = largest(load, table)
            ordered = np.sort(table, axis=2)
            twice = (ordered[:, :, 1:] == ordered[:, :, :-1]).any(axis=(1, 2))
            worse = int(((ours > theirs * (1 + 1e-9)) & ~twice).sum())
            label = f"{other} {setting}"
            if twice.any():
                metric = "layers where the baseline puts an expert twice on a rank"
                rows.append(row(name, metric, twice.sum(), "layers", label))
            rows.append(row(name, "max/mean of the baseline", theirs.mean(), "ratio", label))
            rows.append(row(name, "layers worse than the baseline", worse, "layers", label))
    return rows


def row(case: str, metric: str, value: float, unit: str, baseline: str, note: str = "") -> dict:
    return {
        "benchmark": "balance",
        "case": case,
        "metric": metric,
        "value": f"{value:.6g}",
        "unit": unit,
        "kind": "measured",
        "baseline": baseline,
        "note": note,
    }


def timings(load: np.ndarray, peers) -> Iterator[dict]:
    case = f"{LAYERS}x{EXPERTS}+{EXTRA}, {NODES}x{PER_NODE}, cubed"
    slots, ranks = EXPERTS + EXTRA, NODES * PER_NODE
    allowed = os.sched_getaffinity(0)
    for threads in (1, 2):
        os.sched_setaffinity(0, sorted(allowed)[:threads])  # a thread per processor
        wall, busy = milliseconds(lambda: balance(load, NODES, PER_NODE, slots), REPEATS)
        os.sched_setaffinity(0, allowed)
        note = f"warm, {threads} thread(s), median of {REPEATS}; load {os.getloadavg()[0]:.1f}"
        yield row(case, f"time, {threads} thread(s)", wall, "ms", "", note)
        yield row(case, f"processor time, {threads} thread(s)", busy, "ms", "", note)
    for peer, run in peers:
        wall, busy = milliseconds(lambda run=run: run(load, slots, 1, NODES, ranks), 3)
        yield row(case, "time of the baseline", wall, "ms", f"{peer} global", "warm, median of 3")


def totals(rows: list[dict]) -> Iterator[dict]:
    """One row per baseline and count of layers, summed over the cases of real traces."""
    sums: dict[tuple[str, str], int] = {}
    for found in rows:
        if found["unit"] == "layers" and not found["case"].startswith(f"{LAYERS}x{EXPERTS}"):
            key = found["metric"], found["baseline"]
            sums[key] = sums.get(key, 0) + int(float(found["value"]))
    cases = len({r["case"] for r in rows if not r["case"].startswith(f"{LAYERS}x{EXPERTS}")})
    for (metric, baseline), value in sums.items():
        yield row(f"all traces, {cases} cases", metric, value, "layers", baseline)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--csv", type=table_path)
    parser.add_argument("--peer", action="append", default=[], type=read_peer)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random = random_loads(options.seed)
    rows = list(timings(random["cubed"], options.peer))
    for name, load in random.items():
        case = f"{LAYERS}x{EXPERTS}+{EXTRA}, {NODES}x{PER_NODE}, {name}"
        rows += compare(case, load, NODES, PER_NODE, EXPERTS + EXTRA, options.peer)
    for name, load, nodes, per_node, slots in real_cases():
        rows += compare(name, load, nodes, per_node, slots, options.peer)
    for found in rows:
        print(
            *(found[k] for k in ("case", "metric", "baseline", "value", "unit", "note")), sep="\t"
        )
    worse = [r for r in rows if r["metric"].startswith("layers worse") and float(r["value"]) > 0]
    print(f"layers worse than a baseline in {len(worse)} of {len(rows)} rows")
    if options.csv is not None:
        kept = [r for r in rows if r["case"].startswith(f"{LAYERS}x{EXPERTS}")]
        append_rows(options.csv, kept + list(totals(rows)), packages=("numpy", "numba"))


if __name__ == "__main__":
    main()

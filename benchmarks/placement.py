"""What placements cost on recorded traces, on requests that the solver has not seen.

    MOE_LOCALITY_DATA=DIR python benchmarks/placement.py [--part targets ...] [--csv FILE]

Every trace of tokens in DIR is split by request (70 / 30, seed 0 or several); plans are made from
the first part and costed on the second with ``moe_locality.placement.evaluate``. Copies and
imbalances are counts over recorded routing, not a run on a cluster: their kind is "simulated".
Seconds are measured on this machine. Parts:

    table        the cells that have a target, medians over five splits (seed of split and solver),
                 what hindsight reaches on them where one is missed, and the certified gap with
                 replicas: one run of at most 15 minutes on two cores, for which cells with 25 %
                 replicas take one of three layers
    targets      the same cells on split 0, over several solver seeds (--splits: and splits)
    earlier      the same for the targets of earlier versions
    peers        every method on every trace, 2, 4 and 8 nodes; 4 nodes with 12.5 and 25 % replicas
    shares       what fixed shares of an expert's picks for each home node would level
    bounds       how far plans are from the certified lower bound
    partitioner  mt-KaHyPar at equal balance (where the package mtkahypar is installed)
    transfer     plans made on one family of domains (1000 tokens at least), judged on another
    grouping     distinct experts of batches of requests, with and without predicted homes
    transports   what crosses nodes where a token is sent once per node, or per rank; one layout
    public       public implementations of EPLB that can be imported
    calibration  the imbalance promised for unseen requests against theirs, over many splits
    workloads    the synthetic workloads of Megatron-LM pull request 7488, rebuilt from its words
    scale        seconds for 58 layers x 256 experts x 1M tokens

``benchmarks/balance.py`` and ``benchmarks/refresh.py`` time the balance-only mode and the refresh.
"""

import argparse
import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from _results import append_rows, table_path
from placement_calibration import CALIBRATED, calibration_rows, pooled
from placement_cases import (
    EARLIER,
    GOALS,
    TABLE,
    Goal,
    goal_figures,
    goal_rows,
    hindsight_figures,
    hindsight_row,
    peer_rows,
    token_traces,
)
from placement_checks import (
    BOUND_EFFORT,
    PARTITION_LAYERS,
    PARTITION_NODES,
    bound_rows,
    partitioner_rows,
    public_rows,
    replica_bound_rows,
    scale_rows,
    shares_figures,
    shares_rows,
    transfer_rows,
)
from placement_grouping import TRANSPORT_CASES, grouping_rows, transport_rows
from placement_rows import Row, target_table
from placement_workloads import workload_rows

PARTS = ("targets", "calibration", "bounds", "partitioner", "transfer", "grouping", "transports")
PARTS += ("shares", "public", "workloads", "scale", "peers", "earlier")
REPLICAS = (0.125, 0.25)
TABLE_SPLITS, TABLE_SECONDS = 5, 900.0


def rows_of(part: str, options: argparse.Namespace) -> Iterator[Row]:
    """Yield the figures of one part."""
    folder = Path(options.data)
    if part in ("targets", "earlier"):
        goals = [g for g in (GOALS if part == "targets" else EARLIER) if options.only in g.label]
        pairs = {False: [(0, seed) for seed in range(options.seeds)]}
        if options.splits:
            pairs[True] = [(seed, seed) for seed in range(options.splits)]
        yield from goals_of(goals, folder, pairs, options.processes)
    elif part == "table":
        yield from table_rows(folder, options.processes)
    elif part == "peers":
        cases = [(nodes, 0.0) for nodes in options.nodes]
        cases += [(4, share) for share in REPLICAS]
        names = token_traces(folder)
        yield from side_by_side(
            [(peer_rows, folder, name, *case) for name in names for case in cases],
            options.processes,
        )
    elif part == "calibration":
        work = [(calibration_rows, folder, *case) for case in CALIBRATED]
        found = list(side_by_side(work, options.processes))
        yield from (*found, *pooled(found))
    elif part == "bounds":
        work = [(replica_bound_rows, folder)]
        work += [(bound_rows, folder, name) for name in BOUND_EFFORT]
        yield from side_by_side(work, options.processes)
    elif part == "shares":
        with ProcessPoolExecutor(options.processes) as pool:
            splits = range(TABLE_SPLITS)
            yield from shares_rows(list(pool.map(shares_figures, [folder] * len(splits), splits)))
    elif part == "partitioner":
        cells = [(name, nodes) for name in PARTITION_LAYERS for nodes in PARTITION_NODES]
        work = [(partitioner_rows, folder, *cell) for cell in cells]
        yield from side_by_side(work, options.processes)
    elif part == "transfer":
        yield from transfer_rows(folder)
    elif part == "grouping":
        yield from grouping_rows(folder)
    elif part == "transports":
        work = [(transport_rows, folder, *case) for case in TRANSPORT_CASES]
        yield from side_by_side(work, options.processes)
    elif part == "public":
        yield from public_rows(folder)
    elif part == "workloads":
        yield from workload_rows()
    else:
        yield from scale_rows(options.tokens)


def goals_of(
    goals: Sequence[Goal], folder: Path, pairs: dict[bool, list[tuple[int, int]]], processes: int
) -> Iterator[Row]:
    """Yield the rows of the goals over ``pairs`` of split and solver seed, by whether the splits
    differ; last what hindsight reaches on the splits where a goal is missed.
    """
    with ProcessPoolExecutor(processes) as pool:
        found = {
            pair: [pool.submit(goal_figures, folder, goal, *pair) for goal in goals]
            for pair in dict.fromkeys(pair for some in pairs.values() for pair in some)
        }
        later = []
        for place, goal in enumerate(goals):
            for splits, some in pairs.items():
                each = [found[pair][place].result() for pair in some]
                rows = goal_rows(folder, goal, each, splits)
                yield from rows
                if splits and not rows[0].met:
                    again = [(*pair, of["most"]) for pair, of in zip(some, each, strict=True)]
                    seen = [pool.submit(hindsight_figures, folder, goal, *one) for one in again]
                    later.append((goal, rows[0], seen))
        for goal, missed, seen in later:
            yield hindsight_row(goal, missed, [one.result() for one in seen])


def table_rows(folder: Path, processes: int) -> Iterator[Row]:
    """Yield the figures that placement is held to, and how long they took."""
    start = time.perf_counter()
    splits = [(seed, seed) for seed in range(TABLE_SPLITS)]
    yield from goals_of(list(TABLE), folder, {True: splits}, processes)
    yield from replica_bound_rows(folder)
    yield Row(
        case=f"table: {len(TABLE)} cells x {TABLE_SPLITS} splits, and the gap with replicas",
        metric="wall",
        value=time.perf_counter() - start,
        unit="s",
        kind="measured",
        target=TABLE_SECONDS,
        note=f"{processes} processes",
    )


def side_by_side(work: list[tuple], processes: int) -> Iterator[Row]:
    """Yield the rows of every call (function, *arguments) in order; calls run in parallel, and the
    last ones, which are the longest, start first.
    """
    with ProcessPoolExecutor(processes) as pool:
        for result in reversed([pool.submit(*call) for call in reversed(work)]):
            yield from result.result()


def processor_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    found = os.times()
    return found.user + found.system + found.children_user + found.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=("table", *PARTS), default=PARTS)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 4, 8], help="of peers")
    parser.add_argument("--seeds", type=int, default=5, help="solver seeds of targets")
    parser.add_argument(
        "--splits", type=int, default=0, help="split seeds of targets, beside split 0"
    )
    parser.add_argument("--only", default="", help="targets whose label has these words")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="of targets, peers")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of scale")
    parser.add_argument("--csv", type=table_path, help="table to append the figures to")
    parser.add_argument("--data", type=Path, default=os.environ.get("MOE_LOCALITY_DATA"))
    options = parser.parse_args()
    if options.data is None:
        parser.error("MOE_LOCALITY_DATA is not set: it names the directory of real routing traces")
    logging.getLogger("moe_locality").setLevel(logging.ERROR)  # caps are tried that none can keep
    done: list[Row] = []
    for part in options.part:
        start, busy = time.perf_counter(), processor_seconds()
        for row in rows_of(part, options):
            print(row.line(), flush=True)
            done.append(row)
            if options.csv:
                packages = ("numpy", "scipy", "numba", "mtkahypar")
                append_rows(options.csv, [row.to_csv()], packages=packages)
        seconds, busy = time.perf_counter() - start, processor_seconds() - busy
        print(f"{part}: {seconds:.0f} s, {busy:.0f} s of processor time", flush=True)
    print(target_table(done))


if __name__ == "__main__":
    main()

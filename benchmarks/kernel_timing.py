"""Timings of the local kernels: candidates that take turns, as CUDA graphs and as launched."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import _intervals
import torch

ROUNDS, WARM_UP, BUFFERS = 15, 13, 4
CPU_ROUNDS = 7

Calls = Sequence[Callable[[], Any]]
"""The same work on several buffers: together they are larger than a cache."""


def time_gpu(candidates: Mapping[str, Calls]) -> dict[str, dict[str, Any]]:
    """Microseconds of one call of each candidate, in rounds that interleave all of them.

    ``samples_us``: replays of a CUDA graph of all calls, or, where it cannot be captured
    (``captured`` is False), the calls as launched. ``eager_us``: as launched, host work included.
    """
    plays, pool = {}, torch.cuda.graph_pool_handle()
    for name, calls in candidates.items():
        for _ in range(WARM_UP):
            _run(calls)
        torch.cuda.synchronize()
        play = _capture(calls, pool)
        if play is None:  # a broken capture may have left its pool behind
            pool = torch.cuda.graph_pool_handle()
        plays[name] = play
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    eager: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(ROUNDS):
        for name, calls in candidates.items():
            launched = _events_us(lambda calls=calls: _run(calls)) / len(calls)
            play = plays[name]
            eager[name].append(launched)
            samples[name].append(launched if play is None else _events_us(play) / len(calls))
    return {
        name: facts(samples[name], captured=plays[name] is not None)
        | {"eager_us": _intervals.median(eager[name]).value, "eager_samples_us": eager[name]}
        for name in candidates
    }


def facts(samples_us: list[float], *, captured: bool = True) -> dict[str, Any]:
    """What the report holds of a candidate: median, interval, quartiles, every sample."""
    found = {f"{name}_us": value for name, value in _intervals.summary(samples_us).items()}
    return {**found, "samples_us": samples_us, "captured": captured}


def run_once(candidates: Mapping[str, Calls]) -> dict[str, dict[str, Any]]:
    """What a dry run does instead of timing."""
    for calls in candidates.values():
        calls[0]()
    return {name: {"ran": True} for name in candidates}


def time_cpu(candidates: Mapping[str, Callable[[], Any]]) -> dict[str, dict[str, Any]]:
    """Wall and process microseconds of each candidate, in rounds that interleave them.

    ``samples_us`` are process CPU time, of all threads: another program on the machine makes the
    wall time longer, not this.
    """
    process: dict[str, list[float]] = {name: [] for name in candidates}
    wall: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(CPU_ROUNDS):
        for name, call in candidates.items():
            before, start = time.process_time(), time.perf_counter()
            call()
            process[name].append(1e6 * (time.process_time() - before))
            wall[name].append(1e6 * (time.perf_counter() - start))
    return {
        name: facts(process[name])
        | {"wall_us": _intervals.median(wall[name]).value, "wall_samples_us": wall[name]}
        for name in candidates
    }


def copy_gbps() -> float:
    """Bytes read and written per nanosecond by torch's copy of 1 GiB."""
    # of its own: a capture that failed leaves torch's generator as if it were still captured
    generator = torch.Generator("cuda")
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_(generator=generator)
    target = torch.empty_like(source)
    found = time_gpu({"copy": [lambda: target.copy_(source)]})["copy"]
    return 2 * 2**30 / found["median_us"] / 1e3


def mix_gbps(reads: int, writes: int, *, dry: bool) -> float | None:
    """Bytes per nanosecond of a contiguous copy of this mix; a dry run checks the kernel alone."""
    import kernel_ceiling as ceiling

    device, size = ("cpu", 2**18) if dry else ("cuda", ceiling.BYTES)
    source, target = ceiling.buffers(reads, writes, device, size)
    calls: dict[str, Calls] = {
        str(block): [lambda block=block: ceiling.mixed_copy(source, target, block)]
        for block in ceiling.BLOCKS
    }
    calls[str(ceiling.BLOCKS[-1])][0]()
    if not torch.equal(target, ceiling.expected(source).expand_as(target)):
        raise AssertionError("the copy that the shares are of is wrong: no share can be trusted")
    if dry:
        return None
    moved = source.numel() * 4 + target.numel() * 4
    return max(moved / found["median_us"] / 1e3 for found in time_gpu(calls).values())


def _run(calls: Calls) -> None:
    for call in calls:
        call()


def _capture(calls: Calls, pool: Any) -> Callable[[], None] | None:
    try:
        graph = torch.cuda.CUDAGraph()
        # a capture that fails does not give the stream back
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=pool):
            _run(calls)
    except RuntimeError:  # it waits for the device, or allocates outside of torch
        torch.cuda.synchronize()
        return None
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def _events_us(play: Callable[[], None]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    play()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * begin.elapsed_time(end)

"""A file of requests served by all ranks: results on disk as they come, and what ends a job early.

Every rank appends the results of its share of the lines to a file of its own; a job that is started
again goes on with what has none yet. One that is drained (:func:`draining`), on any rank, finishes
what has begun on all ranks and starts nothing else.
"""

import contextlib
import fcntl
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from moe_locality.dispatch.traffic import traffic_report
from moe_locality.dispatch.transport import LINKS
from moe_locality.errors import ConfigError
from moe_locality.layer.agreement import all_succeed
from moe_locality.serving.engine import Engine
from moe_locality.serving.metrics import Metrics
from moe_locality.serving.requests import RequestOutput, SamplingParams, read_requests
from moe_locality.topology.groups import exchange_objects

DRAIN_FILE = "drain"
_LOOKS_EVERY_S = 0.5


def lock_results(out: Path, rank: int) -> TextIO:
    """Open a rank's results to append to; ConfigError where another job writes there."""
    results = (out / f"rank-{rank}.jsonl").open("a", encoding="utf-8")
    try:
        fcntl.flock(results, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        results.close()
        raise ConfigError(
            f"out: found a job that is running and writes {results.name}, expected none: wait for "
            "it, end it, or name another directory"
        ) from error
    except OSError:  # a file system without locks
        pass
    return results


def read_results(out: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the results in a directory; a line that was cut off by the end of its rank is none."""
    for path in sorted(Path(out).glob("rank-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def serve_file(
    engine: Engine,
    requests: str | Path,
    out: str | Path,
    params: SamplingParams | None = None,
    *,
    on_result: Callable[[RequestOutput], None] | None = None,
    metrics: Metrics | None = None,
) -> dict[str, Any]:
    """Serve the requests of a JSONL file that have no result in ``out`` yet, or were refused.

    Collective. Line i is the request of rank i modulo the number of ranks. Returns what was done on
    all ranks: ``served``, ``refused``, ``unserved`` (when drained), ``tokens`` (new ones),
    ``seconds``, ``tokens_per_s``, ``moved`` (requests to another home), and bytes sent, by link:
    ``bytes`` of the exchange, ``handover_bytes``. ``metrics``, which the engine feeds, also go to
    ``out/metrics-R.jsonl``. ConfigError, on all ranks: another job writes to ``out``.
    """
    rank, size = engine.lockstep.rank, engine.lockstep.size
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    results = all_succeed(lambda: lock_results(out, rank))
    (out / DRAIN_FILE).unlink(missing_ok=True)  # of a job before, and before the ranks meet
    done = {json.dumps(r["request_id"]) for r in read_results(out) if not r.get("error")}
    if size > 1:  # before any rank writes
        done = set().union(*exchange_objects(done))
    counts = {"served": 0, "refused": 0, "tokens": 0}
    began = time.perf_counter()
    if metrics is not None:
        metrics.topology = engine.topology
        metrics.write_to(out / f"metrics-{rank}.jsonl")
    before, share = Path(results.name).read_bytes(), _share(requests, rank, size, done)
    with results, draining(engine, out / DRAIN_FILE):
        if before and not before.endswith(b"\n"):  # torn
            results.write("\n")
        for output in engine.generate(share, params):
            results.write(output.to_json() + "\n")
            results.flush()
            counts["refused" if output.error else "served"] += 1
            counts["tokens"] += sum(len(one.token_ids) for one in output.outputs)
            if on_result is not None:
                on_result(output)
    if metrics is not None:
        metrics.close(engine)
    counts["unserved"] = engine.unserved + sum(1 for _ in share)
    counts["moved"] = engine.handover.moved
    mine = (counts, engine.handover.sent_bytes)
    everyone = exchange_objects(mine) if size > 1 else [mine]
    seconds = time.perf_counter() - began
    total: dict[str, Any] = {name: sum(own[name] for own, _ in everyone) for name in counts}
    total |= {"seconds": seconds, "tokens_per_s": total["tokens"] / seconds}
    links = traffic_report(engine.model)["by_link"] if size > 1 else None
    if links is not None:
        total["bytes"] = {link: sum(kind[link] for kind in links.values()) for link in LINKS}
    sums = [sum(column) for column in zip(*(sent for _, sent in everyone), strict=True)]
    return total | {"handover_bytes": dict(zip(LINKS, sums, strict=True))}


def _share(requests: str | Path, rank: int, size: int, done: set[str]) -> Iterator[Any]:
    for number, value in enumerate(read_requests(requests)):
        told = value["request_id"] if isinstance(value, dict) else value.request_id
        known = isinstance(told, (int, str)) and json.dumps(told) in done
        if number % size == rank and not known:
            yield value


@contextlib.contextmanager
def draining(engine: Engine, file: Path) -> Iterator[None]:
    """Drain the engine when ``file`` appears, or at the first SIGTERM or SIGINT; the second signal
    interrupts. A SIGTERM after a SIGINT does not: launchers send it to the ranks when a Ctrl-C has
    reached both.
    """
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(_LOOKS_EVERY_S):
            if file.exists():
                engine.drain()

    def asked(number: int, frame: Any) -> None:
        del frame
        engine.drain()
        for one in {number, signal.SIGINT}:
            signal.signal(one, signal.default_int_handler)

    signals_are_ours = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGINT) if signals_are_ours else ()
    before = {number: signal.getsignal(number) for number in numbers}
    for number in before:
        signal.signal(number, asked)
    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        for number, handler in before.items():
            signal.signal(number, handler)

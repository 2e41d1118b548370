"""Options of a demo, its progress on stderr, and its runs: the example's training script, started
with DeepSpeed's own launcher; rank 0 prints ``progress DONE TOTAL TEXT``, all goes to a log file.
"""

import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe_locality.config import TrackingConfig
from moe_locality.errors import BackendUnavailable, MoeLocalityError

PROGRESS = re.compile(r"progress (\d+) (\d+) ?(.*)")
TAIL_LINES = 25

OnProgress = Callable[[int, int, str], None]  # how far a stage is: (done, total, text)


def examples_folder() -> Path:
    """The folder of the example model, beside the package or inside it; else BackendUnavailable."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "examples", package / "examples"):
        if (folder / "train_lm.py").is_file():
            return folder
    raise BackendUnavailable(
        f"found no examples/train_lm.py beside or inside {package}, which the demo trains: "
        "reinstall moe-locality, or run from a checkout"
    )


def free_port() -> int:
    """A TCP port that nobody listens on now, below those that the kernel gives out: the ranks bind
    it seconds later, when one of those may be another connection's.
    """
    for _ in range(100):
        port = 10_000 + secrets.randbelow(20_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise BackendUnavailable(
        "found no free TCP port of 100 tried between 10000 and 29999, expected one for the ranks "
        "to meet at: end the programs that listen there"
    )


def launch_environment() -> dict[str, str]:
    """The environment of a CPU run: one thread a rank, no accelerator, no compiler at run time."""
    return {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",  # DeepSpeed orders expert parameter groups by a set of strings
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def launch_command(num_ranks: int, script: Path, arguments: list[str]) -> list[str]:
    """The command line of ``deepspeed`` for ``num_ranks`` ranks on this machine."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]
    place = ["--num_accelerators", str(num_ranks), "--master_addr", "127.0.0.1"]
    return [*launcher, *place, "--master_port", str(free_port()), str(script), *arguments]


def run_training(
    arguments: list[str],
    *,
    num_ranks: int,
    log: Path,
    script: str = "train_lm.py",
    on_progress: OnProgress | None = None,
    timeout_s: float = 900.0,
) -> float:
    """Run a script of the examples on ``num_ranks`` local ranks, which print to ``log``; return the
    seconds it took. MoeLocalityError: it failed (with the end of the log) or passed ``timeout_s``.
    ``on_progress``: called with (done, total, text) of each of its lines of progress.
    """
    command = launch_command(num_ranks, examples_folder() / script, arguments)
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    late = threading.Event()
    with log.open("w", encoding="utf-8") as sink, _started(command) as process:
        watchdog = threading.Timer(timeout_s, lambda: (late.set(), _end(process)))
        watchdog.start()
        sink.write("$ " + " ".join(command) + "\n")
        try:
            for line in process.stdout or ():
                sink.write(line)
                tail.append(line.rstrip())
                found = PROGRESS.search(line)
                if found and on_progress:
                    on_progress(int(found[1]), int(found[2]), found[3])
            code = process.wait()
        finally:
            watchdog.cancel()
            _end(process)
    if late.is_set():
        raise MoeLocalityError(f"a run took longer than {timeout_s:.0f} s and was ended: see {log}")
    if code != 0:
        end = "\n".join(f"  | {line}" for line in tail)
        raise MoeLocalityError(
            f"a run of {script} failed with exit code {code}; the end of {log}:\n{end}"
        )
    return time.monotonic() - start


def _started(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=launch_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that launcher and ranks can be ended together
    )


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


WandbMode = Literal["offline", "online", "disabled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """Options of ``moe-locality demo``; a default is what ``make demo`` runs."""

    out: Path
    trace: Path | None = None
    """a recorded trace: analyze, place and report it instead of training the example model"""
    num_nodes: int = 2
    ranks_per_node: int = 2
    max_imbalance: float = 1.05
    seed: int = 0
    steps: int | None = None
    """training steps of the example model (None: the preset's)"""
    preset: str = "demo"
    wandb_mode: WandbMode = "offline"

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.ranks_per_node

    @property
    def command(self) -> str:
        """The command line of this demo."""
        trace = f"--trace {self.trace} " if self.trace else ""
        return (
            f"moe-locality demo {trace}--nodes {self.num_nodes} --ranks-per-node "
            f"{self.ranks_per_node} --seed {self.seed} --out {self.out}"
        )

    def tracking(self, **run: Any) -> TrackingConfig:
        """Return the settings of a wandb run of this demo: its group, job type and name."""
        mode, folder = self.wandb_mode, str(self.out)
        return TrackingConfig(project="moe_locality-demo", mode=mode, dir=folder, **run)


class Progress:
    """A rich progress display; ``say`` prints a line above the bars. Silent with ``quiet``."""

    def __init__(self, *, quiet: bool = False) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description:<44}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self._bars = Bars(*columns, console=Console(stderr=True, quiet=quiet))

    def __enter__(self) -> "Progress":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        self._bars.console.print(text, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[OnProgress]:
        """Show a bar for the body; it is full when the body ends."""
        task = self._bars.add_task(name, total=None, text="")

        def update(done: int, total: int, text: str) -> None:
            self._bars.update(task, completed=done, total=total, text=text)

        yield update
        done = self._bars.tasks[task].total or 1
        self._bars.update(task, completed=done, total=done)
        if not self._bars.console.is_terminal:  # a log file gets a line per stage instead of bars
            self._bars.console.print(f"done: {name}", highlight=False)

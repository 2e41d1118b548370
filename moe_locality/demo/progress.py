"""What a demo is asked to do, and its progress on stderr: a bar per stage, and lines of text."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

PROJECT = "moe_locality-demo"
"""in wandb"""

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


class Stage(Protocol):
    """How far a stage is: call it with (done, total, text)."""

    def __call__(self, done: int, total: int, text: str) -> None: ...


class Progress:
    """A rich progress display; ``say`` prints a line above the bars. Silent with ``quiet``."""

    def __init__(self, *, quiet: bool = False) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self._console = Console(stderr=True, quiet=quiet)
        columns = (
            TextColumn("{task.description:<44}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self._bars = Bars(*columns, console=self._console)

    def __enter__(self) -> "Progress":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        self._bars.console.print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Show a bar for the body; it is full when the body ends."""
        task = self._bars.add_task(name, total=None, text="")

        def update(done: int, total: int, text: str) -> None:
            self._bars.update(task, completed=done, total=total, text=text)

        yield update
        done = self._bars.tasks[task].total or 1
        self._bars.update(task, completed=done, total=done)
        if not self._console.is_terminal:  # a log file gets one line per stage instead of bars
            self._console.print(f"done: {name}", highlight=False)

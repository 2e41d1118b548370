"""The main job from end to end: record, place, run again, compare. See :func:`run_demo`."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_locality.demo.launch import DemoOptions, Progress, WandbMode
from moe_locality.errors import ConfigError
from moe_locality.files import write_text

__all__ = ["DemoOptions", "run_demo"]

MARKER = ".moe_locality_demo.json"
"""In the directory of a demo: {"made": the files and folders that it has made there}."""

OWN = ("record", "linear", "placed", "once_per_node", "plan.json", "homes.json", "report.html")


def run_demo(
    *,
    out: str | Path,
    trace: str | Path | None = None,
    num_nodes: int = 2,
    ranks_per_node: int = 2,
    wandb_mode: WandbMode = "offline",
    seed: int = 0,
    steps: int | None = None,
    preset: str = "demo",
    quiet: bool = False,
) -> dict[str, Any]:
    """Run the demo and return what it found as plain data; files go below ``out``.

    Without ``trace`` the example model is trained, on ``num_nodes * ranks_per_node`` local ranks.
    With it, that trace is analyzed and placed, and nothing is run. ``out`` is new, empty, or the
    directory of an earlier demo, whose files are replaced; other files there stay. ConfigError: it
    holds files of others; nothing was changed. MoeLocalityError: a stage failed, which and why.
    """
    recorded = None if trace is None else Path(trace)
    sizes = {"num_nodes": num_nodes, "ranks_per_node": ranks_per_node, "seed": seed}
    more: dict[str, Any] = {"steps": steps, "preset": preset, "wandb_mode": wandb_mode}
    options = DemoOptions(out=Path(out), trace=recorded, **sizes, **more)
    if recorded is not None and not recorded.exists():
        raise ConfigError(f"found no trace at {trace}, expected a directory or an .npz file")
    start = time.monotonic()
    with _own_directory(options.out, recorded), Progress(quiet=quiet) as progress:
        from moe_locality.demo.model import publish, run_model, run_trace

        if recorded is not None:
            found = run_trace(options, progress)
        else:
            found = publish(options, run_model(options, progress), progress)
        progress.say(f"report: {found['report']}")
    return {**found, "seconds": round(time.monotonic() - start, 1)}


@contextlib.contextmanager
def _own_directory(out: Path, trace: Path | None) -> Iterator[None]:
    """Remove what earlier demos made (old shards would be read), and note what this one makes."""
    for path in sorted(_made_before(out, trace), reverse=True):  # a folder after what is in it
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    out.mkdir(parents=True, exist_ok=True)
    others = _content(out)
    _note(out, [])
    try:
        yield
    finally:
        _note(out, [str(path.relative_to(out)) for path in sorted(_content(out) - others)])


def _made_before(out: Path, trace: Path | None) -> list[Path]:
    """What an earlier demo made in ``out``; ConfigError: the trace, or files of others, in it."""
    if not out.is_dir() or not any(out.iterdir()):
        if (out.exists() or out.is_symlink()) and not out.is_dir():
            kind = "file" if out.exists() else "link to nothing"
            raise ConfigError(f"--out: found the {kind} {out}, expected a directory: give another")
        return []
    try:
        made = [out / name for name in json.loads((out / MARKER).read_text("utf-8"))["made"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--out: found files in {out} and no {MARKER} that lists what a demo made there, "
            "expected a new or empty directory: remove it or give another; nothing was changed"
        ) from error
    if trace and any(path.resolve().is_relative_to(trace.resolve()) for path in made):
        raise ConfigError(
            f"--trace: found {trace} among what the demo replaces in {out}, expected it elsewhere: "
            "give another --out; nothing was changed"
        )
    others = _content(out) - set(made)
    foreign = sorted(str(path) for path in others if path.relative_to(out).parts[0] in OWN)
    if foreign:
        raise ConfigError(
            f"--out: found {foreign[0]}, which no demo noted as its own (one that was killed notes "
            f"nothing), expected only its files in {', '.join(OWN)}: remove it, or give another "
            "directory; nothing was changed"
        )
    return made


def _content(out: Path) -> set[Path]:
    return {path for path in out.rglob("*") if path.name != MARKER}


def _note(out: Path, made: list[str]) -> None:
    write_text(out / MARKER, json.dumps({"made": made}, indent=1) + "\n", what="demo results")

"""The main job from end to end: record, place, run again, compare. See :func:`run_demo`."""

import shutil
import time
from pathlib import Path
from typing import Any

from moe_locality.demo.options import DemoOptions, WandbMode
from moe_locality.demo.progress import Progress
from moe_locality.errors import ConfigError

__all__ = ["DemoOptions", "run_demo"]

OWN = (
    *("record", "linear", "placed", "once_per_node", "wandb"),
    *("plan.json", "homes.json", "report.html"),
)


def run_demo(
    *,
    out: Path,
    trace: Path | None = None,
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
    With it, that trace is analyzed and placed, and nothing is run. What an earlier demo wrote into
    ``out`` is replaced.

    Raises:
        MoeLocalityError: a stage failed; the message says which and why.
    """
    options = DemoOptions(
        out=Path(out),
        trace=trace,
        num_nodes=num_nodes,
        ranks_per_node=ranks_per_node,
        wandb_mode=wandb_mode,
        seed=seed,
        steps=steps,
        preset=preset,
    )
    if trace is not None and not Path(trace).exists():
        raise ConfigError(f"found no trace at {trace}, expected a directory or an .npz file")
    _clear(options.out)
    start = time.monotonic()
    with Progress(quiet=quiet) as progress:
        if trace is not None:
            from moe_locality.demo.trace_run import run_trace

            found = run_trace(options, progress)
        else:
            from moe_locality.demo.model_report import publish
            from moe_locality.demo.model_run import run_model

            found = publish(options, run_model(options, progress), progress)
        progress.say(f"report: {found['report']}")
    return {**found, "seconds": round(time.monotonic() - start, 1)}


def _clear(out: Path) -> None:
    """Remove what an earlier demo left: old shards would be read as part of the new trace."""
    out.mkdir(parents=True, exist_ok=True)
    for name in OWN:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

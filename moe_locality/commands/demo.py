"""The command demo: hands over to :mod:`moe_locality.demo`."""

from pathlib import Path

from moe_locality.commands.inputs import check_writable
from moe_locality.commands.output import Result
from moe_locality.errors import ConfigError


def demo(
    out: Path,
    trace: Path | None,
    nodes: int,
    ranks_per_node: int,
    wandb_mode: str,
    seed: int,
) -> Result:
    """Run the demo and return what it found."""
    if wandb_mode not in ("offline", "online", "disabled"):
        raise ConfigError(
            f"--wandb-mode: found {wandb_mode!r}, expected offline, online or disabled"
        )
    check_writable(out / "report.html", "demo results")
    from moe_locality.demo import run_demo

    payload = run_demo(
        out=out,
        trace=trace,
        num_nodes=nodes,
        ranks_per_node=ranks_per_node,
        wandb_mode=wandb_mode,
        seed=seed,
    )
    return Result(payload={"command": "demo", **payload}, text=(str(payload["report"]),))

"""What a demo is asked to do."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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

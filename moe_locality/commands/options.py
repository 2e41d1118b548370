"""Options that several commands take, each declared once; ``cli.py`` names them in its signatures.

Imported at start-up: nothing here may import more than typer.
"""

from pathlib import Path
from typing import Annotated

import typer

JSON_FLAG, DEBUG_FLAG = "--json", "--debug"

Json = Annotated[bool, typer.Option(JSON_FLAG, help="Print one JSON object on stdout.")]
Debug = Annotated[bool, typer.Option(DEBUG_FLAG, help="Log more; show tracebacks.")]
Trace = Annotated[Path, typer.Argument(help="Trace: a Parquet directory or an .npz file.")]
Plan = Annotated[Path, typer.Option("--plan", help="Placement plan (JSON).")]
Plans = Annotated[list[Path] | None, typer.Option("--plan", help="Plan; may be repeated.")]
PlanOut = Annotated[Path, typer.Option("-o", "--out", help="Plan to write (JSON).")]
Nodes = Annotated[int | None, typer.Option("--nodes", min=1, help="Nodes of the cluster.")]
RanksPerNode = Annotated[int | None, typer.Option("--ranks-per-node", min=1, help="Ranks on each.")]
Cluster = Annotated[Path | None, typer.Option("--cluster", help="Cluster description (YAML).")]
Hostfile = Annotated[Path | None, typer.Option("--hostfile", help="DeepSpeed hostfile.")]
Homes = Annotated[Path | None, typer.Option("--homes", help="Home rank of each request (JSON).")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")]
HeldOut = Annotated[
    float, typer.Option("--held-out", help="Share of the requests that no plan is made from.")
]
MaxImbalance = Annotated[
    float, typer.Option("--max-imbalance", help="Cap on max/mean load to expect on new requests.")
]
Report = Annotated[Path | None, typer.Option("--report", help="Also write an HTML report.")]
WandbMode = Annotated[str, typer.Option("--wandb-mode", help="offline, online or disabled.")]
Wandb = Annotated[str | None, typer.Option("--wandb", help="Also log to this wandb project.")]
WandbDir = Annotated[str | None, typer.Option("--wandb-dir", help="Where wandb keeps its files.")]
Group = Annotated[str | None, typer.Option("--group", help="wandb group (the experiment).")]

# of place
Method = Annotated[
    str, typer.Option("--method", help="coactivation, balance, or a peer: linear, eplb, seed …")
]
RedundantExperts = Annotated[
    int, typer.Option("--redundant-experts", min=0, help="Slots beyond the experts, per layer.")
]
JointHomes = Annotated[
    str | None, typer.Option("--homes", help="joint: place requests together with experts.")
]
MaxHomeImbalance = Annotated[
    float, typer.Option("--max-home-imbalance", help="With joint homes: cap on tokens per rank.")
]
Objective = Annotated[
    str, typer.Option("--objective", help="With joint homes: lower copies, or picks.")
]
ExpertGroups = Annotated[
    int | None,
    typer.Option("--expert-groups", min=1, help="Groups of a group-limited router, kept whole."),
]
Start = Annotated[
    Path | None, typer.Option("--start", help="Improve this plan instead, with few moves.")
]
MoveBudget = Annotated[
    float | None,
    typer.Option("--move-budget", help="With --start: share of the slots that may move; 0.02."),
]
Bound = Annotated[
    bool, typer.Option("--bound", help="Then say what no plan can go below; Ctrl-C keeps the plan.")
]
BoundSeconds = Annotated[
    float | None,
    typer.Option("--bound-seconds", min=0, help="Effort on the bound; 10. 0: no bound."),
]
Prove = Annotated[
    bool,
    typer.Option("--prove", help="With the bound, prove layers optimal: <= 32 experts, 4 nodes."),
]

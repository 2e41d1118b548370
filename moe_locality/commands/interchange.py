"""Commands about other tools' files: import, export."""

from pathlib import Path

from moe_locality.commands.inputs import check_writable
from moe_locality.commands.output import Result, progress
from moe_locality.placement import PlacementPlan
from moe_locality.placement.export import write_export
from moe_locality.trace.importers import find_format, import_to


def import_(
    file: Path,
    out: Path,
    overwrite: bool,
    format: str | None,
    model: str | None,
    num_experts: int | None,
    top_k: int | None,
) -> Result:
    """Read another tool's record and write it as a trace."""
    with progress(f"importing {file}") as update:
        found = find_format(file) if format is None else format
        summary = import_to(
            file,
            out,
            format=found,
            model=model,
            num_experts=num_experts,
            top_k=top_k,
            overwrite=overwrite,
            report=lambda done, total: update(done, total, ""),
        )
    payload = {"command": "import", "trace": out, "format": found, **summary}
    words = (
        f"{out}: {summary['tokens']:,} tokens of {summary['requests']:,} requests, "
        f"{summary['layers']} MoE layers of {summary['num_experts']} experts, "
        f"top {summary['top_k']}, {len(summary['domains'])} domains; "
        f"model {summary['model'] or 'not named'}"
    )
    return Result(payload=payload, text=(words,))


def export(plan: Path, to: str, out: Path, num_hidden_layers: int | None) -> Result:
    """Write a plan in the format of a serving engine or of DeepSpeed."""
    check_writable(out, "map", plan)
    placed = PlacementPlan.read(plan)
    write_export(placed, out, to, num_hidden_layers)
    payload = {
        "command": "export",
        "plan": plan,
        "digest": placed.digest(),
        "target": to,
        "file": out,
        "layers": placed.num_layers,
        "num_redundant_experts": placed.num_redundant_experts,
    }
    replicas = placed.num_redundant_experts
    kept = f", {replicas} redundant experts per layer" if replicas else ""
    words = f"{out}: {placed.num_layers} MoE layers for {to}, {placed.num_ranks} ranks{kept}"
    return Result(payload=payload, text=(words,))

"""Commands about other tools' files: import, export."""

from pathlib import Path

from moe_locality.commands.inputs import check_writable
from moe_locality.commands.output import Result, progress
from moe_locality.errors import TraceError
from moe_locality.placement import PlacementPlan
from moe_locality.placement.export import write_export
from moe_locality.trace.importers import find_format, import_to


def import_(
    files: list[Path],
    out: Path,
    overwrite: bool,
    format: str | None,
    model: str | None,
    num_experts: int | None,
    top_k: int | None,
    num_layers: int | None,
    layers: str | None,
    table: Path | None,
) -> Result:
    """Read another tool's record and write it as a trace."""
    given = files[0] if len(files) == 1 else files
    with progress(f"importing {files[0]}") as update:
        found = find_format(given) if format is None else format
        summary = import_to(
            given,
            out,
            format=format,
            model=model,
            num_experts=num_experts,
            top_k=top_k,
            num_layers=num_layers,
            layers=None if layers is None else _layer_numbers(layers),
            table=table,
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
    left_out = len(summary["left_out"])
    if left_out:
        words += f"; {left_out} of the requests or files left out, see the warnings"
    return Result(payload=payload, text=(words,))


def _layer_numbers(text: str) -> list[int]:
    """The numbers that "1,3,5-9" names."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not (last.isdecimal() and int(first) <= int(last))):
            raise TraceError(
                f"found --layers {text!r}, expected numbers and ranges such as 1,3,5-9: number the "
                "transformer layers from 0"
            )
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def export(
    plan: Path, to: str, out: Path, num_hidden_layers: int | None, layers: str | None
) -> Result:
    """Write a plan in the format of a serving engine or of DeepSpeed."""
    check_writable(out, "map", plan)
    placed = PlacementPlan.read(plan)
    chosen = None if layers is None else _layer_numbers(layers)
    write_export(placed, out, to, num_hidden_layers, chosen)
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

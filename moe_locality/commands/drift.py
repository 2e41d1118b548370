"""The drift part of analyze: another trace, or the windows of one, with a plan what it loses."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from moe_locality.analysis import drift as measures
from moe_locality.commands.inputs import read_fitting_plan
from moe_locality.commands.output import table
from moe_locality.errors import ConfigError
from moe_locality.trace import RoutingTrace, read_trace

MEASURES = (
    ("loads differ by, bits", "js_bits"),
    ("without drift, bits", "noise_floor_bits"),
    ("cosine of the loads", "load_cosine"),
    ("pairs differ by, bits", "pairs_js_bits"),
    ("without drift, bits", "pairs_noise_floor_bits"),
    ("top 5 % of pairs kept", "top_pairs_kept"),
)


def drift_payload(
    trace: RoutingTrace,
    against: Path | None,
    num_windows: int | None,
    plan: Path | None,
    seed: int,
) -> dict[str, Any]:
    """What ``analyze`` adds about drift: {"drift": ...}; nothing where nothing was asked.

    Raises:
        ConfigError: both --against and --windows, or --plan with neither.
    """
    if against is not None and num_windows is not None:
        raise ConfigError(
            "found --against and --windows, expected one of them: compare two traces, or the "
            "windows of one"
        )
    if against is None and num_windows is None:
        if plan is not None:
            raise ConfigError(
                "found --plan alone, expected --against or --windows with it: a plan is costed on "
                "two traces, or use `moe-locality evaluate`"
            )
        return {}
    if against is not None:
        parts, names = [trace, read_trace(against)], [str(against)]
    else:
        parts = measures.windows(trace, num_windows or 0)
        names = [f"window {number + 1}" for number in range(1, len(parts))]
    first, *later = parts
    placed = None if plan is None else read_fitting_plan(plan, trace)
    rows = []
    for name, other in zip(names, later, strict=True):
        found = measures.compare(first, other, seed=seed)
        entry: dict[str, Any] = {"name": name, **dataclasses.asdict(found)}
        entry["layers_drifted"] = int(found.drifted.sum())
        if placed is not None:
            entry["plan"] = dataclasses.asdict(measures.compare_plan(first, other, placed))
        rows.append(entry)
    found = {"against": against, "windows": num_windows, "plan": plan, "compared": rows}
    return {"drift": found}


def show_drift(console: Any, payload: dict[str, Any]) -> None:
    """Print what ``drift_payload`` found: a table, and sentences about the plan."""
    if not payload:
        return
    console.print(drift_table(payload["drift"]))
    for line in drift_words(payload["drift"]):
        console.print(line)


def drift_table(found: dict[str, Any]) -> Any:
    """Return a rich table, a row per comparison, means over the layers."""
    rows = []
    for entry in found["compared"]:
        values = [_mean(entry[name]) for _, name in MEASURES]
        layers = f"{entry['layers_drifted']} of {len(entry['layer_ids'])}"
        rows.append((entry["name"], *values, layers))
    title = "Drift from this trace" if found["against"] else "Drift from the first window"
    return table(title, ("", *(word for word, _ in MEASURES), "layers drifted"), rows)


def drift_words(found: dict[str, Any]) -> list[str]:
    """Return a sentence per comparison about the plan."""
    lines = []
    for entry in found["compared"]:
        plan = entry.get("plan")
        if plan is None:
            continue
        words = f"{entry['name']}: {plan['copies_old']:.3f} copies become {plan['copies_new']:.3f}"
        if plan["saving_old"] is not None and plan["saving_new"] is not None:
            words += (
                f" ({plan['saving_old']:.1%} less than linear before, {plan['saving_new']:.1%} now)"
            )
        words += (
            f", rank imbalance {plan['imbalance_old']:.3f} becomes {plan['imbalance_new']:.3f}; "
            f"a refresh of {plan['refresh_moved_share']:.1%} of the slots: {plan['refresh_reason']}"
        )
        lines.append(words)
    return lines


def _mean(values: np.ndarray) -> float | str:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else "-"

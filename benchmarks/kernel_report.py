"""What ``benchmarks/kernels.py`` says of its report: tables, ratios, and rows for results.csv."""

import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _intervals
from kernel_cases import AVERAGED

PARTS = ("ours", "peers", "quantize", "layer", "cpu")


def print_tables(report: dict[str, Any]) -> None:
    if report["dry"]:
        print("DRY RUN: no GPU, no figure; it says what was gone through and what is absent")
    print(json.dumps(report["machine"]))
    for part in ("build", "test", "sanitize"):
        if part in report:
            print(f"{part}: {report[part]}")
    for part in PARTS:
        for shape, rows in report.get(part, {}).get("shapes", {}).items():
            print(f"\n{part}, {shape}")
            for label, facts in rows.items():
                print(f"  {label:52s} {describe(facts)}")
    lines = [f"  {name:52s} {text(found)}" for name, found in averages(report)]
    print("\n".join(["\nratios of medians; geometric means where there are shapes", *lines]))


def describe(facts: dict[str, Any]) -> str:
    notes = [facts[name] for name in ("note",) if name in facts]
    if "read_from" in facts:
        here = f", here {facts['installed']}" if "installed" in facts else ""
        notes.append(f"after {facts['read_from']}{here}")
    ending = f"  ({'; '.join(notes)})" if notes else ""
    if "left_out" in facts:
        return f"{facts['left_out']}{ending}"
    if "median_us" not in facts:
        return f"ran{ending}"
    words = f"{facts['median_us']:10.1f} us [{facts['low_us']:.1f}, {facts['high_us']:.1f}]"
    if "share_of_copy" in facts:
        words += f"  {100 * facts['share_of_copy']:5.1f} % of copy"
    if "share_of_mix" in facts:
        words += f", {100 * facts['share_of_mix']:5.1f} % of its mix"
    return words + ("" if facts["captured"] else "  as launched, not captured") + ending


def text(found: _intervals.Estimate) -> str:
    return f"{found.value:6.2f}x [{found.low:.2f}, {found.high:.2f}]"


def averages(report: dict[str, Any]) -> Iterator[tuple[str, _intervals.Estimate]]:
    """Yield what to call each ratio, and its geometric mean over the shapes that both ran on."""
    for above, below, part in pairs(report):
        shapes = report.get(part, {}).get("shapes", {})
        both = [
            comparable(rows[above], rows[below])
            for shape, rows in shapes.items()
            if (shape in AVERAGED or part in ("cpu", "layer"))
            and timed(rows, above)
            and timed(rows, below)
        ]
        if both:
            yield f"{above} over {below}", _intervals.geometric_mean_ratio(both)


def pairs(report: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield (slower, faster, part): what the goals are about, and the noise of the same build."""
    peers = report.get("peers", {})
    if peers:
        best = f"ours, {peers['best']}"
        rows = next(iter(peers["shapes"].values()))
        yield f"{best}, again", best, "peers"
        for label, facts in rows.items():
            if "read_from" in facts:
                below = f"{best}, forward" if facts.get("forward_only") else best
                yield label, below, "peers"
        if best != "ours, triton":
            yield "ours, triton", best, "peers"
    for backend in report.get("ours", {}).get("backends", ()):
        for format in ("fp8", "mxfp8", "mxfp4"):
            fused = f"fused permute and quantize {format} | {backend}"
            yield f"permute, then quantize {format} | {backend}", fused, "quantize"
        whole = f"map, fused permute and quantize mxfp8 | {backend}"
        yield "map, fused permute and quantize mxfp8 | Megatron-core", whole, "quantize"
    layer = report.get("layer", {})
    for rows in list(layer.get("shapes", {}).values())[:1]:
        for label in rows:
            yield label, f"layer, ours, {layer['best']}", "layer"
    yield "index_add", "ours", "cpu"


def timed(rows: dict[str, Any], label: str) -> bool:
    return "samples_us" in rows.get(label, {})


def comparable(above: dict[str, Any], below: dict[str, Any]) -> tuple[list[float], list[float]]:
    """The samples of both as graphs, or of both as launched where one cannot be captured."""
    if above["captured"] and below["captured"]:
        return above["samples_us"], below["samples_us"]
    return above["eager_samples_us"], below["eager_samples_us"]


def write_rows(path: Path, report: dict[str, Any]) -> None:
    """Append the measured figures: medians, shares, ratios; intervals are in the notes."""
    import _results

    common = {"benchmark": "kernels", "kind": "measured"}
    if report["machine"]["device"] != "cpu":
        common["device"] = report["machine"]["device"]
    rows, shares = [], {}
    for part in PARTS:
        for shape, found in report.get(part, {}).get("shapes", {}).items():
            for label, facts in found.items():
                if "median_us" not in facts:
                    continue
                metric = "median process time" if "wall_us" in facts else "median"
                row = {"case": f"{part}, {shape}, {label}", "metric": metric, "unit": "us"}
                note = f"bootstrap 95 % [{facts['low_us']:.2f}, {facts['high_us']:.2f}]"
                note += "" if facts["captured"] else "; as launched, not captured"
                if "wall_us" in facts:
                    note += f"; wall {facts['wall_us']:.2f}"
                rows.append(common | row | {"value": f"{facts['median_us']:.2f}", "note": note})
                if "share_of_copy" in facts and shape in AVERAGED:
                    shares.setdefault(label, []).append(facts["share_of_copy"])
    for label, values in shares.items():
        mean = 100 * math.exp(statistics.fmean(map(math.log, values)))
        case = f"ours, geometric mean of A to E, {label}"
        row = {"case": case, "metric": "share_of_copy", "value": f"{mean:.1f}", "unit": "%"}
        rows.append(common | row)
    for name, found in averages(report):
        row = {"case": f"geometric mean, {name}", "metric": "speed", "unit": "x"}
        note = f"bootstrap 95 % [{found.low:.3f}, {found.high:.3f}]"
        rows.append(common | row | {"value": f"{found.value:.3f}", "note": note})
    _results.append_rows(path, rows, packages=("moe_locality", "torch", "triton"))

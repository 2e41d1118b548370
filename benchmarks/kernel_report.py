"""What ``benchmarks/kernels.py`` says of its report: tables, and rows for results.csv."""

import json
import math
import statistics
from pathlib import Path
from typing import Any


def print_tables(report: dict[str, Any]) -> None:
    print(json.dumps(report["machine"]))
    for part in ("build", "test", "sanitize"):
        if part in report:
            print(f"{part}: {report[part]}")
    for part in ("ours", "peers", "cpu"):
        for shape, rows in report.get(part, {}).get("shapes", {}).items():
            print(f"\n{part}, {shape}")
            for label, facts in rows.items():
                print(f"  {label:44s} {describe(facts)}")


def describe(facts: dict[str, Any]) -> str:
    if "left_out" in facts:
        return f"left out: {facts['left_out']}"
    if "median_us" not in facts:
        return "ran"
    words = f"{facts['median_us']:10.1f} us"
    if "share_of_copy" in facts:
        words += f"  {100 * facts['share_of_copy']:5.1f} % of copy"
    return words + ("" if facts["captured"] else "  (not captured)")


def write_rows(path: Path, report: dict[str, Any]) -> None:
    """Append the measured figures, and the geometric mean of each share over shapes A to E."""
    import _results

    common = {"benchmark": "kernels", "kind": "measured"}
    if report["machine"]["device"] != "cpu":
        common["device"] = report["machine"]["device"]
    rows, shares = [], {}
    for part in ("ours", "peers", "cpu"):
        for shape, found in report.get(part, {}).get("shapes", {}).items():
            for label, facts in found.items():
                if "median_us" not in facts:
                    continue
                case = f"{part}, {shape}, {label}"
                rows.append(common | {"case": case, "metric": "median", "value": f"{facts['median_us']:.2f}", "unit": "us"})  # fmt: skip  # noqa: E501
                if "share_of_copy" in facts and not shape.startswith("F"):
                    shares.setdefault(label, []).append(facts["share_of_copy"])
    for label, values in shares.items():
        mean = 100 * math.exp(statistics.fmean(map(math.log, values)))
        rows.append(common | {"case": f"ours, geometric mean of A to E, {label}", "metric": "share_of_copy", "value": f"{mean:.1f}", "unit": "%"})  # fmt: skip  # noqa: E501
    _results.append_rows(path, rows, packages=("moe_locality", "torch", "triton"))

"""The table of results: one CSV that every benchmark appends to.

Columns: benchmark, case, metric, value, unit, kind (``measured`` or ``simulated``), baseline,
device, versions, commit, date, note. A figure in the README or in docs/ names its row.
"""

import argparse
import csv
import datetime
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from moe_locality.tracking import package_versions

RESULTS = Path(__file__).with_name("results.csv")
COLUMNS = (
    "benchmark",
    "case",
    "metric",
    "value",
    "unit",
    "kind",
    "baseline",
    "device",
    "versions",
    "commit",
    "date",
    "note",
)


def table_path(text: str) -> Path:
    """The path of an option ``--csv``: one that rows can be appended to, known before the work."""
    path = Path(text)
    try:
        path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"found {text} ({error.strerror}), expected a table that can be written"
        ) from error
    return path


def append_rows(
    path: Path, rows: Iterable[dict[str, Any]], *, packages: Sequence[str] = ("numpy",)
) -> None:
    """Append rows; device, versions (of ``packages``), commit and date are filled in.

    A row has at least benchmark, case, metric, value, unit and kind. The file is made with its
    header where it is absent or empty.
    """
    common = {
        "device": device(),
        "versions": _versions(packages),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }
    before = path.read_bytes() if path.exists() else b""
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if not before:
            writer.writeheader()
        elif not before.endswith(b"\n"):
            file.write("\n")
        for row in rows:
            if row["kind"] not in ("measured", "simulated"):
                raise ValueError(f"kind is {row['kind']!r}, expected measured or simulated")
            writer.writerow({**common, **row})


def device() -> str:
    """The processor and the number of cores that this process may use."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        pass
    return f"{name} ({len(os.sched_getaffinity(0))} cores)"


def commit() -> str:
    """The commit of this checkout, with ``-dirty`` where tracked files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent, check=False)
    return done.stdout.strip() or "unknown"


def _versions(packages: Sequence[str]) -> str:
    known = package_versions(packages)
    return " ".join(f"{name} {version}" for name, version in known.items())

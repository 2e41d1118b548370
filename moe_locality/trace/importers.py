"""Importers: other tools' routing records become a RoutingTrace."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from moe_locality.errors import TraceError
from moe_locality.trace.npz import read_npz
from moe_locality.trace.schema import RoutingTrace


def import_trace(path: str | PathLike[str]) -> RoutingTrace:
    """Read a foreign trace; the suffix of the file says which format it is.

    Raises:
        TraceError: the suffix is unknown, or the content does not fit the format.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".npz":
        return read_npz(path)
    raise TraceError(
        f"found a file {path} of unknown format, expected one of: .npz: convert it to one of these"
    )

"""JSON that people can diff: sorted keys, one line per innermost row."""

import json
import math
from typing import Any

import numpy as np

from moe_locality.errors import PlacementError


def to_plain(value: Any, where: str) -> Any:
    """A deep copy in plain JSON types: arrays and tuples become lists, numpy numbers Python
    numbers, nan None.

    Raises:
        PlacementError: something has no JSON form; ``where`` is its path.
    """
    if isinstance(value, np.ndarray):
        return to_plain(value.tolist(), where)
    if isinstance(value, np.generic):
        return to_plain(value.item(), where)
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise PlacementError(f"{where}: found the key {key!r}, expected a string key")
        return {key: to_plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no nan or infinity
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise PlacementError(
        f"{where}: found a {type(value).__name__}, expected numbers, strings, lists and dicts"
    )


def dump_rows(value: Any, indent: int = 0) -> str:
    """JSON text: objects and lists of containers are spread over lines, lists of scalars stay on
    one line.
    """
    pad, end = " " * (indent + 1), " " * indent
    if isinstance(value, dict) and value:
        items = (
            f"{pad}{json.dumps(key)}: {dump_rows(value[key], indent + 1)}" for key in sorted(value)
        )
        return "{\n" + ",\n".join(items) + f"\n{end}}}"
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        items = (f"{pad}{dump_rows(item, indent + 1)}" for item in value)
        return "[\n" + ",\n".join(items) + f"\n{end}]"
    return json.dumps(value, allow_nan=False)

"""Real text of four domains that every Python installation has, offline, the same on every rank.

``code``        the Python sources of the standard library
``prose``       the language reference behind ``help()`` (pydoc_data.topics)
``arithmetic``  worked school arithmetic, generated from a seed
``markup``      HTML pages that pydoc renders for standard library modules

A document is one file, topic, sheet or page. The text depends on the Python version, and on nothing
else: no hash seed, no memory address.
"""

import importlib
import os
import pydoc
import random
import re
from collections.abc import Callable
from pathlib import Path

DOMAINS = ("code", "prose", "arithmetic", "markup")

# Pages of these modules do not change with PYTHONHASHSEED (no default value that prints a set).
_PAGES = [
    "argparse",
    "ast",
    "calendar",
    "collections",
    "csv",
    "dataclasses",
    "decimal",
    "email.message",
    "enum",
    "fractions",
    "functools",
    "html.parser",
    "inspect",
    "json",
    "logging",
    "pathlib",
    "random",
    "statistics",
    "string",
    "textwrap",
    "threading",
    "typing",
    "unittest.case",
    "zipfile",
]


def read_documents(domain: str, seed: int = 0) -> list[str]:
    """Return the documents of a domain, in an order that is the same everywhere.

    Raises:
        ValueError: there is no such domain.
        RuntimeError: this Python has no standard library sources or no topics (some minimal images
        strip them).
    """
    if domain not in _READERS:
        raise ValueError(f"found domain {domain!r}, expected one of {', '.join(DOMAINS)}")
    documents = _READERS[domain](seed)
    if not documents:
        raise RuntimeError(
            f"this Python installation has no text for the domain {domain!r}: use one with the"
            " sources of its standard library"
        )
    return documents


def _code(seed: int) -> list[str]:
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return [text for file in files if len(text := file.read_text("utf-8", "replace")) > 1000]


def _prose(seed: int) -> list[str]:
    try:
        from pydoc_data import topics
    except ImportError as error:
        raise RuntimeError(
            "this Python has no pydoc_data.topics: install the full standard library (Debian:"
            " libpython3-stdlib)"
        ) from error
    return [topics.topics[name] for name in sorted(topics.topics)]


def _markup(seed: int) -> list[str]:
    renderer = pydoc.HTMLDoc()
    pages = [renderer.docmodule(importlib.import_module(name)) for name in _PAGES]
    # addresses differ between processes; runs of non-breaking spaces are the renderer's indentation
    return [re.sub(r" at 0x[0-9a-fA-F]+", "", page).replace("&nbsp;" * 4, "\t") for page in pages]


def _arithmetic(seed: int, sheets: int = 160, problems: int = 24) -> list[str]:
    rng = random.Random(seed)
    kinds = (_addition, _multiplication, _fractions, _division)
    return [
        "\n".join(rng.choice(kinds)(rng) for _ in range(problems)) + "\n" for _ in range(sheets)
    ]


def _addition(rng: random.Random) -> str:
    a, b = rng.randrange(100, 100_000), rng.randrange(100, 100_000)
    lines, carry, written = [f"{a} + {b}"], 0, ""
    for place in range(len(str(max(a, b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        step = f"  {x} + {y} + {carry} = {total}" if carry else f"  {x} + {y} = {total}"
        written, carry = str(total % 10) + written, total // 10
        lines.append(f"{step}, {total % 10}" + (f" carry {carry}" if carry else ""))
    return "\n".join([*lines, f"= {a + b}"])


def _multiplication(rng: random.Random) -> str:
    a, b = rng.randrange(12, 1000), rng.randrange(12, 1000)
    parts = [(int(digit) * 10**place) for place, digit in enumerate(reversed(str(b)))]
    lines = [f"  {a} * {part} = {a * part}" for part in parts if part]
    total = " + ".join(str(a * part) for part in parts if part)
    return "\n".join([f"{a} * {b}", *lines, f"  {total} = {a * b}", f"= {a * b}"])


def _fractions(rng: random.Random) -> str:
    a, b, c, d = (rng.randrange(1, 20) for _ in range(4))
    top = f"({a}*{d} + {c}*{b})/({b}*{d})"
    return (
        f"{a}/{b} + {c}/{d}\n  = {top}\n  = ({a * d} + {c * b})/{b * d}\n= {a * d + c * b}/{b * d}"
    )


def _division(rng: random.Random) -> str:
    divisor, dividend = rng.randrange(3, 30), rng.randrange(1000, 100_000)
    lines, rest = [f"{dividend} : {divisor}"], 0
    for digit in str(dividend):
        value = rest * 10 + int(digit)
        rest = value % divisor
        lines.append(f"  {value} : {divisor} = {value // divisor}, rest {rest}")
    return "\n".join([*lines, f"= {dividend // divisor}, rest {rest}"])


_READERS: dict[str, Callable[[int], list[str]]] = {
    "code": _code,
    "prose": _prose,
    "arithmetic": _arithmetic,
    "markup": _markup,
}

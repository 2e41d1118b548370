"""Real text of four domains that every Python installation has, offline, the same on every rank.

``code``        the Python sources of the standard library's modules
``prose``       the language reference behind ``help()`` (pydoc_data.topics)
``arithmetic``  worked school arithmetic, generated from a seed
``markup``      HTML documentation of the standard library's packages, rendered by pydoc

A document is one file, topic, sheet or page. The text depends on the Python version, and on nothing
else: no hash seed, no memory address.
"""

import ast
import os
import pydoc
import random
from collections.abc import Callable
from pathlib import Path

DOMAINS = ("code", "prose", "arithmetic", "markup")

_PACKAGES = ("email", "html", "http", "json", "logging", "unittest", "urllib", "wsgiref", "xml/sax")
_DOCUMENTED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


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
    return list(dict.fromkeys(documents))  # some topics have two names


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
    library = Path(os.__file__).parent
    files = (file for name in _PACKAGES for file in sorted(library.glob(f"{name}/*.py")))
    pages = (html_page(file.stem, file.read_text("utf-8", "replace")) for file in files)
    return [page for page in pages if len(page) > 1000]


def html_page(title: str, source: str) -> str:
    """Return the HTML documentation of a module: its docstrings and signatures, from the source.

    pydoc's own pages describe the imported module and so depend on what else was imported; only
    its conversion of a text to HTML is used here.
    """
    html = pydoc.HTMLDoc()
    tree = ast.parse(source)
    parts = [f"<h1>{title}</h1>", f"<p>{html.markup(ast.get_docstring(tree) or '')}</p>"]
    for node in ast.walk(tree):
        doc = ast.get_docstring(node) if isinstance(node, _DOCUMENTED) else None
        if doc is None:
            continue
        if isinstance(node, ast.ClassDef):
            parts.append(f'<h2 id="{node.name}">class {node.name}</h2>\n<p>{html.markup(doc)}</p>')
        else:
            call = f"<strong>{node.name}</strong>({html.escape(ast.unparse(node.args))})"
            parts.append(
                f'<dl>\n<dt><a name="-{node.name}">{call}</a></dt>\n'
                f'<dd><span class="code">{html.markup(doc)}</span></dd>\n</dl>'
            )
    return "\n".join([*parts, ""])


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

"""The README keeps its word: links, commands, options and figures exist."""

import csv
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8"))
    for target, heading in links:
        if "://" not in target:
            there = page.parent / target if target else page
            assert there.exists(), f"{page.name} links to {target}, which is not there"
            assert not heading or heading in headings(there), f"no {heading} in {there.name}"


def headings(page):
    """The anchors of a page, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text).strip().lower().replace(" ", "-") for text in found}


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"\bmake ([a-z]+)", README + (ROOT / "CONTRIBUTING.md").read_text()))
    known = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    assert {"demo", "test"} <= named <= known


def test_python_blocks_compile():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")


def commands() -> list[list[str]]:
    return [shlex.split(line) for line in re.findall(r"moe-locality [a-z][^`\n|#]*", README)]


def test_commands_and_their_options_exist():
    assert len(commands()) >= 3
    for words in commands():
        code = "from moe_locality.cli import main; main()"
        line = [sys.executable, "-c", code, words[1], "--help"]
        result = subprocess.run(line, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, f"{words}: {result.stderr}"
        options = [word for word in words if word.startswith("--")]
        missing = [option for option in options if option not in result.stdout]
        assert not missing, f"moe-locality {words[1]} has no {missing}"


BENCHMARKS = "main_job|placement|recorder_overhead|multinode|paper_decoder|serving"
FIGURE = re.compile(rf"`({BENCHMARKS}): ([^`]+)`")


def _prints(value: float, line: str) -> bool:
    """Whether a number of the line is ``value``, rounded to the digits that the line gives it."""
    words = re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", line.replace("\u2212", "-").replace(",", ""))
    for word in words:
        digits, _, power = word.partition("e")
        step = 10.0 ** (int(power or 0) - len(digits.partition(".")[2]))
        if abs(float(word) - value) <= 0.5001 * step:
            return True
    return False


def test_every_figure_is_the_value_of_its_row():
    """A paragraph or table row with figures names the `benchmark: metric` of results.csv, and
    one of its numbers is the value of such a row.
    """
    known = defaultdict(list)
    with (ROOT / "benchmarks" / "results.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            known[row["benchmark"], row["metric"]].append(float(row["value"]))
    lines = [line for line in README.split("\n") if line.startswith("|")]
    lines += [text for text in README.split("\n\n") if not text.startswith("|")]
    named = [(pair, line) for line in lines for pair in FIGURE.findall(line)]
    assert named, "the README shows figures of the demo"
    unknown = [pair for pair, _ in named if pair not in known]
    assert not unknown, f"not in results.csv: {unknown}"
    header = "case of the rows"  # a table's head names the rows of the figures below it
    wrong = [
        (pair, line)
        for pair, line in named
        if header not in line and not any(_prints(value, line) for value in known[pair])
    ]
    assert not wrong, f"no number there is the value of such a row: {wrong}"

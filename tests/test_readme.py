"""The README keeps its word: links, commands, options and figures exist."""

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing, f"{page.name} links to what is not there: {missing}"


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


def test_every_figure_names_its_row():
    """A table row with figures ends in the `benchmark: metric` of results.csv that it is taken
    from.
    """
    with (ROOT / "benchmarks" / "results.csv").open(encoding="utf-8") as file:
        known = {(row["benchmark"], row["metric"]) for row in csv.DictReader(file)}
    named = re.findall(r"`(main_job|placement|recorder_overhead): ([^`]+)`", README)
    assert named, "the README shows figures of the demo"
    unknown = [pair for pair in named if tuple(pair) not in known]
    assert not unknown, f"not in results.csv: {unknown}"

"""What benchmarks/paper_decoder.py counts of steps."""

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def decoder():
    pytest.importorskip("transformers")
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("paper_decoder")
    finally:
        sys.path.remove(str(BENCHMARKS))


def step(kind, tokens, rows, seconds):
    links = {"dispatch": [7, 7, rows], "combine": [7, 7, rows]}
    return {
        "kind": kind,
        "tokens": tokens,
        "rows": links,
        "bytes": {name: [4 * n for n in sums] for name, sums in links.items()},
        "seconds": seconds,
    }


def test_counted_takes_the_steps_in_which_no_rank_reads_a_prompt(decoder):
    first = [step("prefill", 9, 90, 9.0), step("decode", 2, 3, 0.1), step("decode", 2, 1, 0.3)]
    other = [step("decode", 2, 50, 9.0), step("decode", 2, 5, 0.2), step("idle", 0, 1, 0.3)]
    found = decoder.counted([{"steps": first, "seconds": 9.4}, {"steps": other, "seconds": 9.5}])
    assert found["decode rows across nodes per token"] == 2 * (3 + 5 + 1 + 1) / 6
    assert found[decoder.BYTES] == 4 * found["decode rows across nodes per token"]
    assert found["largest sent by a rank"] == 4 * 2 * (5 + 1) / 2
    assert found["decode step, median"] == pytest.approx(200)  # where all ranks decode
    assert found["all steps"] == 9.5

"""Grouping: on made requests with known kinds, and on the routing of a real model."""

import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("moe_locality.serving", reason="transformers before 5.23")

from moe_locality.errors import ConfigError
from moe_locality.serving.grouping import chooser, profile_of
from moe_locality.serving.requests import SamplingParams
from moe_locality.serving.scheduler import (
    Decode,
    Limits,
    RequestState,
    Scheduler,
    Sequence,
)

REAL = Path(os.environ.get("MOE_LOCALITY_DATA", "/nowhere")) / "gpt_oss_20b_benchmarks.npz"


def test_profile_of_counts_picks():
    picks = np.array([[[0, 1], [2, 2]], [[1, -1], [0, 3]]])  # 2 tokens, 2 layers
    assert profile_of(picks, 4).tolist() == [[1, 2, 0, 0], [1, 0, 2, 1]]


def test_chooser_refuses_an_unknown_name():
    with pytest.raises(ConfigError, match="grouping='best'"):
        chooser("best")


def serve(requests, grouping, rows, ready, prompt):
    """Run requests (picks [T, L, K]) through the scheduler; return distinct experts per full step.

    The first ``prompt`` tokens are the prompt, the others are decoded.
    """
    num_experts = 1 + max(int(picks.max()) for picks in requests)
    limits = Limits(
        max_num_seqs=rows, max_model_len=4096, max_num_ready=ready, max_num_kv_tokens=10**9
    )
    scheduler = Scheduler(limits, choose=chooser(grouping), patience=1000)
    for number, picks in enumerate(requests):
        params = SamplingParams(max_tokens=len(picks) - prompt)
        scheduler.add(RequestState(number, [0] * prompt, params, seed=0, number=number))
    found = []
    while (work := scheduler.next_work()) is not None:
        if isinstance(work, Decode):
            at = [(s, prompt + len(s.token_ids) - 1) for s in work.sequences]
            if len(at) == rows:
                step = np.stack([requests[s.request.number][place] for s, place in at])
                found.append((profile_of(step, num_experts) > 0).sum(axis=1).mean())
            for sequence, _ in at:
                sequence.token_ids.append(0)
                if len(sequence.token_ids) >= sequence.request.params.max_tokens:
                    sequence.finish_reason = "length"
            scheduler.drop_finished()
            continue
        for state, count in zip(work.requests, work.chunks, strict=True):
            own = requests[state.number][state.computed : state.computed + count]
            counts = profile_of(own, num_experts)
            state.profile = counts if state.profile is None else state.profile + counts
            state.profiled += count
            if scheduler.was_read(state, count):
                state.sequences = [Sequence(state, 0, [0])]
                scheduler.is_ready(state)
    return float(np.mean(found))


@pytest.mark.parametrize("grouping", ["cosine", "experts"])
@pytest.mark.parametrize("seed", range(3))
def test_chooser_puts_requests_of_one_kind_together(grouping, seed):
    """Four kinds of requests with eight experts each: a step needs one kind's experts, not all."""
    rng = np.random.default_rng(seed)
    requests = [
        8 * rng.integers(4) + rng.integers(0, 8, (24, 2, 2)).astype(np.int16) for _ in range(80)
    ]
    mixed = serve(requests, "fifo", 6, 20, 12)
    grouped = serve(requests, grouping, 6, 20, 12)
    assert grouped < 0.85 * mixed


@pytest.mark.skipif(not REAL.exists(), reason="MOE_LOCALITY_DATA has no recorded model")
def test_chooser_lowers_the_distinct_experts_of_a_real_models_steps():
    """gpt-oss-20b, 16 requests a step, known by their first 32 tokens, 128 ready."""
    with np.load(REAL, allow_pickle=False) as data:
        ids, owner = data["expert_ids"], data["request_id"]
    requests = [ids[owner == r].astype(np.int16)[:160] for r in np.unique(owner)]
    requests = [picks for picks in requests if len(picks) > 40]
    np.random.default_rng(0).shuffle(requests)
    requests = requests[:300]
    mixed = serve(requests, "fifo", 16, 128, 32)
    assert serve(requests, "cosine", 16, 128, 32) < 0.95 * mixed
    assert serve(requests, "experts", 16, 128, 32) < 0.93 * mixed

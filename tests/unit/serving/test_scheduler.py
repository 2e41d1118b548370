"""The scheduler alone: limits hold in every step, everybody gets a turn, in order."""

import numpy as np
import pytest

from moe_locality.errors import ConfigError
from moe_locality.serving.requests import RequestError, SamplingParams
from moe_locality.serving.scheduler import (
    Decode,
    Limits,
    Prefill,
    RequestState,
    Scheduler,
    Sequence,
)


def newest(ready, running):
    """A rule that lets the latest request overtake all others."""
    return max(range(len(ready)), key=lambda i: ready[i].number)


def state(number, prompt=5, max_tokens=4, n=1):
    params = SamplingParams(n=n, max_tokens=max_tokens)
    return RequestState(number, [0] * prompt, params, seed=0, number=number)


def advance(scheduler, work):
    """Do what the engine does with a piece of work, without a model."""
    if isinstance(work, Decode):
        for sequence in work.sequences:
            add_token(sequence)
        scheduler.drop_finished()
    elif isinstance(work, Prefill):
        for request, count in zip(work.requests, work.chunks, strict=True):
            if not scheduler.was_read(request, count):
                continue
            request.sequences = [Sequence(request, i) for i in range(request.params.n)]
            for sequence in request.sequences:
                add_token(sequence)
            scheduler.is_ready(request)
            if all(sequence.finish_reason for sequence in request.sequences):
                scheduler.leaves(request)


def add_token(sequence):
    sequence.token_ids.append(0)
    if len(sequence.token_ids) == sequence.request.params.max_tokens:
        sequence.finish_reason = "length"


def run(scheduler, steps=10_000):
    """Run to the end; return the work of every step."""
    done = []
    while (work := scheduler.next_work()) is not None:
        done.append(work)
        advance(scheduler, work)
        assert len(done) < steps
    return done


def size(work):
    """Tokens of a step, padding included."""
    if isinstance(work, Decode):
        return len(work.sequences)
    return len(work.requests) * max(work.chunks)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("pads", [True, False])
def test_next_work_keeps_every_limit_and_finishes_everything(seed, pads):
    rng = np.random.default_rng(seed)
    limits = Limits(
        max_num_seqs=int(rng.integers(1, 6)),
        max_num_batched_tokens=int(rng.integers(8, 40)),
        max_model_len=100,
        max_num_kv_tokens=int(rng.integers(120, 400)),
        max_num_ready=int(rng.integers(0, 5)),
    )
    scheduler = Scheduler(limits, pads=pads, choose=newest)
    states = []
    for number in range(30):
        n = int(rng.integers(1, limits.max_num_seqs + 1))
        made = state(number, int(rng.integers(1, 80)), int(rng.integers(1, 20)), n)
        try:
            scheduler.check(made)
        except RequestError:
            continue
        states.append(made)
        scheduler.add(made)
    while (work := scheduler.next_work()) is not None:
        assert size(work) <= limits.max_num_batched_tokens
        assert scheduler.kv_tokens <= limits.kv_room
        if isinstance(work, Decode):
            assert len(work.sequences) <= limits.max_num_seqs
        elif not pads or work.requests[0].computed:
            assert len(set(work.chunks)) == 1
        advance(scheduler, work)
    assert len(scheduler) == 0
    for made in states:
        lengths = [len(sequence.token_ids) for sequence in made.sequences]
        assert lengths == [made.params.max_tokens] * made.params.n


def test_next_work_lets_no_sequence_wait_for_more_than_a_chunk():
    scheduler = Scheduler(Limits(max_num_seqs=2, max_num_batched_tokens=8, max_model_len=200))
    scheduler.add(state(0, prompt=4, max_tokens=100))
    scheduler.add(state(1, prompt=90, max_tokens=2))
    kinds = "".join(type(work).__name__[0] for work in run(scheduler))
    assert "PP" not in kinds
    assert kinds.count("P") == 1 + 12  # 90 tokens in chunks of 8


def test_next_work_reads_several_short_prompts_at_once():
    scheduler = Scheduler(Limits(max_num_seqs=8, max_num_batched_tokens=32))
    for number in range(8):
        scheduler.add(state(number, prompt=5 + number % 3))
    first = scheduler.next_work()
    assert isinstance(first, Prefill)
    assert [request.number for request in first.requests] == [0, 1, 2, 3]
    assert first.chunks == [5, 6, 7, 5]


def test_next_work_starts_the_oldest_that_others_have_overtaken():
    limits = Limits(max_num_seqs=1, max_num_batched_tokens=5, max_num_ready=2)
    scheduler = Scheduler(limits, choose=newest, patience=3)
    for number in range(12):
        scheduler.add(state(number))
    order = []
    for work in run(scheduler):
        if isinstance(work, Decode):
            number = work.sequences[0].request.number
            if number not in order:
                order.append(number)
    assert sorted(order) == list(range(12))
    for place, number in enumerate(order):  # overtaken by `patience` in a row at most
        later = [other for other in order[:place] if other > number]
        assert len(later) <= 3 * 3


def test_next_work_lets_a_large_request_in_though_small_ones_keep_coming():
    limits = Limits(max_num_seqs=4, max_num_batched_tokens=32, max_num_kv_tokens=80)
    scheduler = Scheduler(limits)
    for number in range(3):
        scheduler.add(state(number, 5, 10))
    large = state(3, 30, 40)
    scheduler.add(large)
    for number in range(4, 60):
        scheduler.add(state(number, 5, 10))
    finished_before = 0
    while not large.sequences:
        work = scheduler.next_work()
        advance(scheduler, work)
        finished_before += isinstance(work, Decode)
    assert finished_before < 30


@pytest.mark.parametrize(
    ("made", "word"),
    [
        (state(0, prompt=100), "max_model_len"),
        (state(0, n=5), "max_num_seqs"),
        (state(0, prompt=60, max_tokens=60), "max_num_kv_tokens"),
    ],
)
def test_check_refuses_what_can_never_run(made, word):
    limits = Limits(max_num_seqs=4, max_model_len=100, max_num_kv_tokens=110)
    with pytest.raises(RequestError, match=word):
        Scheduler(limits).check(made)


@pytest.mark.parametrize(
    "wrong",
    [{"max_num_seqs": 0}, {"max_model_len": 1}, {"max_num_seqs": 9, "max_num_batched_tokens": 8}],
)
def test_limits_refuse_what_cannot_be(wrong):
    with pytest.raises(ConfigError):
        Limits(**wrong)

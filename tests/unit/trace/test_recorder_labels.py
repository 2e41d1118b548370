"""Labels: how annotate() and the shapes that the hooks see become one label per token."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.errors import TraceError
from moe_locality.trace.recorder import annotate
from moe_locality.trace.recorder.labels import (
    Annotation,
    PositionBook,
    check_fits,
    continues,
    current_annotation,
    layout_of,
    running_count,
    spread,
)
from moe_locality.trace.schema import DECODE, PREFILL, TRAIN, UNKNOWN


def labels(num_tokens, shape, given, *, index=0, book=None, training=True, **layout):
    """Labels of one forward pass; ``book`` carries positions from one to the next."""
    book = book or PositionBook()
    plan = layout_of(num_tokens, shape, given, **layout)
    check_fits(given, plan, index == 0)
    requests = given.request_ids
    if requests is None:
        requests = 100 + np.arange(plan.num_sequences)
    starts = book.starts(requests) if continues(given, index) else None
    found = spread(
        given,
        plan,
        request_ids=requests,
        starts=starts,
        training=training,
        forward_index=index,
    )
    book.advance(given, plan, requests, starts, index == 0)
    return found


def annotation(**given):
    with annotate(**given):
        return current_annotation()


def test_without_annotation_sequences_are_numbered_and_positions_start_at_zero():
    found = labels(6, (2, 3), Annotation())
    assert found.request_id.tolist() == [100, 100, 100, 101, 101, 101]
    assert found.position.tolist() == [0, 1, 2, 0, 1, 2]
    assert (found.stage, found.domains) == (TRAIN, None)
    assert labels(6, (2, 3), Annotation(), training=False).stage == UNKNOWN


def test_sequence_first_models_interleave_their_sequences():
    given = annotation(request_ids=[7, 9], positions=[[0, 1, 2], [5, 6, 7]])
    found = labels(6, (3, 2), given, sequence_first=True)
    assert found.request_id.tolist() == [7, 9, 7, 9, 7, 9]
    assert found.position.tolist() == [0, 5, 1, 6, 2, 7]


def test_flat_input_takes_the_number_of_sequences_from_the_labels():
    found = labels(6, None, annotation(request_ids=[7, 9], domains=["code", "law"]))
    assert found.request_id.tolist() == [7, 7, 7, 9, 9, 9]
    assert [found.domains[i] for i in found.domain_index] == ["code"] * 3 + ["law"] * 3
    assert labels(6, None, Annotation()).position.tolist() == [0, 1, 2, 3, 4, 5]


def test_labels_per_token_count_positions_within_each_request():
    found = labels(6, (1, 6), annotation(request_ids=[7, 7, 9, 9, 9, 4]))
    assert found.request_id.tolist() == [7, 7, 9, 9, 9, 4]
    assert found.position.tolist() == [0, 1, 0, 1, 2, 0]


def test_generate_is_prefill_then_decode_and_positions_go_on():
    book = PositionBook()
    given = annotation(request_ids=[3, 4], stage="generate", mask=[[0, 1, 1], [1, 1, 1]])
    first = labels(6, (2, 3), given, book=book)
    assert first.stage == PREFILL
    assert first.keep.tolist() == [False, True, True, True, True, True]
    assert first.position[first.keep].tolist() == [0, 1, 0, 1, 2]
    for index in (1, 2):
        later = labels(2, (2, 1), given, index=index, book=book)
        assert (later.stage, later.keep) == (DECODE, None)
        assert later.position.tolist() == [1 + index, 2 + index]  # request 3 has one token less


def test_decode_goes_on_in_contexts_of_its_own():
    book = PositionBook()
    labels(6, (2, 3), annotation(request_ids=[3, 4], stage="prefill"), book=book)
    labels(4, (1, 4), annotation(request_ids=[5], stage="prefill"), book=book)
    for step in range(3):
        given = annotation(request_ids=[5, 3], stage="decode")
        assert labels(2, (2, 1), given, book=book).position.tolist() == [4 + step, 3 + step]
    packed = annotation(request_ids=[4, 4, 9, 3], stage="decode")  # two tokens of 4, a new request
    assert labels(4, (1, 4), packed, book=book).position.tolist() == [3, 4, 0, 6]
    again = annotation(request_ids=[4, 3], stage="prefill")
    assert labels(2, (2, 1), again, book=book).position.tolist() == [0, 0]
    told = annotation(request_ids=[4, 3], stage="decode", positions=[50, 60])
    assert labels(2, (2, 1), told, book=book).position.tolist() == [50, 60]
    assert labels(2, (2, 1), told, index=1, book=book).position.tolist() == [51, 61]


def test_a_finished_sequence_stays_where_it_is():
    book = PositionBook()
    labels(4, (2, 2), annotation(request_ids=[1, 2], stage="prefill"), book=book)
    given = annotation(request_ids=[1, 2], stage="decode", mask=[[True], [False]])
    labels(2, (2, 1), given, book=book)
    assert book.starts(np.array([1, 2])).tolist() == [3, 2]


def test_a_book_forgets_the_requests_that_were_seen_longest_ago(monkeypatch):
    monkeypatch.setattr("moe_locality.trace.recorder.labels.REMEMBERED_REQUESTS", 2)
    book = PositionBook()
    for request in (1, 2, 1, 3):
        labels(5, (1, 5), annotation(request_ids=[request], stage="prefill"), book=book)
    assert book.starts(np.array([1, 2, 3])).tolist() == [5, 0, 5]


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (10, [10, 11, 12, 10, 11, 12]),
        ([10, 20], [10, 11, 12, 20, 21, 22]),
        ([[4, 5, 6]], [4, 5, 6, 4, 5, 6]),
        ([9, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4]),
    ],
)
def test_positions_of_every_shape(positions, expected):
    given = annotation(request_ids=[1, 2], positions=torch.tensor(positions))
    assert labels(6, (2, 3), given).position.tolist() == expected


def test_decode_goes_on_after_positions_of_the_first_forward():
    book = PositionBook()
    given = annotation(request_ids=[1, 2], positions=[[4, 5], [7, 8]], stage="decode")
    labels(4, (2, 2), given, book=book)
    assert labels(2, (2, 1), given, index=1, book=book).position.tolist() == [6, 9]


def test_contexts_nest_and_end():
    with annotate(domains="code", stage="prefill"):
        with annotate(request_ids=np.array([5])):
            inner = current_annotation()
        assert current_annotation().request_ids is None
    assert (inner.domains, inner.stage, inner.request_ids.tolist()) == (("code",), "prefill", [5])
    assert current_annotation().stage is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"request_ids": [1.5]}, "request_ids of type float64, expected integers"),
        ({"request_ids": [-1]}, "expected a non-empty list of non-negative integers"),
        ({"request_ids": []}, "request_ids of type float64"),
        ({"request_ids": [1, 2, 3], "domains": ["a", "b"]}, "found 2 domains for 3 request_ids"),
        ({"domains": [1]}, "expected a name or a list of names"),
        ({"stage": "training"}, "found stage 'training', expected one of"),
        ({"positions": -3}, "expected non-negative integers"),
    ],
)
def test_impossible_labels_are_refused_at_once(given, message):
    with pytest.raises(TraceError, match=message), annotate(**given):
        pass


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"request_ids": [1, 2, 3]}, r"found 3 labels .* expected 2 \(one per sequence\) or 6"),
        ({"positions": [1, 2, 3]}, r"positions of shape \(3,\), expected \[6\] or \[2, 3\]"),
        ({"mask": [True]}, r"a mask of shape \(1,\), expected \[6\] or \[2, 3\]"),
    ],
)
def test_labels_that_do_not_fit_the_forward_pass_are_refused(given, message):
    with pytest.raises(TraceError, match=message):
        labels(6, (2, 3), annotation(**given))


@given(st.lists(st.integers(0, 5), max_size=40).map(np.array))
@settings(max_examples=50, deadline=None)
def test_running_count_counts_earlier_equals(values):
    expected = [int((values[:i] == value).sum()) for i, value in enumerate(values)]
    assert running_count(values).tolist() == expected


@given(st.integers(1, 5), st.integers(1, 7), st.booleans())
@settings(max_examples=40, deadline=None)
def test_layout_keeps_request_and_position_together(count, length, sequence_first):
    shape = (length, count) if sequence_first else (count, length)
    given = annotation(request_ids=list(range(count)))
    found = labels(count * length, shape, given, sequence_first=sequence_first)
    grid = np.full(shape, -1)
    rows = np.stack([found.request_id, found.position])
    for request, position in rows.T:
        place = (position, request) if sequence_first else (request, position)
        grid[place] += 1
    assert (grid == 0).all()
    flat = found.request_id.reshape(shape)
    assert (flat == flat[:1] if sequence_first else flat == flat[:, :1]).all()

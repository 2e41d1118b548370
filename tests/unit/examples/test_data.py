"""Text, requests and batches: the same everywhere, balanced, nothing in both splits."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.lm import data
from examples.lm.sources import DOMAINS, read_documents

SIZES = {"seq_len": 64, "train_per_domain": 40, "held_out_per_domain": 8}


@pytest.fixture(scope="module")
def splits() -> tuple[data.Requests, data.Requests]:
    return data.build_requests(**SIZES)


def digest(requests: data.Requests) -> str:
    parts = (requests.tokens, requests.request_id, requests.domain_id)
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def test_requests_are_the_same_in_every_process(splits):
    code = (
        "from examples.lm import data; from tests.unit.examples.test_data import SIZES, digest;"
        "print(*map(digest, data.build_requests(**SIZES)))"
    )
    root = Path(__file__).parents[3]
    for hash_seed in ("1", "2"):
        found = subprocess.run(
            [sys.executable, "-c", code],
            cwd=root,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        assert found == [digest(split) for split in splits]
    assert digest(data.build_requests(**SIZES, seed=1)[0]) != digest(splits[0])


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_document_is_in_both_splits(domain):
    train, held_out = data.split_documents(domain, seed=0)
    assert not set(train) & set(held_out)
    total = sum(map(len, train)) + sum(map(len, held_out))
    assert 0.1 < sum(map(len, held_out)) / total < 0.45
    assert sorted(train + held_out) == sorted(read_documents(domain, 0))


def test_the_text_is_what_the_domain_says():
    assert any("def __init__(self" in text for text in read_documents("code"))
    assert any('The "with" statement' in text for text in read_documents("prose"))
    assert all(text.startswith("<h1>") for text in read_documents("markup"))
    assert sum(text.count("<dd><span") for text in read_documents("markup")) > 500
    with pytest.raises(ValueError, match="found domain 'law', expected one of code, prose"):
        read_documents("law")


def test_the_arithmetic_is_right():
    checked = 0
    for sheet in read_documents("arithmetic", seed=7)[:20]:
        for line in sheet.splitlines():
            left, sign, right = line.strip().partition(" = ")
            if not sign or not left or ":" in line or "," in line:
                continue
            assert eval(left) == eval(right), line  # our own digits and signs
            checked += 1
    assert checked > 300


def test_requests_are_unique_balanced_and_in_range(splits):
    train, held_out = splits
    ids = np.concatenate([train.request_id, held_out.request_id])
    assert len(np.unique(ids)) == len(ids) == 4 * (40 + 8)
    for split, count in ((train, 40), (held_out, 8)):
        assert np.bincount(split.domain_id).tolist() == [count] * 4
        assert split.tokens.shape == (4 * count, 65)
        assert split.tokens.min() >= 0
        assert split.tokens.max() < data.VOCAB_SIZE
    rows = {row.tobytes() for row in train.tokens}
    assert len(rows) == len(train)  # no sequence twice


def test_too_little_text_is_named():
    with pytest.raises(ValueError, match=r"the train text of domain 'code' gives \d+ sequences of"):
        data.build_requests(seq_len=128, train_per_domain=10**6, held_out_per_domain=8)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 12), st.randoms(use_true_random=False), st.floats(0, 1))
def test_every_rank_gets_as_many_requests_and_homes_are_kept_where_there_is_room(
    num_ranks, per_rank, rng, share
):
    ids = np.arange(100, 100 + num_ranks * per_rank)
    homes = {int(i): rng.randrange(num_ranks) for i in ids if rng.random() < share}
    ranks = data.assign_ranks(ids, num_ranks, homes)
    assert np.bincount(ranks, minlength=num_ranks).tolist() == [per_rank] * num_ranks
    wanted = np.array([homes.get(int(i), -1) for i in ids])
    for rank in range(num_ranks):
        at_home = int(((ranks == rank) & (wanted == rank)).sum())
        assert at_home == min(per_rank, int((wanted == rank).sum()))


def test_balanced_homes_are_followed_exactly(splits):
    ids = splits[1].request_id
    homes = {int(i): int(rank) for i, rank in zip(ids, np.arange(len(ids)) // 8, strict=True)}
    assert data.assign_ranks(ids, 4, homes).tolist() == [homes[int(i)] for i in ids]


def test_wrong_homes_and_counts_are_named():
    with pytest.raises(ValueError, match="its home on rank 5, this run has 4 ranks"):
        data.assign_ranks(np.arange(8), 4, {3: 5})
    with pytest.raises(ValueError, match="6 requests cannot be dealt to 4 ranks in equal numbers"):
        data.assign_ranks(np.arange(6), 4)


def batches_of(requests, num_ranks, homes, steps=5):
    return [
        list(
            data.train_batches(
                requests,
                rank=rank,
                num_ranks=num_ranks,
                per_rank=4,
                steps=steps,
                seed=2,
                homes=homes,
            )
        )
        for rank in range(num_ranks)
    ]


def test_homes_move_requests_between_ranks_and_leave_the_global_batch(splits):
    train = splits[0]
    homes = {int(i): int(d) for i, d in zip(train.request_id, train.domain_id, strict=True)}
    plain, placed = batches_of(train, 4, None), batches_of(train, 4, homes)
    for step in range(5):
        joined = [np.concatenate([b[step].request_id for b in ranks]) for ranks in (plain, placed)]
        assert sorted(joined[0]) == sorted(joined[1])
        assert len(set(joined[0])) == 16
        assert (
            sorted(np.concatenate([b[step].domain_id for b in plain]))
            == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
        )
        for rank in range(4):
            assert len(plain[rank][step]) == 4
            assert set(placed[rank][step].domain_id) == {rank}
            assert len(set(plain[rank][step].domain_id)) > 1


def test_one_rank_and_four_ranks_train_on_the_same_global_batches(splits):
    train = splits[0]
    four = batches_of(train, 4, None)
    one = list(data.train_batches(train, rank=0, num_ranks=1, per_rank=16, steps=5, seed=2))
    for step in range(5):
        joined = np.concatenate([ranks[step].request_id for ranks in four])
        assert sorted(joined) == sorted(one[step].request_id)


def test_an_epoch_uses_every_request_once(splits):
    train = splits[0]
    batches = list(data.train_batches(train, rank=0, num_ranks=1, per_rank=16, steps=20, seed=0))
    first = np.concatenate([batch.request_id for batch in batches[:10]])
    second = np.concatenate([batch.request_id for batch in batches[10:]])
    assert sorted(first) == sorted(second) == sorted(train.request_id)
    assert first.tolist() != second.tolist()


def test_evaluation_covers_the_split_with_as_many_batches_on_every_rank(splits):
    held_out = splits[1]
    ranks = [
        list(data.eval_batches(held_out, rank=rank, num_ranks=4, per_rank=3)) for rank in range(4)
    ]
    assert {len(batches) for batches in ranks} == {3}
    ids = [batch.request_id for batches in ranks for batch in batches]
    assert sorted(np.concatenate(ids)) == sorted(held_out.request_id)


def test_homes_files(tmp_path):
    path = tmp_path / "homes.json"
    path.write_text(json.dumps({"17": 3, "18": 0}))
    assert data.read_homes(path) == {17: 3, 18: 0}
    path.write_text(json.dumps({"homes": {"17": 3}, "num_ranks": 4}))
    assert data.read_homes(path) == {17: 3}
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="does not map request ids to ranks"):
        data.read_homes(path)

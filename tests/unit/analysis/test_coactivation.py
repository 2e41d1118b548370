from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.analysis import stats
from moe_locality.errors import TraceError
from moe_locality.placement.counting import count_coactivation
from moe_locality.trace import RoutingTrace, write_trace
from moe_locality.trace.parquet import make_directory, write_shard
from tests.unit.trace.cases import make_load_trace, make_trace


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(1, 4))
def test_counts_against_a_loop(seed, top_k):
    trace = make_trace(seed, num_tokens=25, top_k=top_k)
    pairs, moves = np.zeros((3, 8, 8), int), np.zeros((2, 8, 8), int)
    for token in trace.expert_ids:
        for layer, picks in enumerate(token):
            for a, b in combinations(picks[picks >= 0], 2):
                pairs[layer, a, b] += 1
                pairs[layer, b, a] += 1
            if layer:
                before = token[layer - 1]
                for a in before[before >= 0]:
                    for b in picks[picks >= 0]:
                        moves[layer - 1, a, b] += 1
    assert count_coactivation(trace).pairs.tolist() == pairs.tolist()
    assert stats.transition_counts(trace).tolist() == moves.tolist()


def test_chunks_do_not_change_the_counts(monkeypatch):
    trace = make_trace(num_tokens=100)
    whole = count_coactivation(trace).pairs, stats.transition_counts(trace)
    monkeypatch.setattr(stats, "_CHUNK_TOKENS", 7)
    parts = count_coactivation(trace).pairs, stats.transition_counts(trace)
    for first, second in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(first, second)


def test_share_of_the_most_frequent_pairs():
    counts = np.zeros((2, 8, 8), int)
    counts[0, 1, 4] = counts[0, 4, 1] = 30
    counts[0, 2, 3] = counts[0, 3, 2] = 10
    np.fill_diagonal(counts[0], 99)
    share = stats.top_pair_share(counts, 0.05)
    assert share[0] == 0.75
    assert np.isnan(share[1])


def test_information_of_transitions():
    counts = np.stack([np.eye(4), np.ones((4, 4)), np.zeros((4, 4))])
    bits = stats.transition_mutual_information_bits(counts)
    np.testing.assert_allclose(bits[:2], [2, 0], atol=1e-12)
    assert np.isnan(bits[2])


def test_counts_per_step_have_no_pairs():
    with pytest.raises(ValueError, match="kind 'load'"):
        count_coactivation(make_load_trace())


# Share of the 5 % most frequent pairs, and of independent picks, as published with the data
PAIRS = {
    "gpt_oss_20b_benchmarks": (0.357, 0.248),
    "deepseek_v2_lite_esft_tasks": (0.296, 0.189),
    "flame_moe_290m_pretrain_sample": (0.242, 0.101),
}


@pytest.mark.parametrize("name", PAIRS)
def test_real_pairs(routing_data, name):
    trace = RoutingTrace.from_npz(routing_data / f"{name}.npz")
    share, by_odds = PAIRS[name]
    pairs = count_coactivation(trace).pairs
    np.testing.assert_allclose(stats.top_pair_share(pairs).mean(), share, atol=6e-4)
    # the published reference weighs experts by odds p / (1 - p)
    p = trace.load() / trace.num_tokens
    odds = stats.top_pair_share(stats.independent_pairs(p / (1 - p))).mean()
    np.testing.assert_allclose(odds, by_odds, atol=6e-4)
    ours = stats.top_pair_share(stats.independent_pairs(trace.load())).mean()
    assert ours < by_odds < share


@pytest.mark.parametrize("name", ["gpt_oss_20b_benchmarks", "deepseek_v2_lite_esft_tasks"])
def test_independent_pairs_are_those_of_shuffled_picks(routing_data, name):
    """Shuffling the picks of a layer between tokens keeps the loads and breaks co-activation."""
    trace = RoutingTrace.from_npz(routing_data / f"{name}.npz")
    trace = trace.filter(layers=trace.layer_ids[::6].tolist())
    rng = np.random.default_rng(0)
    shuffled = np.zeros((trace.num_layers, trace.num_experts, trace.num_experts), int)
    for layer in range(trace.num_layers):
        ids = trace.expert_ids[:, layer].astype(int)
        columns = [rng.permutation(ids[:, pick]) for pick in range(trace.top_k)]
        for a, b in combinations(columns, 2):
            np.add.at(shuffled[layer], (a, b), 1)
    shuffled += shuffled.transpose(0, 2, 1)
    expected = stats.independent_pairs(trace.load())
    np.testing.assert_allclose(
        stats.top_pair_share(shuffled).mean(),
        stats.top_pair_share(expected).mean(),
        rtol=0.06,
    )


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_count_coactivation_does_not_depend_on_threads(threads, monkeypatch):
    trace = make_trace(threads, num_tokens=60, top_k=3)
    expected = count_coactivation(trace).pairs
    monkeypatch.setattr("moe_locality.placement.counting.processors", lambda: threads)
    found = count_coactivation(trace)
    np.testing.assert_array_equal(found.pairs, expected)
    np.testing.assert_array_equal(found.load, trace.load())
    assert found.layer_ids == tuple(trace.layer_ids.tolist())
    assert found.num_tokens == trace.num_tokens


@pytest.mark.parametrize("max_bytes", [1, 1 << 20])
def test_a_directory_is_counted_piece_by_piece(tmp_path, max_bytes):
    trace = make_trace(3, num_tokens=100, top_k=3)
    write_trace(trace, tmp_path / "t", shard_tokens=30)
    seen = []
    found = count_coactivation(
        tmp_path / "t", max_bytes=max_bytes, progress=lambda *a: seen.append(a[:2])
    )
    np.testing.assert_array_equal(found.pairs, count_coactivation(trace).pairs)
    np.testing.assert_array_equal(found.load, trace.load())
    assert found.num_tokens == 100
    pieces = 4 * (trace.num_layers if max_bytes == 1 else 1)
    assert seen == [(done, pieces) for done in range(pieces + 1)]


def test_shards_of_pipeline_stages_are_counted_together(tmp_path):
    trace = make_trace(4, num_tokens=50)
    layers = trace.layer_ids.tolist()
    for rank, own in enumerate((layers[2:], layers[:2])):  # written out of order on purpose
        write_shard(trace.filter(layers=own), make_directory(tmp_path), rank, 0)
    found = count_coactivation(tmp_path)
    assert found.layer_ids == tuple(sorted(layers))
    assert found.num_tokens == 50
    np.testing.assert_array_equal(found.pairs, count_coactivation(trace).pairs)


def test_shards_that_do_not_fit_are_refused(tmp_path):
    directory = make_directory(tmp_path)
    with pytest.raises(TraceError, match="found no part-"):
        count_coactivation(directory)
    write_shard(make_trace(1), directory, 0, 0)
    write_shard(make_trace(1, top_k=3), directory, 1, 0)
    with pytest.raises(TraceError, match="does not fit"):
        count_coactivation(directory)
    (directory / "part-00001-00000.parquet").unlink()
    write_shard(make_trace(1).filter(layers=make_trace(1).layer_ids[:2]), directory, 1, 0)
    with pytest.raises(TraceError, match="expected those of another shard or none"):
        count_coactivation(directory)
    (directory / "part-00001-00000.parquet").unlink()
    write_shard(make_trace(1), directory, 0, 2)
    with pytest.raises(TraceError, match="part-00000-00001"):
        count_coactivation(directory)

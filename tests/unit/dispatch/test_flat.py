import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.dispatch.flat import expert_major_order, flat_metadata
from moe_locality.kernels import ops


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_expert_major_order_groups_by_expert_then_source(ranks, experts, seed):
    counts = np.random.default_rng(seed).integers(0, 4, (ranks, experts))
    arrived = [(g, e) for g in range(ranks) for e in range(experts) for _ in range(counts[g, e])]
    order = expert_major_order(torch.from_numpy(counts), len(arrived)).tolist()
    assert sorted(order) == list(range(len(arrived)))
    found = [arrived[i] for i in order]
    assert found == sorted(arrived, key=lambda pair: (pair[1], pair[0]))


def test_flat_metadata_on_one_rank_reorders_nothing():
    mapping = ops.row_map(torch.tensor([[1, 0], [1, -1]]), 2)
    made = flat_metadata(mapping, mapping.tokens_per_slot, 1, [1, 2], [1, 2])
    assert made.input_splits == made.output_splits == (3,)
    assert made.tokens_per_local_expert == (1, 2)
    assert made.by_expert is None
    assert made.by_source is None


def test_flat_metadata_reads_splits_from_both_sides():
    mapping = ops.row_map(torch.tensor([[0, 3], [2, 3]]), 4)
    got = [1, 2, 0, 3]  # from rank 0 and rank 1, for our two experts
    made = flat_metadata(mapping, torch.tensor(got), 2, [1, 0, 1, 2], got)
    assert made.input_splits == (1, 3)
    assert made.output_splits == (3, 3)
    assert made.tokens_per_local_expert == (1, 5)
    assert made.by_expert is not None
    assert made.by_source is not None
    assert made.by_expert.tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(made.by_expert[made.by_source], torch.arange(6))

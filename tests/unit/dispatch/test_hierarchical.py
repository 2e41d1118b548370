"""The arithmetic of the two stages against plain loops, and packed rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.dispatch import hierarchical
from moe_locality.dispatch.flat import block_order, inverse, sort_routes
from moe_locality.dispatch.hierarchical import ALIGNMENT, pays, wire_format
from moe_locality.topology import ClusterTopology


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.integers(0, 2**32 - 1))
def test_blocks_are_taken_in_another_order(lengths, seed):
    order = np.random.default_rng(seed).permutation(len(lengths))
    rows = [(block, i) for block, length in enumerate(lengths) for i in range(length)]
    found = block_order(torch.tensor(lengths), torch.from_numpy(order), len(rows))
    assert [rows[i] for i in found.tolist()] == [
        (block, i) for block in order for i in range(lengths[block])
    ]
    assert torch.equal(found[inverse(found)], torch.arange(len(rows)))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 6), st.integers(0, 2**32 - 1))
def test_layout_inter_node_sends_each_token_once_to_each_node(nodes, per_node, tokens, seed):
    rng = np.random.default_rng(seed)
    num_slots = nodes * per_node
    rail_of_slot = rng.permutation(np.repeat(np.arange(nodes), per_node))
    in_node = np.zeros(num_slots, dtype=np.int64)
    for node in range(nodes):
        in_node[rail_of_slot == node] = np.arange(per_node)
    slots = rng.integers(-1, num_slots, (tokens, 3))
    across = hierarchical.layout_inter_node(
        torch.from_numpy(slots),
        torch.from_numpy(rail_of_slot),
        torch.from_numpy(in_node),
        nodes,
        one_by_one=True,
        kernels="reference",
    )
    expected = [
        (node, token)
        for node in range(nodes)
        for token in range(tokens)
        if any(s >= 0 and rail_of_slot[s] == node for s in slots[token])
    ]
    copies = across.copies
    assert copies.row_token.tolist() == [token for _, token in expected]
    assert copies.tokens_per_slot.tolist() == [
        sum(n == node for n, _ in expected) for node in range(nodes)
    ]
    assert across.local_slots.tolist() == [
        [in_node[s] if s >= 0 and rail_of_slot[s] == node else -1 for s in slots[token]]
        for node, token in expected
    ]
    assert across.routes is not None
    keys = [rail_of_slot[s] * per_node + in_node[s] for s in slots.reshape(-1) if s >= 0]
    assert across.routes.tokens_per_slot.tolist() == np.bincount(keys, minlength=num_slots).tolist()
    splits = tuple(copies.tokens_per_slot.tolist())
    inside = hierarchical.IntraNodeLayout(
        routes=copies,
        input_splits=splits,
        output_splits=splits,
        tokens_per_local_expert=(),
        by_expert=torch.empty(0),
        by_source=torch.empty(0),
    )
    made = hierarchical.HierarchicalMetadata(inter_node=across, intra_node=inside)
    assert made.shape == (tokens, 3)
    sent = [set(row.nonzero()[:, 0].tolist()) for row in made.inter_node.copies.positions >= 0]
    assert sent == [{int(rail_of_slot[s]) for s in row if s >= 0} for row in slots]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_rows_are_counted_by_slot_and_home(nodes, num_slots, seed):
    rng = np.random.default_rng(seed)
    splits = tuple(int(n) for n in rng.integers(0, 4, nodes))
    slots = rng.integers(-1, num_slots, (sum(splits), 2))
    routes = sort_routes(torch.from_numpy(slots), num_slots, "reference")
    found = hierarchical.counts_by_slot_and_home(routes, splits, 2, num_slots)
    homes = np.repeat(np.arange(nodes), splits)
    expected = np.zeros((num_slots, nodes), dtype=int)
    for home, row in zip(homes, slots, strict=True):
        for slot in row[row >= 0]:
            expected[slot, home] += 1
    assert found.view(num_slots, nodes).tolist() == expected.tolist()


def test_blocks_of_a_slot_are_in_the_order_of_the_home_ranks():
    # two nodes of two ranks that alternate: ranks 0, 2 on node 0 and 1, 3 on node 1
    order = hierarchical.blocks_by_expert(((0, 2), (1, 3)), slots_per_rank=2)
    arrived = [(local, slot, node) for local in range(2) for slot in range(2) for node in range(2)]
    ranks = [(slot, ((0, 2), (1, 3))[node][local]) for local, slot, node in arrived]
    assert [ranks[i] for i in order.tolist()] == [(s, r) for s in range(2) for r in range(4)]


def test_two_stages_are_taken_where_they_pay():
    even = ClusterTopology.uniform(2, 2)
    assert pays((0, 1, 2, 3), even, 4, 1)
    assert not pays((0, 1), even, 4, 8)  # inside a node
    assert pays((0, 2), even, 4, 2)
    assert not pays((0, 2), even, 2, 2)  # one expert a node: two picks never share one
    assert not pays((0, 2), even, 4, 1)
    assert not pays((0, 1, 2), even, 6, 2)  # as many ranks on every node, or flat


DTYPES = [torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int16, torch.int32]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 5),
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from(DTYPES)), min_size=2, max_size=3),
    st.integers(0, 2**32 - 1),
)
def test_wire_format_unpacks_what_it_packed(count, shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [
        torch.randint(0, 100, (count, width), generator=generator).to(dtype)
        for width, dtype in shapes
    ]
    wire = wire_format(*parts)
    buffer = wire.pack(parts)
    assert buffer.dtype == torch.uint8
    assert buffer.shape == (count, wire.row_bytes)
    assert wire.row_bytes % ALIGNMENT == 0
    assert wire.extra_bytes == wire.row_bytes - parts[0].shape[1] * parts[0].element_size()
    order = torch.randperm(count, generator=generator)
    for part, found in zip(parts, wire.unpack(buffer[order]), strict=True):
        assert torch.equal(found, part[order])


def test_wire_format_packs_the_same_values_to_the_same_bytes():
    rows, slots = torch.ones(2, 3), torch.ones(2, 1, dtype=torch.int16)
    wire = wire_format(rows, slots)
    assert torch.equal(wire.pack([rows, slots]), wire.pack([rows, slots]))
    assert wire.pack([rows, slots])[:, 12:16].count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_wire_format_leaves_one_part_as_it_is(dtype):
    rows = torch.ones(3, 5).to(dtype)
    wire = wire_format(rows, None)
    assert wire.pack([rows]) is rows
    assert wire.unpack(rows)[0] is rows
    assert wire.extra_bytes == 0

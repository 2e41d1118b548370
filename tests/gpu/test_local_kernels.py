"""The local half of the dispatch on a GPU gives what it gives on the CPU."""

import pytest
import torch

from moe_locality.kernels import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("tokens", [0, 1, 37, 513])
def test_map_and_permute_are_the_same_on_both(tokens):
    generator = torch.Generator().manual_seed(tokens)
    slots = torch.rand(tokens, 16, generator=generator).argsort(dim=1)[:, :4].to(torch.int32)
    slots[torch.rand(tokens, 4, generator=generator) < 0.2] = -1
    x = torch.randn(tokens, 64, generator=generator)
    here, there = ops.row_map(slots, 16), ops.row_map(slots.cuda(), 16)
    torch.testing.assert_close(there.positions.cpu(), here.positions, rtol=0, atol=0)
    torch.testing.assert_close(there.tokens_per_slot.cpu(), here.tokens_per_slot, rtol=0, atol=0)
    moved = ops.permute(x.cuda(), there.row_token)
    torch.testing.assert_close(moved.cpu(), ops.permute(x, here.row_token), rtol=0, atol=0)

"""Who replaces DeepSpeed's all-to-all (a profiler, a transport) sees the exchanges of our layer
too.
"""

import numpy as np
import torch

import moe_locality
from tests.launch import run_ranks

WIDTH, TOKENS = 8, 12


def outputs(moe_class) -> tuple[np.ndarray, list[int]]:
    from deepspeed.moe import sharded_moe

    torch.manual_seed(0)
    expert = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH))
    layer = moe_class(hidden_size=WIDTH, expert=expert, num_experts=4, ep_size=2, k=1)
    layer.set_deepspeed_parallelism()
    calls = []
    original = sharded_moe._AllToAll.apply

    def counted(group, rows):
        calls.append(rows.numel())
        return original(group, rows)

    sharded_moe._AllToAll.apply = counted
    try:
        torch.manual_seed(1)
        output, _, _ = layer(torch.randn(1, TOKENS, WIDTH))
    finally:
        del sharded_moe._AllToAll.apply
    assert sharded_moe._AllToAll.apply is not counted
    return output.detach().numpy(), calls


def on_rank(rank, world_size):
    from deepspeed.moe.layer import MoE as StockMoE

    stock, stock_calls = outputs(StockMoE)
    ours, our_calls = outputs(moe_locality.MoE)
    assert our_calls == stock_calls
    assert len(our_calls) == 2
    np.testing.assert_array_equal(ours, stock)
    return True


def test_a_replacement_of_deepspeeds_all_to_all_sees_both_exchanges():
    assert run_ranks(on_rank, 2, deepspeed=True) == [True, True]

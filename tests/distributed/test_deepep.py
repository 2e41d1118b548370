"""The client of DeepEP against our own exchange, with a FAKE of DeepEP's documented interface."""

import sys

import numpy as np
import pytest
import torch

from moe_locality.config import DispatchConfig
from moe_locality.dispatch import TokenDispatcher
from moe_locality.errors import BackendUnavailable, ConfigError
from tests import fake_deep_ep
from tests.distributed.exchange_cases import SLOTS_PER_RANK, Experts, data_of, step
from tests.launch import run_ranks
from tests.tolerances import LAYER


def same_as_flat(rank, world):
    sys.modules["deep_ep"] = fake_deep_ep  # a FAKE: see its docstring
    num_slots = SLOTS_PER_RANK * world
    mine = range(rank * SLOTS_PER_RANK, (rank + 1) * SLOTS_PER_RANK)
    for pattern in ("uneven", "one slot", "none kept"):
        data = data_of(rank, num_slots, torch.bfloat16, pattern)
        flat = TokenDispatcher(num_slots=num_slots, config=DispatchConfig(exchange="flat"))
        config = DispatchConfig(exchange="deepep", deepep_max_tokens_per_rank=16)
        deepep = TokenDispatcher(num_slots=num_slots, config=config)
        first = flat.dispatch(data[0], data[2], data[1])
        second = deepep.dispatch(data[0], data[2], data[1])
        assert torch.equal(first.rows, second.rows)
        assert first.tokens_per_local_expert == second.tokens_per_local_expert
        again = deepep.dispatch(2 * data[0], data[2], data[1], metadata=second.handle.metadata)
        assert torch.equal(again.rows, 2 * first.rows)
        wanted = step(flat, Experts(mine, torch.bfloat16), data)
        made = step(deepep, Experts(mine, torch.bfloat16), data)
        for number, (ours, expected) in enumerate(zip(made, wanted, strict=True)):
            rtol, atol = LAYER["bfloat16"]
            scale = max(1.0, float(expected.float().abs().max())) if expected.numel() else 1.0
            np.testing.assert_allclose(
                ours.float(), expected.float(), rtol, atol * scale, err_msg=f"{pattern} {number}"
            )
    with pytest.raises(
        ConfigError, match=r"found rows in torch\.float32, expected torch\.bfloat16"
    ):
        deepep.dispatch(data[0].float(), data[2], data[1])
    with pytest.raises(ConfigError, match="found 17 tokens, expected at most"):
        deepep.dispatch(torch.zeros(17, 16).bfloat16(), torch.zeros(17, 1).int(), torch.ones(17, 1))


def test_with_a_fake_of_deepep_it_computes_what_our_exchange_does():
    run_ranks(same_as_flat, 4)


def missing(rank, world):
    config = DispatchConfig(exchange="deepep", deepep_max_tokens_per_rank=16)
    with pytest.raises(BackendUnavailable, match="deep_ep cannot be imported"):
        TokenDispatcher(num_slots=4, config=config)
    with pytest.raises(ConfigError, match=r"without dispatch\.deepep_max_tokens_per_rank"):
        TokenDispatcher(num_slots=4, config=DispatchConfig(exchange="deepep"))
    old = DispatchConfig(exchange="deepep", deepep_max_tokens_per_rank=16, payload="fp8")
    with pytest.raises(ConfigError, match="payload"):
        TokenDispatcher(num_slots=4, config=old)
    sys.modules["deep_ep"] = sys  # a module of that name that is not V2
    with pytest.raises(BackendUnavailable, match="without ElasticBuffer"):
        TokenDispatcher(num_slots=4, config=config)


def test_without_deepep_it_is_refused_by_name():
    run_ranks(missing, 2)

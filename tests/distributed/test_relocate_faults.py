"""A relocation that is interrupted: finished or taken back on every rank, never mixed."""

import multiprocessing as mp
import os
import re
import signal
import time

import numpy as np
import pytest
import torch

from moe_locality.errors import PlacementError
from moe_locality.layer import agreement, relocate
from moe_locality.layer.checkpoint import wrap_checkpoints
from moe_locality.layer.relabeling import relabel
from moe_locality.layer.state import current_order
from tests.distributed import relabel_nets as nets
from tests.distributed.test_online import engine_of as online_engine_of
from tests.distributed.test_online import train as online_train
from tests.distributed.test_relocate import assert_same, everything
from tests.launch import _rank_main, preload, run_ranks
from tests.tolerances import LOSS

A, B = 3, 7  # seeds of two plans


class Fault:
    """Stands in for a function of the move: does ``what`` at call number ``at``, on one rank."""

    def __init__(self, name, what, at, only_once=True):
        self.name, self.what, self.at, self.only_once = name, what, at, only_once
        self.calls, self.function = 0, getattr(relocate, name)

    def __call__(self, *args):
        self.calls += 1
        hit = self.calls == self.at or (self.calls > self.at and not self.only_once)
        if hit and self.what == "raise":
            raise MemoryError("no room")
        if hit and self.what == "interrupt":
            raise KeyboardInterrupt
        if hit and self.what == "signal":
            os.kill(os.getpid(), self.number)
        if hit and self.what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if hit and self.what == "hang":
            time.sleep(600)  # it is killed here
        result = self.function(*args)
        if hit and self.what == "corrupt":
            args[-1][3] ^= 1  # a bit of the flat buffer, after it was packed
        return result

    def __enter__(self):
        setattr(relocate, self.name, self)
        return self

    def __exit__(self, *_):
        setattr(relocate, self.name, self.function)


def engine_at_a(rank, ep_size, zero, precision):
    engine = nets.engine_of(nets.build("ours", ep_size, rank % ep_size), zero, precision)
    relabel(engine, nets.plan_of(ep_size, A))
    nets.train(engine, range(2), rank)
    return engine


def orders(engine):
    return [current_order(m).tolist() for m in (engine.module.moe1, engine.module.moe2)]


def rows(ep_size, seed):
    return nets.plan_of(ep_size, seed).physical_to_logical_map.tolist()


def interrupted(engine, ep_size, fault, here):
    """Relabel to B with a fault on one rank; what was said, after checking what is left."""
    stops = here and fault.what == "interrupt"
    expected = KeyboardInterrupt if stops else PlacementError
    with fault if here else Fault(fault.name, "count", 0), pytest.raises(expected) as caught:
        relabel(engine, nets.plan_of(ep_size, B), timeout_s=30)
    for found, old, new in zip(orders(engine), rows(ep_size, A), rows(ep_size, B), strict=True):
        assert found in (old, new)
    return str(caught.value.__cause__ if stops else caught.value), orders(engine)


def _interrupted(rank, world, ep_size, zero, precision, faults):
    engine = engine_at_a(rank, ep_size, zero, precision)
    before, logits = everything(engine), nets.logits_of(engine.module, rank)
    seen = []
    for name, what, at in faults:
        message, found = interrupted(engine, ep_size, Fault(name, what, at), rank == 1)
        torch.testing.assert_close(nets.logits_of(engine.module, rank), logits)
        relabel(engine, nets.plan_of(ep_size, B))  # a second call finishes
        assert orders(engine) == rows(ep_size, B)
        relabel(engine, nets.plan_of(ep_size, A))
        assert_same(everything(engine), before, (name, what, at))
        seen.append((message, found))
    return seen


FAULTS = [  # the layers have about ten steps each; a step packs, packs again, writes
    ("pack", "raise", 1),
    ("pack", "raise", 2),
    ("pack", "interrupt", 9),
    ("pack", "corrupt", 2),
    ("unpack", "raise", 1),
    ("unpack", "raise", 3),
    ("unpack", "interrupt", 12),
    ("_digest", "raise", 4),
    ("expert_shards", "raise", 2),
    ("gate_shards", "raise", 2),
]


@pytest.mark.parametrize(
    ("world", "ep_size", "zero", "precision", "faults"),
    [
        (2, 2, 0, "fp32", FAULTS),
        pytest.param(4, 2, 2, "bf16", FAULTS[1:7:2], marks=pytest.mark.slow),
    ],
)
def test_a_failure_leaves_whole_layers_and_a_second_call_finishes(
    world, ep_size, zero, precision, faults
):
    per_rank = run_ranks(
        _interrupted, world, ep_size, zero, precision, faults, deepspeed=True, timeout_s=110
    )
    first_undone, second_undone = 0, 0
    for seen in zip(*per_rank, strict=True):
        assert len({str(found) for _, found in seen}) == 1  # the same on every rank
        for message, _ in seen:
            assert re.search(r"ranks \[1\] failed|ranks \[.*1.*\] failed", message)
            assert "in its old order again" in message
        state = seen[0][1]
        first_undone += state == rows(ep_size, A)
        second_undone += state == [rows(ep_size, B)[0], rows(ep_size, A)[1]]
    assert first_undone + second_undone == len(faults)
    assert first_undone
    assert second_undone or world == 4


class Ended(BaseException):
    """What a user's handler of SIGTERM raises."""


def _signalled(rank, world, number, at, everywhere):
    def end(*_):
        raise Ended

    signal.signal(signal.SIGTERM, end)
    engine = engine_at_a(rank, world, 1, "fp32")
    expected = nets.train(engine_at_a(rank, world, 1, "fp32"), range(2, 4), rank)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    fault = Fault("pack", "signal" if rank or everywhere else "count", at)
    fault.number = number
    wanted = KeyboardInterrupt if number == signal.SIGINT else Ended
    wanted = wanted if rank or everywhere else PlacementError
    with fault, pytest.raises(wanted) as caught:
        relabel(engine, nets.plan_of(world, B), timeout_s=30)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    if wanted is PlacementError:
        assert f"{signal.Signals(number).name}: this rank was interrupted" in str(caught.value)
    found = orders(engine)
    assert all(o in (rows(world, A)[i], rows(world, B)[i]) for i, o in enumerate(found))
    np.testing.assert_allclose(nets.train(engine, range(2, 4), rank), expected, *LOSS["float32"])
    return found


@pytest.mark.parametrize(
    ("number", "at", "everywhere", "moved"),
    [
        (signal.SIGINT, 3, False, 0),
        (signal.SIGTERM, 3, True, 0),
        (signal.SIGTERM, 25, False, 1),
    ],
)
def test_a_signal_ends_the_program_after_the_move_was_taken_back(number, at, everywhere, moved):
    """Ctrl-C and SIGTERM were swallowed as a failed move; now whole layers are in either order on
    all ranks, and then the signal does what it does elsewhere [B3]
    """
    per_rank = run_ranks(_signalled, 2, number, at, everywhere, deepspeed=True)
    assert per_rank[0] == per_rank[1]
    assert per_rank[0] == [rows(2, B if i < moved else A)[i] for i in range(2)]


def _signalled_online(rank, world):
    options = {"every_n_steps": 1, "pays_within_steps": 10**6, "move_budget": 1.0}
    options |= {"max_imbalance": 1.5}
    engine = online_engine_of(rank, options, ep_size=world)
    fault = Fault("pack", "signal" if rank == 1 else "count", 3)
    fault.number = signal.SIGINT
    with fault, pytest.raises(KeyboardInterrupt if rank == 1 else PlacementError):
        online_train(engine, range(3), rank, 4)


def test_a_signal_during_an_online_move_stops_the_training():
    """Online placement wrote Ctrl-C into its decision and went on training; now it ends [B3]"""
    run_ranks(_signalled_online, 4, deepspeed=True)


def _checkpoint(rank, world, folder):
    """Saved while one layer is in the new order and the other in the old."""
    engine = engine_at_a(rank, world, 1, "bf16")
    wrap_checkpoints(engine)
    _, found = interrupted(engine, world, Fault("gate_shards", "raise", 2), rank == 1)
    assert found == [rows(world, B)[0], rows(world, A)[1]]
    engine.save_checkpoint(folder, tag="t")
    again = nets.engine_of(nets.build("ours", world, rank), 1, "bf16")
    relabel(again, nets.plan_of(world, 5))
    wrap_checkpoints(again)
    again.load_checkpoint(folder, tag="t")
    assert orders(again) == rows(world, 5)
    assert nets.train(again, range(2, 5), rank) == nets.train(engine, range(2, 5), rank)


def test_a_checkpoint_between_two_orders_is_right(tmp_path):
    run_ranks(_checkpoint, 2, str(tmp_path), deepspeed=True)


def _twice(rank, world):
    """Writing fails, and putting things back fails too: the message does not promise anything."""
    engine = engine_at_a(rank, world, 0, "fp32")
    fault = Fault("unpack", "raise" if rank else "count", 4, only_once=False)
    with fault, pytest.raises(PlacementError, match=r"in no order\. End this job"):
        relabel(engine, nets.plan_of(world, B), timeout_s=30)


def test_a_failure_that_cannot_be_taken_back_says_so():
    run_ranks(_twice, 2, deepspeed=True)


def _lost(rank, world, ep_size, zero, what, at):
    engine = engine_at_a(rank, ep_size, zero, "fp32")
    fault = Fault("pack", what if rank == 1 else "count", at)
    with fault, pytest.raises(agreement.LostRanks) as caught:
        relabel(engine, nets.plan_of(ep_size, B), timeout_s=2)
    return str(caught.value)


@pytest.mark.parametrize(
    ("world", "zero", "faults"),
    # before anything was sent, and between two ranks that share an expert's parts
    [
        (2, 0, [("die", 1), ("hang", 1)]),
        pytest.param(4, 2, [("die", 3), ("hang", 2)], marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_is_lost_is_named_by_the_others(world, zero, faults, tmp_path):
    context, ranks, answers = mp.get_context("fork"), [], []
    preload(deepspeed=True)
    for fault in faults:  # at the same time: all that they do is wait
        answers.append(context.Queue())
        store = str(tmp_path / fault[0])
        ranks += [
            context.Process(
                target=_rank_main,
                args=(_lost, rank, world, (2, zero, *fault), store, answers[-1], True, 120),
            )
            for rank in range(world)
        ]
    for process in ranks:
        process.start()
    try:
        for queue in answers:
            seen = set()
            while len(seen) < world - 1:
                rank, fine, value = queue.get(timeout=120)
                if rank in seen:
                    continue  # the launcher's last barrier, without the lost rank
                seen.add(rank)
                assert fine, value
                # on a machine that stands still for as long, others are late too
                assert re.search(r"no answer from ranks \[(0, )?1(, \d)*\] within 6 s", value)
            assert 1 not in seen
    finally:
        for process in ranks:
            process.kill()
            process.join()

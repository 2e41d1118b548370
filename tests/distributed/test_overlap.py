"""What a layer does while rows travel."""

import torch

from moe_locality.config import DispatchConfig
from moe_locality.dispatch import TokenDispatcher
from tests.distributed.moe_cases import Case, build, quiet, run
from tests.launch import run_ranks

RESIDUAL = Case(name="residual", moe={"k": 2, "use_residual": True})


class Diary:
    """All-to-alls that write down when they start and when somebody waits for them."""

    def __init__(self, inner) -> None:
        self.inner, self.events = inner, []

    def all_to_all_single(self, *args, **kwargs):
        diary, work = self, self.inner(*args, **kwargs)
        self.events.append("start")

        class Work:
            def wait(self):
                diary.events.append("wait")
                return work.wait()

        return Work()


def residual_order(rank, world):
    import deepspeed.comm

    from moe_locality import MoE

    quiet()
    diary = Diary(deepspeed.comm.all_to_all_single)
    deepspeed.comm.all_to_all_single = diary.all_to_all_single
    layer = build(MoE, RESIDUAL, world)
    layer.mlp.register_forward_hook(lambda *_: diary.events.append("mlp"))
    layer.deepspeed_moe.experts.register_forward_hook(lambda *_: diary.events.append("experts"))
    torch.manual_seed(0)
    with torch.no_grad():
        layer(torch.randn(4, 12, 16), None)
    first = list(diary.events)
    diary.events.clear()
    run(layer, RESIDUAL, rank)  # with gradients: the MLP's parameters get theirs
    return first, diary.events[: len(first)]


def test_the_residual_mlp_runs_once_while_results_travel_home():
    for plain, trained in run_ranks(residual_order, 2, deepspeed=True):
        # counts, rows, results: the MLP between the start of the last and the wait for it
        assert plain == ["start", "wait", "start", "wait", "start", "mlp", "wait"]
        assert trained == plain


def rows_travel_between_start_and_wait(rank, world):
    diary = Diary(torch.distributed.all_to_all_single)
    config = DispatchConfig(exchange="flat")
    dispatcher = TokenDispatcher(num_slots=4, config=config, comm=diary)
    x, slots = torch.randn(6, 8), torch.arange(6).reshape(6, 1) % 4
    one, other = (dispatcher.dispatch_async(x * n, slots, torch.ones(6, 1)) for n in (1, 2))
    assert diary.events == ["start", "wait", "start"] * 2
    later, sooner = other.wait(), one.wait()  # in any order, the same on all ranks
    assert torch.equal(later.rows, 2 * sooner.rows)
    out = dispatcher.combine(sooner.rows, sooner.handle)
    torch.testing.assert_close(out, x)


def test_two_dispatches_may_be_on_their_way():
    run_ranks(rows_travel_between_start_and_wait, 2)

"""Same seed, same inputs: our layer computes what DeepSpeed's layer computes, dropping included."""

import pytest
import torch

from tests.distributed.moe_cases import build, cases, inputs, quiet, run
from tests.launch import run_ranks
from tests.tolerances import LAYER

EXACT = ("l_aux", "exp_counts", "noise_after")


def compare(ours: dict, stock: dict, dtype: torch.dtype, exact: tuple[str, ...] = EXACT) -> None:
    assert ours.keys() == stock.keys()
    rtol, atol = LAYER[str(dtype).removeprefix("torch.")]
    for name, expected in stock.items():
        if name in exact:
            assert torch.equal(ours[name], expected), name
        else:
            # rows of other tokens are summed in another order, so the bound follows the largest
            scale = max(1.0, float(expected.abs().max()))
            close(ours[name], expected, rtol, atol * scale, name)


def close(found, expected, rtol: float, atol: float, name: str) -> None:
    torch.testing.assert_close(
        found, expected, rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}"
    )


def every_case_equals_stock(rank, world, ep_size):
    from deepspeed.moe.layer import MoE as Stock

    from moe_locality import MoE

    quiet()
    for case in cases():
        stock = run(build(Stock, case, ep_size), case, rank)
        layer = build(MoE, case, ep_size)
        ours = run(layer, case, rank)
        try:
            compare(ours, stock, case.dtype)
        except AssertionError as error:
            raise AssertionError(f"case {case.name}: {error}") from error
        assert layer.deepspeed_moe.traffic.rows["dispatch"].sum() > 0
        assert layer.state_dict().keys() == build(Stock, case, ep_size).state_dict().keys()


@pytest.mark.parametrize(("world", "ep_size"), [(1, 1), (2, 2), (4, 4), (4, 2)])
def test_layer_equals_stock(world, ep_size):
    run_ranks(every_case_equals_stock, world, ep_size, deepspeed=True)


def tokens_are_dropped_in_the_tight_cases(rank, world):
    from moe_locality import MoE

    quiet()
    dropped = {}
    for case in cases():
        layer = build(MoE, case, world)
        run(layer, case, rank)
        rows = int(layer.deepspeed_moe.traffic.rows["dispatch"].sum())
        dropped[case.name] = inputs(case, rank)[0].shape[:2].numel() * case.moe["k"] - rows
    return dropped


def test_the_cases_do_drop_tokens():
    for dropped in run_ranks(tokens_are_dropped_in_the_tight_cases, 2, deepspeed=True):
        tight = [name for name in dropped if "tight" in name or name.endswith("eval")]
        assert all(dropped[name] > 0 for name in [*tight, "k1-used-token", "k2-drop-float32"])
        assert all(n == 0 for name, n in dropped.items() if "dropless" in name)


def placed_layer_equals_unplaced(rank, world, seed):
    import numpy as np

    from moe_locality import MoE
    from moe_locality.layer.state import set_slot_to_logical
    from tests.distributed.moe_cases import fill_expert

    quiet()
    order = np.random.default_rng(seed).permutation(8)
    mine = order[rank * 8 // world : (rank + 1) * 8 // world]
    assert (order != np.arange(8)).any()
    for case in cases():
        plain = build(MoE, case, world)
        placed = build(MoE, case, world)
        gate = placed.deepspeed_moe.gate.wg.weight
        with torch.no_grad():
            gate.copy_(plain.deepspeed_moe.gate.wg.weight[torch.from_numpy(order)])
        for logical, module in zip(
            mine, placed.deepspeed_moe.experts.deepspeed_experts, strict=True
        ):
            fill_expert(module, int(logical))
        set_slot_to_logical(placed, order)
        expected, found = run(plain, case, rank), run(placed, case, rank)
        # the router's gradient comes in slot order, exactly
        router = "grad deepspeed_moe.gate.wg.weight"
        expected[router] = expected[router][torch.from_numpy(order)]
        experts = {name: found.pop(name) for name in list(found) if "deepspeed_experts" in name}
        rest = {name: value for name, value in expected.items() if name in found}
        compare(found, rest, case.dtype)
        check_expert_gradients(experts, expected, mine, order, world, case)


def check_expert_gradients(found, expected, mine, order, world, case):
    """Compare each expert's gradient with that of the rank which holds it without a placement."""
    per_rank = 8 // world
    names = [n for n in expected if "deepspeed_experts" in n]
    local = {n.partition("deepspeed_experts.")[2]: expected[n] for n in names}
    everyone = [None] * world
    torch.distributed.all_gather_object(everyone, local)
    rtol, atol = LAYER[str(case.dtype).removeprefix("torch.")]
    for name, value in found.items():
        slot, _, rest = name.partition("deepspeed_experts.")[2].partition(".")
        home, at = divmod(int(mine[int(slot)]), per_rank)
        wanted = everyone[home][f"{at}.{rest}"]
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(value, wanted, rtol=rtol, atol=atol * scale)


@pytest.mark.parametrize(("world", "seed"), [(1, 0), (2, 1), (4, 2)])
def test_a_placement_changes_no_result(world, seed):
    run_ranks(placed_layer_equals_unplaced, world, seed, deepspeed=True)


def ranks_differ_in_tokens(rank, world):
    """Ragged batches, one rank without tokens: each rank gets what it would get alone."""
    from moe_locality import MoE

    quiet()
    case = next(c for c in cases() if c.name == "k2-dropless-float32")
    case.moe["top2_2nd_expert_sampling"] = False
    tokens = [(3, 5), (0, 7), (1, 1), (9, 2)][rank]
    layer = build(MoE, case, world)
    found = run(layer, case, rank, tokens)
    alone = build_all_experts(case)
    expected = run(alone, case, rank, tokens) if tokens[0] else None
    assert found["exp_counts"].sum() == tokens[0] * tokens[1] * 2
    assert torch.isfinite(found["l_aux"])
    if expected is not None:
        for name in ("output", "l_aux", "exp_counts", "grad input"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    total = found["grad deepspeed_moe.experts.deepspeed_experts.0.0.weight"]
    assert torch.isfinite(total).all()


def build_all_experts(case):
    from moe_locality import MoE
    from tests.distributed.moe_cases import fill_expert

    layer = build(MoE, case, 1)
    for logical, module in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
        fill_expert(module, logical)
    return layer


def test_ranks_may_have_different_numbers_of_tokens():
    run_ranks(ranks_differ_in_tokens, 4, deepspeed=True)


def all_tokens_to_one_expert(rank, world):
    from deepspeed.moe.layer import MoE as Stock

    from moe_locality import MoE

    quiet()
    case = next(c for c in cases() if c.name == "k1-dropless-float32")
    results = []
    for cls in (Stock, MoE):
        layer = build(cls, case, world)
        with torch.no_grad():
            layer.deepspeed_moe.gate.wg.weight.zero_()  # equal logits: argmax takes expert 0
        results.append(run(layer, case, rank))
    compare(results[1], results[0], case.dtype)
    idle = [n for n in results[1] if "deepspeed_experts" in n and rank > 0]
    assert all(not results[1][name].any() for name in idle)


def test_everything_to_one_expert_leaves_zero_gradients_elsewhere():
    run_ranks(all_tokens_to_one_expert, 2, deepspeed=True)


def collectives_of_a_step(rank, world):
    """The exchanges of one forward and backward; none at all where an EP group is one rank."""
    import deepspeed.comm

    from moe_locality import MoE

    quiet()
    calls = []
    for name in ("all_to_all_single", "all_reduce", "all_gather", "barrier"):
        original = getattr(deepspeed.comm, name)

        def counted(*args, _name=name, _original=original, **kwargs):
            calls.append(_name)
            return _original(*args, **kwargs)

        setattr(deepspeed.comm, name, counted)
    found = {}
    for ep_size in (1, 2):
        for case in cases():
            if case.name not in ("k1-drop-float32", "k2-dropless-float32"):
                continue
            layer = build(MoE, case, ep_size)
            calls.clear()
            run(layer, case, rank)
            found[ep_size, case.name] = list(calls)
    return found


def test_a_step_makes_one_count_exchange_and_two_row_exchanges_and_two_backward():
    """Dropless too: nobody has to agree on a capacity, which costs stock an all-reduce."""
    for found in run_ranks(collectives_of_a_step, 2, deepspeed=True):
        for name in ("k1-drop-float32", "k2-dropless-float32"):
            assert found[1, name] == []
            assert found[2, name] == ["all_to_all_single"] * 5

"""Training with replicas: they stay equal, and the run is that without them."""

import numpy as np
import pytest

from moe_locality.errors import ConfigError
from tests.distributed import replica_nets as nets
from tests.distributed.moe_cases import quiet
from tests.launch import run_ranks
from tests.tolerances import LOSS

STEPS = {2: 16, 4: 12, 6: 8}  # by the number of ranks
CASES = {
    # (ranks, ep_size): (ZeRO stage, dtype, accumulation, gradient clipping)
    (2, 2): [(0, "bfloat16", 1, 0.0), (1, "bfloat16", 1, 0.1), (2, "float32", 2, 0.1)],
    (4, 2): [(0, "float32", 2, 0.0), (2, "bfloat16", 1, 0.0)],
    (4, 4): [(1, "float32", 1, 0.1)],  # up to four replicas: the order of sums shows; the second
    # layer has fewer slots
    (6, 2): [(1, "bfloat16", 1, 0.1)],  # three expert-data-parallel ranks: that of theirs too
}
WIDE = [(4, 4), (6, 2)]


def trains(rank, world, ep_size, cases, path):
    quiet()
    for stage, dtype, accumulate, clip in cases:
        config = nets.config_of(stage, dtype, accumulate, gradient_clipping=clip)
        expected, found = [], []
        for results, plan in ((expected, None), (found, path)):
            engine = nets.engine_of(rank, ep_size, config, plan)
            for step in range(4):
                results += nets.train(engine, [step], rank, dtype)
                if clip:
                    results.append(float(engine.get_global_grad_norm()))
                    assert results[-1] > clip
            if plan is None:
                engine.destroy()
        case = f"stage {stage}, {dtype}"
        np.testing.assert_allclose(found, expected, *LOSS[dtype], err_msg=case)
        nets.train(engine, range(4, STEPS[world]), rank, dtype)
        # of each of 4 parameters: itself and two moments, and masters where there are some
        assert nets.check_replicas_agree(engine) >= 2 * ep_size * 4 * 3
        engine.destroy()


@pytest.mark.parametrize(
    ("world", "ep_size"),
    [pytest.param(*case, marks=pytest.mark.slow if case in WIDE else ()) for case in CASES],
)
def test_replicas_stay_equal_and_the_run_is_that_without_them(world, ep_size, tmp_path):
    path = str(tmp_path / "plan.json")
    plan = nets.plan_of(ep_size, extra_per_rank=[2, 1] if ep_size == 4 else 1)
    assert (plan.slots_of_layers[0] > plan.slots_of_layers[1]) == (ep_size == 4)
    plan.write(path)
    cases = CASES[world, ep_size]
    run_ranks(trains, world, ep_size, cases, path, deepspeed=True, timeout_s=300)


def refuses(rank, world, path):
    quiet()
    config = nets.config_of(0, "float32", gradient_clipping=1.0)
    with pytest.raises(ConfigError, match="once per replica"):
        nets.engine_of(rank, world, config, path)


def test_clipping_at_stage_0_is_refused(tmp_path):
    path = str(tmp_path / "plan.json")
    nets.plan_of(2).write(path)
    run_ranks(refuses, 2, path, deepspeed=True)

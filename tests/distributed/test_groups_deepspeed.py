"""A real DeepSpeed engine with its stock MoE layer, on our groups: ZeRO 0, 1, 2, both orders."""

import math

import deepspeed
import deepspeed.runtime.zero.stage_1_and_2
import pytest
import torch
import torch._inductor.compile_fx  # an engine imports it (seconds): once here, for all ranks
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import groups as deepspeed_groups

from moe_locality.errors import TopologyError
from moe_locality.topology import (
    ClusterTopology,
    build_groups,
    exchange_objects,
    layout_groups,
    prepare_groups,
    register_with_deepspeed,
)
from tests.launch import run_ranks
from tests.tolerances import LOSS

EXPERTS, WIDTH, TOKENS = 4, 8, 32
CONSECUTIVE, INTERLEAVED = "aabb", "abba"


class Model(torch.nn.Module):
    """Two stock MoE layers, of different ``ep_size`` where two are given."""

    def __init__(self, ep_sizes):
        super().__init__()
        expert = torch.nn.Linear(WIDTH, WIDTH)
        self.layers = torch.nn.ModuleList(
            MoE(WIDTH, expert, EXPERTS, ep_size=ep_size, k=2, drop_tokens=False, use_rts=False,
                top2_2nd_expert_sampling=False)
            for ep_size in ep_sizes
        )  # fmt: skip

    def forward(self, x):
        loss = x.new_zeros(())
        for layer in self.layers:
            y, l_aux, _ = layer(x)
            x, loss = x + y, loss + 0.01 * l_aux
        return loss + (x - 1).square().mean()


def fill(model, ep_position, seed, everywhere):
    """Give each expert weights that depend on its number alone, not on the rank that holds it.

    With ``everywhere=False`` only the first rank of an EDP group gets them: DeepSpeed's broadcast
    has to bring them to the others.
    """
    for number, layer in enumerate(model.layers):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        layer.deepspeed_moe.gate.wg.weight.data.normal_(generator=generator)
        held = layer.num_local_experts
        for local, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
            expert_number = ep_position[layer.ep_size] * held + local
            generator = torch.Generator().manual_seed(1000 * seed + 100 * number + expert_number)
            for parameter in expert.parameters():
                parameter.data.normal_(std=0.3, generator=generator)
                if not everywhere[layer.ep_size]:
                    parameter.data.fill_(math.nan)


def engine_of(rank, ep_sizes, stage, order="E+D", seed=1):
    """A DeepSpeed engine; the groups are registered before, else DeepSpeed makes its own."""
    model = Model(ep_sizes)
    known = {size: deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS.get(f"ep_size_{size}")
             for size in ep_sizes}  # fmt: skip
    if None in known.values():  # stock: the same formula that DeepSpeed uses, written out
        stride = 4 // ep_sizes[0]
        known = {
            ep_sizes[0]: list(range(rank % stride, 4, stride))
            if order == "D+E"
            else [r for r in range(4) if r // ep_sizes[0] == rank // ep_sizes[0]]
        }
        first = {ep_sizes[0]: True}
    else:
        edp = deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS
        first = {size: edp[f"ep_size_{size}"][0] == rank for size in ep_sizes}
    fill(model, {size: list(ranks).index(rank) for size, ranks in known.items()}, seed, first)
    config = {
        "train_micro_batch_size_per_gpu": TOKENS,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "use_data_before_expert_parallelism": order == "D+E",
    }
    parameters = {"params": list(model.parameters()), "name": "all"}
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=split_params_into_different_moe_groups_for_optimizer(parameters),
        config=config,
    )
    return engine


def train(engine, rank, steps=3, first_step=0):
    """Return this rank's losses; its tokens depend on the rank and the step alone."""
    losses = []
    for step in range(first_step, first_step + steps):
        generator = torch.Generator().manual_seed(100 * step + rank)
        loss = engine(torch.randn(TOKENS, WIDTH, generator=generator))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def experts_of(engine):
    """Return {(layer, expert number): weights} that this rank holds."""
    held = {}
    for number, layer in enumerate(engine.module.layers):
        position = deepspeed_groups._get_expert_parallel_rank(layer.expert_group_name)
        for local, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
            name = (number, position * layer.num_local_experts + local)
            held[name] = [parameter.detach().clone().tolist() for parameter in expert.parameters()]
    return held


def forget_groups():
    """Let DeepSpeed forget the expert groups, as a new process would."""
    for name in ("PARALLEL", "DATA_PARALLEL"):
        getattr(deepspeed_groups, f"_EXPERT_{name}_GROUP").clear()
        getattr(deepspeed_groups, f"_EXPERT_{name}_GROUP_RANKS").clear()


def train_on(rank, nodes, ep_sizes, stage, order):
    forget_groups()
    ours = {}
    if nodes is not None:
        ours = prepare_groups(ClusterTopology.from_node_names(nodes), ep_sizes, order)
    engine = engine_of(rank, ep_sizes, stage, order)
    losses = train(engine, rank)
    for layer in engine.module.layers if ours else ():
        groups = ours[layer.ep_size]
        assert layer.deepspeed_moe.ep_group is groups.ep_group
        used = deepspeed_groups._get_expert_data_parallel_group(layer.expert_group_name)
        assert used is groups.edp_group
    held = exchange_objects(experts_of(engine))
    engine.destroy()
    merged = {}
    for one in held:
        for name, weights in one.items():
            # ranks of an EDP group hold the same bits after three steps
            assert merged.setdefault(name, weights) == weights, name
    assert len(merged) == EXPERTS * len(ep_sizes)
    return losses


def every_layout(rank, world, ep_size, stage):
    runs = [(None, "E+D"), (CONSECUTIVE, "E+D")]
    if ep_size < world:
        runs += [(INTERLEAVED, "E+D"), (INTERLEAVED, "D+E")]
        runs += [(None, "D+E"), (CONSECUTIVE, "D+E")] if stage == 2 else []
    return {run: train_on(rank, run[0], (ep_size,), stage, run[1]) for run in runs}


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("ep_size", [2, 4])
def test_training_is_the_same_on_every_layout_of_the_groups(ep_size, stage):
    rtol, atol = LOSS["float32"]
    for losses in run_ranks(every_layout, 4, ep_size, stage, deepspeed=True):
        reference = losses[None, "E+D"]
        assert reference[0] != reference[-1]
        for (nodes, order), found in losses.items():
            assert found == pytest.approx(reference, rel=rtol, abs=atol), (nodes, order)
            if nodes == CONSECUTIVE:  # DeepSpeed's own groups: every bit is the same
                assert found == losses[None, order]


def two_sizes(rank, world, stage):
    losses = train_on(rank, INTERLEAVED, (2, 4), stage, "E+D")
    names = sorted(deepspeed_groups._get_expert_parallel_group_dict())
    return losses, names, deepspeed_groups._get_max_expert_size_name()


def test_two_ep_sizes_at_once():
    for losses, names, largest in run_ranks(two_sizes, 4, 0, deepspeed=True):
        assert names == ["ep_size_2", "ep_size_4"]
        assert largest == "ep_size_4"
        assert all(math.isfinite(loss) for loss in losses)


def save_and_read(rank, world, stage, order, folder):
    prepare_groups(ClusterTopology.from_node_names(INTERLEAVED), (2,), order)
    engine = engine_of(rank, (2,), stage, order)
    train(engine, rank)
    engine.save_checkpoint(folder, tag="t")
    held = experts_of(engine)
    expected = train(engine, rank, steps=2, first_step=3)
    again = engine_of(rank, (2,), stage, order, seed=7)
    path, _ = again.load_checkpoint(folder, tag="t")
    assert path is not None
    assert experts_of(again) == held
    return held, expected, train(again, rank, steps=2, first_step=3)


@pytest.mark.parametrize(("stage", "order"), [(0, "E+D"), (2, "D+E")])
def test_a_checkpoint_goes_out_and_in_under_our_groups(stage, order, tmp_path):
    results = run_ranks(save_and_read, 4, stage, order, str(tmp_path), deepspeed=True)
    for held, expected, found in results:
        assert found == expected
        for (layer, number), weights in held.items():
            name = f"layer_{layer}_expert_{number}_mp_rank_00_model_states.pt"
            saved = torch.load(tmp_path / "t" / name, weights_only=False)
            prefix = f"layers.{layer}.deepspeed_moe.experts.deepspeed_experts.{number}"
            assert saved[f"{prefix}.weight"].tolist() == weights[0]
            assert saved[f"{prefix}.bias"].tolist() == weights[1]


def refusal(call, *args):
    with pytest.raises(TopologyError) as caught:
        call(*args)
    return str(caught.value)


def conflict(rank, world):
    topology = ClusterTopology.from_node_names("aabb")
    ours = build_groups(layout_groups(topology, 2))
    register_with_deepspeed(ours, 2)
    register_with_deepspeed(ours, 2)  # the same again changes nothing
    others = [build_groups(layout_groups(topology, *which)) for which in ((2, "D+E"), (4, "E+D"))]
    messages = [refusal(register_with_deepspeed, other, 2) for other in others]
    kept = deepspeed_groups._get_expert_parallel_group("ep_size_2") is ours.ep_group
    # one rank alone has something else registered
    forget_groups()
    if rank == 2:
        deepspeed_groups._EXPERT_PARALLEL_GROUP["ep_size_2"] = ours.edp_group
        deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS["ep_size_2"] = ours.edp_ranks
    return [*messages, refusal(register_with_deepspeed, ours, 2)], kept


def test_other_groups_of_deepspeed_are_not_replaced():
    for rank, (messages, kept) in enumerate(run_ranks(conflict, 4, deepspeed=True)):
        assert kept
        other_order, other_size, one_rank = messages
        assert "failed on ranks [0, 1, 2, 3] of 4" in other_order
        assert "found expert groups of DeepSpeed for ep_size 2 (EP ranks [0, 1]" in other_order
        assert "found groups of ep_size 4, expected 2" in other_size
        assert "failed on ranks [2] of 4: found expert groups of DeepSpeed" in one_rank, rank


def prepare_what_does_not_fit(rank, world):
    message = refusal(prepare_groups, ClusterTopology.uniform(2, 2), (2, 3))
    return message, dict(deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS)


def test_sizes_that_do_not_fit_register_nothing():
    for message, registered in run_ranks(prepare_what_does_not_fit, 4, deepspeed=True):
        assert "laying out the expert groups of ep_size [2, 3] failed" in message
        assert "found ep_size=3 for 4 ranks" in message
        assert registered == {}

"""moe_locality.initialize: one call around deepspeed.initialize, on several ranks."""

import json
import os
import time
from unittest import mock

import numpy as np
import pytest
import torch

from moe_locality import compat
from moe_locality.errors import ConfigError, PlacementError
from moe_locality.layer import agreement
from moe_locality.trace import read_trace
from tests.distributed.moe_cases import WIDTH, expert, quiet
from tests.distributed.test_layer_training import NUM_EXPERTS, Net, config_of, make_net, train
from tests.launch import run_ranks
from tests.tolerances import LOSS


def plan_of(orders, num_nodes=1, ranks_per_node=2):
    import dataclasses

    from moe_locality import PlacementPlan

    linear = PlacementPlan.linear(NUM_EXPERTS, range(len(orders)), num_nodes, ranks_per_node)
    return dataclasses.replace(linear, physical_to_logical_map=np.array(orders, dtype=np.int32))


def start(net, config, **arguments):
    import moe_locality

    return moe_locality.initialize(
        model=net, model_parameters=list(net.parameters()), config=config, **arguments
    )


def placed_run_equals_stock(rank, world, folder):
    import deepspeed
    from deepspeed.moe.layer import MoE as Stock

    from moe_locality import MoE

    quiet()
    net = make_net(Stock, rank, world)
    engine = deepspeed.initialize(
        model=net, model_parameters=list(net.parameters()), config=config_of(1, "float32")
    )[0]
    expected = train(engine, rank, "float32")
    engine.destroy()

    section = {
        "plan": f"{folder}/plan.json",
        "trace": {"path": f"{folder}/trace"},
        "cluster": {"num_nodes": 2, "ranks_per_node": 1},
    }
    # the user's model is a stock one, and DeepSpeed gets its arguments as it likes them
    net = make_net(Stock, rank, world)
    engine, optimizer, loader, scheduler = start(
        net, {**config_of(1, "float32"), "moe_locality": section}
    )
    assert optimizer is not None
    assert loader is None
    assert scheduler is None
    assert isinstance(net.moe1, MoE)
    runtime = engine.moe_locality
    assert runtime.topology.num_nodes == 2
    assert runtime.plan.digest() == plan_of([[2, 0, 3, 1], [3, 2, 1, 0]], 2, 1).digest()
    np.testing.assert_allclose(train(engine, rank, "float32"), expected, *LOSS["float32"])
    report = runtime.traffic_report()
    tokens = 5 * 4 * 8 * 2 * world  # steps, sequences, tokens, layers; two picks cross as one
    assert report["rows_by_link"]["dispatch"]["cross_node"] <= tokens
    assert report["by_link"]["dispatch"]["cross_node"] > 0
    assert report["by_link"]["dispatch"]["same_node"] == 0
    runtime.reset_traffic()
    assert sum(runtime.traffic_report()["rows_by_link"]["dispatch"].values()) == 0
    engine.destroy()
    torch.distributed.barrier()
    trace = read_trace(f"{folder}/trace")
    return trace.num_tokens, trace.num_layers, sorted(set(trace.step.tolist())), trace.load()


def test_a_placed_and_recorded_run_equals_stock(tmp_path):
    plan_of([[2, 0, 3, 1], [3, 2, 1, 0]], 2, 1).write(tmp_path / "plan.json")
    results = run_ranks(placed_run_equals_stock, 2, str(tmp_path), deepspeed=True, timeout_s=240)
    tokens, layers, steps, load = results[0]
    assert (tokens, layers) == (5 * 4 * 8 * 2, 2)
    assert len(steps) == 5
    assert load.shape == (2, NUM_EXPERTS)
    assert load.min() > 0


def apply_finds_nodes_and_says_so(rank, world, subclassed):
    import logging

    import deepspeed
    from deepspeed.moe.layer import MoE as Stock

    import moe_locality
    from moe_locality.dispatch import traffic_report

    said = []
    handler = logging.Handler()  # at the level that loggers have by default
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("moe_locality").addHandler(handler)
    section = {
        "cluster": {"num_nodes": 2, "ranks_per_node": 2},
        "dispatch": {"exchange": "hierarchical"},
    }

    class Own(Stock):
        """A user's layer, which sees the call of the engine too."""

        def set_deepspeed_parallelism(self, *args, **kwargs):
            self.asked = True
            super().set_deepspeed_parallelism(*args, **kwargs)

    net = make_net(Own if subclassed else Stock, rank, world)
    moe_locality.apply(net, section)
    moe_locality.apply(net, section)
    said = [line for line in said if "exchange through it" in line]
    quiet()
    engine = deepspeed.initialize(
        model=net, model_parameters=list(net.parameters()), config=config_of(1, "float32")
    )[0]
    losses = train(engine, rank, "float32")
    report = traffic_report(net)
    engine.destroy()
    assert (type(net.moe1) is Own and net.moe1.asked) == subclassed
    return said, losses, report


@pytest.mark.parametrize("subclassed", [False, True])
def test_apply_says_that_it_swapped_and_gets_nodes_from_the_engine(subclassed):
    """apply alone was silent, had no node groups and no bytes by link; it has them now [F11].

    A subclass of DeepSpeed's layer keeps its class, and its own methods run.
    """
    results = run_ranks(apply_finds_nodes_and_says_so, 4, subclassed, deepspeed=True, timeout_s=240)
    said, losses, report = results[0]
    assert len(said) == 1
    assert "2 of 2 layers of Net exchange through it (hierarchical, no plan)" in said[0]
    assert [lines for lines, _, _ in results[1:]] == [[]] * 3
    assert np.isfinite(losses).all()
    assert report["by_link"]["dispatch"]["cross_node"] > 0
    assert report["by_link"]["routing"]["cross_node"] > 0  # packed rows: once per node


def no_section_simply_works(rank, world, folder):
    from deepspeed.moe.layer import MoE as Stock

    from moe_locality import MoE

    quiet()
    config = config_of(0, "float32", gradient_accumulation_steps=2)
    path = f"{folder}/ds_{rank}.json"
    with open(path, "w", encoding="utf-8") as file:
        file.write("{ # DeepSpeed reads comments\n" + json.dumps(config)[1:])
    engine = start(make_net(Stock, rank, world), path)[0]
    assert isinstance(engine.module.moe1, MoE)
    assert engine.moe_locality.recorder is None
    losses = train(engine, rank, "float32", steps=4)
    assert np.isfinite(losses).all()

    class Arguments:
        deepspeed_config = path
        local_rank = rank

    import moe_locality

    net = make_net(Stock, rank, world)
    moe_locality.initialize(Arguments(), net, None, list(net.parameters()))
    assert isinstance(net.moe2, MoE)


def test_without_a_section_only_the_layers_change(tmp_path):
    run_ranks(no_section_simply_works, 2, str(tmp_path), deepspeed=True)


def optimizers_of_the_user_stay_valid(rank, world):
    import deepspeed
    from deepspeed.moe.layer import MoE as Stock
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    quiet()
    config = {k: v for k, v in config_of(1, "float32").items() if k != "optimizer"}
    runs = []
    for begin in (deepspeed.initialize, None):
        net = make_net(Stock, rank, world)
        groups = split([{"params": list(net.parameters()), "name": "dense"}])
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        if begin is None:
            import moe_locality

            begin = moe_locality.initialize
        engine = begin(model=net, optimizer=optimizer, config=config)[0]
        runs.append(train(engine, rank, "float32"))
    np.testing.assert_allclose(runs[1], runs[0], *LOSS["float32"])


def test_an_optimizer_made_before_stays_valid():
    run_ranks(optimizers_of_the_user_stay_valid, 2, deepspeed=True)


def failures_reach_all_ranks(rank, world, folder):
    """Every rank has the reason, and no rank waits for another until its time is up."""
    from deepspeed.moe.layer import MoE as Stock

    import moe_locality

    quiet()
    messages = []

    def initialize(model, section):
        start(model, {**config_of(0, "float32"), "moe_locality": section})

    def infer(model, section):
        moe_locality.init_inference(model, {"moe_locality": section})

    def attempt(section, expected, model=None, call=initialize):
        with pytest.raises(expected) as caught:
            call(model or Net(Stock, world), section)
        messages.append(str(caught.value))

    ours = f"{folder}/plan_{rank}.json"
    attempt({"plan": f"{folder}/nowhere.json"}, PlacementError)
    attempt({"kernels": "reference"} if rank == 1 else {}, ConfigError)
    plan_of([[2, 0, 3, 1], [3, 2, 1, 0]]).write(ours)
    if rank == 1:
        plan_of([[2, 0, 3, 1], [3, 2, 0, 1]]).write(ours)
    # the same path on every rank, but another file behind it
    os.makedirs(f"{folder}/view_{rank}")
    os.chdir(f"{folder}/view_{rank}")
    os.rename(ours, "plan.json")
    calls = (initialize, moe_locality.apply, infer)
    for call in calls:
        attempt({"plan": "plan.json"}, PlacementError, call=call)
    plan_of([[2, 0, 3, 1]] * 3).write("plan.json")
    attempt({"plan": "plan.json"}, PlacementError)
    attempt({"exchnage": "flat"} if rank == 1 else {}, ConfigError)
    attempt({}, ConfigError, torch.nn.Linear(2, 2))
    attempt({"dispatch": {"payload": "int3"}}, ConfigError)
    plan_of([[2, 0, 3, 1], [3, 2, 1, 0]]).write("plan.json")
    if rank == 1:
        os.remove("plan.json")
    for call in calls:
        attempt({"plan": "plan.json"}, PlacementError, call=call)
    return messages


def test_a_failure_on_one_rank_is_an_error_on_all(tmp_path):
    """Of initialize, apply and init_inference: wrong, different and missing inputs."""
    everyone = run_ranks(failures_reach_all_ranks, 2, str(tmp_path), deepspeed=True)
    for unread, section, *plans, misfit, typo, dense, payload, _, _, _ in everyone:
        assert "cannot read the plan" in unread
        assert "found different moe_locality sections on the ranks" in section
        assert len(plans) == 3
        assert all("found different placement plans on the ranks" in plan for plan in plans)
        assert "MoE layers: found 3 in the plan, expected 2" in misfit
        assert "exchnage" in typo
        assert "found no deepspeed.moe.layer.MoE in Linear" in dense
        assert "dispatch.payload: Input should be 'none', 'fp8'" in payload
    for missing in everyone[0][-3:]:
        assert missing.startswith("found by ranks [1], as rank 1 says: cannot read the plan")


def auto_ep_losses(rank, world, folder, placed):
    import transformers as tf

    from moe_locality.layer import relabel_state_dict

    quiet()
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model = tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**sizes))
    if placed:
        plan = plan_of([[2, 0, 3, 1], [3, 2, 1, 0]])
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(relabel_state_dict(state, plan, preset="qwen3_moe"))
    config = config_of(0, "float32")
    config["expert_parallel"] = {
        "enabled": True,
        "autoep_size": world,
        "preset_model": "qwen3_moe",
        "use_grouped_mm": False,
    }
    config["moe_locality"] = {"trace": {"path": f"{folder}/trace_{placed}"}}
    engine = start(model, config)[0]
    losses = []
    for step in range(4):
        generator = torch.Generator().manual_seed(10 * step + rank)
        tokens = torch.randint(0, 32, (4, 8), generator=generator)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert len(engine.moe_locality.traffic_report()["per_layer"]) == 2
    engine.destroy()
    return losses


def test_a_relabelled_model_trains_the_same_under_auto_ep(tmp_path):
    """The advice for a plan with AutoEP went in a circle; what it says now works [F3]"""
    usual, placed = (
        run_ranks(auto_ep_losses, 2, str(tmp_path), placed, deepspeed=True, timeout_s=240)
        for placed in (False, True)
    )
    np.testing.assert_allclose(placed, usual, *LOSS["float32"])
    trace = read_trace(tmp_path / "trace_False")
    assert (trace.num_tokens, trace.num_layers, trace.top_k) == (4 * 2 * 4 * 8, 2, 2)


class OneByOne:
    """A model-parallel unit as Megatron's, with tensor size ``tensor`` on two ranks."""

    def __init__(self, tensor):
        self.tensor = tensor
        groups = [torch.distributed.new_group([rank]) for rank in range(2)]
        self.group = groups[torch.distributed.get_rank()]

    def get_model_parallel_rank(self):
        return 0

    def get_model_parallel_world_size(self):
        return self.tensor

    def get_model_parallel_group(self):
        return self.group

    def get_data_parallel_rank(self):
        return torch.distributed.get_rank()

    def get_data_parallel_world_size(self):
        return 2 // self.tensor

    def get_data_parallel_group(self):
        return torch.distributed.group.WORLD


def a_plan_with_an_mpu(rank, world, folder):
    from deepspeed.moe.layer import MoE as Stock

    quiet()
    losses = []
    for section in ({}, {"plan": f"{folder}/plan.json"}):
        config = {**config_of(0, "float32"), "moe_locality": section}
        engine = start(make_net(Stock, rank, world), config, mpu=OneByOne(1))[0]
        losses.append(train(engine, rank, "float32"))
    assert engine.moe_locality.plan is not None
    np.testing.assert_allclose(losses[1], losses[0], *LOSS["float32"])
    with pytest.raises(ConfigError, match="a model-parallel unit that splits tensors"):
        start(make_net(Stock, rank, world), config, mpu=OneByOne(2))


def test_a_plan_with_an_mpu_that_splits_nothing(tmp_path):
    """A plan was refused with any mpu; one of tensor size 1 over all ranks now trains it [F2]"""
    plan_of([[2, 0, 3, 1], [3, 2, 1, 0]]).write(tmp_path / "plan.json")
    run_ranks(a_plan_with_an_mpu, 2, str(tmp_path), deepspeed=True)


def frozen_experts(rank, world):
    from deepspeed.moe.layer import MoE as Stock

    quiet()

    def net():
        made = make_net(Stock, rank, world)
        for name, parameter in made.named_parameters():
            parameter.requires_grad_("deepspeed_experts" not in name)
        return made

    for stage in (1, 2):
        with pytest.raises(ConfigError, match=r"every expert frozen .*Use ZeRO stage 0 in fp32"):
            start(net(), config_of(stage, "float32"))
    assert np.isfinite(train(start(net(), config_of(0, "float32"))[0], rank, "float32")).all()


def test_frozen_experts_under_zero_are_refused_with_what_to_do():
    """It ended in DeepSpeed's "None of the param groups are marked as MoE" [E6]"""
    run_ranks(frozen_experts, 2, deepspeed=True)


class MoEBlock(torch.nn.Module):
    """A pipeline stage passes one tensor on."""

    def __init__(self, cls):
        super().__init__()
        self.moe = cls(WIDTH, expert(), num_experts=4, k=2, top2_2nd_expert_sampling=False)

    def forward(self, x):
        return x + self.moe(x)[0]


def pipelines_train_and_equal_stock(rank, world):
    import deepspeed
    from deepspeed.moe.layer import MoE as Stock
    from deepspeed.pipe import PipelineModule

    import moe_locality

    quiet()
    runs = []
    for begin in (deepspeed.initialize, moe_locality.initialize):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(WIDTH, WIDTH), MoEBlock(Stock), MoEBlock(Stock)]
        layers.append(torch.nn.Linear(WIDTH, WIDTH))
        net = PipelineModule(
            layers, num_stages=2, loss_fn=torch.nn.functional.mse_loss, partition_method="uniform"
        )
        config = config_of(0, "float32", gradient_accumulation_steps=2)
        engine = begin(model=net, model_parameters=list(net.parameters()), config=config)[0]
        generator = torch.Generator().manual_seed(0)
        batches = [
            tuple(torch.randn(4, 8, WIDTH, generator=generator) for _ in range(2)) for _ in range(6)
        ]
        data = iter(batches)
        runs.append([engine.train_batch(data).item() for _ in range(3)])
    swapped = [m for m in net.modules() if isinstance(m, moe_locality.MoE)]
    assert len(swapped) == 1
    assert swapped[0].deepspeed_moe.traffic.rows["dispatch"].sum() > 0
    np.testing.assert_allclose(runs[1], runs[0], *LOSS["float32"])
    with pytest.raises(ConfigError, match="trace is not supported with a pipeline"):
        start(net, {**config, "moe_locality": {"trace": {"path": "unused"}}})


def test_pipelines_train_and_equal_stock():
    run_ranks(pipelines_train_and_equal_stock, 2, deepspeed=True)


def infers_as_documented(rank, world):
    import re
    from pathlib import Path

    import deepspeed
    from deepspeed.moe.layer import MoE as Stock

    import moe_locality

    quiet()
    page = (Path(__file__).parents[2] / "docs/deepspeed.md").read_text(encoding="utf-8")
    section = page[page.index("## Inference") : page.index("## What is whose")]
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(blocks) == 2
    x, y = torch.randn(2, 2, 8, WIDTH, generator=torch.Generator().manual_seed(rank))
    plan = plan_of([[2, 0, 3, 1], [3, 2, 1, 0]])
    found = []
    for block in (None, *blocks):
        net = make_net(Stock, rank, world).eval()
        names = {"model": net, "moe_locality": moe_locality, "deepspeed": deepspeed}
        names |= {"torch": torch, "plan": plan, "batch": (x, y)}
        if block is None:
            for _, module in moe_locality.layer.state.moe_modules(net):
                module.set_deepspeed_parallelism()
            with torch.no_grad():
                found.append(net(x, y).item())
            continue
        exec(block, names)
        found.append(names["output"].item())
        assert isinstance(net.moe1, moe_locality.MoE)
    return found


def test_inference_works_as_documented():
    """initialize without an optimizer and init_inference worked, written down nowhere [F11]."""
    for stock, *ours in run_ranks(infers_as_documented, 2, deepspeed=True, timeout_s=240):
        np.testing.assert_allclose(ours, [stock, stock], *LOSS["float32"])


def infers_with_every_plan(rank, world):
    import deepspeed  # noqa: F401
    from deepspeed.moe.layer import MoE as Stock

    import moe_locality

    quiet()
    x, y = torch.randn(2, 2, 8, WIDTH, generator=torch.Generator().manual_seed(rank))
    plans = {
        "stock": None,
        "no plan": None,
        "plan": plan_of([[2, 0, 3, 1], [3, 2, 1, 0]], 2, 1),
        "replicas": plan_of([[2, 0, 3, 3, 1, 2], [3, 2, 0, 1, 0, 3]], 2, 1),
    }
    found, rows = {}, {}
    for name, plan in plans.items():
        net = make_net(Stock, rank, world).eval()
        section = {"cluster": {"num_nodes": 2, "ranks_per_node": 1}, "enabled": name != "stock"}
        config = {"moe_locality": section, "dtype": torch.float32}
        engine = moe_locality.init_inference(net, config, plan=plan)
        assert config.keys() == {"moe_locality", "dtype"}
        if name == "stock":
            for _, module in moe_locality.layer.state.moe_modules(net):
                module.set_deepspeed_parallelism()
        with torch.no_grad():
            found[name] = engine(x, y).item()
        assert isinstance(net.moe1, moe_locality.MoE) == (name != "stock")
        if name != "stock":
            assert engine.moe_locality.topology.num_nodes == 2
            rows[name] = engine.moe_locality.traffic_report()["rows_by_link"]["dispatch"]
        engine.moe_locality.close()
    for words in ({"replace_with_kernel_inject": True}, {"tensor_parallel": {"tp_size": 2}}):
        with pytest.raises(ConfigError, match=next(iter(words))):
            moe_locality.init_inference(make_net(Stock, rank, world), plan=plans["plan"], **words)
    return found, rows


def test_init_inference_computes_the_same_with_plan_and_replicas():
    """[F17.8] Same outputs, groups along the nodes, traffic counted, replicas save rows."""
    for found, rows in run_ranks(infers_with_every_plan, 2, deepspeed=True, timeout_s=240):
        np.testing.assert_allclose(list(found.values()), found["stock"], *LOSS["float32"])
        across = {name: links["cross_node"] for name, links in rows.items()}
        assert across["no plan"] > 0
        assert across["replicas"] < across["plan"]


class SlowReader:
    """The store of a rank that is slow to read what the first one has published."""

    def __init__(self, store):
        self.store = store

    def __getattr__(self, name):
        return getattr(self.store, name)

    def get(self, key):
        time.sleep(0.5)
        found = self.store.get(key)
        self.read = time.monotonic()
        return found


def answers_of_a_slow_reader(rank, world):
    store = compat.default_store()
    slow, keys = SlowReader(store) if rank else store, []
    with mock.patch.object(compat, "default_store", return_value=slow):
        for _ in range(2):
            assert agreement.gather_answers(rank, "test", 20.0) == [0, 1]
            returned = time.monotonic()
            torch.distributed.barrier()
            keys.append(store.num_keys())
            torch.distributed.barrier()
    return slow.read if rank else returned, keys


def test_the_first_rank_goes_on_when_all_have_read_its_answer():
    """It raised and ended with the store: others saw a broken connection, not the reason."""
    (returned, keys), (read, _) = run_ranks(answers_of_a_slow_reader, 2)
    assert returned >= read
    assert keys[0] == keys[1]  # nothing is left

"""One test per private name, so that a new DeepSpeed which lost it is seen at once."""

import subprocess
import sys
from datetime import timedelta
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moe_locality import compat
from moe_locality.errors import ConfigError

deepspeed = pytest.importorskip("deepspeed")


def test_the_installed_deepspeed_is_accepted_and_one_that_was_tested():
    assert compat.require_deepspeed() == metadata.version("deepspeed")
    assert compat.require_deepspeed() in compat.TESTED_DEEPSPEED


def test_an_older_deepspeed_is_refused(monkeypatch):
    monkeypatch.setattr(compat.metadata, "version", lambda name: "0.19.3")
    with pytest.raises(ConfigError, match=r"found deepspeed 0.19.3, expected 0.19.4 or newer"):
        compat.require_deepspeed()


def test_no_deepspeed_says_how_to_get_it(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(compat.metadata, "version", missing)
    with pytest.raises(ConfigError, match=r"found no DeepSpeed.*pip install"):
        compat.require_deepspeed()


def test_avoid_cpu_jit_leaves_no_op_to_build():
    """In a fresh process: the table is DeepSpeed's own, which its comm backend asks at its
    start."""
    code = (
        "import sys, deepspeed, moe_locality.compat as c; c.avoid_cpu_jit();"
        "assert deepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] is False;"
        "assert 'deepspeed_fused_adam' in deepspeed.ops.__compatible_ops__ or"
        " 'fused_adam' in deepspeed.ops.__compatible_ops__;"
        "print(sys.modules['deepspeed.comm.torch'].build_shm_op())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("None")


def test_the_stock_initializer_survives_a_rebound_name(monkeypatch):
    import deepspeed.moe.layer

    stock = deepspeed.moe.layer.MoE

    class Ours(stock):
        def __init__(self, *args, **kwargs):
            compat.init_stock_moe(stock, self, *args, **kwargs)

    monkeypatch.setattr(deepspeed.moe.layer, "MoE", Ours)
    layer = Ours(4, nn.Linear(4, 4), num_experts=2)
    assert layer.num_experts == 2
    assert layer.deepspeed_moe.gate.k == 1

    class Naive(stock):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    # the trap that this is for: without the repair, the class would call itself
    monkeypatch.setattr(deepspeed.moe.layer, "MoE", Naive)
    with pytest.raises(TypeError, match="missing 2 required positional arguments"):
        Naive(4, nn.Linear(4, 4), num_experts=2)


def test_init_stock_moe_draws_the_same_random_numbers():
    from deepspeed.moe.layer import MoE as Stock

    torch.manual_seed(0)
    expected = Stock(4, nn.Linear(4, 4), num_experts=2, use_residual=True)
    torch.manual_seed(0)
    found = Stock.__new__(Stock)
    compat.init_stock_moe(Stock, found, 4, nn.Linear(4, 4), num_experts=2, use_residual=True)
    for (name, a), (_, b) in zip(
        found.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name


def test_tensor_parallel_size_is_one_without_an_mpu(monkeypatch):
    from deepspeed.utils import groups

    assert compat.tensor_parallel_size() == 1

    class Mpu:
        def get_tensor_model_parallel_world_size(self):
            return 3

    monkeypatch.setattr(groups, "mpu", Mpu())
    assert compat.tensor_parallel_size() == 3


def test_expert_groups_are_found_by_name(monkeypatch):
    from deepspeed.utils import groups

    monkeypatch.setattr(groups, "_EXPERT_PARALLEL_GROUP", {"ep_size_2": "the group"})
    assert compat.expert_parallel_group("ep_size_2") == "the group"
    assert compat.expert_parallel_group("ep_size_4") is None


def test_the_part_of_a_master_that_a_rank_holds_is_found():
    from deepspeed.utils import link_hp_params, safe_get_full_fp32_param

    with pytest.MonkeyPatch.context() as patch:
        first, second = nn.Parameter(torch.ones(4).half()), nn.Parameter(torch.ones(6).half())
        assert compat.master_fragment(first) is None
        flat = torch.arange(5.0)  # this rank: the numbers 2 to 6 of the ten
        link_hp_params([first, second], flat, {}, {}, False, 0, 2, 5, "the group")
        fragment, group = compat.master_fragment(second)
        assert group == "the group"
        assert fragment.lp_fragment_address.start == 0
        address = fragment.get_hp_fragment_address()
        assert (address.start, address.numel) == (2, 3)
        patch.setattr("deepspeed.comm.all_reduce", lambda *args, **kwargs: None)
        assert safe_get_full_fp32_param(second).tolist() == [2, 3, 4, 0, 0, 0]
    far = nn.Parameter(torch.ones(2))
    link_hp_params([first, second, far], flat, {}, {}, False, 0, 2, 5, "the group")
    assert compat.master_fragment(far) == (None, "the group")


def test_a_replaced_all_to_all_is_seen(monkeypatch):
    from deepspeed.moe import sharded_moe

    assert not compat.all_to_all_replaced()
    with monkeypatch.context() as patch:
        patch.setattr(sharded_moe._AllToAll, "apply", lambda group, x: x)
        assert compat.all_to_all_replaced()

    class Another(torch.autograd.Function):
        pass

    with monkeypatch.context() as patch:
        patch.setattr(sharded_moe, "_AllToAll", Another)
        assert compat.all_to_all_replaced()
    assert not compat.all_to_all_replaced()


def test_grouped_products_multiply_each_group_by_its_matrix():
    grouped_mm = compat.grouped_mm()
    if grouped_mm is None:
        pytest.skip("this torch has no grouped_mm")
    x, weights = torch.randn(5, 4), torch.randn(3, 4, 8)
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    expected = torch.cat([x[:2] @ weights[0], x[2:] @ weights[2]])
    torch.testing.assert_close(grouped_mm(x, weights, offs=offsets), expected)


def test_grouped_products_of_an_older_torch_are_found(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "grouped_mm", raising=False)
    monkeypatch.setattr(torch, "_grouped_mm", "private", raising=False)
    assert compat.grouped_mm() == "private"
    monkeypatch.delattr(torch, "_grouped_mm")
    assert compat.grouped_mm() is None


@pytest.mark.parametrize("name", ["_fsdp_param_groups", "_fsdp_param_group"])
def test_fsdp_groups_are_those_of_either_torch(name):
    group = object()
    state = SimpleNamespace(**{name: [group] if name.endswith("s") else group})
    assert compat.fsdp_groups(state) == [group]
    compat.set_fsdp_groups(state, [])
    assert not getattr(state, name)
    assert compat.fsdp_groups(state) == []
    compat.set_fsdp_groups(state, [group])
    assert compat.fsdp_groups(state) == [group]


def test_the_time_limit_of_the_default_group_is_read(tmp_path):
    import torch.distributed as dist

    limit = timedelta(seconds=21)
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1, timeout=limit)
    try:
        assert compat.default_timeout() == limit
        group = dist.new_group([0])
        assert compat._timeout(group) > limit
        compat.take_default_timeout(group)
        assert compat._timeout(group) == limit
    finally:
        dist.destroy_process_group()


def test_the_expert_data_parallel_group_is_found_by_name(monkeypatch):
    from deepspeed.utils import groups

    group = object()
    monkeypatch.setitem(groups._EXPERT_DATA_PARALLEL_GROUP, "ep_size_7", group)
    assert compat.expert_data_parallel_group("ep_size_7") is group
    assert compat.expert_data_parallel_group("") is None


def test_the_model_parallel_unit_is_where_deepspeed_keeps_it(monkeypatch):
    from deepspeed.utils import groups

    assert compat.model_parallel_unit() is None
    monkeypatch.setattr(groups, "mpu", "the unit")
    assert compat.model_parallel_unit() == "the unit"


def test_let_auto_ep_read_recorders_gives_the_registry_the_get_of_a_dict(monkeypatch):
    """What AutoEP asks works, what transformers asks stays, and a second call changes nothing."""
    from transformers.utils import output_capturing

    kind = type(output_capturing._CAN_RECORD_REGISTRY)
    if kind is dict:
        pytest.skip("this transformers has a plain dict: nothing to mend")
    monkeypatch.setattr(kind, "get", getattr(kind.get, "__wrapped__", kind.get))  # as installed
    registry, model = kind(), nn.Linear(1, 1)
    registry[model] = {"router_logits": 1}
    assert compat.let_auto_ep_read_recorders()
    assert not compat.let_auto_ep_read_recorders()
    missing = object()
    assert registry.get("no such class", missing) is missing
    assert registry.get("no such class") is None
    assert registry.get(str(nn.Linear), missing) == {"router_logits": 1}
    assert registry.get(model) == {"router_logits": 1}
    assert registry.get(nn.Bilinear(1, 1, 1)) == {}

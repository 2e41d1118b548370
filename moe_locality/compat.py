"""Other packages as they are installed: the one file that imports private names of DeepSpeed,
transformers or torch (a test for each), their versions, and whose ``apex`` is there.

Everything is imported inside functions: reading this module imports none of them.

PyPI's ``apex`` is a toolkit for web applications and has nothing to do with NVIDIA's
(https://github.com/NVIDIA/apex, installed from source). Importing the wrong one runs its code, so
it is recognized by its files.
"""

import contextlib
import functools
import gc
import importlib.util
import inspect
import sys
import types
import weakref
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from moe_locality.errors import ConfigError

MIN_DEEPSPEED = "0.19.4"
TESTED_DEEPSPEED = ("0.19.8",)


def require_deepspeed() -> str:
    """Return the version of DeepSpeed; ConfigError where it is absent or its gate too old."""
    try:
        found = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        raise ConfigError(
            f"found no DeepSpeed, expected deepspeed>={MIN_DEEPSPEED}: pip install "
            "'moe-locality[deepspeed]'"
        ) from None
    from packaging.version import Version  # one of DeepSpeed's own requirements

    if Version(found) < Version(MIN_DEEPSPEED):
        raise ConfigError(
            f"found deepspeed {found}, expected {MIN_DEEPSPEED} or newer, whose gate returns "
            f"sparse routes: pip install 'deepspeed>={MIN_DEEPSPEED}'"
        )
    return found


def avoid_cpu_jit() -> None:
    """Keep DeepSpeed's CPU backend from compiling ``deepspeed_shm_comm`` at its start, which takes
    minutes, and hangs without a word on a lock that a killed build left behind. Call this before
    ``deepspeed.init_distributed``; on a GPU it changes nothing."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def end_distributed() -> None:
    """End all process groups, and with gloo their threads. Collective; the last call of a program.

    A group ends when nothing holds it: whatever holds the engine or the model has to be gone.
    A thread of gloo that is left may drop the tensor of its last collective while the interpreter
    ends, which aborts the process (``terminate called without an active exception``)."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    gc.collect()  # an engine is part of reference cycles
    dist.barrier()
    # what holds groups for ever: device meshes, which caches of DTensor keep, and default arguments
    # of functions that were defined when there was a default group (None is it)
    for held in gc.get_objects():
        if type(held) is DeviceMesh:
            getattr(held, "_pg_registry", {}).clear()
        elif type(held) is types.FunctionType and held.__defaults__:
            held.__defaults__ = tuple(
                None if type(default) is dist.ProcessGroup else default
                for default in held.__defaults__
            )
    held = None
    comm = sys.modules.get("deepspeed.comm")
    if comm is not None and comm.is_initialized():
        comm.destroy_process_group()  # torch's alone leaves the groups to DeepSpeed's globals
    else:
        dist.destroy_process_group()


def let_auto_ep_read_recorders() -> bool:
    """Let DeepSpeed's AutoEP run with transformers 5.23 and newer; return whether that was needed.

    AutoEP (up to 0.19.8) asks the registry of output recorders for ``get(key, default)``. It was a
    dict up to transformers 5.22; since then it is a subclass whose ``get`` takes a model alone, and
    AutoEP ends in a TypeError. Here a second argument means the plain ``dict.get`` of before."""
    try:
        from transformers.utils import output_capturing
    except ImportError:
        return False
    kind: Any = type(getattr(output_capturing, "_CAN_RECORD_REGISTRY", None))
    if kind is dict or not issubclass(kind, dict) or "get" not in vars(kind):
        return False
    own = kind.get
    if len(inspect.signature(own, follow_wrapped=False).parameters) != 2:
        return False

    @functools.wraps(own)
    def get(self: Any, key: Any, *default: Any) -> Any:
        plain = default or isinstance(key, str)
        return dict.get(self, key, *default) if plain else own(self, key)

    kind.get = get
    return True


def before_forward_passes(part: Any, check: Callable[[], bool]) -> None:
    """Call the method ``check`` before each forward pass through ``part``, until it returns True. A
    hook of all modules runs before FSDP2's, which waits for ranks that may never call it."""
    from torch.nn.modules.module import register_module_forward_pre_hook

    checks, known_part = weakref.WeakMethod(check), weakref.ref(part)

    def before(module: Any, _args: Any) -> None:
        known = checks()
        if known is None or (any(m is known_part() for m in module.modules()) and known()):
            handle.remove()

    handle = register_module_forward_pre_hook(before)


def init_stock_moe(stock: type, module: Any, *args: Any, **kwargs: Any) -> None:
    """Run ``stock.__init__`` on ``module`` even where the name ``MoE`` of its module was rebound.

    ``deepspeed.moe.layer.MoE.__init__`` says ``super(MoE, self)`` and so looks its own class up in
    the module's globals; once a subclass is bound to that name it would call itself for ever. The
    same code runs here with globals in which the name means the stock class."""
    init: Any = stock.__init__
    names = {**init.__globals__, stock.__name__: stock}
    same = types.FunctionType(init.__code__, names, None, init.__defaults__, init.__closure__)
    same.__kwdefaults__ = init.__kwdefaults__
    same(module, *args, **kwargs)


def _groups() -> Any:
    from deepspeed.utils import groups

    return groups


def tensor_parallel_size() -> int:
    """Return the tensor-parallel size of the dense layers (1 without an mpu)."""
    from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size

    mpu = model_parallel_unit()
    return 1 if mpu is None else bwc_tensor_model_parallel_world_size(mpu)


def spreads_data_only(mpu: Any) -> bool:
    """Return whether a model-parallel unit splits neither tensors nor layers over the ranks."""
    import torch.distributed as dist
    from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size

    whole = bwc_tensor_model_parallel_world_size(mpu) == 1
    return whole and mpu.get_data_parallel_world_size() == dist.get_world_size()


def model_parallel_unit() -> Any:
    """Return the ``mpu`` that DeepSpeed was given, or None."""
    return _groups().mpu


def all_to_all_replaced() -> bool:
    """Return whether somebody (a profiler, a test of DeepSpeed) replaced DeepSpeed's ``_AllToAll``:
    the replacement has to see the exchanges of a layer that stands in for DeepSpeed's."""
    from deepspeed.moe import sharded_moe

    function = sharded_moe._AllToAll
    return function.__module__ != sharded_moe.__name__ or "apply" in vars(function)


def expert_parallel_group(name: str) -> Any:
    """Return the expert-parallel group of this rank under ``name`` (``ep_size_{n}``), or None."""
    return _groups()._get_expert_parallel_group_dict().get(name)


def expert_data_parallel_group(name: str) -> Any:
    """Return the expert-data-parallel group of this rank under ``name``, or None."""
    return _groups()._get_expert_data_parallel_group_dict().get(name)


def pipeline_layer_kinds(module: Any) -> list[type | None]:
    """Return the class of every layer of a ``PipelineModule``, those of other stages too; None for
    what is no block: functions, layers of torch.nn, and those that stages share (embeddings)."""
    from deepspeed.runtime.pipe.module import LayerSpec, TiedLayerSpec

    kinds: list[type | None] = []
    for layer in module._layer_specs:
        kind = layer.typename if isinstance(layer, LayerSpec) else type(layer)
        fits = hasattr(kind, "named_modules") and not kind.__module__.startswith("torch.nn.")
        kinds.append(kind if fits and not isinstance(layer, TiedLayerSpec) else None)
    return kinds


def default_store() -> Any:
    """Return the key-value store of the default process group (it works before a device is set)."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


READ_LIMIT = timedelta(seconds=30)
"""How long the first rank waits for the others to have read what it published."""


def forget_when_read(
    store: Any, key: str, ranks: Sequence[int], limit: timedelta = READ_LIMIT, forget: bool = True
) -> None:
    """Wait until ``ranks`` have read what the first of them published; then delete the keys.

    What a rank gave is at ``key/RANK``, what was published at ``key``, and ``key/read/RANK`` says
    that a rank has read it. The process of the first rank may hold the store: were it to raise over
    what it read and end, the others would see a broken connection instead of the reason."""
    read = [f"{key}/read/{rank}" for rank in ranks]
    with contextlib.suppress(RuntimeError):  # a rank is gone or late: the keys stay
        store.wait(read, limit)
        for name in (key, *read, *(f"{key}/{rank}" for rank in ranks)) if forget else ():
            store.delete_key(name)


def default_timeout() -> Any:
    """Return how long collectives of the default process group wait (a timedelta). ``new_group``
    does not take it over: its own is half an hour with gloo, whatever the user asked for."""
    from torch.distributed.distributed_c10d import _get_default_group

    return _timeout(_get_default_group())


def take_default_timeout(group: Any) -> None:
    """Let a group of DeepSpeed, made without a timeout, wait as long as the default group."""
    from torch.distributed.distributed_c10d import _set_pg_timeout

    if _timeout(group) != default_timeout():
        _set_pg_timeout(default_timeout(), group)


def _timeout(group: Any) -> Any:
    return group._get_backend(group._device_types[0]).options._timeout


def registered_expert_ranks(ep_size: int) -> tuple[list[int], list[int]] | None:
    """Return the EP and EDP ranks that DeepSpeed has for this rank under ``ep_size``, if any."""
    groups, name = _groups(), f"ep_size_{ep_size}"
    if name not in groups._EXPERT_PARALLEL_GROUP and name not in groups._EXPERT_DATA_PARALLEL_GROUP:
        return None
    ep_ranks = groups._EXPERT_PARALLEL_GROUP_RANKS.get(name, ())
    return list(ep_ranks), list(groups._EXPERT_DATA_PARALLEL_GROUP_RANKS.get(name, ()))


def register_expert_groups(ep_size: int, made: Any) -> None:
    """Make those of ``made``, ExpertParallelGroups, the groups that DeepSpeed uses for ``ep_size``.

    What is registered already stays; the caller checks that it has the same ranks. The name has to
    be ``ep_size_<number>``: DeepSpeed reads the number back from every name."""
    if registered_expert_ranks(ep_size) is not None:
        return
    groups, name = _groups(), f"ep_size_{ep_size}"
    groups._EXPERT_PARALLEL_GROUP[name] = made.ep_group
    groups._EXPERT_PARALLEL_GROUP_RANKS[name] = list(made.ep_ranks)
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = made.edp_group
    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = list(made.edp_ranks)


def master_fragment(parameter: Any) -> tuple[Any, Any] | None:
    """Return which part of a parameter's fp32 master this rank holds, and the group it is spread
    over; None where no partitioned optimizer (ZeRO 1 and 2, ``BF16_Optimizer``) has the parameter.

    The first is DeepSpeed's ``tensor_fragment``, or None where this rank holds no part. The public
    ``safe_get_full_fp32_param`` reads the same fields, but does one all-reduce per tensor in which
    an error on one rank leaves the others waiting, and loses the sign of a zero."""
    if not hasattr(parameter, "_hp_mapping"):
        return None
    return parameter._hp_mapping, parameter._dp_group


def remove_parameters(module: Any, names: Collection[str]) -> None:
    """Take parameters out of a module, and of FSDP2 where it holds them: their memory is free."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(module, FSDPModule):
        module.reshard()
        state = module._get_fsdp_state()
        groups = fsdp_groups(state)
        for group in groups:
            own = [p for p in group.fsdp_params if p._module_info.module is module]
            gone = [p for p in own if p._module_info.param_name in names]
            for parameter in gone:
                parameter._post_load_hook_handle.remove()  # it holds the weights
            group.fsdp_params = [p for p in group.fsdp_params if p not in gone]
        set_fsdp_groups(state, [g for g in groups if g.fsdp_params])
    for name in names:
        delattr(module, name)


def fsdp_groups(state: Any) -> list[Any]:
    """Return the groups of parameters of a module's FSDP2 state; older torch has one group."""
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def set_fsdp_groups(state: Any, groups: list[Any]) -> None:
    """Put ``groups`` in the place of ``fsdp_groups``."""
    if hasattr(state, "_fsdp_param_groups"):
        state._fsdp_param_groups = groups
    else:
        state._fsdp_param_group = groups[0] if groups else None


def compute_on_shards(module: Any) -> None:
    """Let forward passes without gradients read a module's parameters where FSDP2 keeps them.

    On a mesh of one rank FSDP2 has nothing to gather and copies all the same. Here its hooks find
    no parameters in such a pass; before and after it, all is as FSDP2 has made it. Parameters that
    it casts, or gets from other ranks or from the CPU, are gathered as before."""
    import torch

    state, hidden = module._get_fsdp_state(), []

    def give_back(*_: Any) -> None:
        if hidden:
            set_fsdp_groups(state, hidden.pop())

    @torch.compiler.disable
    def hide(*_: Any) -> None:
        give_back()  # what an interrupted pass has left
        groups = fsdp_groups(state)
        held = not torch.is_grad_enabled() and all(g.is_sharded for g in groups)
        for p in (p for group in groups for p in group.fsdp_params):
            casts = getattr(p, "param_dtype", True) is not None  # absent before the first pass
            whole = p.sharded_size == p._orig_size and p._module_info.module is module
            held = held and whole and not casts and not p.offload_to_cpu
        if held:
            set_fsdp_groups(state, [])
            hidden.append(groups)

    module.register_forward_pre_hook(hide, prepend=True)
    module.register_forward_hook(give_back, always_call=True)


def grouped_mm() -> Any:
    """Return torch's grouped matrix product (public since 2.10, private before), or None."""
    import torch

    public = getattr(torch.nn.functional, "grouped_mm", None)
    return public or getattr(torch, "_grouped_mm", None)


ApexState = Literal["absent", "wrong", "python-only", "cuda"]


def nvidia_apex_state() -> tuple[ApexState, str]:
    """Say which ``apex`` is installed, and what to do about it.

    The state is ``wrong`` for another package of that name, ``python-only`` for NVIDIA's without
    the compiled kernels of its normalization layers, ``cuda`` where it is usable."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "absent", "NVIDIA apex is not installed"
    parts = ("normalization", "multi_tensor_apply")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if not any(all((folder / part).is_dir() for part in parts) for folder in folders):
        try:
            fields = metadata.metadata("apex")
            found = f"{fields['Version']}: {fields['Summary']}"
        except metadata.PackageNotFoundError:
            found = "unknown distribution"
        return "wrong", (
            f"the installed 'apex' is not NVIDIA apex ({found}): pip uninstall apex,"
            " then install https://github.com/NVIDIA/apex from source with its CUDA extensions"
        )
    if importlib.util.find_spec("fused_layer_norm_cuda") is None:
        return "python-only", (
            "NVIDIA apex is installed without fused_layer_norm_cuda: install it from source with"
            " its CUDA extensions"
        )
    return "cuda", "NVIDIA apex with fused_layer_norm_cuda"

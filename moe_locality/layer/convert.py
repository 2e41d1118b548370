"""Put the drop-in into a model, in place (:func:`apply`) or with DeepSpeed started around it
(:func:`initialize`), and drive what runs beside an engine (:class:`LocalityRuntime`).
"""

import atexit
import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch.distributed as dist
from torch import nn

from moe_locality import compat
from moe_locality.config import SECTION, MoeLocalityConfig, refuse_settings
from moe_locality.dispatch.desync import all_calls, announce_departure
from moe_locality.dispatch.flat import check_overflow
from moe_locality.dispatch.traffic import reset_traffic, traffic_report
from moe_locality.errors import ConfigError, TopologyError
from moe_locality.layer.agreement import (
    Inputs,
    agree_on_inputs,
    all_succeed,
    announce,
    section_and_plan,
)
from moe_locality.placement.plan import PlacementPlan, check_is_permutation, check_nodes
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.topology.groups import discover_topology, exchange_objects, prepare_groups

compat.require_deepspeed()

import deepspeed  # noqa: E402
from deepspeed.accelerator import get_accelerator  # noqa: E402
from deepspeed.pipe import PipelineModule  # noqa: E402
from deepspeed.runtime.pipe.engine import PipelineEngine  # noqa: E402
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config  # noqa: E402

from moe_locality.layer.checkpoint import wrap_checkpoints  # noqa: E402
from moe_locality.layer.moe import adopt, configure  # noqa: E402
from moe_locality.layer.relabeling import relabel  # noqa: E402
from moe_locality.layer.replicas import add_replicas, with_new_parameters  # noqa: E402
from moe_locality.layer.state import has_auto_ep, moe_modules, plan_rows  # noqa: E402

logger = logging.getLogger(__name__)
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def apply(
    model: nn.Module,
    config: MoeLocalityConfig | dict[str, Any] | str | Path | None = None,
    *,
    plan: PlacementPlan | str | Path | None = None,
    topology: ClusterTopology | None = None,
) -> nn.Module:
    """Turn every DeepSpeed MoE layer of ``model`` into ours, in place, and return the model.

    Parameters, hooks and names stay the same objects, so an optimizer or a checkpoint made before
    stays valid. A second call changes nothing.

    An engine whose layers AutoEP built is given as ``model`` after ``deepspeed.initialize``: its
    layers get the exchange, and the plan moves experts with their optimizer state.

    Collective over all ranks where a process group is up; arguments as of ``moe_locality.apply``.

    Args:
        plan: or its file; place the experts too (before ``deepspeed.initialize``). With replicas, a
            rank gets more experts: collect the parameters to train afterwards.
        topology: default: found by ``deepspeed.initialize`` when it makes the expert groups.

    Raises:
        ConfigError: the model has no DeepSpeed MoE layer, or one that cannot be swapped.
        PlacementError: the plan does not fit the model. Both on all ranks.
    """
    auto_ep = has_auto_ep(model)
    begun: Any = getattr(model, "moe_locality", None)
    given = begun.config if config is None and begun is not None else config

    def read() -> Inputs[None]:
        section, found = section_and_plan(given, plan)
        if not auto_ep:
            _check_layers(model, found)
        return section, found, None

    section, found, _ = agree_on_inputs(read)
    runtime = LocalityRuntime(model=model, config=section, plan=found, topology=topology)
    if auto_ep:
        _adopt_auto_ep(model, runtime)
    else:
        _place(runtime)
    return model


def _check_layers(model: nn.Module, plan: PlacementPlan | None) -> None:
    layers = moe_modules(model)
    if not layers:
        raise ConfigError(
            f"found no deepspeed.moe.layer.MoE in {type(model).__name__}, expected at least one: "
            "moe_locality swaps DeepSpeed's MoE layers. A Hugging Face model needs the section "
            "expert_parallel (AutoEP, docs/deepspeed.md), or from_pretrained with "
            'ep_implementation="moe_locality" (docs/transformers.md)'
        )
    if plan is not None:
        plan.check_fits(num_experts=max(module.num_experts for _, module in layers))
        plan_rows(model, plan)


def _place(runtime: "LocalityRuntime") -> None:
    """Swap the layers of a model, and place its experts (collective)."""
    model, section, plan = runtime.model, runtime.config, runtime.plan
    key_of = {"dispatch_config": "dispatch", "kernels": "kernels", "experts": "experts"}
    chosen: dict[str, Any] = {given: getattr(section, key) for given, key in key_of.items()}
    said = {
        given: chosen[given] for given, key in key_of.items() if key in section.model_fields_set
    }
    layers = moe_modules(model)
    swapped = 0
    for number, (name, module) in enumerate(layers):
        if adopt(module, **chosen, topology=runtime.topology):
            swapped += 1
        else:  # built as ours: what its constructor was given stays, unless the section says it
            configure(module, **said, topology=runtime.topology)
        layer: Any = module.deepspeed_moe
        layer.cluster = section.cluster or layer.cluster
        layer.call_position.number, layer.call_position.name = number, name
    if swapped:
        what = f"{swapped} of {len(layers)} layers of {type(model).__name__}"
        announce(what, section, plan is not None)
    if plan is not None:
        (relabel if plan.is_permutation else add_replicas)(model, plan)


def _signature_of(
    original: Callable[_Arguments, _Result],
) -> Callable[[Callable[..., Any]], Callable[_Arguments, _Result]]:
    """Show the signature of ``original`` to editors and ``help`` for a function that forwards."""

    def show(function: Any) -> Any:
        function.__signature__ = inspect.signature(original)
        return function

    return show


@_signature_of(deepspeed.initialize)
def initialize(*args: Any, **kwargs: Any) -> Any:
    """``deepspeed.initialize`` with moe_locality around it; the same arguments, the same result.

    Before it: find the nodes, make expert groups that follow them, swap the layers, read the plan
    and relabel the experts. After it: attach the recorder, and make checkpoints keep the order of
    the slots (``wrap_checkpoints``). The engine gets the attribute ``moe_locality`` (a
    :class:`~moe_locality.layer.convert.LocalityRuntime`). Everything is read from the section
    ``"moe_locality"`` of the ds_config; without it, the layers are swapped.

    With the ``expert_parallel`` section, the layers that DeepSpeed's AutoEP builds get exchange and
    plan (:mod:`moe_locality.integrations.autoep`). With a model-parallel unit or a pipeline,
    DeepSpeed makes the groups.

    With ``"enabled": false`` DeepSpeed's layers stay; the recorder and the log are attached.
    ConfigError, PlacementError, TopologyError: on all ranks, also where one rank only found it."""
    bound = inspect.signature(deepspeed.initialize).bind(*args, **kwargs).arguments
    model = bound.get("model")
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"found model={type(model).__name__}, expected a torch module: pass model=..."
        )
    _init_distributed(bound)
    section, plan, ds_config = _agree_on_inputs(bound)
    runtime = LocalityRuntime(model=model, config=section, plan=plan)
    auto_ep = _auto_ep(ds_config)
    if auto_ep:
        compat.let_auto_ep_read_recorders()
        if section.enabled:  # the groups that AutoEP will use
            ep_size = ds_config["expert_parallel"].get("autoep_size", 1)
            folded = (ds_config.get("tensor_parallel") or {}).get("autotp_size", 1) > 1
            alone = ep_size <= 1 or bound.get("mpu") is not None or folded
            _make_groups(runtime, set() if alone else {ep_size}, ds_config)
    elif section.enabled:
        _prepare_model(runtime, ds_config, bound.get("mpu"))
        if plan is not None and not plan.is_permutation:
            args, kwargs = (), bound
            for name in ("model_parameters", "optimizer"):
                given = bound.get(name)
                if given is not None and (name == "model_parameters" or not callable(given)):
                    bound[name] = with_new_parameters(model, given)
    result = deepspeed.initialize(*args, **kwargs)
    engine: Any = result[0]
    if auto_ep and section.enabled:
        _adopt_auto_ep(engine, runtime)
    runtime.model = engine.module
    attach_runtime(engine, runtime, ds_config)
    if runtime.topology is not None and not auto_ep and moe_modules(engine.module):
        wrap_checkpoints(engine)
    return result


def init_inference(
    model: nn.Module,
    config: dict[str, Any] | str | None = None,
    *,
    plan: PlacementPlan | str | Path | None = None,
    **kwargs: Any,
) -> Any:
    """``deepspeed.init_inference`` with moe_locality around it; the same arguments and result.

    Before it: find the nodes, make expert groups that follow them, swap the layers, place the
    experts. The engine gets the attribute ``moe_locality``, as that of :func:`initialize`.

    Args:
        config: of DeepSpeed's inference engine, with a section ``"moe_locality"`` or without one.
        plan: default: the plan that the section names.

    ConfigError, PlacementError, TopologyError: on all ranks.
    """
    _init_distributed({})

    def read() -> Inputs[dict[str, Any]]:
        given = dict(load_ds_config(config)) if config is not None else {}
        section, found = section_and_plan({SECTION: given.pop(SECTION, {})}, plan)
        merged = given | kwargs
        tensor_parallel: Any = merged.get("tensor_parallel") or merged.get("tp") or {}
        needs = "it needs an optimizer"
        refuse_settings(section, "of an inference engine", {"online": needs, "tracking": needs})
        refused = {
            "replace_with_kernel_inject": merged.get("replace_with_kernel_inject"),
            "injection_policy": merged.get("injection_policy"),
            "tensor_parallel": found is not None and tensor_parallel.get("tp_size", 1) > 1,
        }
        for name, wrong in refused.items():
            if wrong:
                raise ConfigError(
                    f"found {name} in an inference engine, expected none beside moe_locality: it "
                    "replaces or splits the layers; leave it out"
                )
        if section.enabled:
            _check_layers(model, found)
        return section, found, given

    section, found, given = agree_on_inputs(read)
    runtime = LocalityRuntime(model=model, config=section, plan=found)
    if section.enabled:
        _prepare_model(runtime, {}, None)
        for _, module in moe_modules(model):
            module.set_deepspeed_parallelism()
    engine: Any = deepspeed.init_inference(model, given, **kwargs)
    engine.moe_locality = runtime
    if section.trace is not None and section.trace.enabled:
        from moe_locality.trace import recorder

        runtime.recorder = recorder.attach(engine, section.trace, model=type(model).__name__)
    _close_with(engine, runtime)
    return engine


def _check_zero_stage(
    bound: dict[str, Any], ds_config: dict[str, Any], plan: PlacementPlan | None
) -> None:
    stage = (ds_config.get("zero_optimization") or {}).get("stage", 0)
    layers = [module.deepspeed_moe for _, module in moe_modules(bound["model"])]
    experts = [parameter for layer in layers for parameter in layer.experts.parameters()]
    trains = bound.get("optimizer") is not None or "optimizer" in ds_config
    frozen = experts and not any(parameter.requires_grad for parameter in experts)
    if stage in (1, 2) and trains and frozen:
        raise ConfigError(
            f"found every expert frozen under ZeRO stage {stage}, expected one expert parameter "
            "that trains: DeepSpeed makes no group for the experts then, and stops ('None of the "
            "param groups are marked as MoE'). Use ZeRO stage 0 in fp32, or let one small "
            "parameter of an expert train"
        )
    replicas = plan is not None and not plan.is_permutation
    if replicas and not stage and ds_config.get("gradient_clipping"):
        raise ConfigError(
            "found gradient_clipping at ZeRO stage 0 together with a plan with replicas, expected "
            "stage 1 or 2: at stage 0 DeepSpeed counts an expert in the norm once per replica; set "
            "zero_optimization.stage to 1 or 2, or gradient_clipping to 0"
        )


def _init_distributed(bound: dict[str, Any]) -> None:
    """Start DeepSpeed's comm layer the way ``deepspeed.initialize`` would, only earlier."""
    accelerator: Any = get_accelerator()
    wanted = {"distributed_port", "dist_init_required"} & bound.keys()
    given = {name: bound[name] for name in wanted}
    deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), **given)
    local_rank = os.environ.get("LOCAL_RANK")
    if accelerator.device_name() != "cpu" and local_rank is not None:
        # experts may travel before the engine chooses the device
        accelerator.set_device(int(local_rank))


def _ds_config(bound: dict[str, Any]) -> dict[str, Any]:
    """Return the ds_config, found where DeepSpeed looks for it."""
    args = bound.get("args")
    given = [bound.get("config"), bound.get("config_params")]
    given += [getattr(args, name, None) for name in ("deepspeed_config", "deepscale_config")]
    config = next((config for config in given if config is not None), None)
    if config is None:
        raise ConfigError(
            "found no ds_config, expected one: pass config= (a dict or a path) or "
            "--deepspeed_config"
        )
    try:
        return load_ds_config(config if isinstance(config, dict) else os.fspath(config))
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"cannot read the ds_config: {error}: check the path") from error


def _agree_on_inputs(bound: dict[str, Any]) -> Inputs[dict[str, Any]]:
    """Read config and plan on every rank; raise on all ranks where they are wrong or differ."""

    def read() -> Inputs[dict[str, Any]]:
        ds_config = _ds_config(bound)
        section, plan = section_and_plan({SECTION: ds_config.get(SECTION, {})})
        _check_zero_stage(bound, ds_config, plan)
        if not _auto_ep(ds_config):
            if section.enabled and not isinstance(bound["model"], PipelineModule):
                _check_layers(bound["model"], plan)
        elif plan is not None:  # AutoEP's layers do not exist yet
            check_is_permutation(plan)
            plan.check_fits(num_ranks=ds_config["expert_parallel"].get("autoep_size", 1))
        return section, plan, ds_config

    section, plan, ds_config = agree_on_inputs(read)
    everyone = exchange_objects(section.tracking) if dist.is_initialized() else [section.tracking]
    others = [rank for rank, tracking in enumerate(everyone) if tracking is not None]
    if everyone[0] is None and others:
        raise ConfigError(
            f"found the section tracking on ranks {others} and not on rank 0, which writes the "
            "run, expected it there: give rank 0 the section"
        )
    return section.model_copy(update={"tracking": everyone[0]}), plan, ds_config


def _auto_ep(ds_config: dict[str, Any]) -> bool:
    return bool((ds_config.get("expert_parallel") or {}).get("enabled"))


def _adopt_auto_ep(model: Any, runtime: "LocalityRuntime") -> None:
    """Give AutoEP's layers of an engine or a model our exchange, and place its experts."""
    try:
        from moe_locality.integrations.autoep import adopt as adopt_auto_ep
    except ImportError as error:
        if not (error.name or "").startswith("deepspeed"):
            raise
        why = f"the AutoEP of DeepSpeed {deepspeed.__version__} has no place for another exchange"
        if runtime.plan is not None:
            raise ConfigError(
                f"found a plan, and {why}, expected DeepSpeed 0.19.8 or newer: upgrade it, or put "
                "the plan into the weights first: moe_locality.layer.relabel_state_dict"
            ) from error
        logger.warning("moe_locality: AutoEP's layers keep their own exchange: %s", why)
        return
    adopted = adopt_auto_ep(model, runtime.config, runtime.topology, runtime.plan)
    if adopted:
        announce(f"{len(adopted)} layers of AutoEP", runtime.config, runtime.plan is not None)


def _make_groups(runtime: "LocalityRuntime", sizes: set[int], ds_config: dict[str, Any]) -> None:
    """Find the nodes, and make expert groups of these sizes that follow them, where plan or cluster
    section ask for it or can. Collective."""
    plan, cluster = runtime.plan, runtime.config.cluster
    runtime.topology = topology = discover_topology(cluster_config=cluster)
    order = "D+E" if ds_config.get("use_data_before_expert_parallelism") else "E+D"
    try:
        groups = prepare_groups(topology, sizes, order) if sizes else {}
        if plan is not None and plan.num_ranks in groups:
            check_nodes(plan, topology, groups[plan.num_ranks].layout.ep_groups)
    except TopologyError as error:  # on all ranks alike
        if plan is not None or cluster is not None:
            raise
        logger.warning(
            "moe_locality: the expert groups cannot follow the nodes (%s), so DeepSpeed makes "
            "its own: %s",
            topology.describe(),
            error,
        )


def _prepare_model(runtime: "LocalityRuntime", ds_config: dict[str, Any], mpu: Any) -> None:
    """Find the nodes, make the expert groups, swap the layers, apply the plan. Collective."""
    model, plan, trace = runtime.model, runtime.plan, runtime.config.trace
    pipeline = isinstance(model, PipelineModule)
    data_only = mpu is None or (plan is not None and compat.spreads_data_only(mpu))
    if plan is not None and (pipeline or not data_only):
        raise ConfigError(
            "plans are not supported with a pipeline, or with a model-parallel unit that splits "
            "tensors or layers: bake the plan into the checkpoint with `moe-locality bake`"
        )
    if pipeline and trace is not None and trace.enabled:
        raise ConfigError(
            "trace is not supported with a pipeline: leave it out, and call "
            "moe_locality.attach(engine.module, path) on the stages that have MoE layers"
        )
    sizes = {module.ep_size for _, module in moe_modules(model)}
    _make_groups(runtime, sizes if not pipeline and data_only else set(), ds_config)
    if sizes or not pipeline:  # a pipeline stage may be without an MoE layer
        _place(runtime)


# -- beside a running engine -------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class LocalityRuntime:
    """Configuration, placement, cluster and recorder of an engine.

    ``topology`` is None where the layers stay DeepSpeed's, ``recorder`` where the section has no
    ``trace``, ``online`` where it has no ``online``, ``log`` where no ``tracking``."""

    model: nn.Module
    config: MoeLocalityConfig
    plan: PlacementPlan | None = None
    topology: ClusterTopology | None = None
    recorder: Any = None
    online: Any = None
    log: Any = None

    def traffic_report(self, group: Any = None) -> dict[str, Any]:
        """Gather what every rank sent; see ``moe_locality.dispatch.traffic_report``. Collective."""
        report = traffic_report(self.model, self.topology, group)
        if not report["per_layer"]:
            logger.warning(
                "moe_locality: nothing was counted: AutoEP's own exchange, DeepSpeed's padded "
                "dispatch and layers that have not run yet count no traffic"
            )
        return report

    def reset_traffic(self) -> None:
        """Count from zero again."""
        reset_traffic(self.model)
        if self.log is not None:
            self.log.reset_traffic()

    def check_overflow(self) -> None:
        """Raise on all ranks where routes found no row in the buffers of ``dispatch.capacity``, for
        what no step checks: the replays of a CUDA graph. Collective; waits for the device."""
        check_overflow(self.model)

    def close(self) -> None:
        """Write what recorder and tracking still hold; not collective. ``engine.destroy`` and the
        end of the process call it."""
        online, self.online = self.online, None
        if online is not None:
            online.close()
        recorder, self.recorder = self.recorder, None
        report = None if recorder is None else recorder.close()
        log, self.log = self.log, None
        if log is not None:
            atexit.unregister(self.close)
            failed = sys.exc_info()[0] is not None or getattr(sys, "last_value", None) is not None
            trace = self.config.trace
            log.close(None if trace is None else trace.path, report, failed=failed)


def attach_runtime(
    engine: Any, runtime: LocalityRuntime, ds_config: dict[str, Any] | None = None
) -> None:
    """Set ``engine.moe_locality``, start what the section asks for, and let the engine drive it."""
    engine.moe_locality = runtime
    online = runtime.config.online
    if online is not None and online.enabled:
        from moe_locality.layer.online import attach_online

        runtime.online = attach_online(engine, online, runtime.topology)
        after_each_step(engine, runtime.online.step)
    trace = runtime.config.trace
    if trace is not None and trace.enabled:
        from moe_locality.trace import recorder

        runtime.recorder = recorder.attach(engine, trace, model=type(runtime.model).__name__)
        after_each_step(engine, runtime.recorder.step)
    if runtime.config.tracking is not None and runtime.config.tracking.enabled:
        _attach_log(engine, runtime, ds_config)
    if (runtime.online, runtime.recorder, runtime.log) != (None, None, None):
        _close_with(engine, runtime)


def _attach_log(engine: Any, runtime: LocalityRuntime, ds_config: dict[str, Any] | None) -> None:
    """Start the log of a training run. Collective: an error of rank 0 is raised on all ranks."""
    from moe_locality.layer.run_log import RunLog

    log = runtime.log = all_succeed(lambda: RunLog(engine, runtime, ds_config))
    atexit.register(runtime.close)

    def after_step() -> None:
        if runtime.log is not None:
            log.step(runtime.recorder, runtime.online)

    after_each_step(engine, after_step)
    if isinstance(engine, PipelineEngine):
        return  # its train_batch has the loss
    original = engine.backward

    @functools.wraps(original)
    def backward(loss: Any, *args: Any, **kwargs: Any) -> Any:
        log.record_loss(loss)
        return original(loss, *args, **kwargs)

    engine.backward = backward


def after_each_step(engine: Any, callback: Callable[[], object]) -> None:
    """Call ``callback()``, after those given before, at the end of every optimizer step (the last
    micro-batch of an accumulation): ``engine.step`` (a pipeline's ``train_batch``) is wrapped."""
    callbacks = vars(engine).get("moe_locality_after_step")
    if callbacks is not None:
        callbacks.append(callback)
        return
    callbacks = engine.moe_locality_after_step = [callback]
    name = "train_batch" if isinstance(engine, PipelineEngine) else "step"
    original = getattr(engine, name)

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        # counted, not asked for: with managed_gradient_accumulation=false the engine knows that a
        # call ends an accumulation only while it runs
        before = engine.global_steps
        result = original(*args, **kwargs)
        if engine.global_steps > before:
            for call in tuple(callbacks):
                call()
        return result

    setattr(engine, name, step)


def _close_with(engine: Any, runtime: LocalityRuntime) -> None:
    original = engine.destroy

    @functools.wraps(original)
    def destroy(*args: Any, **kwargs: Any) -> Any:
        runtime.close()
        announce_departure(f"destroyed its engine after {all_calls()}")
        return original(*args, **kwargs)

    engine.destroy = destroy

"""A pytest plugin that runs DeepSpeed's own tests of MoE and AutoEP with our layers in the place of
its own.

docs/deepspeed.md has the commands. Importing this module makes the switch, so that the workers
which DeepSpeed's tests start are switched too (it is preloaded into their fork server). On a
machine without a GPU it also keeps DeepSpeed from compiling anything. The environment variable
MOE_LOCALITY_ACCEPTANCE chooses the layer: ``identity`` (default), ``reversed`` (every expert sits
at the other end), or ``stock`` (DeepSpeed's, to see what its tests say without us).
"""

import multiprocessing
import os
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
VARIANT = "MOE_LOCALITY_ACCEPTANCE"
MARKS = "MOE_LOCALITY_ACCEPTANCE_MARKS"

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("LOCAL_SIZE", "4")  # the number of CPU devices that DeepSpeed's tests see
os.environ.setdefault("DS_UNITTEST_TIMEOUT", "1200")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault(VARIANT, "identity")

import deepspeed  # noqa: E402
import torch  # noqa: E402

from moe_locality.compat import avoid_cpu_jit  # noqa: E402


class TorchAdam(torch.optim.AdamW):
    """What DeepSpeed calls FusedAdam, without the compiler."""

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, adam_w_mode=True
    ):
        if not adam_w_mode and weight_decay:
            raise NotImplementedError("Adam with L2 regularization")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def avoid_compilers() -> None:
    """Do without the ops that DeepSpeed compiles at first use: minutes each, on a CPU."""
    import deepspeed.ops.adam
    import deepspeed.runtime.engine
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    avoid_cpu_jit()
    deepspeed.ops.adam.FusedAdam = TorchAdam
    deepspeed.runtime.engine.FusedAdam = TorchAdam
    ZERO_SUPPORTED_OPTIMIZERS.append(TorchAdam)


def allow_fp16() -> None:
    """DeepSpeed asks for a CPU with fast fp16; torch computes fp16 on any, only slower."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        type(accelerator).is_fp16_supported = lambda self: True


def mend_older_tests() -> None:
    """Tests of a release before the installed one may read an attribute that is gone."""
    engine = deepspeed.DeepSpeedEngine
    if not hasattr(engine, "sparse_tensor_module_names"):
        engine.sparse_tensor_module_names = frozenset()


def switch_layers(variant: str) -> None:
    """Bind our class to ``deepspeed.moe.layer.MoE``; a layer that runs leaves a mark."""
    if variant == "stock":
        return
    import deepspeed.moe.layer

    from moe_locality.layer.moe import LocalityMOELayer, MoE
    from moe_locality.layer.state import set_slot_to_logical

    class ReversedMoE(MoE):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            set_slot_to_logical(self, range(self.num_experts - 1, -1, -1))

    deepspeed.moe.layer.MoE = {"identity": MoE, "reversed": ReversedMoE}[variant]
    forward = LocalityMOELayer.forward

    def marked_forward(self, *args, **kwargs):
        (Path(os.environ[MARKS]) / str(os.getpid())).touch()
        return forward(self, *args, **kwargs)

    LocalityMOELayer.forward = marked_forward


def switch_auto_ep(variant: str) -> None:
    """Adopt the AutoEP layers of every engine that DeepSpeed builds; a layer that runs leaves a
    mark. An engine with what our exchange refuses stays stock.
    """
    from moe_locality.compat import let_auto_ep_read_recorders

    let_auto_ep_read_recorders()
    if variant == "stock":
        return
    import numpy as np

    from moe_locality.config import MoeLocalityConfig
    from moe_locality.errors import ConfigError
    from moe_locality.integrations import autoep

    init, route = deepspeed.DeepSpeedEngine.__init__, autoep.LocalityAutoEPMoELayer._deepep_route

    def adopting_init(self, *args, **kwargs):
        init(self, *args, **kwargs)
        layers = dict(autoep.auto_ep_layers(self.module))
        try:
            names = autoep.adopt(self, MoeLocalityConfig(), None) if layers else []
        except ConfigError:
            return
        if names and variant == "reversed" and self.zero_optimization_stage() < 3:
            ours = [(name, layers[name]) for name in names]
            orders = [np.arange(layer.num_experts)[::-1].copy() for _, layer in ours]
            autoep.place_stacked(ours, orders, self)
            autoep.wrap_checkpoints(self)

    def marked_route(self, *args):
        (Path(os.environ[MARKS]) / str(os.getpid())).touch()
        return route(self, *args)

    deepspeed.DeepSpeedEngine.__init__ = adopting_init
    autoep.LocalityAutoEPMoELayer._deepep_route = marked_route


def pytest_configure(config):
    if os.environ.get("PYTHONPATH", "").split(os.pathsep)[0] != str(ROOT):
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    multiprocessing.set_forkserver_preload(["tests.deepspeed_acceptance"])


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(
        f"{VARIANT}={os.environ[VARIANT]}: deepspeed {deepspeed.__version__}, layers of "
        f"moe_locality ran in {len(os.listdir(os.environ[MARKS]))} processes"
    )


def pytest_sessionfinish(session):
    # no layer of ours ran: the switch did not reach the workers, so the result says nothing
    if os.environ[VARIANT] != "stock" and not os.listdir(os.environ[MARKS]):
        session.exitstatus = 1


if MARKS not in os.environ:
    os.environ[MARKS] = tempfile.mkdtemp(prefix="moe_locality_acceptance_")
avoid_compilers()
allow_fp16()
mend_older_tests()
switch_layers(os.environ[VARIANT])
switch_auto_ep(os.environ[VARIANT])

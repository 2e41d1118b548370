"""The recorder on a GPU: ring on the device, copies on their own stream, hooks that never wait."""

import numpy as np
import pytest
import torch

pytest.importorskip("deepspeed")
pytest.importorskip("pyarrow")
pytest.importorskip("pydantic")

from moe_locality.trace import read_trace
from moe_locality.trace.recorder import attach
from moe_locality.trace.recorder.writer import Ring
from tests.recorder_models import GateWitness, MoeModel, inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


class CudaModel(MoeModel):
    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)[0]
        return x


@pytest.mark.parametrize("ring_tokens", [20, 4096])
def test_ids_are_those_of_the_cpu(tmp_path, ring_tokens):
    cpu, gpu = CudaModel(), CudaModel().cuda()
    witness = GateWitness(cpu)
    options = {"strict": True, "weights": True, "ring_tokens": ring_tokens, "shard_tokens": 64}
    with attach(gpu, tmp_path, **options):
        for seed in range(40):
            with torch.no_grad():
                cpu(inputs(seed=seed))
                gpu(inputs(seed=seed).cuda())
    trace = read_trace(tmp_path)
    assert trace.num_tokens == 400
    for layer in range(3):
        assert (np.sort(trace.expert_ids[:, layer], axis=1) == witness.picks(layer)).all()


def test_hooks_do_not_wait_for_the_device():
    ring = Ring(1 << 16, torch.device("cuda"), weights=False)
    ids = torch.arange(8, device="cuda").view(4, 2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        start = ring.reserve(8, 0)
        ring.fill(start, ids, None)
        arrived = ring.send(start, start + 8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    arrived.synchronize()
    assert ring.read(start, 8)[0].tolist() == list(range(8))

"""Run on every rank by benchmarks/multinode.py: MoE layers in several ways, in turns, measured.

``_multinode_program.py CASES.json BATCHES.npz OUT.json``. Before anything is measured, output and
gradient of every case are compared with those of one process.
"""

import functools
import json
import socket
import sys
import time
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from _multinode_layers import Layer, build, distance, experts_of, loss_of, reference, tokens
from torch import Tensor, nn

from moe_locality.compat import avoid_cpu_jit, end_distributed
from moe_locality.dispatch.traffic import counters
from moe_locality.dispatch.transport import ALL_KINDS
from moe_locality.topology import ClusterTopology, discover_topology, prepare_groups


class Meter:
    """What this rank sees of a step: seconds, and what went over links.

    A model that is watched stops all ranks before their first expert runs, so that the bytes of the
    dispatch alone are known too: not for times.
    """

    def __init__(self, topology: ClusterTopology) -> None:
        rank = dist.get_rank()
        away = [topology.node_of(r) != topology.node_of(rank) for r in range(dist.get_world_size())]
        self.away = np.array(away)
        self._model: nn.Module | None = None

    def measure(self, model: nn.Module, layer: Layer, x: Tensor, backward: bool) -> dict[str, Any]:
        """Run forward, and backward where asked; return what it took. Collective."""
        self._begin(model)
        start, cpu = time.perf_counter(), time.process_time()
        with torch.set_grad_enabled(backward):
            loss = loss_of(layer(x))
        if backward:
            loss.backward()
        mine = time.perf_counter() - start
        cpu = time.process_time() - cpu
        seconds = torch.tensor(mine)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        found: dict[str, Any] = {"seconds": float(seconds), "cpu_s": cpu}
        found["step"] = since(self._before, self._read())
        if self._at_experts is not None:
            found["dispatch"] = self._at_experts
        return found

    def generate(self, model: Any, prompts: Tensor, routes: Tensor) -> list[dict[str, Any]]:
        """Let ``model.generate`` decode; return what each step took, the prompts' excluded.

        A step is from the begin of one forward pass to that of the next. Collective.

        Args:
            prompts: ``[B, P]`` token ids of this rank.
            routes: ``[S, L, B, K]`` experts that the tokens of each of S steps are sent to, with
                the weights that the router gave its own picks.
        """
        self._begin(model)
        stamps: list[tuple[float, float, dict[str, list[int]]]] = []

        def stamp(*_: Any) -> None:
            stamps.append((time.perf_counter(), time.process_time(), self._read()))

        def replay(layer: int, given: tuple[Tensor, Tensor, Tensor]) -> Any:
            step = len(stamps) - 2  # the first pass is that of the prompts
            return None if step < 0 else (given[0], routes[step, layer], given[2])

        hooks = [model.register_forward_pre_hook(stamp)]
        for layer, experts in enumerate(experts_of(model)):
            hook = functools.partial(lambda number, _, given: replay(number, given), layer)
            hooks.append(experts.register_forward_pre_hook(hook))
        sizes = {"max_new_tokens": len(routes) + 1, "min_new_tokens": len(routes) + 1}
        mask = torch.ones_like(prompts)
        self.texts = model.generate(prompts, attention_mask=mask, do_sample=False, **sizes)
        stamp()
        for hook in hooks:
            hook.remove()
        mine = torch.tensor([now[0] - before[0] for before, now in pairwise(stamps[1:])])
        dist.all_reduce(mine, op=dist.ReduceOp.MAX)
        return [
            {"seconds": float(s), "cpu_s": now[1] - before[1], "step": since(before[2], now[2])}
            for s, (before, now) in zip(mine, pairwise(stamps[1:]), strict=True)
        ]

    def _begin(self, model: nn.Module) -> None:
        self._model = model
        self._before = self._read_together()
        self._at_experts: dict[str, list[int]] | None = None

    def watch(self, model: nn.Module) -> None:
        """Note what was sent when the experts begin."""
        for module in model.modules():
            if hasattr(module, "deepspeed_experts"):
                module.deepspeed_experts[0].register_forward_pre_hook(self._note)

    def _note(self, *_: Any) -> None:
        self._at_experts = since(self._before, self._read_together())

    def _read_together(self) -> dict[str, list[int]]:
        """Read while no rank sends."""
        dist.barrier()
        found = self._read()
        dist.barrier()
        return found

    def _read(self) -> dict[str, list[int]]:
        """Link of this node: sent and received; our counters: rows and bytes to other nodes."""
        assert self._model is not None
        rows = size = 0
        for _, counter in counters(self._model):
            for kind in ALL_KINDS:
                size += int(counter.bytes[kind][self.away].sum())
                rows += int(counter.rows[kind][self.away].sum()) if kind != "routing" else 0
        return {"link": link_bytes(), "counted": [rows, size]}


def since(before: dict[str, list[int]], now: dict[str, list[int]]) -> dict[str, list[int]]:
    return {key: [a - b for a, b in zip(now[key], before[key], strict=True)] for key in now}


def link_bytes() -> list[int]:
    """What this node's link has sent and received, as its kernel counted."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, values = line.partition(":")
        if name.strip() == "eth0":
            return [int(values.split()[8]), int(values.split()[0])]
    raise RuntimeError("found no eth0 on this node")


def check(case: dict[str, Any], layer: Layer, ids: np.ndarray, sizes: dict[str, Any]) -> None:
    """Raise on all ranks where the case does not compute what one process does. Collective."""
    x = tokens(ids, sizes)
    out = layer(x)
    loss_of(out).backward()
    assert x.grad is not None
    wanted_out, wanted_grad = reference(x, ids, sizes)
    off = torch.tensor([distance(out.detach(), wanted_out), distance(x.grad, wanted_grad)])
    dist.all_reduce(off, op=dist.ReduceOp.MAX)
    if not bool((off < case["tolerance"]).all()):  # also where it is not a number
        raise RuntimeError(
            f"{case['name']}: output and gradient are {off.tolist()} away from those of one "
            f"process, expected less than {case['tolerance']}"
        )


def run(given: dict[str, Any], batches: Any, topology: ClusterTopology) -> list[list[dict]]:
    """Return what every step of every case took on this rank."""
    sizes, cases, meter = given["sizes"], given["cases"], Meter(topology)
    torch.manual_seed(dist.get_rank())
    built = [build(case, sizes, topology) for case in cases]
    found: list[list[dict[str, Any]]] = [[] for _ in cases]
    for case, (model, layers) in zip(cases, built, strict=True):
        ids = batches[case["batches"]][0, :, dist.get_rank()]
        for layer, chosen in zip(layers, ids, strict=True):
            check(case, layer, chosen, sizes)
        if given["watch"]:
            meter.watch(model)
    if given.get("generate"):
        return decode(cases, built, batches, meter)
    for step in range(given["rounds"]):
        for case, (model, layers), steps in zip(cases, built, found, strict=True):
            index = step % len(layers)
            ids = batches[case["batches"]][step // len(layers), index, dist.get_rank()]
            x = tokens(ids, sizes)
            steps.append(meter.measure(model, layers[index], x, given["backward"]))
    return found


def decode(
    cases: list[dict], built: list[tuple[Any, Any]], batches: Any, meter: Meter
) -> list[list[dict]]:
    """Return what every step of ``generate`` took on this rank; routes ``[R, S, L, G, B, K]``.

    Raises:
        RuntimeError: cases with the same routes write other texts.
    """
    found: list[list[dict[str, Any]]] = [[] for _ in cases]
    rounds = len(batches[f"generate {cases[0]['batches']}"])
    for each in range(rounds):
        texts: dict[str, Tensor] = {}
        for case, (model, _), steps in zip(cases, built, found, strict=True):
            routes = batches[f"generate {case['batches']}"][each, :, :, dist.get_rank()]
            model.eval().set_reshard_after_forward(False)  # dense weights stay gathered
            prompts = torch.arange(2 * routes.shape[2]).view(-1, 2) % 8
            steps += meter.generate(model, prompts, torch.from_numpy(routes.astype(np.int64)))
            if not texts.setdefault(case["batches"], meter.texts).equal(meter.texts):
                raise RuntimeError(f"{case['name']} writes other texts than the cases before it")
    return found


def main() -> None:
    avoid_cpu_jit()
    deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(seconds=300))
    torch.set_num_threads(1)
    given = json.loads(Path(sys.argv[-3]).read_text())
    batches = dict(np.load(sys.argv[-2]))
    topology = discover_topology()
    prepare_groups(topology, [dist.get_world_size()])
    mine = {"node": socket.gethostname(), "cases": run(given, batches, topology)}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() == 0:
        Path(sys.argv[-1]).write_text(json.dumps(everyone))
    end_distributed()


if __name__ == "__main__":
    main()

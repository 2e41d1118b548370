"""The MoE layer on a CPU: time against DeepSpeed's own, and the bytes of the exchanges.

    python benchmarks/layer_cpu.py [--csv benchmarks/results.csv] [--parts layer,bytes,payload,...]

layer     forward + backward on one node, dropless, against ``deepspeed.moe.layer.MoE`` of the
          installed version in the same process: the same weights, inputs and routes. Rounds
          alternate; the ratio is that of the medians. ``skew`` adds a bias per expert to the
          logits; the busiest expert's load over the mean is printed with it.
bytes     rows and bytes between nodes of a dispatch, counted on 8 gloo ranks that stand for 2, 4
          and 8 nodes: uniform routing, once per node against every pick by itself; and what
          ``evaluate`` predicts for the same routes.
payload   bytes of a dispatch in a low-bit format against bfloat16, counted alike.
adapter   our implementation of transformers' expert parallelism on a mesh of one rank, around a
          real experts module, against that module alone: what the way to the experts costs.
overlap   the residual MLP while results travel home against after it; two gloo ranks share the
          machine, so what is saved is waiting, not computing.

Bytes are exact; times are of this machine and its gloo, and say nothing about a GPU.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from _results import append_rows, table_path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.launch import run_ranks

PACKAGES = ("torch", "deepspeed", "numpy")
WIDTH, HIDDEN, EXPERTS, TOP_K, TOKENS = 256, 512, 64, 2, 1024
SKEWS = (0.0, 0.1, 0.2, 0.5, 1.0)
"""standard deviation of the bias of the logits"""


def row(case: str, metric: str, value: float, unit: str, note: str, baseline: str = "") -> dict:
    return {
        "benchmark": "layer_cpu",
        "case": case,
        "metric": metric,
        "value": f"{value:.4g}",
        "unit": unit,
        "kind": "measured",
        "baseline": baseline,
        "note": note,
    }


def expert() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))


def layer_of(kind: type, ep_size: int, skew: float, **more) -> nn.Module:
    """A layer whose first input column carries a bias for every expert."""
    torch.manual_seed(0)
    made = kind(
        WIDTH,
        expert(),
        num_experts=EXPERTS,
        ep_size=ep_size,
        k=TOP_K,
        drop_tokens=False,
        top2_2nd_expert_sampling=False,
        **more,
    )
    with torch.no_grad():
        bias = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(1))
        made.deepspeed_moe.gate.wg.weight[:, 0] = skew * bias
    made.set_deepspeed_parallelism()
    return made


def timed_step(layer: nn.Module, x: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
    layer.zero_grad()
    torch.distributed.barrier()
    begin = time.perf_counter()
    out, aux, counts = layer(x)  # pyright: ignore
    (out.square().mean() + 0.01 * aux).backward()
    torch.distributed.barrier()
    return time.perf_counter() - begin, out.detach(), counts


def layer_on_rank(rank: int, world: int, rounds: int) -> list[dict]:
    from deepspeed.moe.layer import MoE as Stock

    from moe_locality import MoE

    rows = []
    for skew in SKEWS:
        ours, stock = (layer_of(kind, world, skew) for kind in (MoE, Stock))
        x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(7 + rank))
        x[..., 0] = 1.0
        _, a, counts = timed_step(ours, x)
        _, b, _ = timed_step(stock, x)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # the same work
        times = [(timed_step(ours, x)[0], timed_step(stock, x)[0]) for _ in range(rounds)]
        mine, theirs = (statistics.median(side) for side in zip(*times, strict=True))
        total = counts.clone().float()
        torch.distributed.all_reduce(total)
        busiest = float(total.max() / total.mean())
        case = f"{world} ranks, skew {skew}"
        note = (
            f"busiest expert {busiest:.2f}x the mean; {TOKENS} tokens a rank, width {WIDTH}, "
            f"experts {EXPERTS} x {HIDDEN}, k {TOP_K}, float32, dropless, 1 thread a rank; medians "
            f"of {rounds} alternating rounds; lowest ratio of a round "
            f"{min(t / m for m, t in times):.2f}"
        )
        rows.append(row(case, "step_ms", 1e3 * mine, "ms", note))
        rows.append(row(case, "stock_step_ms", 1e3 * theirs, "ms", note))
        rows.append(row(case, "speedup", theirs / mine, "x", note, "deepspeed.moe.layer.MoE"))
    return rows


def uniform_routes(rank: int, tokens: int, experts: int, top_k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :top_k].int()


def dispatched_on_rank(rank: int, world: int, nodes: int, tokens: int, width: int, options: dict):
    """Dispatch once; return the report of what was sent."""
    from moe_locality.config import DispatchConfig
    from moe_locality.dispatch import TokenDispatcher, traffic_report
    from moe_locality.dispatch.hierarchical import Rails
    from moe_locality.topology import ClusterTopology
    from moe_locality.topology.groups import build_groups, layout_groups

    experts, top_k = 256, 8
    topology = ClusterTopology.uniform(nodes, world // nodes)
    rails = Rails(build_groups(layout_groups(topology, world)), topology, experts)
    dispatcher = TokenDispatcher(
        topology=topology, num_slots=experts, rails=rails, config=DispatchConfig(**options)
    )
    routes = uniform_routes(rank, tokens, experts, top_k)
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(rank)).bfloat16()
    dispatcher.dispatch(x, routes, torch.ones(tokens, top_k))
    model = nn.Module()
    model.traffic = dispatcher.traffic  # pyright: ignore
    return traffic_report(model)


def predicted(nodes: int, world: int, tokens: int) -> tuple[int, int]:
    """Return what ``evaluate`` says of the same routes: (picks, copies) between nodes."""
    from moe_locality.placement import evaluate
    from moe_locality.placement.plan import PlacementPlan
    from moe_locality.topology import ClusterTopology
    from moe_locality.trace import RoutingTrace

    ids = np.concatenate([uniform_routes(r, tokens, 256, 8).numpy() for r in range(world)])
    request = np.repeat(np.arange(world), tokens)
    trace = RoutingTrace(
        model="uniform",
        num_experts=256,
        layer_ids=np.zeros(1, dtype=np.int32),
        domain=("uniform",),
        expert_ids=ids[:, None].astype(np.int16),
        request_id=request,
        position=np.tile(np.arange(tokens, dtype=np.int32), world),
        stage=np.zeros(len(ids), dtype=np.uint8),
        domain_id=np.zeros(len(ids), dtype=np.int32),
    )
    plan = PlacementPlan.linear(256, [0], nodes, world // nodes)
    topology = ClusterTopology.uniform(nodes, world // nodes)
    costs = evaluate(trace, plan, topology, {r: r for r in range(world)})
    assert costs.total_picks is not None
    assert costs.total_copies is not None
    return costs.total_picks, costs.total_copies


def bytes_part(tokens: int = 256, width: int = 128) -> list[dict]:
    rows = []
    for nodes in (2, 4, 8):
        found = {
            exchange: run_ranks(
                dispatched_on_rank, 8, nodes, tokens, width, {"exchange": exchange}
            )[0]
            for exchange in ("flat", "hierarchical")
        }
        sent = {key: r["rows_by_link"]["dispatch"]["cross_node"] for key, r in found.items()}
        picks, copies = predicted(nodes, 8, tokens)
        assert (sent["flat"], sent["hierarchical"]) == (picks, copies), (sent, picks, copies)
        extra = found["hierarchical"]["by_link"]["routing"]["cross_node"] / copies
        note = (
            f"8 gloo ranks as {nodes} nodes, {tokens} tokens a rank, uniform routing over 256 "
            f"experts, k 8; counted {sent['flat']} and {sent['hierarchical']} rows, evaluate "
            f"predicts {picks} and {copies}; slots and weights: {extra:.0f} bytes a packed row"
        )
        case = f"{nodes} nodes, uniform"
        rows.append(row(case, "cross_node_rows_fewer", picks / copies, "x", note, "every pick"))
        for model_width in (2048, 7168):
            size = 2 * model_width
            ratio = picks * size / (copies * (size + extra))
            rows.append(
                row(
                    f"{case}, bfloat16 width {model_width}",
                    "cross_node_bytes_fewer",
                    ratio,
                    "x",
                    f"with slots and weights; {note}",
                    "every pick",
                )
            )
    return rows


def payload_part(tokens: int = 32, width: int = 2880) -> list[dict]:
    rows = []
    for exchange in ("flat", "hierarchical"):
        sent = {}
        for payload in ("none", "fp8", "mxfp8", "mxfp4"):
            options = {"exchange": exchange, "payload": payload}
            sent[payload] = run_ranks(dispatched_on_rank, 4, 2, tokens, width, options)[0][
                "by_link"
            ]
        for payload in ("fp8", "mxfp8", "mxfp4"):
            base, coded = sent["none"], sent[payload]
            across = [t["dispatch"]["cross_node"] for t in (base, coded)]
            whole = [
                t["dispatch"]["cross_node"] + t["routing"]["cross_node"] for t in (base, coded)
            ]
            note = (
                f"4 gloo ranks as 2 nodes, width {width}, k 8; {across[0]} and {across[1]} bytes; "
                f"with slots and weights {whole[0] / whole[1]:.3f}x"
            )
            case = f"{exchange}, {payload}"
            rows.append(
                row(case, "dispatch_bytes_fewer", across[0] / across[1], "x", note, "bfloat16")
            )
    return rows


def overlap_on_rank(rank: int, world: int, rounds: int) -> list[dict]:
    """The layer with a residual MLP; once as it is, once with the MLP after the combine."""
    from moe_locality import MoE

    layer = layer_of(MoE, world, 0.0, use_residual=True)
    x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(rank))
    inner: Any = type(layer.deepspeed_moe)
    ragged = inner._ragged_forward

    def afterwards(self, *args):
        self.overlap_fn = None
        return ragged(self, *args)

    times = []
    for number in range(rounds + 1):
        pair = {}
        for forward in (ragged, afterwards) if number % 2 else (afterwards, ragged):
            inner._ragged_forward = forward
            pair[forward] = timed_step(layer, x)[0]
        times.append((pair[ragged], pair[afterwards]))
    inner._ragged_forward = ragged
    sides = list(zip(*times[1:], strict=True))
    beside, after = (statistics.median(side) for side in sides)
    best = [1e3 * min(side) for side in sides]
    note = (
        f"{world} gloo ranks on one machine, {TOKENS} tokens a rank, width {WIDTH}, forward + "
        f"backward, medians of {rounds} alternating rounds: {1e3 * beside:.1f} and "
        f"{1e3 * after:.1f} ms, fastest {best[0]:.1f} and {best[1]:.1f}"
    )
    return [
        row(f"{world} ranks, residual MLP", "overlap_speedup", after / beside, "x", note, "after")
    ]


def adapter_on_rank(rank: int, world: int, rounds: int) -> list[dict]:
    del rank
    from torch.distributed import init_device_mesh
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from moe_locality.integrations.transformers_ep import LocalityEP, register

    register()
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 768, "num_experts": 32}
    tokens, top_k, shape = 1024, 4, {"num_hidden_layers": 1, "num_experts_per_tok": 4}
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=8, **sizes, **shape))
    experts: Any = model.model.layers[0].mlp.experts
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
    ours = LocalityEP(experts, mesh, mesh)
    x = torch.randn(tokens, sizes["hidden_size"])
    ids = uniform_routes(0, tokens, sizes["num_experts"], top_k).long()
    weights = torch.rand(tokens, top_k)

    def seconds(call: Any, backward: bool) -> tuple[float, torch.Tensor]:
        given = x.clone().requires_grad_(backward)
        begin = time.process_time()  # of one thread; other jobs may run
        with torch.set_grad_enabled(backward):
            out = call(given, ids, weights)
        if backward:
            out.square().mean().backward()
        return time.process_time() - begin, out.detach()

    rows = []
    for backward in (False, True):
        a, b = (seconds(call, backward)[1] for call in (ours, experts))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        times = [
            (seconds(ours, backward)[0], seconds(experts, backward)[0]) for _ in range(4 * rounds)
        ]
        ratios = [100 * (mine / theirs - 1) for mine, theirs in times]
        note = (
            f"{tokens} tokens, width 1024, experts 32 x 768, k {top_k}, float32, 1 thread, experts "
            f"{experts.config._experts_implementation}; {len(times)} rounds in turns, from "
            f"{min(ratios):.1f} to {max(ratios):.1f} %"
        )
        case = "transformers adapter, one rank, " + ("training" if backward else "forward")
        rows.append(
            row(case, "added CPU time", statistics.median(ratios), "%", note, "Qwen3MoeExperts")
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--csv", type=table_path)
    parser.add_argument("--parts", default="layer,bytes,payload,adapter,overlap")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    parts = {
        "layer": lambda: [
            found
            for world in (1, 2)
            for found in run_ranks(
                layer_on_rank, world, args.rounds, deepspeed=True, timeout_s=600
            )[0]
        ],
        "bytes": bytes_part,
        "payload": payload_part,
        "adapter": lambda: run_ranks(adapter_on_rank, 1, args.rounds, timeout_s=600)[0],
        "overlap": lambda: run_ranks(overlap_on_rank, 2, 4 * args.rounds, deepspeed=True)[0],
    }
    for name in args.parts.split(","):
        rows = parts[name]()
        for found in rows:
            print(*(found[key] for key in ("case", "metric", "value", "unit", "note")), sep=" | ")
        if args.csv:
            append_rows(args.csv, rows, packages=PACKAGES)


if __name__ == "__main__":
    main()

"""Train the example language model with DeepSpeed, stock or with moe_locality, and evaluate it request by request.

    deepspeed --num_accelerators 4 examples/train_lm.py --layer stock --steps 120 --out runs/baseline \
        --trace traces/baseline --save-checkpoint runs/baseline/checkpoint
    deepspeed --num_accelerators 4 examples/train_lm.py --layer locality --plan plan.json --homes homes.json \
        --eval-only --load-checkpoint runs/baseline/checkpoint --out runs/placed

Written to ``--out`` by rank 0: ``evaluation.npz`` (see lm/evaluation.py), ``summary.json`` and, with moe_locality's
layer, ``traffic.json`` (rows and bytes between ranks during the evaluation).
"""

import argparse
import itertools
import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from lm import data, evaluation, training
from lm.model import build_model, preset


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; DeepSpeed's launcher adds ``--local_rank``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--preset",
        default="demo",
        choices=sorted(training.RUN_SIZES),
        help="sizes of model and data",
    )
    add("--layer", default="stock", choices=["stock", "locality"], help="whose MoE layer")
    add("--steps", type=int, help="train up to this step (default: the preset's)")
    add("--out", default="runs/example", help="directory of the results")
    add("--seed", type=int, default=0)
    add("--trace", metavar="DIR", help="record the routing of training and evaluation")
    add("--trace-from", type=int, metavar="STEP", help="first recorded step (default: last third)")
    add("--plan", metavar="FILE", help="placement plan (layer locality)")
    add("--homes", metavar="FILE", help="JSON: request id -> rank")
    add("--metrics", metavar="FILE", help="JSON lines: one object per step")
    add("--save-checkpoint", metavar="DIR")
    add("--load-checkpoint", metavar="DIR")
    add("--eval-only", action="store_true", help="do not train")
    add("--num-nodes", type=int, help="emulate that many nodes of equal size on this machine")
    add("--top-k", type=int, help="experts of a token (default: the preset's)")
    add("--local_rank", type=int, default=-1, help="set by DeepSpeed's launcher")
    deepspeed.add_config_arguments(parser)
    args = parser.parse_args(arguments)
    if args.plan and args.layer == "stock":
        parser.error("--plan needs --layer locality: DeepSpeed's own layer knows no placement")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    sizes = training.RUN_SIZES[args.preset]
    steps = sizes.steps if args.steps is None else args.steps
    start_distributed()
    rank, num_ranks = training.rank_and_size()
    torch.manual_seed(args.seed)
    config = run_config(args, sizes, steps, num_ranks)
    metrics = training.Metrics(args.metrics)
    changes = {} if args.top_k is None else {"top_k": args.top_k}
    model_config = preset(args.preset, **changes)
    train_set, held_out = data.build_requests(
        seq_len=model_config.max_seq_len,
        train_per_domain=sizes.train_per_domain,
        held_out_per_domain=sizes.held_out_per_domain,
        seed=args.seed,
    )
    model = build_model(
        model_config, moe_class(args.layer), ep_size=num_ranks, ep_rank=rank, seed=args.seed
    )
    engine = training.build_engine(model, config, args.layer)
    done = read_checkpoint(engine, args.load_checkpoint)
    apply_plan(engine, args.plan)
    homes = data.read_homes(args.homes) if args.homes else None
    per_rank = config["train_micro_batch_size_per_gpu"]
    recorder = Recorder(engine, args.trace)
    if not args.eval_only:
        batches = data.train_batches(
            train_set,
            rank=rank,
            num_ranks=num_ranks,
            per_rank=per_rank,
            steps=steps,
            seed=args.seed,
            homes=homes,
        )
        first_recorded = steps * 2 // 3 + 1 if args.trace_from is None else args.trace_from
        training.train(
            engine,
            itertools.islice(batches, done, None),
            first_step=done,
            steps=steps,
            recorder_of=lambda step: recorder.get() if step >= first_recorded else None,
            metrics=metrics,
        )
        done = max(done, steps)
    if args.save_checkpoint:
        engine.save_checkpoint(args.save_checkpoint, client_state={"steps_done": done})
    evaluate(args, engine, held_out, homes, per_rank, recorder, metrics, done)
    recorder.close()
    metrics.close()


def start_distributed() -> None:
    """Join the process group; on a CPU keep DeepSpeed from compiling its shared-memory op at the first collective."""
    training.share_cores()
    if not torch.cuda.is_available():
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)


def run_config(args, sizes, steps: int, num_ranks: int) -> dict[str, Any]:
    """Return the ds_config, with the emulated nodes in its ``moe_locality`` section."""
    config = training.ds_config(args.deepspeed_config, sizes, steps)
    if args.num_nodes:
        if num_ranks % args.num_nodes:
            raise ValueError(f"{num_ranks} ranks do not make {args.num_nodes} equal nodes")
        cluster = {"num_nodes": args.num_nodes, "ranks_per_node": num_ranks // args.num_nodes}
        config.setdefault("moe_locality", {})["cluster"] = cluster
    return config


def moe_class(layer: str) -> Any:
    """Return the class of the MoE layers: the only difference between the two kinds of run."""
    if layer == "locality":
        import moe_locality

        return moe_locality.MoE
    from deepspeed.moe.layer import MoE

    return MoE


def read_checkpoint(engine: Any, folder: str | None) -> int:
    """Read a checkpoint into the engine and return the number of steps it was trained for."""
    if folder is None:
        return 0
    path, state = engine.load_checkpoint(folder)
    if path is None:
        raise FileNotFoundError(
            f"{folder} holds no DeepSpeed checkpoint: give the directory that holds 'latest'"
        )
    return int(state["steps_done"])


def apply_plan(engine: Any, path: str | None) -> None:
    """Move the experts to the slots of the plan, after a checkpoint in the order of the model was read."""
    if path is None:
        return
    import moe_locality

    moe_locality.relabel(engine.module, moe_locality.PlacementPlan.read(path))


class Recorder:
    """Attaches moe_locality's recorder to the engine's model when it is first needed."""

    def __init__(self, engine: Any, path: str | None) -> None:
        self.engine, self.path, self.recorder = engine, path, None

    def get(self) -> Any:
        if self.recorder is None and self.path is not None:
            import moe_locality

            self.recorder = moe_locality.attach(self.engine.module, self.path)
        return self.recorder

    def close(self) -> None:
        if self.recorder is not None:
            self.recorder.close()


def evaluate(args, engine, held_out, homes, per_rank, recorder, metrics, done: int) -> None:
    """Evaluate the held-out requests and write the results of rank 0."""
    rank, num_ranks = training.rank_and_size()
    count_traffic = TrafficOfEvaluation(engine, args) if args.layer == "locality" else None
    batches = data.eval_batches(
        held_out, rank=rank, num_ranks=num_ranks, per_rank=per_rank, homes=homes
    )
    start = time.perf_counter()
    rows = evaluation.evaluate_requests(engine, batches, recorder=recorder.get())
    seconds = time.perf_counter() - start
    traffic = count_traffic.report() if count_traffic else None
    cpu_s = total_cpu_seconds()
    if rows is None:
        return
    out = Path(args.out)
    evaluation.write_evaluation(rows, held_out.domains, out / "evaluation.npz")
    if traffic is not None:
        write_json(out / "traffic.json", traffic)
    summary = {
        "layer": args.layer,
        "preset": args.preset,
        "seed": args.seed,
        "num_ranks": num_ranks,
        "steps_done": done,
        "parameters": num_parameters(engine.module, num_ranks),
        "eval_loss": float(rows["loss"].mean()),
        "eval_loss_by_domain": evaluation.loss_by_domain(rows, held_out.domains),
        "eval_requests": len(rows["loss"]),
        "eval_s": seconds,
        "time_s": time.perf_counter() - metrics.start,
        "cpu_s": cpu_s,
        "plan": args.plan,
        "homes": args.homes,
    }
    write_json(out / "summary.json", summary)
    metrics.write(kind="eval", **{k: v for k, v in summary.items() if k.startswith("eval_")})
    print(f"evaluation loss {summary['eval_loss']:.4f} of {len(rows['loss'])} requests", flush=True)


class TrafficOfEvaluation:
    """Counts what the layers send from here on."""

    def __init__(self, engine: Any, args: argparse.Namespace) -> None:
        from moe_locality.dispatch.traffic import reset_traffic

        self.engine, self.args = engine, args
        reset_traffic(engine.module)

    def report(self) -> dict[str, Any]:
        from moe_locality.config import read_config
        from moe_locality.dispatch.traffic import traffic_report
        from moe_locality.topology.groups import discover_topology

        section = run_config(
            self.args, training.RUN_SIZES[self.args.preset], 2, training.rank_and_size()[1]
        )
        topology = discover_topology(cluster_config=read_config(section).cluster)
        return traffic_report(self.engine.module, topology)


def num_parameters(model: torch.nn.Module, num_ranks: int) -> int:
    """Return the parameters of the whole model: experts of all ranks, everything else once."""
    return sum(
        p.numel() * (1 if getattr(p, "allreduce", True) else num_ranks) for p in model.parameters()
    )


def total_cpu_seconds() -> float:
    """Return the CPU seconds of all ranks so far, process start included."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    seconds = torch.tensor([usage.ru_utime + usage.ru_stime], dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(seconds)
    return float(seconds)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def run() -> None:
    """Run ``main``; a failure on one rank ends this process at once, and the launcher then ends the others.

    A plain exception would let the interpreter wait for peers that wait for this rank in a collective.
    """
    try:
        main()
    except Exception:  # noqa: BLE001  reported in full, then the process ends
        traceback.print_exc()
        rank = os.environ.get("RANK", "0")
        print(f"rank {rank} failed, all ranks are being ended", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    run()

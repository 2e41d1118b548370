r"""Train the example language model with DeepSpeed, stock or with moe_locality, and evaluate it.

    deepspeed --num_accelerators 4 examples/train_lm.py --layer stock --num-nodes 2 \
        --trace traces/baseline --out runs/baseline --save-checkpoint runs/checkpoint
    deepspeed --num_accelerators 4 examples/train_lm.py --layer locality --num-nodes 2 \
        --eval-only --load-checkpoint runs/checkpoint --plan plan.json --homes homes.json \
        --out runs/placed

Rank 0 writes into ``--out``: ``evaluation.npz`` (see lm/evaluation.py), ``summary.json``, with
``--continue-steps`` the same rows of those steps as ``continued.npz``, and, with moe_locality's
layer, ``traffic.json``: rows and bytes between ranks during the evaluation.
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
import numpy as np
import torch
import torch.distributed as dist
from lm import data, evaluation, training
from lm.model import build_model, preset

from moe_locality.compat import avoid_cpu_jit, end_distributed
from moe_locality.tracking import git_commit


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; DeepSpeed's launcher adds ``--local_rank``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", default="demo", choices=sorted(training.RUN_SIZES), help="size of the run")
    add("--layer", default="stock", choices=["stock", "locality"], help="whose MoE layer")
    add("--steps", type=int, help="train up to this step (default: the preset's)")
    add("--out", default="runs/example", help="directory of the results")
    add("--seed", type=int, default=0)
    add("--trace", metavar="DIR", help="record the routing of training and evaluation")
    add("--trace-from", type=int, metavar="STEP", help="first recorded step (default: last sixth)")
    add(
        "--record-again",
        action="store_true",
        help="record the requests of the recorded steps once more, with the trained weights",
    )
    add("--plan", metavar="FILE", help="placement plan (layer locality)")
    add("--homes", metavar="FILE", help="JSON: request id -> rank")
    add("--exchange", choices=["flat", "hierarchical"], help="how tokens travel (layer locality)")
    add("--metrics", metavar="FILE", help="JSON lines, one per step (default: OUT/metrics.jsonl)")
    add("--save-checkpoint", metavar="DIR")
    add("--load-checkpoint", metavar="DIR")
    add("--eval-only", action="store_true", help="do not train before the evaluation")
    add("--continue-steps", type=int, default=0, metavar="N", help="train N steps after it")
    add("--num-nodes", type=int, help="emulate that many nodes of equal size on this machine")
    add("--top-k", type=int, help="experts of a token (default: the preset's)")
    add("--local_rank", type=int, default=-1, help="set by DeepSpeed's launcher")
    deepspeed.add_config_arguments(parser)
    args = parser.parse_args(arguments)
    if args.plan and args.layer == "stock":
        parser.error("--plan needs --layer locality: DeepSpeed's own layer knows no placement")
    return args


def main(arguments: list[str] | None = None) -> None:
    """Train, write a checkpoint, evaluate, train on: each as far as asked for."""
    args = parse_arguments(arguments)
    start_distributed()
    rank, num_ranks = training.rank_and_size()
    torch.manual_seed(args.seed)
    sizes = training.RUN_SIZES[args.preset]
    steps = sizes.steps if args.steps is None else args.steps
    config = run_config(args, sizes, steps, num_ranks)
    model_config = preset(args.preset, **({} if args.top_k is None else {"top_k": args.top_k}))
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
    dealt = {
        "rank": rank,
        "num_ranks": num_ranks,
        "per_rank": config["train_micro_batch_size_per_gpu"],
        "homes": data.read_homes(args.homes) if args.homes else None,
    }
    held_out_batches = list(data.eval_batches(held_out, **dealt))
    target = done if args.eval_only else max(done, steps)
    last = target + args.continue_steps
    first_recorded = steps * 5 // 6 + 1 if args.trace_from is None else args.trace_from
    recorded_steps = range(first_recorded, target + 1) if args.record_again else range(0)
    metrics = training.Metrics(
        args.metrics or str(Path(args.out, "metrics.jsonl")),
        total=last - done + len(held_out_batches) + len(recorded_steps),
        append=done > 0 and not args.eval_only,
    )
    recorder = Recorder(engine, args.trace)

    def train(first: int, until: int, after_step: Any = lambda *_: None) -> None:
        batches = data.train_batches(train_set, steps=until, seed=args.seed, **dealt)
        training.train(
            engine,
            itertools.islice(batches, first, None),
            first_step=first,
            recorder_of=lambda step: recorder.get() if step >= first_recorded else None,
            metrics=metrics,
            after_step=after_step,
        )

    train(done, target)
    if args.save_checkpoint:
        engine.save_checkpoint(args.save_checkpoint, client_state={"steps_done": target})
    summary = {
        **{name: getattr(args, name) for name in ("layer", "preset", "seed", "plan", "homes")},
        "model": training.MODEL_NAME,
        "ds_config": config,
        "commit": git_commit(Path(__file__).parent),
        "num_ranks": num_ranks,
        "global_batch": num_ranks * dealt["per_rank"],
        "steps_done": target,
        "continued_steps": args.continue_steps,
        "parameters": num_parameters(engine.module, num_ranks),
    }
    if recorded_steps:
        batches = data.train_batches(train_set, steps=target, seed=args.seed, **dealt)
        evaluation.evaluate_requests(
            engine,
            itertools.islice(batches, first_recorded - 1, None),
            recorder=recorder.get(),
            after_batch=lambda: metrics.advance("recording"),
        )
    summary |= evaluate(args, engine, held_out_batches, held_out.domains, recorder.get(), metrics)
    recorder.close()
    if last > target:
        continue_training(args, engine, held_out.domains, lambda done: train(target, last, done))
    summary |= {"time_s": time.perf_counter() - metrics.start, "cpu_s": total_cpu_seconds()}
    if rank == 0:
        write_json(Path(args.out, "summary.json"), summary)
        if args.plan:
            plan = Path(args.plan).read_text(encoding="utf-8")
            Path(args.out, "plan.json").write_text(plan, encoding="utf-8")
    metrics.close()


def start_distributed() -> None:
    """Join the process group; on a CPU, DeepSpeed must not compile its shared-memory op for it."""
    training.share_cores()
    if not torch.cuda.is_available():
        avoid_cpu_jit()
    deepspeed.init_distributed(verbose=False)


def run_config(
    args: argparse.Namespace, sizes: training.RunSizes, steps: int, num_ranks: int
) -> dict[str, Any]:
    """Return the ds_config, with plan and emulated nodes in its ``moe_locality`` section."""
    config = training.ds_config(args.deepspeed_config, sizes, steps)
    if args.plan:
        config.setdefault("moe_locality", {})["plan"] = args.plan
    if args.num_nodes:
        if num_ranks % args.num_nodes:
            raise ValueError(
                f"{num_ranks} ranks do not make {args.num_nodes} equal nodes: use a multiple"
            )
        cluster = {"num_nodes": args.num_nodes, "ranks_per_node": num_ranks // args.num_nodes}
        config.setdefault("moe_locality", {})["cluster"] = cluster
    if args.exchange:
        config.setdefault("moe_locality", {})["dispatch"] = {"exchange": args.exchange}
    return config


def moe_class(layer: str) -> Any:
    """Return the class of the MoE layers: the only difference between the two kinds of run."""
    if layer == "locality":
        import moe_locality

        return moe_locality.MoE
    from deepspeed.moe.layer import MoE

    return MoE


def read_checkpoint(engine: Any, folder: str | None) -> int:
    """Read a checkpoint into the engine and return the number of steps it was trained for.

    With moe_locality's layer, the experts go to the slots of the engine's plan, wherever they were
    when the checkpoint was written.
    """
    if folder is None:
        return 0
    path, state = engine.load_checkpoint(folder)
    if path is None:
        raise FileNotFoundError(
            f"{folder} holds no DeepSpeed checkpoint: give the directory that holds 'latest'"
        )
    return int(state["steps_done"])


class Recorder:
    """Attaches moe_locality's recorder to the engine's model when it is first asked for."""

    def __init__(self, engine: Any, path: str | None) -> None:
        self.engine, self.path, self.recorder = engine, path, None

    def get(self) -> Any:
        """Return the recorder, or None after ``close`` and where nothing is to be recorded."""
        if self.recorder is None and self.path is not None:
            import moe_locality

            self.recorder = moe_locality.attach(
                self.engine.module, self.path, model=training.MODEL_NAME
            )
        return self.recorder

    def close(self) -> None:
        if self.recorder is not None:
            self.recorder.close()
        self.recorder = self.path = None


def evaluate(
    args: argparse.Namespace,
    engine: Any,
    batches: list[data.Requests],
    domains: tuple[str, ...],
    recorder: Any,
    metrics: training.Metrics,
) -> dict[str, Any]:
    """Evaluate the held-out requests; rank 0 writes the rows and returns their summary."""
    counted = args.layer == "locality"
    if counted:
        engine.moe_locality.reset_traffic()
    start = time.perf_counter()
    rows = evaluation.evaluate_requests(
        engine, batches, recorder=recorder, after_batch=lambda: metrics.advance("evaluation")
    )
    seconds = time.perf_counter() - start
    traffic = engine.moe_locality.traffic_report() if counted else None
    if rows is None:
        return {}
    out = Path(args.out)
    evaluation.write_evaluation(rows, domains, out / "evaluation.npz")
    if traffic is not None:
        write_json(out / "traffic.json", traffic)
    summary = {
        "eval_requests": len(rows["loss"]),
        "eval_loss": float(rows["loss"].mean()),
        "eval_loss_by_domain": evaluation.loss_by_domain(rows, domains),
        "eval_s": seconds,
    }
    metrics.write(kind="eval", **summary)
    print(f"evaluation loss {summary['eval_loss']:.4f} of {len(rows['loss'])} requests", flush=True)
    return summary


def continue_training(
    args: argparse.Namespace, engine: Any, domains: tuple[str, ...], train: Any
) -> None:
    """Train on; rank 0 writes the rows of the steps' requests as ``continued.npz``.

    ``train`` takes what is to be called after each step.
    """
    rows: list[dict[str, Any]] = []
    with evaluation.watched_gates(engine) as routing:

        def keep(step: int, batch: data.Requests, targets: torch.Tensor, output: Any) -> None:
            found = evaluation.rows_of(batch, targets, output, routing)
            rows.append({**found, "step": np.full(len(batch), step)})
            routing.clear()

        train(keep)
    joined = evaluation.gathered(rows)
    if joined is not None:
        evaluation.write_evaluation(joined, domains, Path(args.out, "continued.npz"))


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
    """Run ``main``; a failure ends this rank at once, and the launcher then ends the others.

    A plain exception would let the interpreter's exit wait for peers that wait for this rank.
    """
    try:
        main()
    except Exception:  # noqa: BLE001  reported in full, then the process ends
        traceback.print_exc()
        rank = os.environ.get("RANK", "0")
        print(
            f"rank {rank} failed, all ranks are being ended (a broken connection means that another"
            " rank failed first: its message is the one to read)",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        os._exit(1)
    if dist.is_initialized():
        end_distributed()


if __name__ == "__main__":
    run()

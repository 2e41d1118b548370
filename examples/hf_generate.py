"""Generate with a Hugging Face model on several ranks, without and with a placement of its experts.

    torchrun --nproc-per-node 4 examples/hf_generate.py --num-nodes 2             # a small model
    torchrun --nproc-per-node 4 examples/hf_generate.py --num-nodes 2 --model DIR # a model on disk
    launch/generate.sh --hostfile hostfile --model DIR                            # many machines

The steps: record which experts the prompts use, place experts and requests, generate on the ranks
that the placement names. It prints the bytes that crossed nodes both times and compares the texts.
Without --model, a small Qwen3-MoE is trained first, so that its experts have something to tell
apart. The plan is made from other requests than those that are served.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import moe_locality
from moe_locality.compat import end_distributed
from moe_locality.dispatch.traffic import reset_traffic, traffic_report
from moe_locality.topology import discover_topology, exchange_objects

sys.path.insert(0, str(Path(__file__).parent))
from hf_record import prompt_tokens
from hf_train import load_spread, say, start_distributed, train
from lm.data import Requests, assign_ranks, build_requests
from lm.training import rank_and_size

BATCH = 8
ROUNDING = 1e-3
"""Where the two best logits are as close as this, another order of sums may choose the other."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="directory of a model (default: train a small one)")
    parser.add_argument("--out", default="runs/hf_generate", help="directory of traces and plan")
    parser.add_argument("--num-nodes", type=int, help="emulate that many nodes on this machine")
    parser.add_argument("--requests", type=int, default=64, help="a multiple of 4 and of the ranks")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--train-steps", type=int, default=100, help="of the small model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--local_rank", type=int, help="set by DeepSpeed's launcher")
    args = parser.parse_args(arguments)
    rank, num_ranks = start_distributed(args.num_nodes)
    if num_ranks == 1:
        sys.exit("found one rank, expected several: start this with torchrun or deepspeed")
    out = Path(args.out)
    path = args.model or str(out / "model")
    if args.model is None:
        train(path, None, steps=args.train_steps, seed=args.seed)
    model = load_spread(path).eval()
    model.set_reshard_after_forward(False)  # dense weights stay gathered: only tokens travel
    earlier, served = read_requests(args.requests, args.seed)

    # 1. record
    record(model, [earlier, served], out / "trace", args.model)
    # 2. place
    plan, homes = place(out / "trace", earlier, served, args.seed)
    if rank == 0:
        plan.write(out / "plan.json")
    # 3. generate, without and with the plan
    dealt = assign_ranks(served.request_id, num_ranks)
    usual = generate(model, served, dealt, args.new_tokens, out / "usual", args.model)
    moe_locality.apply(model, plan=plan)
    placed = generate(model, served, homes, args.new_tokens, out / "placed", args.model)
    end = model.generation_config.eos_token_id
    del model  # it holds process groups, whose threads have to end before the interpreter does
    end_distributed()
    if rank == 0:
        end = end if isinstance(end, list) else [end]
        report(usual, placed, end, out / "summary.json")


def read_requests(count: int, seed: int) -> tuple[Requests, Requests]:
    """Return (earlier, served) prompts: as many of four domains, from different documents."""
    return build_requests(
        seq_len=48, train_per_domain=4 * count, held_out_per_domain=count // 4, seed=seed
    )


def new_recorder(model: Any, path: Path) -> Any:
    """Return a recorder that writes to ``path``, where the trace of an earlier run is removed."""
    if rank_and_size()[0] == 0:
        shutil.rmtree(path, ignore_errors=True)
    dist.barrier()
    return moe_locality.attach(model, path)


def record(model: Any, parts: list[Requests], path: Path, name: str | None) -> None:
    """Run the prompts once, every rank its share, and record their routing in ``path``."""
    recorder = new_recorder(model, path)
    for requests in parts:
        prompts, domains = prompt_tokens(requests, name), np.array(requests.domain_names())
        for rows in share(assign_ranks(requests.request_id, rank_and_size()[1])):
            labels = {"request_ids": requests.request_id[rows], "domains": domains[rows].tolist()}
            with torch.no_grad(), moe_locality.annotate(stage="prefill", **labels):
                model(prompts[rows].to(model.device))
    recorder.close()
    dist.barrier()


def place(path: Path, earlier: Requests, served: Requests, seed: int) -> tuple[Any, np.ndarray]:
    """Return the plan, from the earlier requests, and the home rank [N] of each one to serve."""
    topology = discover_topology()  # the hosts of the ranks
    found: list[Any] = [None]
    if rank_and_size()[0] == 0:
        trace = moe_locality.read_trace(path)
        known = trace.filter(requests=earlier.request_id)
        plan = moe_locality.solve(known, topology, homes="joint", seed=seed)
        asked = trace.filter(requests=served.request_id)
        homes = moe_locality.assign_homes(asked, plan, topology, equal_requests=True)
        found = [(plan, np.array([homes[int(r)] for r in served.request_id]))]
    dist.broadcast_object_list(found)
    return found[0]


def share(rank_of: np.ndarray) -> list[np.ndarray]:
    """Return the rows of the requests of this rank, batch by batch; every rank has as many."""
    mine = np.flatnonzero(rank_of == rank_and_size()[0])
    return [mine[i : i + BATCH] for i in range(0, len(mine), BATCH)]


def generate(
    model: Any,
    requests: Requests,
    rank_of: np.ndarray,
    new_tokens: int,
    path: Path,
    name: str | None,
) -> dict[str, Any]:
    """Decode greedily, each request on its rank; return what was counted and written, of all ranks.

    ``answers``: request id to its new tokens, and by how much the best logit of each was ahead.
    ``path``: of a trace of these tokens, from which ``evaluate`` predicts the rows across nodes.
    """
    recorder = new_recorder(model, path)
    reset_traffic(model)
    everything, mine = prompt_tokens(requests, name), {}
    for rows in share(rank_of):
        prompts = everything[rows].to(model.device)
        output = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.stack(output.logits, dim=1).float().topk(2).values
        tokens = output.sequences[:, prompts.shape[1] :].tolist()
        ahead = (best[..., 0] - best[..., 1]).tolist()
        ids = requests.request_id[rows].tolist()
        mine |= dict(zip(ids, zip(tokens, ahead, strict=True), strict=True))
    recorder.close()
    answers: dict[int, Any] = {}
    for part in exchange_objects(mine):
        answers |= part
    counted = traffic_report(model, discover_topology())
    return {
        "bytes": sum(kind["cross_node"] for kind in counted["by_link"].values()),
        "rows": counted["rows_by_link"]["dispatch"]["cross_node"],
        "answers": answers,
    }


def report(usual: dict[str, Any], placed: dict[str, Any], end: list[int], path: Path) -> None:
    """Print and write the bytes of both runs, and whether the texts are the same.

    Raises:
        SystemExit: a text differs where the model was not in two minds.
    """
    parted: dict[int, float] = {}  # request id -> how far ahead the best token was
    compared = 0
    for request, (tokens, ahead) in usual["answers"].items():
        pairs = zip(tokens, placed["answers"][request][0], ahead, strict=False)
        for token, other, lead in pairs:
            compared += 1
            if token != other:
                parted[request] = lead
            if token != other or token in end:
                break
    count, (before, after) = len(usual["answers"]), (usual["bytes"], placed["bytes"])
    change = f" ({after / before - 1:+.1%})" if before else ": there is one node"
    say(f"bytes across nodes: {before:,} in the usual order, {after:,} with the plan{change}")
    say(f"texts: {count - len(parted)} of {count} are the same {parted or ''}")
    say(f"tokens: {len(parted)} of {compared} differ, at equal logits")
    summary = {
        "bytes": [before, after],
        "rows": [usual["rows"], placed["rows"]],
        "requests": count,
        "tokens": compared,
        "parted": parted,
    }
    path.write_text(json.dumps(summary) + "\n", encoding="utf-8")
    if max(parted.values(), default=0.0) > ROUNDING:
        sys.exit(f"texts differ beyond rounding: {parted}")


if __name__ == "__main__":
    main()

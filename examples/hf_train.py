"""Train a Hugging Face mixture-of-experts model whose experts are spread over the ranks.

    torchrun --nproc-per-node 4 examples/hf_train.py --out runs/hf_model               # a small one
    torchrun --nproc-per-node 4 examples/hf_train.py --model DIR --plan plan.json --out runs/out

Dense weights are spread by FSDP2, experts by expert parallelism, their tokens travel through
moe_locality. What is saved is an ordinary checkpoint, whatever the plan. The launcher of DeepSpeed
works too: ``deepspeed --num_accelerators 4 examples/hf_train.py``.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import moe_locality
from moe_locality.compat import end_distributed

sys.path.insert(0, str(Path(__file__).parent))
from hf_record import prompt_tokens
from lm.data import VOCAB_SIZE, build_requests, train_batches
from lm.training import all_reduced_mean, rank_and_size, share_cores


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="directory of a model (default: a small new Qwen3-MoE)")
    parser.add_argument("--plan", help="placement plan, from moe-locality place")
    parser.add_argument("--out", default="runs/hf_model", help="directory of the trained model")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--num-nodes", type=int, help="emulate that many nodes on this machine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--local_rank", type=int, help="set by DeepSpeed's launcher")
    args = parser.parse_args(arguments)
    start_distributed(args.num_nodes)
    train(args.out, args.model, steps=args.steps, seed=args.seed, plan=args.plan)
    end_distributed()


def train(
    out: str, path: str | None, *, steps: int, seed: int = 0, plan: str | None = None
) -> None:
    """Train the model in ``path`` (None: a small new one) and save it in ``out``."""
    model = load_spread(path or new_model(out, seed), plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3 if path is None else 1e-5)
    model.train()
    own = batches(path, steps, seed, *rank_and_size())
    for step, tokens in enumerate(own, start=1):
        tokens = tokens.to(model.device)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        (mean,) = all_reduced_mean([loss.detach()])
        if step % 10 == 0 or step == steps:
            say(f"step {step} loss {mean:.4f}")
    model.save_pretrained(out)  # every rank: the experts are gathered, in their usual order


def load_spread(path: str, plan: str | None = None) -> Any:
    """Load a checkpoint over all ranks: each reads its part, no rank holds all experts."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    num_ranks = dist.get_world_size()
    moe_locality.register({"plan": plan})  # line 1 of 3
    spread = DistributedConfig(
        fsdp_size=num_ranks,
        ep_size=num_ranks,
        ep_implementation="moe_locality",  # line 2 of 3
    )
    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=spread)
    return moe_locality.apply(model)  # line 3 of 3


def batches(
    path: str | None, steps: int, seed: int, rank: int, num_ranks: int
) -> Iterator[torch.Tensor]:
    """Yield a rank's token ids [8, S] of each step: text of four domains."""
    requests, _ = build_requests(seq_len=64, train_per_domain=960, held_out_per_domain=4, seed=seed)
    dealt = train_batches(
        requests, rank=rank, num_ranks=num_ranks, per_rank=8, steps=steps, seed=seed
    )
    for batch in dealt:
        yield prompt_tokens(batch, path)


def new_model(out: str, seed: int) -> str:
    """Write a small Qwen3-MoE with random weights, and return its directory."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    path = Path(out) / "random"
    if rank_and_size()[0] == 0:
        torch.manual_seed(seed)
        config = Qwen3MoeConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=64,
            moe_intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=16,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            router_aux_loss_coef=0.01,
            output_router_logits=True,  # the loss then has the term that levels the experts
            max_position_embeddings=256,
            bos_token_id=256,
            eos_token_id=257,
            pad_token_id=257,
        )
        Qwen3MoeForCausalLM(config).save_pretrained(path)
    dist.barrier()
    return str(path)


def start_distributed(num_nodes: int | None = None) -> tuple[int, int]:
    """Join the process group of the launcher (without one, alone); return (rank, ranks).

    ``num_nodes``: let the ranks of this machine stand for so many nodes.
    """
    share_cores()
    if "RANK" not in os.environ:
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    else:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group()
    rank, num_ranks = rank_and_size()
    if num_nodes:
        os.environ["MOE_LOCALITY_RANKS_PER_NODE"] = str(num_ranks // num_nodes)
    return rank, num_ranks


def say(text: str) -> None:
    if rank_and_size()[0] == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()

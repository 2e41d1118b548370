"""The small model of benchmarks/paper_decoder.py: trained until its experts tell domains apart."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from lm.data import BEGIN, END, VOCAB_SIZE, build_requests, train_batches

SHAPE = {"num_hidden_layers": 8, "num_experts": 32, "num_experts_per_tok": 4}
BATCH, SEQ_LEN = 16, 64


def train(path: Path, steps: int, seed: int = 0) -> None:
    """Train the model into ``path``, or leave the one that is there with as many steps."""
    done = path / "trained.json"
    wanted = {"steps": steps, "seed": seed, **SHAPE}
    if done.exists() and json.loads(done.read_text()) == wanted:
        return
    torch.manual_seed(seed)
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    requests, _ = build_requests(
        seq_len=SEQ_LEN, train_per_domain=1600, held_out_per_domain=4, seed=seed
    )
    start = time.perf_counter()
    dealt = train_batches(requests, rank=0, num_ranks=1, per_rank=BATCH, steps=steps, seed=seed)
    for step, batch in enumerate(dealt, start=1):
        tokens = torch.from_numpy(batch.tokens.astype("int64"))
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 25 == 0:
            seconds = time.perf_counter() - start
            print(f"training: step {step} of {steps}, loss {loss:.3f}, {seconds:.0f} s", flush=True)
    model.config.output_router_logits = False  # its loss is for training
    model.save_pretrained(path)
    done.write_text(json.dumps(wanted))


def new_model() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        moe_intermediate_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        norm_topk_prob=True,
        router_aux_loss_coef=0.003,
        output_router_logits=True,  # the loss then has the term that levels the experts
        max_position_embeddings=512,
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=END,
        **SHAPE,
    )
    return Qwen3MoeForCausalLM(config)

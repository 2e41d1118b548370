"""Record the routing of a Hugging Face mixture-of-experts model with two lines.

    python examples/hf_record.py --out traces/hf                        # a small random OLMoE
    python examples/hf_record.py --out traces/hf --model /path/to/model # a model on disk

Then ``moe-locality analyze traces/hf`` and ``moe-locality place traces/hf -o plan.json``. A random
model has random routing: it shows the mechanics, not a result.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import moe_locality

sys.path.insert(0, str(Path(__file__).parent))
from lm.data import Requests, build_requests


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="directory of a model (default: a small random OLMoE)")
    parser.add_argument("--out", default="traces/hf", help="directory of the trace")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=8, help="tokens decoded after the prompt")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    torch.manual_seed(args.seed)
    model, requests = read_model(args.model), read_requests(args.requests, args.seed)

    recorder = moe_locality.attach(model, args.out)  # line 1 of 2
    for first in range(0, len(requests), 4):
        generate(model, requests.take(slice(first, first + 4)), args.new_tokens, args.model)
    recorder.close()  # line 2 of 2

    trace = moe_locality.read_trace(args.out)
    print(f"{trace.num_tokens} tokens, {trace.num_layers} layers, top-{trace.top_k}: {args.out}")


def generate(model: Any, batch: Requests, new_tokens: int, name: str | None) -> None:
    """Prefill the prompts and decode greedily; ``annotate`` labels whose tokens these are."""
    labels = {"request_ids": batch.request_id, "domains": batch.domain_names()}
    tokens = prompt_tokens(batch, name)
    with torch.no_grad():
        with moe_locality.annotate(stage="prefill", **labels):
            output = model(tokens, use_cache=True)
        for _ in range(new_tokens):
            tokens = output.logits[:, -1:].argmax(-1)
            with moe_locality.annotate(stage="decode", **labels):
                output = model(tokens, use_cache=True, past_key_values=output.past_key_values)


def read_requests(count: int, seed: int) -> Requests:
    """Return prompts of four domains, from the text of this Python's standard library."""
    per_domain = -(-count // 4)
    _, held_out = build_requests(
        seq_len=64, train_per_domain=4, held_out_per_domain=per_domain, seed=seed
    )
    return held_out.take(slice(0, count))


def prompt_tokens(batch: Requests, name: str | None) -> torch.Tensor:
    """Return token ids [B, S]: bytes for the random model, the model's own tokenizer otherwise."""
    if name is None:
        return torch.from_numpy(batch.tokens[:, :-1].astype("int64"))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    texts = [
        bytes(t for t in row.tolist() if t < 256).decode("utf-8", "replace") for row in batch.tokens
    ]
    encoded = [tokenizer(text).input_ids for text in texts]
    length = min(map(len, encoded))  # equal prompts need no padding
    return torch.tensor([ids[:length] for ids in encoded])


def read_model(name: str | None) -> Any:
    """Return the model of a directory, or a small OLMoE with random weights."""
    from transformers import AutoModelForCausalLM, OlmoeConfig

    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name).eval()
    config = OlmoeConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=256,
        pad_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config).eval()


if __name__ == "__main__":
    main()

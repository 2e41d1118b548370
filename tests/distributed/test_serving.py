"""The serving engine on gloo ranks: tiny real models, spread with transformers' expert parallelism
and our exchange, must give the tokens of the whole model's own ``generate``.
"""

from collections import Counter

import numpy as np
import pytest
import torch

from tests.distributed.test_transformers_ep import SIZES, placed, save_tiny
from tests.launch import run_ranks

transformers = pytest.importorskip("transformers")

CASES = {
    "Mixtral": {},
    "Mixtral, sliding": {"sliding_window": 8},
    "Qwen3Moe": {},
    "GptOss": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "DeepseekV3": {},
    "Qwen3Next": {},
}


def prompts_of(rank, count, seed=0):
    """Requests of a rank: prompts and answers of mixed lengths; the last rank has none."""
    rng = np.random.default_rng((seed, rank))
    return [
        {
            "request_id": 100 * rank + i,
            "prompt_token_ids": rng.integers(0, SIZES["vocab_size"], rng.integers(1, 30)).tolist(),
            "max_tokens": int(rng.integers(1, 14)),
            "temperature": 0,
            "ignore_eos": True,
        }
        for i in range(count)
    ]


def expected(path, requests):
    """{request id: greedy tokens} of the whole model, one request at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    found = {}
    for request in requests:
        ids = torch.tensor([request["prompt_token_ids"]])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request["max_tokens"],
            do_sample=False,
            pad_token_id=0,
        )
        found[request["request_id"]] = output[0, ids.shape[1] :].tolist()
    return found


def serve_and_compare(rank, world, path, options):
    from moe_locality.serving import Engine, Limits

    model, _ = placed(path, world, "moved")
    requests = prompts_of(rank, 7 if rank < world - 1 or world == 1 else 0)
    steps = []
    limits = Limits(max_num_seqs=4, max_num_batched_tokens=24, max_model_len=64)
    engine = Engine(model, limits=limits, on_step=steps.append, **options)
    outputs = list(engine.generate(requests))
    found = {output.request_id: output.outputs[0].token_ids for output in outputs}
    assert found == expected(path, requests)
    return steps


@pytest.mark.parametrize("case", CASES)
def test_generate_gives_the_tokens_of_the_whole_model(tmp_path, case):
    """[F17.1] Rows of other lengths join and leave; long prompts come in chunks; an empty rank."""
    family = case.partition(",")[0]
    path = save_tiny(tmp_path, family, **CASES[case])
    steps = run_ranks(serve_and_compare, 4, path, {})
    kinds = [{step["kind"] for step in of_rank} for of_rank in steps]
    assert kinds[:3] == [{"prefill", "decode", "idle"}] * 3 or "idle" in kinds[3]
    assert kinds[3] == {"idle"}
    assert len({len(of_rank) for of_rank in steps}) == 1


def serve_and_count(rank, world, path):
    """Every collective that torch ran in each step, and the bytes that the engine counted."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from moe_locality.dispatch.traffic import traffic_report
    from moe_locality.serving import Engine, Limits

    class Collectives(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "c10d" in func.namespace:
                calls[func.name()] += 1
            return func(*args, **(kwargs or {}))

    model, _ = placed(path, world, "moved")
    seen, calls, mode = [], Counter(), Collectives()

    def on_step(counts):
        seen.append((counts["kind"], dict(calls), counts["bytes"]))
        calls.clear()

    limits = Limits(max_num_seqs=4, max_num_batched_tokens=24, max_model_len=64)
    engine = Engine(model, limits=limits, on_step=on_step)
    with mode:
        list(engine.generate(prompts_of(rank, 2 + rank)))
    return seen, traffic_report(model)["by_link"]


def test_step_moves_tokens_and_one_small_collective_only(tmp_path):
    """[F17.1] No dense weights are gathered in a step; its bytes are the exchange's."""
    path = save_tiny(tmp_path, "Mixtral")
    results = run_ranks(serve_and_count, 4, path)
    for steps, _ in results:
        for _, calls, _ in steps:
            others = {name: count for name, count in calls.items() if "alltoall" not in name}
            assert others == {"c10d::_allgather_base_": 1}
            assert len(calls) == 2
    sent = {}
    for steps, _ in results:
        for _, _, by_kind in steps:
            for kind, links in by_kind.items():
                sent[kind] = np.add(sent.get(kind, 0), links)
    report = results[0][1]
    for kind, links in sent.items():
        assert links.tolist() == list(report[kind].values()), kind
    assert sent["dispatch"][2] > 0

"""The serving engine on gloo ranks: tiny real models, spread with transformers' expert parallelism
and our exchange, must give the tokens of the whole model's own ``generate``.
"""

import tempfile
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


def plan_with_homes(path, world):
    """A plan of joint homes for the model, from a recording of other prompts. On every rank."""
    import moe_locality
    from moe_locality.topology.cluster import ClusterTopology
    from moe_locality.topology.groups import exchange_objects

    rank, plan = torch.distributed.get_rank(), None
    if rank == 0:
        whole = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with tempfile.TemporaryDirectory() as folder:
            with moe_locality.attach(whole, folder), torch.no_grad():
                for i in range(48):
                    ids = torch.randint(0, SIZES["vocab_size"], (1, 16))
                    with moe_locality.annotate([i], domains=f"d{i % 3}", stage="prefill"):
                        whole(ids)
            trace = moe_locality.read_trace(folder)
        nodes = ClusterTopology.uniform(num_nodes=2, ranks_per_node=world // 2)
        plan = moe_locality.solve(trace, nodes, homes="joint", max_imbalance=1.5)
    return exchange_objects(plan)[0]


def serve_at_homes(rank, world, path, options):
    """Serve the same requests under every option; return the tokens and where they were decoded."""
    import moe_locality
    from moe_locality.serving import Engine, Limits

    model, _ = placed(path, world, None)
    plan = plan_with_homes(path, world)
    moe_locality.apply(model, plan=plan)
    requests = prompts_of(rank, 6 if rank < world - 1 else 0)
    for i, request in enumerate(requests):
        request |= {"domain": f"d{i % 4}", "n": 1 + i % 2}
    found = {}
    for homes in options:
        limits = Limits(
            max_num_seqs=4, max_num_batched_tokens=24, max_model_len=64, max_num_kv_tokens=200
        )
        steps = []
        engine = Engine(model, limits=limits, homes=homes, plan=plan, on_step=steps.append)
        outputs = list(engine.generate(requests))
        tokens = {o.request_id: [c.token_ids for c in o.outputs] for o in outputs}
        places = {o.request_id: (o.arrival, o.home) for o in outputs}
        assert not [o.error for o in outputs if o.error]
        found[homes] = tokens, places, steps[-1]["moved"], steps[-1]["handover_bytes"]
        assert all(step["kv_tokens"] <= 200 for step in steps)
    return found, {request["request_id"] for request in requests}


def test_homes_change_where_requests_decode_and_not_their_tokens(tmp_path):
    """[F17.2] Every request ends once, at its home, with the tokens that it has at its arrival."""
    path = save_tiny(tmp_path, "Mixtral", sliding_window=8)
    options = ["arrival", "predicted", "first:4", "domain", "random", "round_robin"]
    results = run_ranks(serve_at_homes, 4, path, options, timeout_s=300.0)
    asked = set().union(*(ids for _, ids in results))
    wanted = None
    for homes in options:
        tokens, places, moved, sent = {}, {}, 0, np.zeros(3, int)
        for rank, (found, _) in enumerate(results):
            own_tokens, own_places, own_moved, own_sent = found[homes]
            assert not tokens.keys() & own_tokens.keys()
            assert all(home == rank for _, home in own_places.values())
            tokens |= own_tokens
            places |= own_places
            moved, sent = moved + own_moved, sent + own_sent
        assert tokens.keys() == asked
        wanted = wanted or tokens
        assert tokens == wanted, homes
        away = sum(arrival != home for arrival, home in places.values())
        assert moved == away
        assert (away == 0) == (homes == "arrival")
        assert (sent[1] + sent[2] > 0) == (away > 0)


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

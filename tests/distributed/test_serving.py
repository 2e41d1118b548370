"""The serving engine on gloo ranks: tiny real models, spread with transformers' expert parallelism
and our exchange, must give the tokens of the whole model's own ``generate``.
"""

import tempfile
import threading
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.distributed.test_transformers_ep import (
    SIZES,
    bytes_held,
    check_experts_are_held_once,
    load,
    logical,
    make_plan,
    placed,
    save_tiny,
    whole,
)
from tests.launch import run_ranks
from tests.unit.serving.test_engine import with_rounded_experts

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
    steps, before = [], bytes_held()
    limits = Limits(max_num_seqs=4, max_num_batched_tokens=24, max_model_len=64)
    engine = Engine(model, limits=limits, on_step=steps.append, **options)
    outputs = list(engine.generate(requests))
    check_experts_are_held_once(model, before)
    found = {output.request_id: output.outputs[0].token_ids for output in outputs}
    assert found == expected(path, requests)
    return steps


@pytest.mark.parametrize("case", CASES)
def test_generate_gives_the_tokens_of_the_whole_model(tmp_path, case):
    """[F17.1] Rows of other lengths join and leave; long prompts come in chunks; an empty rank.

    Only dense weights, not the experts, are gathered for good.
    """
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
    from moe_locality.errors import PlacementError
    from moe_locality.placement.plan import PlacementPlan
    from moe_locality.serving import Engine, Limits

    model, _ = placed(path, world, None)
    plan = plan_with_homes(path, world)
    with pytest.raises(PlacementError, match=r"was not placed with it: model\.layers\.0"):
        Engine(model, plan=plan)
    moe_locality.apply(model, plan=plan)
    for wrong, said in (
        (usual_order(1, 2), "the plan does not fit: expert-parallel ranks: found 2"),
        (PlacementPlan.linear(16, range(2), 2, 2), "the plan does not fit: experts per layer"),
        (usual_order(), "was not placed with it: model.layers.0"),
        ("none.json" if rank else usual_order(), "found by ranks" if not rank else "none.json"),
    ):
        with pytest.raises(PlacementError, match=said):
            Engine(model, plan=wrong)
    with pytest.raises(PlacementError, match=r"max_num_seqs=16.*'random'.* on ranks \[1, 2, 3\]"):
        Engine(model, plan=plan, homes="random" if rank else "arrival")
    requests = prompts_of(rank, 4 if rank < world - 1 else 0)
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


def late_transfer(rank, world):
    """Rank 0 sends a request only when rank 1, which waits for it, has named the transfer."""

    from moe_locality.serving import SamplingParams, homes
    from moe_locality.serving.scheduler import RequestState
    from moe_locality.topology.cluster import ClusterTopology

    said, homes.STUCK_S = [], 0.1
    homes.logger.addFilter(lambda record: said.append(record.getMessage()))
    nodes = ClusterTopology.uniform(num_nodes=2, ranks_per_node=1)
    rule = homes.HomeRule("round_robin", world)
    handover = homes.HandOver(rule, rank, torch.device("cpu"), nodes)
    for number in range(2):  # the second one has its home at rank 1
        if rank == 0:
            params = SamplingParams()
            state = RequestState(7 + number, [1, 2], params, seed=0, number=number)
            state.began = time.monotonic()
            handover.offer(state)
    handover.choose([2, 0])
    if rank == 0:
        dist.barrier()
    handover.start(np.array([100, 100]))
    came = []
    while rank == 1 and not said:
        came += handover.arrived(None)[0]
    if rank == 1:
        assert not came
        dist.barrier()
    while rank == 1 and not came:
        came += handover.arrived(None)[0]
    now = time.monotonic()
    return said, [(state.request_id, state.prompt, now - state.began) for state in came]


def test_transfer_that_does_not_come_is_named(tmp_path):
    """[F17 faults] Long before the timeout, with both ranks; when it comes it is taken, and its way
    has made it older.
    """
    _, (said, came) = run_ranks(late_transfer, 2)
    assert "on its way from rank 0 to rank 1 has not come within 0.1 s" in said[0]
    ((request_id, prompt, age),) = came
    assert (request_id, prompt) == (8, [1, 2])
    assert age > 0.1


@pytest.mark.parametrize("on_cuda", [False, True])
def test_transfer_that_fails_while_it_is_asked_for_has_not_arrived(monkeypatch, on_cuda):
    """It was taken for one that had come, with whatever was in its memory."""
    from moe_locality.layer.agreement import LostRanks
    from moe_locality.serving import homes

    breaks = threading.Event()

    class Transfer:
        def is_completed(self):  # NCCL's is so for one that failed
            breaks.set()
            return True

        def wait(self, _timeout):
            breaks.wait(60)
            raise RuntimeError("Connection closed by peer")

    class BreaksWhenAsked(threading.Thread):
        def is_alive(self):
            breaks.set()
            self.join(60)
            return super().is_alive()

    monkeypatch.setattr(homes, "threading", SimpleNamespace(Thread=BreaksWhenAsked))
    monkeypatch.setattr(homes, "default_timeout", lambda: None)
    done = homes._watch(Transfer(), homes.Offer(0, 7, 1, 1, 0, home=1), on_cuda)
    with pytest.raises(LostRanks, match=r"from rank 0 to rank 1 was lost \(Connection closed"):
        done()


def serve_and_count(rank, world, path):
    """Every collective that torch ran in each step, and the bytes that the engine counted."""
    from torch.utils._python_dispatch import TorchDispatchMode

    import moe_locality
    from moe_locality.dispatch.traffic import traffic_report
    from moe_locality.serving import Engine, Limits

    class Collectives(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "c10d" in func.namespace:
                calls[func.name()] += 1
            return func(*args, **(kwargs or {}))

    moe_locality.register({"cluster": {"num_nodes": 2, "ranks_per_node": world // 2}})
    model = load(path, world)  # the engine takes it without apply too
    before, seen, calls, mode = bytes_held(), [], Counter(), Collectives()

    def on_step(counts):
        seen.append((counts["kind"], dict(calls), counts["bytes"]))
        calls.clear()

    limits = Limits(max_num_seqs=4, max_num_batched_tokens=24, max_model_len=64)
    engine = Engine(model, limits=limits, on_step=on_step)
    with mode:
        list(engine.generate(prompts_of(rank, 2 + rank)))
    check_experts_are_held_once(model, before)
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


def shifting_prompts(rank, world, count):
    """Requests of a rank whose words are those of its node first, and of the other node later."""
    rng = np.random.default_rng(rank)
    half = SIZES["vocab_size"] // 2
    for i in range(count):
        node = (rank // (world // 2) + (i >= count // 4)) % 2
        words = rng.integers(node * half, node * half + 6, rng.integers(4, 24))
        yield {
            "request_id": 1000 * rank + i,
            "prompt_token_ids": words.tolist(),
            "max_tokens": int(rng.integers(2, 12)),
            "temperature": 0,
            "ignore_eos": True,
        }


def usual_order(num_nodes=2, ranks_per_node=2):
    """The nodes have other numbers than in the run."""
    from moe_locality.placement.plan import PlacementPlan

    nodes = [num_nodes - 1 - rank // ranks_per_node for rank in range(num_nodes * ranks_per_node)]
    plan = PlacementPlan.linear(8, range(2), num_nodes, ranks_per_node)
    return replace(plan, rank_to_node=tuple(nodes))


def serve_watched(rank, world, path):
    """Serve a shift of traffic, watched: tokens, decisions, bytes across nodes of each step."""
    import moe_locality
    from moe_locality.config import OnlineConfig
    from moe_locality.dispatch.traffic import traffic_report
    from moe_locality.serving import Engine, Limits

    online = OnlineConfig(
        every_n_steps=15, pays_within_steps=10**9, move_budget=0.5, max_imbalance=1.5
    )
    limits = Limits(max_num_seqs=4, max_num_batched_tokens=24, max_model_len=64)
    found = {}
    for watch, homes in (("propose", "arrival"), ("apply", "arrival"), ("apply", "predicted")):
        model, _ = placed(path, world, None)
        plan = plan_with_homes(path, world) if homes == "predicted" else usual_order()
        moe_locality.apply(model, plan=plan)
        decisions, steps, before = [], [], bytes_held()
        engine = Engine(
            model, limits=limits, homes=homes, plan=plan, watch=watch, online=online,
            on_watch=decisions.append, on_step=steps.append,
        )  # fmt: skip
        outputs = list(engine.generate(shifting_prompts(rank, world, 20)))
        check_experts_are_held_once(model, before)
        tokens = {output.request_id: output.outputs[0].token_ids for output in outputs}
        across = [sum(links[2] for links in step["bytes"].values()) for step in steps]
        total = sum(kind["cross_node"] for kind in traffic_report(model)["by_link"].values())
        moved = [decision.to_dict() for decision in decisions]
        assert [step["watch"] for step in steps if step["watch"]] == moved
        moved = [{**decision, "seconds": 0} for decision in moved]  # each rank's own
        found[watch, homes] = tokens, moved, across, total
    engine.close()
    whole_model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for each in (model, whole_model):  # the same tokens on all ranks: the mean is that of one
        each(torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
    for name, parameter in whole_model.named_parameters():
        ours = logical(model, name, whole(model.get_parameter(name).grad))
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
    return found


@pytest.mark.slow
def test_watch_moves_experts_under_requests_in_flight(tmp_path):
    """[F17.4] The traffic shifts: with a watch that applies, fewer bytes cross nodes afterwards,
    every request has the tokens that it has without, and the counters go on. No expert is held
    twice, and afterwards the model has the gradients of the whole one.
    """
    path = save_tiny(tmp_path, "Mixtral", sliding_window=8)
    results = run_ranks(serve_watched, 4, path, timeout_s=300.0)
    tokens, later = {}, {}
    for case in results[0]:
        tokens[case] = {k: v for result in results for k, v in result[case][0].items()}
        across = np.sum([result[case][2] for result in results], axis=0)
        later[case] = across[len(across) // 2 :].sum()
        assert all(result[case][1] == results[0][case][1] for result in results)
        assert across.sum() == results[0][case][3]
        for decision in results[0][case][1]:
            assert decision["applied"] == (decision["proposed"] and case[0] == "apply")
            assert decision["num_tokens"] > 0
            assert set(decision["drift_bits"]) == {"prefill", "decode"}
        proposed = [decision for decision in results[0][case][1] if decision["proposed"]]
        assert proposed, case
        assert all(one["copies_after"] < one["copies_before"] for one in proposed)
    kept, moved, at_home = tokens.values()
    assert len(kept) == 4 * 20
    assert kept == moved == at_home
    assert later["apply", "arrival"] < 0.95 * later["propose", "arrival"]
    some = {request_id: kept[request_id] for request_id in (0, 19, 1019, 3019)}
    asked = [r for rank in range(4) for r in shifting_prompts(rank, 4, 20)]
    assert some == expected(path, [r for r in asked if r["request_id"] in some])


def serve_stored(rank, world, path, name):
    """Serve under a watch with experts in low bits, then under plans with and without replicas."""
    import moe_locality
    from moe_locality.config import OnlineConfig
    from moe_locality.errors import ConfigError
    from moe_locality.integrations.transformers_ep import expert_layers
    from moe_locality.layer import store_experts
    from moe_locality.quantization import row_bytes
    from moe_locality.serving import Engine, Limits
    from moe_locality.topology.cluster import ClusterTopology

    model, _ = placed(path, world, "copied")
    with torch.no_grad():
        model(torch.arange(4)[None])  # copies of weights are there, and what FSDP2 gathers
    parts = [layer.experts for _, layer in expert_layers(model)]
    plain = sum(p.to_local().nbytes for part in parts for p in part.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    model(torch.arange(4)[None]).logits.sum().backward()
    for leave in (optimizer.step, model.zero_grad):  # gradients, then moments are left
        with pytest.raises(ConfigError, match=r"found gradients.* of the experts model\.layers\.0"):
            store_experts(model, name)
        leave()
    with pytest.raises(ConfigError, match=r"moments of an optimizer, of the experts model\.layers"):
        store_experts(model, name)
    del optimizer, leave
    before = bytes_held()
    report = store_experts(model, name)
    assert (report.bytes_before, report.num_experts) == (plain, 2 * 8 // world)
    assert report.bytes_after == sum(b.nbytes for part in parts for b in part.buffers())
    # neither the rows of FSDP2 nor copies of replicas are left
    assert before - bytes_held() >= plain + plain // 2 - report.bytes_after
    online = OnlineConfig(
        every_n_steps=25, pays_within_steps=10**9, move_budget=0.5, max_imbalance=1.5
    )
    limits, decisions = Limits(max_num_seqs=4, max_num_batched_tokens=24, max_model_len=64), []
    moe_locality.apply(model, plan=usual_order(2, world // 2))
    engine = Engine(
        model, limits=limits, plan=usual_order(2, world // 2), watch="apply", online=online,
        on_watch=decisions.append,
    )  # fmt: skip
    found = [list(engine.generate(shifting_prompts(rank, world, 24)))]
    nodes = ClusterTopology.uniform(num_nodes=2, ranks_per_node=world // 2)
    for kind in ("copied", "moved"):
        moe_locality.apply(model, plan=make_plan(kind, (0, 1), 2, world // 2), topology=nodes)
        found.append(list(Engine(model, limits=limits).generate(prompts_of(rank, 4))))
    steps, coded = [], {"exchange": "flat", "payload": "mxfp8", "combine_payload": "mxfp4"}
    moe_locality.apply(model, config={"dispatch": coded}, topology=nodes)
    outputs = list(Engine(model, limits=limits, on_step=steps.append).generate(prompts_of(rank, 4)))
    assert all(len(o.outputs[0].token_ids) == p["max_tokens"] for o, p in zip(
        sorted(outputs, key=lambda o: o.request_id), prompts_of(rank, 4), strict=True,
    ))  # fmt: skip
    for kind, payload in (("dispatch", "mxfp8"), ("combine", "mxfp4")):
        sent = [(step["bytes"][kind], step["rows"][kind]) for step in steps if step["bytes"]]
        size = row_bytes(payload, SIZES["hidden_size"])
        assert all(bytes == [size * n for n in rows] for bytes, rows in sent)
        assert sum(rows[2] for _, rows in sent) > 0
    for what in (model.state_dict, lambda: model.save_pretrained(f"{path}-again")):
        with pytest.raises(ConfigError, match=f"experts stored in {name}, expected neither"):
            what()
    with pytest.raises(ConfigError, match=f"need gradients at an expert stored in {name}"):
        model(torch.arange(4)[None])
    tokens = [{o.request_id: o.outputs[0].token_ids for o in outputs} for outputs in found]
    return tokens, sum(decision.applied for decision in decisions)


@pytest.mark.slow
def test_engine_moves_experts_that_are_kept_in_low_bits(tmp_path):
    """[F17.5] The weights are gone from memory; a watch's move and plans with and without replicas
    give the tokens of rounded weights; gradients, state dicts and training are refused.
    """
    name = "mxfp4-mbs-h"
    path = save_tiny(tmp_path, "GptOss", **CASES["GptOss"])
    results = run_ranks(serve_stored, 2, path, name, timeout_s=200.0)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with_rounded_experts(model, name).save_pretrained(f"{path}-rounded")
    asked = [[*shifting_prompts(rank, 2, 24)] for rank in range(2)]
    wanted = expected(f"{path}-rounded", asked[0] + asked[1])
    others = expected(f"{path}-rounded", prompts_of(0, 4) + prompts_of(1, 4))
    assert {**results[0][0][0], **results[1][0][0]} == wanted
    for turn in (1, 2):
        assert {**results[0][0][turn], **results[1][0][turn]} == others
    assert results[0][1] == results[1][1] > 0
    assert wanted != expected(path, asked[0] + asked[1])


class MoeMlp(torch.nn.Module):
    """DeepSpeed's MoE in the place of the MLP of a dense transformers model."""

    def __init__(self, mlp, world, number, **options):
        from deepspeed.moe.layer import MoE

        super().__init__()
        torch.manual_seed(number)
        fixed = {"drop_tokens": False, "top2_2nd_expert_sampling": False}
        self.moe = MoE(SIZES["hidden_size"], mlp, 4, world, k=2, **fixed | options)
        for at, expert in enumerate(self.moe.deepspeed_moe.experts.deepspeed_experts):
            torch.manual_seed(100 * number + at + dist.get_rank() * 4 // world)  # of the expert
            for parameter in expert.parameters():
                torch.nn.init.normal_(parameter, std=0.3)

    def forward(self, x):
        return self.moe(x)[0]


def llama_of_deepspeed(world, **options):
    torch.manual_seed(0)
    names = ("vocab_size", "hidden_size", "num_attention_heads")
    config = transformers.LlamaConfig(
        **{name: SIZES[name] for name in names},
        num_hidden_layers=2,
        num_key_value_heads=2,
        intermediate_size=32,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for number, layer in enumerate(model.model.layers):
        layer.mlp = MoeMlp(layer.mlp, world, number, **options)
    model.generation_config.eos_token_id = None
    return model


def serve_deepspeed(rank, world):
    import moe_locality
    from moe_locality.errors import ConfigError, PlacementError
    from moe_locality.serving import Engine, Limits

    section = {"cluster": {"num_nodes": world, "ranks_per_node": 1}}
    config = {"moe_locality": section, "dtype": torch.float32}
    layer = "model.layers.0.mlp.moe"
    for expected_name, wrong in (
        (layer, llama_of_deepspeed(world, drop_tokens=True)),
        (layer, llama_of_deepspeed(world, top2_2nd_expert_sampling=True)),
        ("a Linear", torch.nn.Linear(2, 2)),
    ):
        with pytest.raises(ConfigError) as caught:
            Engine(wrong)
        assert str(caught.value).startswith(f"found {expected_name}")
    plan = make_plan("moved", (0, 1), world, 1, num_experts=4)
    for kind in (None, "copied"):
        model = llama_of_deepspeed(world)
        other = make_plan(kind, (0, 1), world, 1, num_experts=4) if kind else None
        engine = moe_locality.init_inference(model, config, plan=other)
        with pytest.raises(PlacementError, match=r"not placed with it: model\.layers\.0\.mlp"):
            Engine(engine, plan=plan)
        Engine(engine, plan=other).close()
    engine = moe_locality.init_inference(llama_of_deepspeed(world), config, plan=plan)
    limits = Limits(max_num_seqs=4, max_num_batched_tokens=24, max_model_len=64)
    options, texts = {"limits": limits, "homes": "round_robin", "plan": plan}, []
    for store in (None, "mxfp4"):
        steps, wanted = [], {}
        serving = Engine(engine, on_step=steps.append, expert_store=store, **options)
        requests = prompts_of(rank, 7 if rank < world - 1 else 0)
        found = {one.request_id: one.outputs[0].token_ids for one in serving.generate(requests)}
        assert {step["kind"] for step in steps} >= {"prefill", "decode"}
        assert sum(step["moved"] for step in steps[-1:]) == (3 if rank == 0 else 0)
        assert sum(step["bytes"]["dispatch"][2] for step in steps if step["bytes"]) > 0
        serving.close()
        for request in prompts_of(0, 7):  # the ranks in step: the same request on each
            ids = torch.tensor([request["prompt_token_ids"]])
            words = {"max_new_tokens": request["max_tokens"], "do_sample": False, "pad_token_id": 0}
            output = engine.module.generate(ids, attention_mask=torch.ones_like(ids), **words)
            wanted[request["request_id"]] = output[0, ids.shape[1] :].tolist()
        assert {number: wanted[number] for number in found} == found
        texts.append(wanted)
    assert texts[0] != texts[1]
    return sorted(found)


@pytest.mark.slow
def test_generate_continues_a_model_whose_moe_layers_are_deepspeeds():
    """[F17.8] Mixed lengths, an idle rank and homes, also with experts in low bits; refused by name
    where it cannot be served, or was placed with another plan.
    """
    found = run_ranks(serve_deepspeed, 2, deepspeed=True, timeout_s=200)
    assert sorted(found[0] + found[1]) == list(range(7))
    assert all(found)

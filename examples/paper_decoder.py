"""The experiment of arXiv 2604.23150 in a running decoder, on the ranks of a launch.

    launch/paper.sh --hostfile hostfile --out runs/paper                # a small trained model
    launch/paper.sh --ranks 4 --num-nodes 2 --trace TRACE.npz           # recorded routing, replayed

Without --trace, a small Qwen3-MoE (8 layers, 32 experts, top-4) is trained on text of four domains,
and requests are served on one rank and recorded. Other requests are then decoded by
``moe_locality.serving`` in every condition: usual order and EPLB with random homes, the paper's
recipe, ours, ours with replicas. With --trace, the router's picks are replaced by those of a
recording: the tokens of a request go where the recorded ones went, through the same exchange. Its
requests are stretches of recorded answers, each behind the prompt of its own; where no prefill was
recorded, the first 32 tokens stand for it.

Conditions take turns, a step each. The report has bytes between nodes as the exchange counts them,
and the time of the steps in which all requests decode, which says something about links only where
the ranks are on nodes.
"""

import argparse
import contextlib
import functools
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import moe_locality
from moe_locality.analysis.decoding import classify_domains
from moe_locality.analysis.stats import prefill_decode_correlation
from moe_locality.arrivals import ArrivingHomes
from moe_locality.compat import end_distributed
from moe_locality.config import TrackingConfig
from moe_locality.demo.paper import PAPER, REPLICA_SHARE, share_of_gain
from moe_locality.demo.paper import WITH_REPLICAS as REPLICATED
from moe_locality.errors import TraceError
from moe_locality.figures import Table
from moe_locality.placement import PlacementPlan, assign_homes, evaluate, solve
from moe_locality.placement.baselines import cluster_homes
from moe_locality.placement.homes.predictor import FIRST_TOKENS
from moe_locality.report import Headline, ReportData, write_report
from moe_locality.serving import Engine, Limits, SamplingParams
from moe_locality.topology import ClusterTopology, discover_topology, exchange_objects
from moe_locality.trace import DECODE, PREFILL, RoutingTrace, write_trace
from moe_locality.trace.recorder.labels import current_annotation
from moe_locality.tracking import package_versions, start_tracking

sys.path.insert(0, str(Path(__file__).parent))
from hf_train import load_spread, say
from lm.data import BEGIN, END, VOCAB_SIZE, Requests, build_requests, train_batches
from lm.training import share_cores

Prepared = tuple[RoutingTrace, RoutingTrace, list[dict[str, Any]], Path, dict[str, float]]
"""Earlier routing, that of the requests to serve, these, the model, what their prefill tells."""
PROMPT, RECORDED_TOKENS = 48, 48
BASE, OURS = "linear, random homes", "ours, predicted homes"
WITH_REPLICAS = f"{REPLICATED}, predicted homes"
BYTES, STEP = "decode bytes across nodes per token", "decode step, median"
UNITS = {
    BYTES: "bytes",
    "largest sent by a rank": "bytes, mean over steps",
    "decode rows across nodes per token": "rows",
    "predicted rows per token": "rows",
    "node_imbalance": "max/mean",
    STEP: "ms",
}
COMPARED = (BYTES, "largest sent by a rank", STEP)


def main(arguments: list[str] | None = None) -> None:
    chosen = parse(arguments)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        sys.exit("found one rank, expected several: start this with launch/paper.sh")
    if chosen.num_nodes:
        os.environ["MOE_LOCALITY_RANKS_PER_NODE"] = str(ranks // chosen.num_nodes)
    share_cores()
    job = chosen.out / "job.json"
    if os.environ["RANK"] == "0":  # alone; the others wait for it
        chosen.out.mkdir(parents=True, exist_ok=True)
        job.write_text(json.dumps(prepare(chosen, ClusterTopology.from_env())))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(timeout=timedelta(hours=1))
    given = json.loads(job.read_text())
    everyone = exchange_objects((socket.gethostname(), decode(given)))
    topology = discover_topology()
    if dist.get_rank() == 0:
        hosts, counts = zip(*everyone, strict=True)
        found = judged(given, counts, topology, timed=len(set(hosts)) == topology.num_nodes)
        (chosen.out / "paper.json").write_text(json.dumps(found))
        publish(found, chosen)
    end_distributed()


# -- before the ranks meet: model, requests, plans


def prepare(chosen: argparse.Namespace, topology: ClusterTopology) -> dict[str, Any]:
    """Make the files that the ranks need, in ``--out``; return what they are told."""
    known, asked, requests, model, tells = (replayed if chosen.trace else trained)(chosen)
    longest = max(len(one["prompt_token_ids"]) for one in requests)
    write_trace(asked, chosen.out / "asked.npz")
    rows = 2 * -(-len(requests) // topology.num_ranks)
    return {
        "model": str(model.absolute()),
        "requests": requests,
        "asked": str((chosen.out / "asked.npz").absolute()),
        "replays": chosen.trace is not None,
        "max_tokens": chosen.new_tokens,
        "limits": {"max_num_seqs": rows, "max_num_batched_tokens": rows * longest},
        "cases": cases_of(known, asked, topology, chosen.out.absolute()),
        "told": tells,
        "recorded": f"{asked.model}, replayed" if chosen.trace else "trained on four domains",
    }


def replayed(chosen: argparse.Namespace) -> Prepared:
    """A recording, and a model of its sizes."""
    trace = moe_locality.read_trace(chosen.trace)
    kept = [int(layer) for layer in trace.layer_ids[:: chosen.every_layer]]
    trace = trace.select_layers(kept).evolve(layer_ids=np.arange(len(kept), dtype=np.int32))
    since = place_in_request(trace)
    stage = trace.stage
    if stage is None or not (stage == PREFILL).any():
        stage = np.where(since < FIRST_TOKENS, PREFILL, DECODE).astype(np.uint8)
    trace = trace.evolve(stage=stage, position=since.astype(np.int32))
    earlier, held_out = trace.split(0.7, seed=0)
    asked, given = stretches(held_out, chosen.new_tokens, chosen.served)
    path = chosen.out / "model"
    sizes = {"num_hidden_layers": trace.num_layers, "num_experts": trace.num_experts}
    sizes |= {"num_experts_per_tok": trace.top_k, "hidden_size": chosen.width}
    new_model(**sizes, vocab_size=8, moe_intermediate_size=16).save_pretrained(path)
    return earlier, asked, given, path, told(earlier, held_out)


def stretches(
    trace: RoutingTrace, length: int, count: int
) -> tuple[RoutingTrace, list[dict[str, Any]]]:
    """Draw stretches of so many tokens from the answers, each a request with the prompt of its own:
    what decodes at some moment, where those of long answers are more often met.
    """
    stage, found = trace.tokens_only("replay").stage, []
    for rows in rows_by_request(trace).values():
        prompt, answer = rows[stage[rows] == PREFILL], rows[stage[rows] != PREFILL]
        if len(prompt):
            ends = range(length, len(answer) + 1, length)
            found += [(prompt, answer[end - length : end]) for end in ends]
    if not found:
        sys.exit(f"found no answer of {length} tokens behind a prompt: lower --new-tokens")
    drawn = np.random.default_rng(0).permutation(len(found))[:count]
    parts = [np.concatenate(found[i]) for i in drawn]
    taken = trace.take(np.concatenate(parts)).evolve(
        request_id=np.repeat(np.arange(len(parts)), [len(part) for part in parts]),
        position=np.concatenate([np.arange(len(part), dtype=np.int32) for part in parts]),
    )
    given = [
        {"request_id": number, "prompt_token_ids": [1] * len(found[i][0])}
        for number, i in enumerate(drawn)
    ]
    return taken, given


def rows_by_request(trace: RoutingTrace) -> dict[int, np.ndarray]:
    """The rows of the tokens of each request, in the order of their positions."""
    view = trace.tokens_only("replay")
    order = np.lexsort((view.position, view.request_id))
    requests, first = np.unique(view.request_id[order], return_index=True)
    return dict(zip(requests.tolist(), np.split(order, first[1:]), strict=True))


def place_in_request(trace: RoutingTrace) -> np.ndarray:
    """[T] how many tokens of its request come before each one."""
    found = np.empty(trace.num_rows, dtype=np.int64)
    for rows in rows_by_request(trace).values():
        found[rows] = np.arange(len(rows))
    return found


def trained(chosen: argparse.Namespace) -> Prepared:
    """A model that is trained here, and what it routed itself."""
    train(chosen.out / "model", chosen.steps)
    earlier, served = build_requests(
        seq_len=PROMPT,
        train_per_domain=chosen.earlier // 4,
        held_out_per_domain=chosen.served // 4,
        seed=1,
    )
    trace = record(chosen.out, [earlier, served], chosen.steps)
    known = trace.filter(requests=earlier.request_id)
    asked = trace.filter(requests=served.request_id)
    return known, asked, requests_of(served), chosen.out / "model", told(known, asked)


def train(path: Path, steps: int, seed: int = 0) -> None:
    """Train the model into ``path``, or leave the one that is there with as many steps."""
    done = path / "trained.json"
    wanted = {"steps": steps, "seed": seed}
    if done.exists() and json.loads(done.read_text()) == wanted:
        return
    torch.manual_seed(seed)
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    requests, _ = build_requests(
        seq_len=64, train_per_domain=1600, held_out_per_domain=4, seed=seed
    )
    dealt = train_batches(requests, rank=0, num_ranks=1, per_rank=16, steps=steps, seed=seed)
    for step, batch in enumerate(dealt, start=1):
        tokens = torch.from_numpy(batch.tokens.astype("int64"))
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 25 == 0:
            print(f"training: step {step} of {steps}, loss {loss:.3f}", flush=True)
    model.config.output_router_logits = False  # its loss is for training
    model.save_pretrained(path)
    done.write_text(json.dumps(wanted))


def new_model(**sizes: Any) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    small = {
        "num_hidden_layers": 8,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "bos_token_id": BEGIN,
        "eos_token_id": END,
        "pad_token_id": END,
        "output_router_logits": True,  # the loss then has the term that levels the experts
    }
    common = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    common |= {"norm_topk_prob": True, "router_aux_loss_coef": 0.003}
    if sizes:
        small |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        small["output_router_logits"] = False
    config = Qwen3MoeConfig(max_position_embeddings=512, **common, **(small | sizes))
    return Qwen3MoeForCausalLM(config)


def record(out: Path, parts: list[Requests], steps: int) -> RoutingTrace:
    """Serve all requests on one rank, and return the routing of prefill and decode."""
    path = out / f"trace-{steps}-{'-'.join(str(len(part)) for part in parts)}"
    if not path.exists():
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
        making = path.with_name(f"{path.name}.part")
        shutil.rmtree(making, ignore_errors=True)
        recorder = moe_locality.attach(model, making)
        engine = Engine(model, limits=Limits(max_num_seqs=64, max_num_batched_tokens=64 * PROMPT))
        params = SamplingParams(temperature=0, max_tokens=RECORDED_TOKENS, ignore_eos=True)
        asked = [one for part in parts for one in requests_of(part)]
        print(f"recording: {len(asked)} requests", flush=True)
        for one in engine.generate(asked, params):
            if one.error is not None:
                sys.exit(f"request {one.request_id}: {one.error}")
        recorder.close()
        making.rename(path)
    return moe_locality.read_trace(path)


def requests_of(part: Requests) -> list[dict[str, Any]]:
    names = part.domain_names()
    return [
        {"request_id": int(request), "prompt_token_ids": tokens[:-1].tolist(), "domain": name}
        for request, tokens, name in zip(part.request_id, part.tokens, names, strict=True)
    ]


def cases_of(
    known: RoutingTrace, asked: RoutingTrace, topology: ClusterTopology, folder: Path
) -> list[dict[str, Any]]:
    """The conditions: a plan, from the known requests alone, and where each request is decoded."""
    shuffled = np.random.default_rng(0).permutation(asked.request_ids)
    dealt = {int(request): at % topology.num_ranks for at, request in enumerate(shuffled)}
    plans = {method: solve(known, topology, method=method) for method in ("linear", "eplb")}
    plans["recipe"] = solve(known, topology, method="request_kmeans")
    extra = round(known.num_experts * REPLICA_SHARE)
    extra = -(-extra // topology.num_ranks) * topology.num_ranks
    for name, replicas in (("ours", 0), ("replicas", extra)):
        print(f"solving: {name}", flush=True)
        plans[name] = solve(
            known,
            topology,
            homes="joint",
            num_redundant_experts=replicas,
        )
    recipe = cluster_homes(asked, plans["recipe"], topology, predict="prefill")
    cases = (
        (BASE, "linear", "arrival", dealt),
        ("EPLB, random homes", "eplb", "arrival", dealt),
        ("the paper's recipe", "recipe", "arrival", recipe),
        (OURS, "ours", "predicted", dealt),
        (WITH_REPLICAS, "replicas", "predicted", dealt),
    )
    for name, plan in plans.items():
        plan.write(folder / f"{name}.json")
    return [
        {"name": name, "plan": str(folder / f"{plan}.json"), "homes": homes, "rank_of": rank_of}
        for name, plan, homes, rank_of in cases
    ]


def told(known: RoutingTrace, asked: RoutingTrace) -> dict[str, float]:
    """What the prefill of a request tells."""
    found = {}
    with contextlib.suppress(TraceError):  # no domains
        found["domain told from prefill, %"] = (
            100 * classify_domains(known, asked, lambda name: name.split("/")[0]).ridge
        )
    with contextlib.suppress(TraceError):
        pairs = prefill_decode_correlation(asked)
        found["prefill-decode correlation, same request"] = pairs.same_request
        found["prefill-decode correlation, other domain"] = pairs.other_domain
    return found


# -- on all ranks


class Replay:
    """Sends the tokens of every pass where those of a recording went."""

    def __init__(self, trace: RoutingTrace, model: Any) -> None:
        ids = torch.from_numpy(trace.tokens_only("replay").expert_ids.astype(np.int64))
        self._ids = {request: ids[rows] for request, rows in rows_by_request(trace).items()}
        self._routes: Tensor | None = None
        model.register_forward_pre_hook(self._begin)
        for number, layer in enumerate(model.model.layers):  # before others look at the picks
            hook = functools.partial(self._replace, number)
            layer.mlp.experts.register_forward_pre_hook(hook)

    def _begin(self, *_: Any) -> None:
        labels: Any = current_annotation()
        self._routes = None
        if labels.mask is not None and not labels.mask.any():  # the warm-up
            return
        pairs = zip(labels.request_ids.tolist(), torch.from_numpy(labels.positions), strict=True)
        self._routes = torch.cat([self._ids[request][places] for request, places in pairs])

    def _replace(self, layer: int, _: Any, given: tuple[Tensor, Tensor, Tensor]) -> Any:
        if self._routes is None or not len(given[0]):  # an idle rank enters the exchange alone
            return given
        return given[0], self._routes[:, layer].to(given[1].device), given[2]


def engine_of(case: dict[str, Any], given: dict[str, Any], asked: RoutingTrace) -> Any:
    """Return (engine, the counts of its steps) with the requests of this rank, for a condition."""
    plan = PlacementPlan.read(case["plan"])
    model = moe_locality.apply(load_spread(given["model"]), plan=plan)
    if given["replays"]:
        Replay(asked, model)
    steps: list[dict[str, Any]] = []
    engine = Engine(
        model,
        limits=Limits(**given["limits"]),
        homes=case["homes"],
        plan=plan,
        on_step=steps.append,
    )
    params = SamplingParams(temperature=0, max_tokens=given["max_tokens"], ignore_eos=True)
    refused = []
    for one in given["requests"]:
        if case["rank_of"][str(one["request_id"])] == dist.get_rank():
            refused += engine.add_request(one, params)
    if refused:
        sys.exit(f"request {refused[0].request_id}: {refused[0].error}")
    return engine, steps


def decode(given: dict[str, Any]) -> list[dict[str, Any]]:
    """Decode in all conditions, in turns; return what this rank counted in each."""
    asked = moe_locality.read_trace(given["asked"])
    made = [engine_of(case, given, asked) for case in given["cases"]]
    found: list[dict[str, Any]] = [{"steps": [], "homes": {}, "tokens": {}} for _ in made]
    left, turn = list(range(len(made))), 0
    while left:
        for index in tuple(left):
            engine, steps = made[index]
            dist.barrier()
            start = time.perf_counter()
            outputs = engine.step()
            seconds = time.perf_counter() - start
            if outputs is None:
                left.remove(index)
                continue
            kept = {name: steps[-1][name] for name in ("kind", "tokens", "bytes", "rows", "moved")}
            found[index]["steps"].append({**kept, "seconds": seconds})
            for one in outputs:
                found[index]["homes"][one.request_id] = one.home
                found[index]["tokens"][one.request_id] = one.outputs[0].token_ids
        turn += 1
        if turn % 10 == 0:
            say(f"{turn} turns of {len(made)} conditions")
    return found


# -- what came out


def judged(
    given: dict[str, Any], counts: Sequence[Any], topology: ClusterTopology, *, timed: bool
) -> dict[str, Any]:
    """Plain data: the conditions, what homes keep, and what prefill tells.

    Args:
        counts: of every rank, of every condition.
    """
    asked = moe_locality.read_trace(given["asked"])
    prompts = {one["request_id"]: len(one["prompt_token_ids"]) for one in given["requests"]}
    of = asked.tokens_only("decode").request_id.tolist()
    past = place_in_request(asked) - np.array([prompts[request] for request in of])
    rows = np.flatnonzero((past >= 0) & (past < given["max_tokens"] - 1))
    tokens = asked.take(rows)
    found: dict[str, Any] = {}
    texts = [
        {k: v for one in counts for k, v in one[index]["tokens"].items()}
        for index in range(len(given["cases"]))
    ]
    for index, case in enumerate(given["cases"]):
        ranks = [one[index] for one in counts]
        homes = {request: home for one in ranks for request, home in one["homes"].items()}
        plan = PlacementPlan.read(case["plan"])
        costs = evaluate(tokens, plan, topology, homes)
        facts = {**counted(ranks), "node_imbalance": costs.node_imbalance}
        facts["predicted rows per token"] = 2 * costs.copies * tokens.num_layers  # there and back
        if not timed:
            del facts[STEP]
        base = found.setdefault(BASE, facts)
        changes = {name: 100 * (facts[name] / base[name] - 1) for name in COMPARED if name in facts}
        more = {
            "changes": changes,
            "moved": sum(one["steps"][-1]["moved"] for one in ranks),
            "texts that differ": sum(texts[0][k] != text for k, text in texts[index].items()),
        }
        found[case["name"]] = {**facts, **more}
        if case["name"] == OURS:
            linear = PlacementPlan.read(given["cases"][0]["plan"])
            kept = homes_keep(asked, tokens, plan, linear, topology, homes)
    return {
        "nodes": topology.num_nodes,
        "ranks_per_node": topology.ranks_per_node,
        "timed": timed,
        "model": given["recorded"],
        "requests": len(prompts),
        "new_tokens": given["max_tokens"],
        "layers": tokens.num_layers,
        "conditions": found,
        "told": {**kept, **given["told"]},
    }


def homes_keep(
    asked: RoutingTrace,
    tokens: RoutingTrace,
    plan: PlacementPlan,
    linear: PlacementPlan,
    topology: ClusterTopology,
    homes: dict[int, int],
) -> dict[str, float]:
    """What homes keep of what a batch of homes gains that are chosen by the decode ``tokens``,
    against the usual order with random homes: the engine's, a batch chosen by the prefill (what
    the prediction loses), and, in the order of arrival, by the decode tokens (what not knowing
    who comes next loses).
    """
    arriving = ArrivingHomes(plan, topology)
    one_by_one = {
        request: arriving.assign_scored(
            arriving.score(tokens.tokens_only("homes").expert_ids[rows]), len(rows)
        )
        for request, rows in rows_by_request(tokens).items()
    }
    chosen = {
        "homes keep of the oracle's gain, %": homes,
        "homes as a batch, by the prefill, keep, %": assign_homes(
            asked, plan, topology, predict="prefill"
        ),
        "homes one by one, by the decode routing, keep, %": one_by_one,
    }
    first = evaluate(tokens, linear, topology).copies
    best = assign_homes(tokens, plan, topology, predict="oracle")
    least = evaluate(tokens, plan, topology, best).copies
    return {
        name: 100 * share_of_gain(first, evaluate(tokens, plan, topology, some).copies, least)
        for name, some in chosen.items()
    }


def counted(ranks: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Bytes and rows of the steps where no rank reads a prompt, and the time of those in which all
    requests decode.
    """
    together = list(zip(*(one["steps"] for one in ranks), strict=True))
    only = [some for some in together if all(s["kind"] != "prefill" for s in some)]
    tokens = [sum(s["tokens"] for s in some) for some in only]
    sent = [[across(s["bytes"]) for s in some] for some in only]
    rows = sum(
        s["rows"][kind][2] for some in only for s in some for kind in ("dispatch", "combine")
    )
    full = [
        max(s["seconds"] for s in some)
        for count, some in zip(tokens, only, strict=True)
        if count == max(tokens)
    ]
    return {
        BYTES: sum(map(sum, sent)) / sum(tokens),
        "largest sent by a rank": float(np.mean([max(some) for some in sent])),
        "decode rows across nodes per token": rows / sum(tokens),
        STEP: 1e3 * float(np.median(full)),
        "full": len(full),
    }


def across(links: dict[str, list[int]]) -> int:
    """Of {kind: [same rank, same node, across nodes]} the last, of all kinds."""
    return sum(sums[2] for sums in links.values())


def publish(found: dict[str, Any], chosen: argparse.Namespace) -> None:
    """Print the conditions, write report.html, and log both to wandb."""
    shown = [name for name in (BYTES, STEP, "node_imbalance") if name in found["conditions"][BASE]]
    rows = []
    for name, facts in found["conditions"].items():
        cells: list[object] = [name]
        for metric in shown:
            change = facts["changes"].get(metric)
            cells += [f"{facts[metric]:,.4g}"] + ([] if change is None else [f"{change:+.1f} %"])
        rows.append(tuple(cells))
    columns = ["condition"]
    for metric in shown:
        columns += [f"{metric}, {UNITS[metric]}"] + (["change"] if metric in COMPARED else [])
    title = (
        f"{found['nodes']} nodes x {found['ranks_per_node']}, {found['requests']} requests x "
        f"{found['new_tokens']} tokens, {found['layers']} MoE layers"
    )
    links = (
        "Times are those of the links between the nodes."
        if found["timed"]
        else "The ranks are on one machine: bytes, but no times of links."
    )
    tables = (
        Table(title=title, columns=tuple(columns), rows=tuple(rows)),
        Table(title="What prefill tells", columns=("", "here"), rows=tuple(found["told"].items())),
        Table(title="The paper", columns=("what", "its figure", "comparable?"), rows=PAPER),
    )
    for row in (columns, *rows):
        print(" | ".join(map(str, row)))
    print(links, *(f"{name}: {value:.4g}" for name, value in found["told"].items()), sep="\n")
    ours = found["conditions"][OURS]
    data = ReportData(
        title="arXiv 2604.23150 in a running decoder",
        summary=(links,),
        facts=(("model", found["model"]),),
        versions=package_versions(),
        command=f"launch/paper.sh {' '.join(sys.argv[1:])}",
        headlines=tuple(
            Headline(label=name, value=f"{change:+.1f} %", context=f"{OURS}, against {BASE}")
            for name, change in ours["changes"].items()
        ),
        tables=tables,
    )
    page = write_report(data, chosen.out / "report.html")
    config = TrackingConfig(job_type="paper", mode=chosen.wandb, dir=str(chosen.out))
    with start_tracking(config, run_config={"trace": str(chosen.trace)}) as tracker:
        for table in tables:
            tracker.log_table(f"paper/{table.title}", table.columns, table.rows)
        tracker.log_summary(ours["changes"])
        tracker.log_artifact("paper", "report", [page])
    print(f"report: {page}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/paper"), help="directory that all ranks see")
    add("--num-nodes", type=int, help="emulate that many nodes on this machine")
    add("--trace", type=Path, help="recorded routing to replay")
    add("--every-layer", type=int, default=1, help="replay every n-th MoE layer")
    add("--width", type=int, default=1440, help="of the replayed model, float32")
    add("--new-tokens", type=int, default=32)
    add("--steps", type=int, default=400, help="of training")
    add("--earlier", type=int, default=400, help="requests that plans are made from")
    add("--served", type=int, default=64, help="requests to decode")
    add("--wandb", default="offline", help="offline, online or disabled")
    add("--local_rank", type=int, help="set by DeepSpeed's launcher")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

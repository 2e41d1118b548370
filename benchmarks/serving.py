"""The serving engine on one rank: against its peers, what watching costs, what low bits lose.

    python benchmarks/serving.py [--parts peers watching stored lowbit] [--csv FILE]

peers     new tokens per second of the engine, of ``model.generate`` in batches as large, and of
          transformers' continuous batching, on requests of equal and of mixed lengths.
watching  time of a decode step with the engine's counts of every step, and with a recorder too,
          against the same step without, step by step.
stored    the same with the experts in low bits, against bfloat16.
lowbit    a small trained model (``--model``, of examples/paper_decoder.py): perplexity of held-out
          text and greedy texts that stay the same, with the engine's low-bit expert store and with
          the payloads of an exchange, against bfloat16.

All cases of a part take turns; a figure is the median over rounds or steps. Everything is measured.
"""

import argparse
import contextlib
import copy
import functools
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from _results import append_rows, table_path
from torch import Tensor, nn

import moe_locality
from moe_locality.quantization.rows import decode_rows, encode_rows
from moe_locality.serving import Engine, Limits, SamplingParams

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from examples.lm.data import build_requests
from examples.paper_decoder import new_model, requests_of

Asked = list[tuple[list[int], int]]
"""(prompt, new tokens) of each request."""
Run = Callable[[Asked], list[list[int]]]
SEQS = 16
PROMPT, NEW = 48, 48
KINDS = ("equal", "mixed")
PEERS = ("model.generate", "continuous batching of transformers")
WATCHED = ("nothing", "counts", "counts and recorder")
CLOCKS = {"": time.perf_counter, ", CPU": time.thread_time}
FORMATS = ("mxfp8", "mxfp4", "mxfp4-mbs-h")
PAYLOADS = ("fp8", "mxfp8", "mxfp4")


def work(kind: str, count: int) -> Asked:
    """Requests of equal or of mixed lengths."""
    draw = torch.Generator().manual_seed(0)
    sizes = torch.randint(8, 2 * PROMPT - 8, (count, 2), generator=draw)
    if kind == "equal":
        sizes = torch.full((count, 2), PROMPT)
    return [
        (torch.randint(3, 250, (prompt,), generator=draw).tolist(), new)
        for prompt, new in sizes.tolist()
    ]


def by_engine(model: Any, **options: Any) -> Run:
    """An engine is made once, as a server would: its two passes of warm-up are not timed."""
    limits = Limits(max_num_seqs=SEQS, max_num_batched_tokens=SEQS * PROMPT)
    engine = Engine(model, limits=limits, **options)
    params = SamplingParams(temperature=0, ignore_eos=True)

    def run(asked: Asked) -> list[list[int]]:
        requests = [
            {"request_id": i, "prompt_token_ids": prompt, "max_tokens": new}
            for i, (prompt, new) in enumerate(asked)
        ]
        outputs = engine.generate(requests, params)
        found = {one.request_id: one.outputs[0].token_ids for one in outputs}
        return [found[i] for i in range(len(asked))]

    return run


def by_generate(model: Any, asked: Asked) -> list[list[int]]:
    """Batches in the order of arrival, each as long as its longest request."""
    found = []
    for at in range(0, len(asked), SEQS):
        some = asked[at : at + SEQS]
        width = max(len(prompt) for prompt, _ in some)
        padded = [[0] * (width - len(prompt)) + prompt for prompt, _ in some]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in some]
        most = max(new for _, new in some)
        ids = model.generate(
            torch.tensor(padded),
            attention_mask=torch.tensor(mask),
            max_new_tokens=most,
            min_new_tokens=most,
            do_sample=False,
        )
        new_ids = ids[:, width:].tolist()
        found += [row[:new] for row, (_, new) in zip(new_ids, some, strict=True)]
    return found


def by_continuous_batching(model: Any, asked: Asked) -> list[list[int]]:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    config = ContinuousBatchingConfig(
        max_requests_per_batch=SEQS,
        max_batch_tokens=SEQS * PROMPT,
        page_size=32,
        num_blocks=SEQS * 8,
        allow_block_sharing=False,
    )
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    found = {}
    with model.continuous_batching_context_manager(
        generation_config=greedy, continuous_batching_config=config, block=True, timeout=30
    ) as manager:
        for i, (prompt, new) in enumerate(asked):
            manager.add_request(prompt, request_id=str(i), max_new_tokens=new)
        while len(found) < len(asked):
            one = manager.get_result(timeout=1)
            if one is None and not manager.is_running():
                raise RuntimeError("continuous batching ended before its requests")
            if one is not None and one.is_finished():
                found[one.request_id] = one.generated_tokens
    return [found[str(i)] for i in range(len(asked))]


def peers(chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    model = small(chosen.width)
    of_peers: dict[str, Run] = {
        "engine": by_engine(model),
        "model.generate": functools.partial(by_generate, model),
        "continuous batching of transformers": functools.partial(by_continuous_batching, model),
    }
    of_peers = {name: of_peers[name] for name in ("engine", *chosen.against)}
    for kind in chosen.lengths:
        asked = work(kind, chosen.requests)
        tokens = sum(new for _, new in asked)
        seconds: dict[str, list[float]] = {name: [] for name in of_peers}
        cpu: dict[str, list[float]] = {name: [] for name in of_peers}
        texts: dict[str, list[list[int]]] = {}
        for turn in range(chosen.rounds + 1):
            for name, run in of_peers.items():
                start, busy = time.perf_counter(), time.process_time()
                texts[name] = run(asked)
                if turn:  # the first one warms up
                    seconds[name].append(time.perf_counter() - start)
                    cpu[name].append(time.process_time() - busy)
        same = texts["engine"]
        for name in of_peers:
            speeds = [tokens / s for s in seconds[name]]
            differ = sum(a != b for a, b in zip(texts[name], same, strict=True))
            note = f"{len(asked)} requests, {tokens} new tokens, batch {SEQS}, D={chosen.width}, "
            note += f"fp32; {chosen.rounds} rounds in turns; {differ} texts differ from the engine"
            many = "" if len(asked) == 2 * SEQS else f" of {len(asked)} requests"
            case = f"{kind} lengths{many}, {name}"
            yield row(case, "tokens per second", statistics.median(speeds), "1/s", note=note)
            clocks = {"speed": seconds, "speed by CPU time": cpu} if name != "engine" else {}
            for metric, took in clocks.items():  # the CPU time holds on a busy machine too
                ratios = [a / b for a, b in zip(took[name], took["engine"], strict=True)]
                spread = f"; rounds from {min(ratios):.2f} to {max(ratios):.2f}"
                ratio = statistics.median(ratios)
                case = f"{kind} lengths{many}, engine"
                yield row(case, metric, ratio, "x", baseline=name, note=note + spread)


def watching(chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    other = yield from in_turns(chosen, small(chosen.width), WATCHED, "fp32")
    case = f"decode step, {WATCHED[-1]}, D={chosen.width}"
    note = f"per step; {chosen.rounds} rounds of {chosen.steps} steps in turns"
    yield row(case, "seconds, CPU of the recorder's thread", 1e3 * other, "ms", note=note)


def stored(chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    names = ("bfloat16", *FORMATS)
    yield from in_turns(chosen, small(chosen.width).bfloat16(), names, "bfloat16 otherwise")


def in_turns(
    chosen: argparse.Namespace, model: Any, names: Sequence[str], dtype: str
) -> Generator[dict[str, Any], None, float]:
    """Engines over the same weights decode the same batch, a step each in turns.

    A step is compared with the one of the first engine beside it, so what slows both down drops
    out; every round makes engines anew, since where their memory lies counts too. ``seconds`` and
    ``CPU`` are of the thread that steps; returns CPU seconds per step of other threads.
    """
    found: dict[str, list[list[float]]] = {name: [] for name in names}
    other = 0.0
    for turn in range(chosen.rounds):
        other += one_round(model, turn, chosen.steps, found) / chosen.rounds
    note = f"{SEQS} sequences, 8 layers, 32 experts, top-4, D={chosen.width}, {dtype}, one thread; "
    note += f"{chosen.rounds} rounds of {chosen.steps} steps in turns; of the medians of rounds"
    for name, own in found.items():
        case = f"decode step, {name}, D={chosen.width}"
        for at, what in enumerate(CLOCKS):
            value = 1e3 * statistics.median(step[at] for step in own)
            yield row(case, f"seconds{what}", value, "ms", note=note)
            ratios = [a[at] / b[at] - 1 for a, b in zip(own, found[names[0]], strict=True)]
            n = chosen.steps
            costs = [statistics.median(ratios[i : i + n]) for i in range(0, len(ratios), n)]
            if name != names[0]:
                spread = f" {100 * min(costs):.1f} to {100 * max(costs):.1f}"
                cost = 100 * statistics.median(costs)
                yield row(case, f"overhead{what}", cost, "%", names[0], note + spread)
    return other


def one_round(model: Any, turn: int, steps: int, found: dict[str, list[list[float]]]) -> float:
    """Add the clocks of every step to those of its name; return CPU seconds of other threads."""
    limits = Limits(max_num_seqs=SEQS, max_num_batched_tokens=SEQS * PROMPT)
    params = SamplingParams(temperature=0, max_tokens=steps + 4, ignore_eos=True)
    order, names = random.Random(turn), list(found)
    engines: dict[str, Engine] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as recorders:
        for name in order.sample(names, len(names)):
            own = copy.deepcopy(model, {id(p): p for p in model.parameters()})
            if "recorder" in name:
                recorders.enter_context(moe_locality.attach(own, Path(folder) / "trace"))
            engine = engines[name] = Engine(
                own,
                limits=limits,
                on_step=do_nothing if "counts" in name else None,
                expert_store=name if name in FORMATS else None,
            )
            for i, (prompt, _) in enumerate(work("equal", SEQS)):
                engine.add_request({"request_id": i, "prompt_token_ids": prompt}, params)
            engine.step()  # reads the prompts
            engine.step()
        began = time.process_time() - time.thread_time()
        for _ in range(steps):
            for name in order.sample(names, len(names)):
                before = [clock() for clock in CLOCKS.values()]
                engines[name].step()
                after = [clock() for clock in CLOCKS.values()]
                found[name].append([b - a for a, b in zip(before, after, strict=True)])
        return (time.process_time() - time.thread_time() - began) / steps


def do_nothing(counts: dict[str, Any]) -> None:
    """Have the counts made, and no more."""


# -- low bits


def send_in(payload: str, model: Any) -> None:
    """Let the experts of a whole model be given what an exchange would send them."""

    def sent(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        del module
        coded = encode_rows(given[0], payload)
        rows = decode_rows(coded, payload, given[0].shape[1], given[0].dtype)
        return (rows, *given[1:])

    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(sent)


def lowbit(chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.bfloat16)
    _, part = build_requests(seq_len=PROMPT, train_per_domain=64, held_out_per_domain=64, seed=1)
    tokens = torch.from_numpy(part.tokens.astype("int64"))
    asked = [(one["prompt_token_ids"], NEW) for one in requests_of(part)]
    names = ["bfloat16", *(f"weights {f}" for f in FORMATS), *(f"payload {p}" for p in PAYLOADS)]
    texts: dict[str, list[list[int]]] = {}
    for name in names:
        what, _, format = name.partition(" ")
        model = copy.deepcopy(whole)
        if what == "payload":
            send_in(format, model)
        run = by_engine(model, expert_store=format if what == "weights" else None)
        with torch.no_grad():
            losses = [model(ids, labels=ids).loss.item() for ids in tokens.split(32)]
        texts[name] = run(asked)
        note = f"{len(part)} held-out requests of {PROMPT + 1} bytes; Qwen3-MoE, 8 layers x 32, "
        note += f"top-4, bfloat16; {NEW} greedy tokens each"
        case = f"low bit: {name}"
        experts = [layer.mlp.experts for layer in model.model.layers]
        held = sum(t.nbytes for one in experts for t in (*one.parameters(), *one.buffers()))
        yield row(case, "bytes of experts", held, "bytes", note=note)
        value = math.exp(statistics.fmean(losses))
        yield row(case, "perplexity", value, "per byte", note=note)
        pairs = list(zip(texts[name], texts["bfloat16"], strict=True))
        same = 100 * statistics.fmean(a == b for a, b in pairs)
        first = [
            next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), NEW)
            for a, b in pairs
        ]
        base = "" if name == "bfloat16" else "bfloat16"
        yield row(case, "same greedy texts", same, "%", baseline=base, note=note)
        share = 100 * statistics.fmean(first) / NEW
        metric = "greedy tokens until the first that differs"
        yield row(case, metric, share, "%", base, note)


def small(width: int) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": width, "moe_intermediate_size": width // 2}
    return new_model(**sizes).eval()


def row(
    case: str, metric: str, value: float, unit: str, baseline: str = "", note: str = ""
) -> dict[str, Any]:
    common = {"benchmark": "serving", "kind": "measured", "value": f"{value:.4f}"}
    return {**common, "case": case, "metric": metric, "unit": unit, "baseline": baseline} | {
        "note": note
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parts = {"peers": peers, "watching": watching, "stored": stored, "lowbit": lowbit}
    add = parser.add_argument
    add("--parts", nargs="+", choices=parts, default=["peers", "watching"])
    add("--rounds", type=int, default=7)
    add("--against", nargs="+", default=PEERS, choices=PEERS, help="of the part peers")
    add("--requests", type=int, default=32, help="of the part peers")
    add("--lengths", nargs="+", choices=KINDS, default=KINDS, help="of the part peers")
    add("--steps", type=int, default=40, help="of a round of the parts watching and stored")
    add("--width", type=int, default=256, help="of the model of random weights, 8 layers")
    add("--model", type=Path, default=Path("runs/paper/model"), help="of the part lowbit")
    add("--csv", type=table_path, help="table to append the figures to")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for part in chosen.parts:
        rows = []
        for one in parts[part](chosen):
            print(one["case"], one["metric"], one["value"], one["unit"], one["note"], sep="; ")
            rows.append(one)
        if chosen.csv is not None:
            append_rows(chosen.csv, rows, packages=("torch", "transformers"))


if __name__ == "__main__":
    main()

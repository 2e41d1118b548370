"""Refresh of a plan after drift: share of a full re-solve's gain for few moves, and the time.

    MOE_LOCALITY_DATA=DIR python benchmarks/refresh.py [--csv benchmarks/results.csv] [--seeds 5]

Quality: a plan from old requests; new requests arrive; both a full solve and a refresh see old and
new counts, the new ones weighing half in all. Judged on new requests that neither saw. Cases: new
requests of the same kind, or 10, 30 or 50 % of them of domains that were not there before.
The gain is in ``copies``, against the old plan, beside that of a full solve and that of a refresh
without a budget. A full solve may level more, at the price of copies: look at the imbalance too.
Where it gains nothing (within 0.2 % of the copies) a share of it says nothing and is left out.
The same at equal balance: of a few caps the refresh with the fewest copies whose node imbalance on
the judged requests is no more than the old plan's. New requests without drift (0 % foreign) bring a
gain too, that of more tokens: what a drift adds to it is the difference of the two cases. And the
largest share of the gain that any few swaps can bring, with hindsight (``refresh_ceiling``).
Time: 58 layers x 256 experts, top 8, made-up tokens (they cost as much as real ones), warm.
"""

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _results import append_rows, table_path
from refresh_ceiling import most_share

from moe_locality.placement import evaluate, solve
from moe_locality.placement.counting import count_coactivation
from moe_locality.placement.refresh.improve import refresh
from moe_locality.placement.refresh.state import RefreshState
from moe_locality.topology import ClusterTopology
from moe_locality.trace import RoutingTrace, read_trace

BUDGETS = (0.02, 0.05, 0.1, 0.2, 1.0)
NO_GAIN = 0.002
LEVEL_CAPS = (1.0, 1.02, 1.05, 1.1)
LEVEL_SLACK = 0.002
CASES = {
    "gpt_oss_20b_benchmarks": ("safety", "philosophy"),
    "deepseek_v2_lite_esft_tasks": ("translation", "intent"),
    "deepseek_v2_lite_chat_prompts": (),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    old: RoutingTrace
    new: RoutingTrace
    test: RoutingTrace


def parts_of(trace: RoutingTrace, foreign: tuple[str, ...], share: float, seed: int) -> Parts:
    """Old requests, new ones, and a test of the same mix; ``share`` of the new ones is foreign."""
    rng = np.random.default_rng(seed)
    requests, first = np.unique(trace.request_id, return_index=True)
    group = np.array((*trace.groups, ""))[trace.domain_id[first]]
    is_foreign = np.isin(group, foreign)
    known, other = rng.permutation(requests[~is_foreign]), rng.permutation(requests[is_foreign])
    cut = int(0.6 * len(known))
    old, rest = known[:cut], known[cut:]
    sides = []
    for side in (0, 1):
        mine, theirs = rest[side::2], other[side::2]
        if share:
            keep = round(len(theirs) * (1 - share) / share)
            mine, theirs = mine[:keep], theirs[: round(len(mine[:keep]) * share / (1 - share))]
            sides.append(np.concatenate([mine, theirs]))
        else:
            sides.append(mine)
    new, test = (trace.filter(requests=ids) for ids in sides)
    return Parts(old=trace.filter(requests=old), new=new, test=test)


def quality(name: str, trace: RoutingTrace, case: str, parts: Parts, nodes: int) -> list[dict]:
    topology = ClusterTopology.uniform(nodes, 2)
    plan = solve(parts.old, topology)
    repeats = max(round(parts.old.num_tokens / parts.new.num_tokens), 1)
    full = solve(RoutingTrace.concat([parts.old] + [parts.new] * repeats), topology)
    state = RefreshState.from_trace(parts.old, half_life_tokens=parts.new.num_tokens)
    state.absorb(parts.new)
    # one half-life: the old counts are halved; the new ones are brought up to the same weight
    new = count_coactivation(parts.new)
    weight = parts.old.num_tokens / 2 / parts.new.num_tokens - 1
    state.pairs += (weight * new.pairs).astype(np.float32)
    state.load += weight * new.load
    before = evaluate(parts.test, plan)
    after = evaluate(parts.test, full, baseline=plan)
    label = f"{name} {nodes} nodes, {case}"
    notes = f"{parts.new.num_tokens} new tokens, {parts.test.num_tokens} to judge on"
    rows = [
        row(label, "copies of the old plan", before.copies, "copies", "", notes),
        row(label, "rank imbalance of the old plan", before.rank_imbalance, "ratio", ""),
        row(label, "copies, full solve", after.copies, "copies", ""),
        row(label, "rank imbalance, full solve", after.rank_imbalance, "ratio", ""),
        row(label, "slots moved, full solve", 100 * after.move, "%", ""),
    ]
    by_budget = {
        budget: evaluate(
            parts.test, refresh(plan, state, topology, move_budget=budget).plan, baseline=plan
        )
        for budget in BUDGETS
    }
    gains = {
        "full solve": before.copies - after.copies,
        "refresh without a budget": before.copies - by_budget[1.0].copies,
    }
    for budget, costs in by_budget.items():
        head = f"refresh of at most {100 * budget:g} %"
        rows.append(row(label, f"slots moved, {head}", 100 * costs.move, "%", ""))
        rows.append(row(label, f"copies, {head}", costs.copies, "copies", ""))
        rows.append(row(label, f"rank imbalance, {head}", costs.rank_imbalance, "ratio", ""))
        for other, gain in gains.items():
            if gain > NO_GAIN * before.copies:
                share = 100 * (before.copies - costs.copies) / gain
                rows.append(row(label, f"share of the gain, {head}", share, "%", other))
    rows += level_rows(label, plan, state, parts.test, topology, before)
    for budget, share in most_share(parts.test, plan, topology, BUDGETS).items():
        head = (
            f"most of the gain in pairs that {100 * budget:g} % can bring, hindsight, any balance"
        )
        rows.append(row(label, head, 100 * share, "%", "best placement known"))
    return rows


def level_rows(label, plan, state, test, topology, before) -> list[dict]:
    """Gain over the old plan for each budget, no less level than it on the judged requests."""
    rows = []
    for budget in BUDGETS:
        tried = [
            evaluate(
                test,
                refresh(plan, state, topology, move_budget=budget, max_imbalance=cap).plan,
                baseline=plan,
            )
            for cap in LEVEL_CAPS
        ]
        level = [c for c in tried if c.node_imbalance <= before.node_imbalance + LEVEL_SLACK]
        best = min(level or tried[:1], key=lambda c: c.copies)
        note = f"{100 * best.move:.2f} % moved, node imbalance {best.node_imbalance:.4f}"
        gain = 100 * (1 - best.copies / before.copies)
        head = f"copies saved at equal balance, at most {100 * budget:g} %"
        note += f", old plan {before.node_imbalance:.4f}"
        rows.append(row(label, head, gain, "%", "old plan", note))
    return rows


def row(case: str, metric: str, value: float, unit: str, baseline: str, note: str = "") -> dict:
    return {
        "benchmark": "refresh",
        "case": case,
        "metric": metric,
        "value": f"{value:.6g}",
        "unit": unit,
        "kind": "measured",
        "baseline": baseline,
        "note": note,
    }


def made_up(tokens: int) -> RoutingTrace:
    """58 layers x 256 experts, top 8, skewed; seeded."""
    rng = np.random.default_rng(0)
    layers, experts, top_k = 58, 256, 8
    score = rng.random((4096, layers, experts)) - np.linspace(0, 0.3, experts)
    table = np.argsort(score, axis=2)[..., :top_k].astype(np.int16)
    return RoutingTrace(
        model="made up",
        num_experts=experts,
        layer_ids=np.arange(layers),
        expert_ids=table[rng.integers(0, len(table), tokens)],
        request_id=np.arange(tokens) // 100,
        position=np.arange(tokens) % 100,
    )


def timings(tokens: int) -> list[dict]:
    """Counting ``tokens`` tokens once, then absorbing 1 % new ones and refreshing."""
    trace = made_up(tokens)
    new = trace.take(np.arange(tokens // 100))
    topology = ClusterTopology.uniform(8, 4)
    count_coactivation(new)  # compiled code is loaded
    forget_peak()
    resident = peak_bytes()
    start, busy = time.perf_counter(), time.process_time()
    found = count_coactivation(trace)
    counting, busy_counting = time.perf_counter() - start, time.process_time() - busy
    extra = (peak_bytes() - resident) / 2**20
    load = f"load {os.getloadavg()[0]:.1f}"
    case = f"58x256, top 8, {tokens} tokens"
    rows = [
        row(case, "time to count co-activations", counting, "s", "", load),
        row(case, "processor time to count co-activations", busy_counting, "s", "", load),
        row(case, "peak memory of counting beyond the trace", extra, "MiB", ""),
    ]
    state = RefreshState.from_trace(trace)
    for extra_slots in (0, 32):
        few = trace.take(np.arange(64))
        plan = solve(few, topology, method="balance", num_redundant_experts=extra_slots)
        refresh(plan, state, topology)
        times = []
        for _ in range(5):
            start, busy = time.perf_counter(), time.process_time()
            state.absorb(new)
            refresh(plan, state, topology)
            times.append((time.perf_counter() - start, time.process_time() - busy))
        wall, busy = np.median(times, axis=0)
        case = f"58x256+{extra_slots}, 8x4, {len(new.expert_ids)} new tokens"
        note = f"absorb and refresh of 2 %, warm, median of 5; {load}"
        rows.append(row(case, "time of a refresh", wall, "s", "", note))
        rows.append(row(case, "processor time of a refresh", busy, "s", "", note))
    del found
    return rows


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=table_path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--every", type=int, default=1, help="use every n-th layer")
    options = parser.parse_args()
    if options.tokens:
        report(timings(options.tokens), options.csv)
    folder = os.environ.get("MOE_LOCALITY_DATA")
    for name, foreign in CASES.items() if folder else ():
        trace = read_trace(Path(folder or "") / f"{name}.npz")
        trace = trace.filter(layers=trace.layer_ids[:: options.every].tolist())
        for share in (0, 0.1, 0.3, 0.5) if foreign else (0,):
            for seed in range(options.seeds):
                case = f"{100 * share:g} % foreign, seed {seed}"
                parts = parts_of(trace, foreign, share, seed)
                report(quality(name, trace, case, parts, options.nodes), options.csv)


def report(rows: list[dict], csv: Path | None) -> None:
    """Print the rows, and append them to the table."""
    shown = ("case", "metric", "baseline", "value", "unit", "note")
    for found in rows:
        print(*(found[name] for name in shown), sep="\t", flush=True)
    if csv is not None:
        append_rows(csv, rows, packages=("numpy", "numba"))


if __name__ == "__main__":
    main()

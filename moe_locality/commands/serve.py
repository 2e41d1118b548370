"""The command that serves a file of requests. Started by a launcher, it runs on every rank."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from moe_locality.commands.inputs import Nodes, RanksPerNode, Seed, WandbMode
from moe_locality.commands.output import Result
from moe_locality.commands.reports import Wandb, WandbDir, tracking_settings
from moe_locality.errors import ConfigError

if TYPE_CHECKING:
    from moe_locality.config import OnlineConfig, TrackingConfig
    from moe_locality.placement import PlacementPlan
    from moe_locality.serving import Metrics, SamplingParams
    from moe_locality.serving.watch import WatchDecision

_SEQS = "Sequences that a rank continues together."
_TOKENS = "Tokens of a step; longer prompts come in chunks."
_GROUPING = "fifo, cosine or experts."
_CONFIG = "JSON with a section moe_locality: dispatch (low-bit payloads too), kernels, cluster."
_STORE = "Keep the experts in low bits, such as mxfp4-mbs-h or mxfp8."
_WATCH = "off, propose (OUT/plan-step-N.json) or apply (between steps)."
_HOMES = "arrival, predicted, first:N, domain, random or round_robin."


def serve(
    requests: Annotated[Path, Argument(help="Requests: JSONL, one a line.")],
    model: Annotated[str, Option(help="Directory or name of a Hugging Face model.")],
    out: Annotated[Path, Option("--out", "-o", help="Directory of the results.")],
    plan: Annotated[Path | None, Option(help="Placement plan (JSON).")] = None,
    homes: Annotated[str, Option(help=f"Which rank decodes a request: {_HOMES}")] = "arrival",
    max_num_seqs: Annotated[int, Option(help=_SEQS)] = 16,
    max_num_batched_tokens: Annotated[int, Option(help=_TOKENS)] = 512,
    max_model_len: Annotated[
        int | None, Option(help="Tokens of a sequence; else what the model allows.")
    ] = None,
    max_num_kv_tokens: Annotated[int | None, Option(help="Tokens in the caches.")] = None,
    grouping: Annotated[str, Option(help=f"Who joins a batch: {_GROUPING}")] = "fifo",
    max_num_ready: Annotated[int, Option(help="Prompts read ahead, to choose from.")] = 0,
    max_tokens: Annotated[int, Option(help="New tokens of a request that says none.")] = 16,
    temperature: Annotated[float, Option(help="Of a request that says none.")] = 1.0,
    dtype: Annotated[str, Option(help="Of the weights: auto, float32, bfloat16.")] = "auto",
    trace: Annotated[Path | None, Option(help="Also record the routing there.")] = None,
    config: Annotated[Path | None, Option(help=_CONFIG)] = None,
    expert_store: Annotated[str | None, Option(help=_STORE)] = None,
    watch: Annotated[str, Option(help=f"Of the routing: {_WATCH}")] = "off",
    watch_every: Annotated[int, Option(min=1, help="Steps between two decisions.")] = 500,
    move_budget: Annotated[float, Option(help="Share of the slots that may move.")] = 0.1,
    metrics: Annotated[bool, Option(help="Also write OUT/metrics-R.jsonl.")] = False,
    metrics_port: Annotated[
        int | None, Option(min=1, max=65535, help="Prometheus: this port, plus the local rank.")
    ] = None,
    metrics_host: Annotated[str, Option(help="Where it listens.")] = "127.0.0.1",
    wandb: Wandb = None,
    wandb_mode: WandbMode = "offline",
    wandb_dir: WandbDir = None,
    nodes: Nodes = None,
    ranks_per_node: RanksPerNode = None,
    seed: Seed = 0,
) -> Result:
    """Serve requests with a Hugging Face MoE model, on one rank or under a launcher."""
    told = {name: str(value) for name, value in locals().items()}
    from moe_locality.serving import Limits, SamplingParams

    params = SamplingParams(temperature=temperature, max_tokens=max_tokens)
    most: dict[str, Any] = {"max_num_seqs": max_num_seqs, "max_model_len": max_model_len}
    most |= {"max_num_kv_tokens": max_num_kv_tokens, "max_num_ready": max_num_ready}
    limits = Limits(**most, max_num_batched_tokens=max_num_batched_tokens)
    section, placed = _section(config, plan, nodes, ranks_per_node)
    _check_choices(homes, placed, grouping, expert_store)
    online = _online(watch, watch_every, move_budget)
    settings = tracking_settings(wandb, wandb_mode, wandb_dir, None, "serve")
    _check_files(requests, out, dtype)
    counts = metrics or metrics_port is not None or settings is not None
    rank = _join_ranks(section, counts, out)
    counted = _metrics(rank, metrics_port, metrics_host, settings, **told) if counts else None
    options: dict[str, Any] = {"limits": limits, "homes": homes, "plan": placed}
    options |= {"grouping": grouping, "watch": watch, "online": online, "seed": seed}
    options["expert_store"] = expert_store
    total = _serve(_load(model, dtype, placed), trace, (requests, out, params), counted, options)
    _leave_ranks()  # once nothing holds the engine any more
    if rank:
        raise SystemExit(0)  # the first rank speaks for all
    return _told(total, out)


def _serve(
    loaded: tuple[Any, Any],
    trace: Path | None,
    job: tuple[Path, Path, SamplingParams],
    metrics: Metrics | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Serve a job (requests, results, sampling) with a model and its tokenizer; return the sums."""
    import moe_locality
    from moe_locality.serving import Engine
    from moe_locality.serving.jobs import serve_file

    recorder = None if trace is None else moe_locality.attach(loaded[0], trace)

    def on_watch(decision: WatchDecision) -> None:
        if decision.plan is not None and os.environ.get("RANK", "0") == "0":
            decision.plan.write(job[1] / f"plan-step-{decision.step}.json")

    on_step = metrics and metrics.on_step
    engine = Engine(*loaded, on_watch=on_watch, on_step=on_step, **options)
    total = serve_file(engine, *job, metrics=metrics)
    if recorder is not None:
        recorder.close()
    return total


def _leave_ranks() -> None:
    import torch.distributed as dist

    from moe_locality.compat import end_distributed

    if dist.is_initialized():
        end_distributed()


def _check_choices(
    homes: str, plan: PlacementPlan | None, grouping: str, expert_store: str | None
) -> None:
    """Say what is wrong before anything is loaded."""
    from moe_locality.quantization import get_format
    from moe_locality.serving.grouping import chooser
    from moe_locality.serving.homes import HomeRule

    HomeRule(homes, 1 if plan is None else plan.num_ranks, plan=plan)
    chooser(grouping)
    if expert_store is not None:
        get_format(expert_store)


def _metrics(
    rank: int, port: int | None, host: str, settings: TrackingConfig | None, **told: str
) -> Metrics:
    """Collective: a port that is taken on one rank is an error on all. ``told``: the options."""
    from moe_locality.layer.agreement import all_succeed
    from moe_locality.serving import Metrics
    from moe_locality.tracking import start_tracking

    metrics = Metrics(rank, model=told["model"])

    def start() -> None:
        if port is not None:
            metrics.listen(port + int(os.environ.get("LOCAL_RANK", "0")), host)
        metrics.track(start_tracking(settings, run_config=told, rank=rank, step_metric="step"))

    all_succeed(start)
    return metrics


def _online(watch: str, every: int, budget: float) -> OnlineConfig:
    from moe_locality.config import OnlineConfig
    from moe_locality.serving.watch import MODES

    if watch not in MODES:
        raise ConfigError(f"found --watch {watch}, expected one of {', '.join(MODES)}")
    if not 0 < budget <= 1:
        raise ConfigError(f"found --move-budget {budget}, expected a share above 0, at most 1")
    return OnlineConfig(every_n_steps=every, move_budget=budget)


def _told(total: dict[str, Any], out: Path) -> Result:
    served = ", ".join(f"{total[name]} {name}" for name in ("served", "refused", "unserved"))
    tokens = f"{total['tokens']:,} new tokens, {total['tokens_per_s']:.1f} per second"
    text = [f"{served}: {out}", tokens]
    if "bytes" in total:
        text.append(
            f"{total['bytes']['cross_node']:,} bytes across nodes in the exchange, "
            f"{total['handover_bytes']['cross_node']:,} with {total['moved']} requests that moved"
        )
    return Result(payload={"command": "serve", "out": str(out), **total}, text=text)


def _check_files(requests: Path, out: Path, dtype: str) -> None:
    known = ("auto", "float32", "float16", "bfloat16")
    if dtype not in known:
        raise ConfigError(f"dtype: found {dtype!r}, expected one of {known}")
    if not requests.is_file():
        raise ConfigError(f"requests: found no file {requests}, expected one with a request a line")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"out: found {out}, which cannot be made ({error.strerror}), expected a directory"
        ) from error


def _join_ranks(section: dict[str, Any], counts: bool, out: Path) -> int:
    """Register the exchange where there is one, timed where it is counted; return the rank. Another
    job that writes to ``out`` is found before anything is loaded."""
    from moe_locality.layer.agreement import all_succeed
    from moe_locality.serving.jobs import lock_results

    if section or "WORLD_SIZE" in os.environ:
        import moe_locality

        if counts:
            section["dispatch"] = {**section.get("dispatch", {}), "timing": True}
        moe_locality.register(section)
    rank = 0
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.distributed.init_process_group()
        rank = torch.distributed.get_rank()
    all_succeed(lambda: lock_results(out, rank).close())
    return rank


def _section(
    config: Path | None, plan: Path | None, nodes: int | None, ranks_per_node: int | None
) -> tuple[dict[str, Any], PlacementPlan | None]:
    """Return the section, with ranks that stand for nodes, and its plan; nothing else is read."""
    from moe_locality.config import read_config
    from moe_locality.placement import PlacementPlan

    section = {} if config is None else read_config(config).model_dump(exclude_unset=True)
    named = section.pop("plan", None)
    found = PlacementPlan.read(plan or named) if plan or named else None
    if nodes is None and ranks_per_node is None:
        return section, found
    size = int(os.environ.get("WORLD_SIZE", "1"))
    per_node = ranks_per_node or max(size // (nodes or 1), 1)
    nodes = nodes or max(size // per_node, 1)
    if nodes * per_node != size:
        raise ConfigError(
            f"found --nodes {nodes} and --ranks-per-node {per_node} for {size} ranks, expected "
            "as many: correct them, or start another number of ranks"
        )
    if found is not None and (found.num_nodes, found.ranks_per_node) != (nodes, per_node):
        raise ConfigError(
            f"found a plan for {found.num_nodes} nodes x {found.ranks_per_node} ranks, expected one"
            f" for {nodes} x {per_node}: make one with `moe-locality place`"
        )
    return section | {"cluster": {"num_nodes": nodes, "ranks_per_node": per_node}}, found


def _load(path: str, dtype: str, plan: PlacementPlan | None) -> tuple[Any, Any]:
    """Return the model, spread over the ranks, and its tokenizer (None where it has none)."""
    import torch.distributed as dist
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    import moe_locality

    tokenizer = None
    with contextlib.suppress(OSError, ValueError, KeyError):  # without one, requests are token ids
        tokenizer = AutoTokenizer.from_pretrained(path)
    try:
        AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model: found {path}, which transformers does not know ({str(error)[:200]}), expected "
            "the directory or name of a Hugging Face model"
        ) from error
    if not dist.is_initialized():
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype), tokenizer
    from transformers.distributed import DistributedConfig

    size = dist.get_world_size()
    spread = DistributedConfig(fsdp_size=size, ep_size=size, ep_implementation="moe_locality")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, distributed_config=spread)
    return moe_locality.apply(model, plan=plan), tokenizer

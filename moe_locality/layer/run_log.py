"""Lines about a running training, for wandb and for ``moe-locality compare``.

Every ``tracking.every_n_steps`` optimizer steps all ranks send their counts to rank 0, which writes
one line: sums and means over all ranks. No other call is collective, so a run may end anywhere, on
any rank. A failure to write is one warning; the training continues.
"""

import json
import logging
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from moe_locality.config import TrackingConfig
from moe_locality.dispatch.dispatcher import group_ranks
from moe_locality.dispatch.flat import lost_routes
from moe_locality.dispatch.traffic import counters, joined_traffic, local_traffic
from moe_locality.dispatch.transport import LINKS
from moe_locality.errors import ConfigError
from moe_locality.files import replace_text
from moe_locality.layer.moe import LocalityTopKGate
from moe_locality.layer.state import moe_modules
from moe_locality.placement.plan import PlacementPlan
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.trace.recorder.hooks import read_deepspeed_gate
from moe_locality.tracking import git_commit, package_versions, start_tracking

if TYPE_CHECKING:
    from moe_locality.layer.convert import LocalityRuntime

logger = logging.getLogger(__name__)
METRICS, TRAFFIC, SUMMARY, PLAN = "metrics.jsonl", "traffic.json", "summary.json", "plan.json"


class RunLog:
    """Lines about the training of an engine. Rank 0 holds the wandb run and the run directory, and
    raises BackendUnavailable or ConfigError where a run cannot be started."""

    def __init__(
        self, engine: Any, runtime: "LocalityRuntime", ds_config: dict[str, Any] | None
    ) -> None:
        assert runtime.config.tracking is not None
        config: TrackingConfig = runtime.config.tracking
        plan, topology = runtime.plan, runtime.topology
        self.engine, self.config, self.topology = engine, config, topology
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        script = Path(getattr(sys.modules.get("__main__"), "__file__", None) or ".")
        self.facts = {
            "model": type(runtime.model).__name__,
            "ds_config": ds_config,
            "cluster": None if topology is None else topology.describe(),
            "num_ranks": dist.get_world_size() if dist.is_initialized() else 1,
            "plan": None if plan is None else plan.digest(),
            "commit": git_commit(script.resolve().parent if script.is_file() else "."),
        }
        self._seen = self._counted_from = 0  # optimizer steps since the start; where counts began
        self._losses: list[torch.Tensor] = []
        self._routing: dict[str, dict[str, Any]] = {}
        self._last: dict[str, Any] = {}
        self._clock: tuple[int, float] | None = None
        self._decisions = 0
        self._failed = self._wrote = False
        if self.rank == 0 and config.run_dir is not None:
            self._open_directory(Path(config.run_dir), plan)
        self.tracker = start_tracking(
            config.model_copy(update={"group": config.group or self.facts["model"]}),
            run_config=self.facts,
            rank=self.rank,
            step_metric="step",
        )
        if plan is not None and runtime.config.plan is not None:
            what, files = {"digest": plan.digest()}, [runtime.config.plan]
            self._guarded(self.tracker.log_artifact, "plan", "plan", files, metadata=what)
        self._hooks = [
            layer.gate.register_forward_hook(partial(self._after_gate, name, layer))
            for name, layer in ((name, m.deepspeed_moe) for name, m in moe_modules(engine.module))
            if isinstance(layer.gate, LocalityTopKGate)
        ]

    # -- while a step runs ------------------------------------------------------------------------

    def wanted(self) -> bool:
        """Whether the step that runs now will have a line."""
        return (self.engine.global_steps + 1) % self.config.every_n_steps == 0

    def record_loss(self, loss: Any) -> None:
        """Record the loss of a micro-batch, the argument of ``engine.backward``."""
        if isinstance(loss, torch.Tensor) and loss.numel() == 1 and self.wanted():
            self._losses.append(loss.detach())

    def _after_gate(self, name: str, layer: Any, gate: Any, _inputs: Any, output: Any) -> None:
        """Forward hook of a gate: count the slots of its routes. Does not wait for the device."""
        if not (gate.training and torch.is_grad_enabled() and self.wanted()):
            return
        slots = gate.slot_ids(read_deepspeed_gate(output, gate.k, False).ids.detach())  # [T, K]
        ranks = group_ranks(layer.ep_group, layer.ep_size)
        num_slots = layer.ep_size * layer.num_local_experts
        kept = slots >= 0
        index = torch.where(kept, slots, num_slots).flatten().long()
        # no bincount: it waits for the device
        counts = index.new_zeros(num_slots + 1).scatter_add_(0, index, torch.ones_like(index))
        found = {
            "ranks": ranks,
            "tokens": slots.shape[0],
            "picks": slots.numel(),
            "dropped": (~kept).sum(),
            "slots": counts[:num_slots],
        }
        topology = self.topology or layer.topology
        if topology is not None:
            nodes = torch.tensor([topology.node_of(rank) for rank in ranks], device=slots.device)
            per_rank = num_slots // len(ranks)
            where = nodes[slots.clamp_min(0).long() // per_rank]
            none = topology.num_nodes
            hit = torch.zeros(len(slots), none + 1, dtype=torch.bool, device=slots.device)
            hit.scatter_(1, torch.where(kept, where, none), True)
            hit[:, [none, topology.node_of(self.rank)]] = False
            found["copies"] = hit.sum()
        before = self._routing.get(name)
        if before is not None:  # micro-batches
            found = {k: v if k == "ranks" else v + before[k] for k, v in found.items()}
        self._routing[name] = found

    # -- after a step -----------------------------------------------------------------------------

    def step(self, recorder: Any, online: Any) -> None:
        """Count an optimizer step and write a line where one is due. Collective there."""
        done = self.engine.global_steps
        self._seen += 1
        losses, self._losses = self._losses, []
        routing, self._routing = self._routing, {}
        if done % self.config.every_n_steps:
            self._clock = self._clock or (self._seen, time.perf_counter())
            return
        agg = getattr(self.engine, "agg_train_loss", None)  # a pipeline's, the same on all stages
        if agg is not None:
            losses = [torch.as_tensor(agg)]
        for found in routing.values():
            found |= {k: v.tolist() for k, v in found.items() if isinstance(v, torch.Tensor)}
        loss = None
        if losses:
            loss = float(torch.stack([x.float().reshape(()) for x in losses]).mean())
        mine = {
            "loss": loss,
            "traffic": local_traffic(counters(self.engine.module), self.topology),
            "routing": routing,
            "lost": lost_routes(self.engine.module),
            "recorder": None if recorder is None else recorder.report(),
        }
        everyone: list[Any] = [mine]
        if dist.is_initialized() and dist.get_world_size() > 1:
            everyone = [None] * dist.get_world_size()
            dist.gather_object(mine, everyone if self.rank == 0 else None)
        if self.rank == 0:
            self._guarded(self._write_line, done, everyone, online)
        self._clock = (self._seen, time.perf_counter())

    def _write_line(self, done: int, everyone: Sequence[dict[str, Any]], online: Any) -> None:
        report = joined_traffic([mine["traffic"] for mine in everyone])
        if report["resets"] != self._last.get("resets"):
            self._last = {}
        steps = self._seen - self._last.get("seen", self._counted_from)
        losses = [mine["loss"] for mine in everyone if mine["loss"] is not None]
        lost = sum(mine["lost"] for mine in everyone)
        values = {
            **({"quality/loss": float(np.mean(losses))} if losses else {}),
            **_traffic(_minus(report, self._last), max(steps, 1), self.topology),
            **_routing([mine["routing"] for mine in everyone]),
            **_recorded([mine["recorder"] for mine in everyone]),
            **({"load/overflow_routes": float(lost)} if lost else {}),
        }
        if self._clock is not None and self._seen > self._clock[0]:
            seconds = time.perf_counter() - self._clock[1]
            values["time/step_us"] = 1e6 * seconds / (self._seen - self._clock[0])
        if online is not None and len(online.decisions) > self._decisions:
            self._decisions = len(online.decisions)
            values |= online.decisions[-1].metrics()
        self._last = {**report, "seen": self._seen}
        self.tracker.log(values, step=done)
        if self.config.run_dir is not None:
            counted = {**report, "steps": self._seen - self._counted_from}
            self._to_directory(Path(self.config.run_dir), done, steps, values, counted)

    def reset_traffic(self) -> None:
        """Restart the counts, as the layers do."""
        self._counted_from = self._seen

    # -- the end ----------------------------------------------------------------------------------

    def close(self, trace: str | None, report: Any, *, failed: bool) -> None:
        """Write what is left and close the wandb run."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if trace is not None and report is not None and report.recorded_tokens:
            what = {"path": str(Path(trace).resolve()), "tokens_of_rank_0": report.recorded_tokens}
            self._guarded(self.tracker.log_reference, "trace", "trace", trace, metadata=what)
        summary: dict[str, Any] = {"steps": self.engine.global_steps}
        for kind, links in (self._last.get("by_link") or {}).items():
            summary |= {f"total/{kind}/{link}_bytes": count for link, count in links.items()}
        self._guarded(self.tracker.log_summary, summary)
        self._guarded(self.tracker.finish, 1 if failed else 0)

    def _guarded(self, action: Any, *args: Any, **options: Any) -> None:
        """Turn any failure to write into a warning: it must not end the training."""
        try:
            action(*args, **options)
        except Exception as error:  # noqa: BLE001  whatever wandb or the disk say
            log = logger.debug if self._failed else logger.warning
            self._failed = True
            log("moe_locality: tracking failed, the training goes on: %s", error, exc_info=error)

    # -- the run directory ------------------------------------------------------------------------

    def _open_directory(self, folder: Path, plan: PlacementPlan | None) -> None:
        there = folder / PLAN
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if there.is_file() and (
                plan is None or PlacementPlan.read(there).digest() != plan.digest()
            ):
                raise ConfigError(
                    f"found {there} of another run, expected "
                    f"{'none' if plan is None else 'the plan of this run'}: give an empty "
                    "directory as tracking.run_dir"
                )
            if plan is not None:
                plan.write(there)
            self._write_summary(folder, 0)
        except OSError as error:
            raise ConfigError(
                f"cannot write the run directory {folder}: {error.strerror}: give another one as "
                "tracking.run_dir"
            ) from error

    def _to_directory(
        self, folder: Path, done: int, steps: int, values: dict[str, float], counted: dict[str, Any]
    ) -> None:
        file = folder / METRICS
        if not self._wrote and file.is_file():
            _keep_before(file, done)
        self._wrote = True
        line: dict[str, Any] = {"step": done, "steps": steps}
        names = {"quality/loss": ("loss", 1.0), "time/step_us": ("step_s", 1e-6)}
        for key, value in values.items():
            name, factor = names.get(key, (key, 1.0))
            line[name] = value * factor
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")
        replace_text(folder / TRAFFIC, json.dumps(counted) + "\n")
        self._write_summary(folder, done)

    def _write_summary(self, folder: Path, steps: int) -> None:
        content = {**self.facts, "versions": package_versions(), "steps": steps}
        replace_text(folder / SUMMARY, json.dumps(content, indent=1, default=str) + "\n")


def _keep_before(file: Path, step: int) -> None:
    """Keep the lines of an earlier run from before ``step``; a file with later lines is renamed."""
    lines = file.read_text(encoding="utf-8").splitlines()
    earlier = [line for line in lines if line.strip() and json.loads(line).get("step", 0) < step]
    if len(earlier) == len(lines):
        return
    number = 1
    while (kept := file.with_name(f"metrics.{number}.jsonl")).exists():
        number += 1
    file.rename(kept)
    replace_text(file, "".join(line + "\n" for line in earlier))
    logger.warning("moe_locality: found lines from step %d on in %s: see %s", step, file, kept)


# -- the numbers of a line -------------------------------------------------------------------------


def _traffic(
    counted: dict[str, Any], steps: int, topology: ClusterTopology | None
) -> dict[str, float]:
    """Bytes, messages and times per step; imbalances as means over the layers."""
    values: dict[str, float] = {}
    if counted["by_link"]:
        totals = {link: sum(kind[link] for kind in counted["by_link"].values()) for link in LINKS}
        values = {f"traffic/{link}_bytes": count / steps for link, count in totals.items()}
        values["traffic/cross_node_frac"] = totals["cross_node"] / max(sum(totals.values()), 1)
        kinds = counted["messages_by_link"].items()
        messages = sum(kind["cross_node"] for name, kind in kinds if name != "routing")
        values["traffic/cross_node_messages"] = messages / steps
    by_rank, by_node = [], []
    for layer in counted["per_layer"]:
        load = np.array([layer["load"][rank] for rank in layer["ranks"]], np.float64)
        if not load.sum():
            continue
        by_rank.append(load.max() / load.mean())
        if topology is not None:
            nodes = np.bincount([topology.node_of(r) for r in layer["ranks"]], weights=load)
            by_node.append(nodes.max() / nodes.mean())
    if by_rank:
        values["load/rank_imbalance"] = float(np.mean(by_rank))
        values["load/balancedness"] = float(np.mean(1 / np.array(by_rank)))
    if by_node:
        values["load/node_imbalance"] = float(np.mean(by_node))
    for stage, us in counted["stage_us"].items():
        values[f"time/{stage.replace(' ', '_')}_us"] = float(np.mean(us)) / steps
    return values


def _routing(everyone: Sequence[dict[str, dict[str, Any]]]) -> dict[str, float]:
    """Return what ``moe_locality.placement.evaluate`` counts, for the routes of one step."""
    found = [layer for mine in everyone for layer in mine.values()]
    if not found:
        return {}
    total = {what: sum(f[what] for f in found) for what in ("tokens", "picks", "dropped")}
    values = {"load/dropped_frac": total["dropped"] / max(total["picks"], 1)}
    if all("copies" in layer for layer in found):
        values["traffic/copies"] = sum(f["copies"] for f in found) / max(total["tokens"], 1)
    slots: dict[Any, np.ndarray] = {}
    for mine in everyone:
        for name, layer in mine.items():
            key = (name, layer["ranks"])
            slots[key] = slots.get(key, 0) + np.array(layer["slots"])
    used = [(count.reshape(len(key[1]), -1) > 0).sum(axis=1) for key, count in slots.items()]
    values["load/distinct"] = float(np.mean(np.concatenate(used)))
    return values


def _recorded(reports: Sequence[Any]) -> dict[str, float]:
    reports = [report for report in reports if report is not None]
    names = ("recorded_tokens", "dropped_tokens", "skipped_forwards") if reports else ()
    return {f"trace/{name}": float(sum(getattr(r, name) for r in reports)) for name in names}


def _minus(now: Any, before: Any) -> Any:
    """Subtract growing counts, in nested lists and dicts; new entries stay."""
    if isinstance(now, dict) and isinstance(before, dict):
        return {k: v if k == "ranks" else _minus(v, before.get(k)) for k, v in now.items()}
    if isinstance(now, list) and isinstance(before, list) and len(now) == len(before):
        return [_minus(a, b) for a, b in zip(now, before, strict=True)]
    if isinstance(now, (int, float)) and isinstance(before, (int, float)):
        return now - before
    return now

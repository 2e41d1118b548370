"""Run on every rank by benchmarks/paper_decoder.py: the same requests decoded in several ways.

``_paper_program.py CASES.json OUT.json``. A case has a plan and the rank that each request is given
to; with homes "predicted" the engine moves it to another one after its prefill.
"""

import json
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import moe_locality
from moe_locality.compat import avoid_cpu_jit, end_distributed
from moe_locality.placement import PlacementPlan
from moe_locality.serving import Engine, Limits, SamplingParams


def load(path: str) -> Any:
    """Return the model, its experts spread over the ranks."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    size = dist.get_world_size()
    moe_locality.register()
    spread = DistributedConfig(fsdp_size=size, ep_size=size, ep_implementation="moe_locality")
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32", distributed_config=spread)
    return moe_locality.apply(model)


def decode(model: Any, case: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Serve the requests of this rank; return counts of its steps, texts, and who decoded them."""
    plan = PlacementPlan.read(case["plan"])
    moe_locality.apply(model, plan=plan)
    steps: list[dict[str, Any]] = []
    clock = [0.0]

    def note(counts: dict[str, Any]) -> None:
        now = time.perf_counter()
        kept = {name: counts[name] for name in ("kind", "tokens", "bytes", "rows")}
        steps.append({**kept, "seconds": now - clock[0], "moved": counts["moved"]})
        clock[0] = now

    engine = Engine(
        model, limits=Limits(**given["limits"]), homes=case["homes"], plan=plan, on_step=note
    )
    mine = [
        {name: one[name] for name in ("request_id", "prompt_token_ids", "domain")}
        for one in given["requests"]
        if case["rank_of"][str(one["request_id"])] == dist.get_rank()
    ]
    params = SamplingParams(temperature=0, max_tokens=given["max_tokens"], ignore_eos=True)
    dist.barrier()
    clock[0] = start = time.perf_counter()
    outputs = list(engine.generate(mine, params))
    seconds = time.perf_counter() - start
    return {
        "steps": steps,
        "seconds": seconds,
        "homes": {one.request_id: one.home for one in outputs},
        "tokens": {one.request_id: one.outputs[0].token_ids for one in outputs},
    }


def main() -> None:
    avoid_cpu_jit()
    deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(seconds=300))
    torch.set_num_threads(1)
    given = json.loads(Path(sys.argv[-2]).read_text())
    model = load(given["model"])
    found = []
    for case in given["cases"]:
        found.append(decode(model, case, given))
        if dist.get_rank() == 0:
            print(f"{case['name']}: {found[-1]['seconds']:.1f} s", flush=True)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        Path(sys.argv[-1]).write_text(json.dumps(everyone))
    del model
    end_distributed()


if __name__ == "__main__":
    main()

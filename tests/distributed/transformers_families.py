"""Every family of transformers that has an expert-parallel plan, tiny, through our exchange on two
ranks. ``python -m tests.distributed.transformers_families`` rewrites the table of
docs/transformers.md.
"""

import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.distributed import DistributedConfig

from moe_locality.placement.plan import PlacementPlan
from moe_locality.topology.groups import exchange_objects
from moe_locality.trace.recorder.hooks import moe_layer_ids
from tests.launch import run_ranks
from tests.tolerances import LOGITS
from tests.unit.trace.families import build, families, inputs

PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"
NUM_EXPERTS = 8


def config_plans(config) -> list[dict]:
    """The expert-parallel plans of a config and of its parts."""
    parts = [getattr(config, name, None) for name in type(config).sub_configs]
    found = [getattr(config, "base_model_ep_plan", None) or {}]
    return found + [plan for part in parts if part is not None for plan in config_plans(part)]


def dispatches(model) -> bool:
    """Whether transformers has a rule of expert parallelism for the model."""
    return any("ep_dispatch_experts" in plan.values() for plan in config_plans(model.config))


def compare(rank: int, world: int, family: str, folder: str) -> str | None:
    """Compare ours with the unsplit model, on other tokens on every rank.

    Returns why transformers' own exchange does not run the family, or None.
    """
    import moe_locality
    from moe_locality.integrations.transformers_ep import expert_layers

    model = build(family)
    kind, given = type(model), inputs(family, model)
    for name, value in given.items():
        given[name] = value.roll(rank, -1) if isinstance(value, torch.Tensor) else value
    whole = kind.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = whole(**given)[0]
    why = why_not(kind, world, folder, given, wanted)
    if why is not None:
        return why
    moe_locality.register({"cluster": {"num_nodes": 2, "ranks_per_node": 1}})
    for replicas in (0, 4):
        model = load(kind, world, folder, "moe_locality")
        moe_locality.apply(model, plan=make_plan(model, replicas))
        with torch.no_grad():
            found = model(**given)[0]
        assert close(found, wanted), float((found - wanted).abs().max())
        ran = [layer.dispatcher for _, layer in expert_layers(model) if layer.dispatcher]
        assert ran
        assert all(dispatcher.traffic.rows["dispatch"].sum() for dispatcher in ran)
    return None


def load(kind: type, world: int, folder: str, name: str) -> Any:
    spread = DistributedConfig(fsdp_size=world, ep_size=world, ep_implementation=name)
    theirs: Any = kind
    return theirs.from_pretrained(folder, dtype=torch.float32, distributed_config=spread).eval()


def why_not(kind: type, world: int, folder: str, given: dict, wanted: Any) -> str | None:
    """Return what is wrong with the family under transformers' own exchange. Collective."""
    model, error = None, None
    try:
        model = load(kind, world, folder, "all_to_all")
    except Exception as failure:
        error = f"transformers cannot load it split: {failure}".splitlines()[0]
    if error := next(filter(None, exchange_objects(error)), None):
        return error
    assert model is not None
    with torch.no_grad():
        same = close(model(**given)[0], wanted)
    return None if all(exchange_objects(same)) else "transformers' own exchange differs as well"


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    rtol, atol = LOGITS["float32"]
    return torch.allclose(found, wanted, rtol=rtol, atol=atol)


def make_plan(model: Any, replicas: int) -> PlacementPlan:
    """A random placement, with replicas on the other rank."""
    from moe_locality.integrations.transformers_ep import expert_layers

    names, rng, slots = [name for name, _ in expert_layers(model)], np.random.default_rng(0), []
    for _ in names:
        halves = rng.permutation(NUM_EXPERTS).reshape(2, -1)
        extra = [rng.permutation(halves[1 - half])[: replicas // 2] for half in (0, 1)]
        slots.append(np.concatenate([halves[0], extra[0], halves[1], extra[1]]))
    return PlacementPlan(
        layer_ids=tuple(moe_layer_ids(model, names) or range(len(names))),
        num_experts=NUM_EXPERTS,
        num_nodes=2,
        ranks_per_node=1,
        physical_to_logical_map=np.stack(slots),
    )


def row(family: str) -> str:
    """The family's line of the table."""
    model = build(family)
    if not dispatches(model):
        return f"| {family} | no | no expert-parallel plan in transformers |"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        why = run_ranks(compare, 2, family, folder, timeout_s=240.0)[0]
    return f"| {family} | yes |  |" if why is None else f"| {family} | no | {why} |"


def listed() -> dict[str, str]:
    """The lines of the table of the page, by family."""
    lines = re.findall(r"^\| \w+ \| (?:yes|no) \|.*$", PAGE.read_text(), re.MULTILINE)
    return {line.split("|")[1].strip(): line for line in lines}


def main() -> None:
    """Run all families, and write their lines where those of the page are."""
    rows = "\n".join(row(family) for family in families())
    table = re.compile(r"(?:^\| \w+ \| (?:yes|no) \|.*\n)+", re.MULTILINE)
    PAGE.write_text(table.sub(lambda _: f"{rows}\n", PAGE.read_text(), count=1))


if __name__ == "__main__":
    main()

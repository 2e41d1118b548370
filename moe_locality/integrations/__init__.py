"""Front ends: whose models run through our exchange, and the one call that puts it into them."""

import sys
from typing import TYPE_CHECKING, Any

from moe_locality.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from moe_locality.config import MoeLocalityConfig
    from moe_locality.placement.plan import PlacementPlan
    from moe_locality.topology.cluster import ClusterTopology


def apply(
    model: "nn.Module",
    config: "MoeLocalityConfig | dict[str, Any] | str | Path | None" = None,
    *,
    plan: "PlacementPlan | str | Path | None" = None,
    topology: "ClusterTopology | None" = None,
    **kwargs: Any,
) -> "nn.Module":
    """Put our exchange, and the plan, into the MoE layers of a model, in place; return the model.

    What the model is decides what is done: DeepSpeed's MoE layers are swapped
    (:func:`moe_locality.layer.convert.apply`), those that AutoEP built get section and plan
    (:mod:`moe_locality.integrations.autoep`); a transformers model that was loaded with
    ``ep_implementation="moe_locality"`` gets section and plan
    (:func:`moe_locality.integrations.transformers_ep.apply`, which also takes ``optimizer``).

    Args:
        config: the ``"moe_locality"`` section, or a ds_config with it.
        plan: or its file; place the experts too. Default: the plan that the section names.
        topology: node of every rank. Default: from the section, or asked from all ranks.
    """
    if type(model).__name__.startswith("Peft") and hasattr(model, "peft_config"):
        raise ConfigError(
            f"found a {type(model).__name__}, expected the model below it: call moe_locality.apply "
            "on the model of from_pretrained, before peft.get_peft_model"
        )
    is_transformers = _is_transformers(model)
    if not is_transformers and any(hasattr(m, "moe_locality_ep") for m in model.modules()):
        raise ConfigError(
            f"found a {type(model).__name__} around a transformers model, expected the model: call "
            "moe_locality.apply on what from_pretrained returned, before it is wrapped"
        )
    given: dict[str, Any] = {"plan": plan, "topology": topology, **kwargs}
    if is_transformers:
        from moe_locality.integrations.transformers_ep import apply as apply_to_transformers

        return apply_to_transformers(model, config, **given)
    from moe_locality.layer.convert import apply as apply_to_deepspeed

    return apply_to_deepspeed(model, config, **given)


def _is_transformers(model: Any) -> bool:
    """Return whether transformers made the model, and no layer of it is DeepSpeed's."""
    theirs = sys.modules.get("transformers.modeling_utils")
    if theirs is None or not isinstance(model, theirs.PreTrainedModel):
        return False
    from moe_locality.layer.state import has_auto_ep, moe_modules

    return not (moe_modules(model) or has_auto_ep(model))

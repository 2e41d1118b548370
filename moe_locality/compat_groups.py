"""Private names of DeepSpeed and torch that the expert groups need: DeepSpeed's dictionaries of
groups, and torch's rendezvous store.
"""

from collections.abc import Sequence
from typing import Any


def default_store() -> Any:
    """Return the key-value store of the default process group (it works before a device is set)."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def registered_expert_ranks(ep_size: int) -> tuple[list[int], list[int]] | None:
    """Return the EP and EDP ranks that DeepSpeed has for this rank under ``ep_size``, if any."""
    from deepspeed.utils import groups

    name = f"ep_size_{ep_size}"
    if name not in groups._EXPERT_PARALLEL_GROUP and name not in groups._EXPERT_DATA_PARALLEL_GROUP:
        return None
    return (
        list(groups._EXPERT_PARALLEL_GROUP_RANKS.get(name, ())),
        list(groups._EXPERT_DATA_PARALLEL_GROUP_RANKS.get(name, ())),
    )


def register_expert_groups(
    ep_size: int, ep_group: Any, ep_ranks: Sequence[int], edp_group: Any, edp_ranks: Sequence[int]
) -> None:
    """Make these the groups that DeepSpeed uses for ``ep_size``; it makes none of that name then.

    What is registered already stays; the caller checks that it has the same ranks. The name has to
    be ``ep_size_<number>``: DeepSpeed reads the number back from every name.
    """
    from deepspeed.utils import groups

    if registered_expert_ranks(ep_size) is not None:
        return
    name = f"ep_size_{ep_size}"
    groups._EXPERT_PARALLEL_GROUP[name] = ep_group
    groups._EXPERT_PARALLEL_GROUP_RANKS[name] = list(ep_ranks)
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = edp_group
    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = list(edp_ranks)

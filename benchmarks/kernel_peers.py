"""Other projects' local dispatch, each behind a guard: what cannot be imported says why.

A peer makes a step (``kernel_cases``) of a case. Each says which version its calls were read from.
What it returns must be what our reference returns, or it is named as not comparable and not timed.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from kernel_cases import Case, Step, disagreement
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One way to do the local half of a dispatch.

    ``read_from``: the version whose source the calls were written after. ``forward_only``: it has
    no backward, and is held against our forward. ``gpu_only``: why it cannot run on a CPU.
    """

    name: str
    distribution: str
    read_from: str
    make: Callable[[Any], Step]
    forward_only: bool = False
    gpu_only: str = ""
    note: str = ""

    @property
    def installed(self) -> str | None:
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return None


def prepare(
    peer: Peer, cases: Sequence[Any], wanted: tuple[Tensor, ...]
) -> tuple[list[Step], dict[str, str]]:
    """Return the steps of a peer that keeps the contract, or no steps and why.

    The facts: ``left_out`` (begins with ``absent``, ``not run`` or ``not comparable``),
    ``read_from``, ``installed``, ``note``.
    """
    facts = {"read_from": f"{peer.distribution} {peer.read_from}"}
    if peer.installed:
        facts["installed"] = peer.installed
    if peer.note:
        facts["note"] = peer.note
    if peer.gpu_only and wanted[0].device.type == "cpu":
        return [], facts | {"left_out": f"not run on a CPU: {peer.gpu_only}"}
    try:
        steps = [peer.make(case) for case in cases]
        found = steps[0]()
    except ImportError as error:
        return [], facts | {"left_out": f"absent: {_first_line(error)}"}
    except Exception as error:  # noqa: BLE001 - a peer may fail in any way
        return [], facts | {"left_out": f"not run: {type(error).__name__}: {_first_line(error)}"}
    why = disagreement(found, wanted)
    if why:
        return [], facts | {"left_out": f"not comparable: {why}"}
    return steps, facts


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:160]


def import_alone(name: str, *beside: str) -> ModuleType:
    """Import one file of a package without running the ``__init__`` of its parents.

    Kernels are often plain Triton files in packages that want large libraries. ``beside`` are other
    packages that the file imports from and whose ``__init__`` is not to be run either.
    """
    parts = name.split(".")
    spec = importlib.util.find_spec(parts[0])
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {parts[0]!r}")
    root = Path(next(iter(spec.submodule_search_locations)))
    parents = [".".join(parts[:end]) for end in range(1, len(parts))]
    parents += beside
    kept = {parent: sys.modules.get(parent) for parent in parents}
    try:
        for parent in parents:
            hollow: Any = ModuleType(parent)
            hollow.__path__ = [str(root.joinpath(*parent.split(".")[1:]))]
            sys.modules[parent] = hollow
        return importlib.import_module(name)
    finally:  # whoever imports the package next gets the real one, or its own error
        for parent, module in kept.items():
            if module is None:
                sys.modules.pop(parent, None)
            else:
                sys.modules[parent] = module


@contextmanager
def hidden(name: str) -> Iterator[None]:
    """Make ``import name`` fail inside the block."""
    kept = {key: value for key, value in sys.modules.items() if key.split(".")[0] == name}
    for key in kept:
        del sys.modules[key]
    hole: Any = None
    sys.modules[name] = hole
    try:
        yield
    finally:
        del sys.modules[name]
        sys.modules.update(kept)


def sorted_routes(case: Case) -> tuple[Tensor, Tensor]:
    """The routes in the order of their experts, and the token of each: how most peers begin."""
    order = torch.argsort(case.ids.reshape(-1), stable=True)
    return order, order // case.top_k


def expert_counts(case: Case, dtype: torch.dtype = torch.int64) -> Tensor:
    """Routes per expert, without a wait for the device."""
    flat = case.ids.reshape(-1).long()
    counts = torch.zeros(case.num_experts, dtype=dtype, device=flat.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=dtype))


def dense(case: Case, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The ``[T, E]`` probabilities and mask that some peers take."""
    empty = weights.new_zeros(len(weights), case.num_experts)
    probs = empty.scatter(1, case.ids.long(), weights)
    mask = torch.zeros_like(empty, dtype=torch.bool).scatter(1, case.ids.long(), True)
    return probs, mask


def all_peers() -> list[Peer]:
    """Every peer, in the order of the table."""
    import kernel_peers_deepspeed
    import kernel_peers_nvidia
    import kernel_peers_pytorch
    import kernel_peers_triton

    return [
        *kernel_peers_pytorch.PEERS,
        *kernel_peers_deepspeed.PEERS,
        *kernel_peers_nvidia.PEERS,
        *kernel_peers_triton.PEERS,
    ]

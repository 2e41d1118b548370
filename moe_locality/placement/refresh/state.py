"""What a refresh remembers of the traffic: decayed co-activation counts and the latest tokens."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_locality.errors import PlacementError
from moe_locality.trace.schema import RoutingTrace

SAMPLE_TOKENS = 8192
_FORMAT = 1
_ARRAYS = ("layer_ids", "pairs", "load", "recent_ids", "recent_request")


@dataclass(slots=True, kw_only=True)
class RefreshState:
    """Counts of all traffic so far, older tokens weighing less, and a sample of the latest.

    ``absorb`` changes it in place; nothing of an old trace has to be kept or counted again.
    """

    model: str
    num_experts: int
    layer_ids: np.ndarray
    """int32 [L]"""
    pairs: np.ndarray
    """float32 [L, E, E], weighed tokens that picked both experts; zero diagonal."""
    load: np.ndarray
    """float64 [L, E], weighed picks."""
    tokens: float
    """Weighed tokens."""
    half_life_tokens: float | None
    """After so many newer tokens a token counts half; None: all count the same for ever."""
    recent_ids: np.ndarray
    """int16 [S, L, K], the latest tokens."""
    recent_request: np.ndarray
    """int64 [S]"""

    @classmethod
    def from_trace(
        cls,
        trace: RoutingTrace,
        *,
        half_life_tokens: float | None = None,
        sample_tokens: int = SAMPLE_TOKENS,
    ) -> RefreshState:
        """Count a trace of tokens; the end of it becomes the sample.

        Raises:
            TraceError: the trace has counts only. PlacementError: the half-life is not above 0.
        """
        from moe_locality.analysis.coactivation import count_coactivation

        if half_life_tokens is not None and not half_life_tokens > 0:
            raise PlacementError(
                f"half_life_tokens: found {half_life_tokens}, expected a number of tokens above 0, "
                "or None to never forget"
            )
        found = count_coactivation(trace)
        state = cls(
            model=trace.model,
            num_experts=trace.num_experts,
            layer_ids=np.asarray(found.layer_ids, np.int32),
            pairs=found.pairs.astype(np.float32),
            load=found.load.astype(np.float64),
            tokens=float(trace.num_tokens),
            half_life_tokens=half_life_tokens,
            recent_ids=np.zeros((0, trace.num_layers, trace.top_k), np.int16),
            recent_request=np.zeros(0, np.int64),
        )
        state._keep(trace, sample_tokens)
        return state

    def absorb(self, trace: RoutingTrace, *, sample_tokens: int = SAMPLE_TOKENS) -> None:
        """Let old counts decay by the number of new tokens, and add the new ones.

        Raises:
            PlacementError: the trace is of another model, or has other layers, experts or top_k.
        """
        from moe_locality.analysis.coactivation import count_coactivation

        ids = trace.tokens_only("absorb").expert_ids
        found = (trace.model, trace.num_experts, trace.layer_ids.tolist(), ids.shape[2])
        top_k = self.recent_ids.shape[2]
        expected = (self.model, self.num_experts, self.layer_ids.tolist(), top_k)
        if found != expected:
            raise PlacementError(
                f"found new tokens of (model, experts, layers, top_k) {found}, expected "
                f"{expected}: absorb traces of the model that the state was made from"
            )
        new = count_coactivation(trace)
        if self.half_life_tokens is not None:
            decay = 0.5 ** (trace.num_tokens / self.half_life_tokens)
            self.pairs *= np.float32(decay)
            self.load *= decay
            self.tokens *= decay
        self.pairs += new.pairs
        self.load += new.load
        self.tokens += trace.num_tokens
        self._keep(trace, sample_tokens)

    def _keep(self, trace: RoutingTrace, sample_tokens: int) -> None:
        view = trace.tokens_only("a sample of tokens")
        ids = np.concatenate([self.recent_ids, view.expert_ids[-sample_tokens:]])
        request = np.concatenate([self.recent_request, view.request_id[-sample_tokens:]])
        self.recent_ids = np.ascontiguousarray(ids[-sample_tokens:])
        self.recent_request = request[-sample_tokens:]

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the state as .npz, whole or not at all."""
        place = Path(path)
        temporary = place.with_name(f".tmp-{os.getpid()}-{place.name}")
        scalars = {
            "format": np.array(_FORMAT),
            "model": np.array(self.model),
            "num_experts": np.array(self.num_experts),
            "tokens": np.array(self.tokens),
            "half_life_tokens": np.array(self.half_life_tokens or np.nan),
        }
        try:
            with open(temporary, "wb") as file:
                np.savez(file, **scalars, **{name: getattr(self, name) for name in _ARRAYS})
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, place)
        except OSError as error:
            raise PlacementError(
                f"cannot write the refresh state {place}: {error.strerror or error}: give a path "
                "in a directory that you may write"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
        return place

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> RefreshState:
        """Read a state; raises PlacementError when the file is missing or no such state."""
        try:
            with np.load(path, allow_pickle=False) as file:
                if int(file["format"]) != _FORMAT:
                    raise ValueError(f"format {int(file['format'])}, expected {_FORMAT}")
                half_life = float(file["half_life_tokens"])
                state = cls(
                    model=str(file["model"]),
                    num_experts=int(file["num_experts"]),
                    tokens=float(file["tokens"]),
                    half_life_tokens=None if np.isnan(half_life) else half_life,
                    **{name: file[name] for name in _ARRAYS},
                )
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise PlacementError(
                f"cannot read the refresh state {path}: {error}: make it again with "
                "RefreshState.from_trace"
            ) from error
        state._check(path)
        return state

    def _check(self, path: str | os.PathLike[str]) -> None:
        layers, num = len(self.layer_ids), self.num_experts
        shapes = (self.pairs.shape, self.load.shape, self.recent_ids.shape[1:2])
        fine = shapes == ((layers, num, num), (layers, num), (layers,))
        if not fine or self.recent_ids.max(initial=-1) >= num:
            raise PlacementError(
                f"the refresh state {path} is damaged: found shapes {shapes}, expected those of "
                f"{layers} layers and {num} experts: make it again with RefreshState.from_trace"
            )

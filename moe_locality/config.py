"""The ``"moe_locality"`` section of a ds_config, as pydantic models.

The rules are DeepSpeed's own: an unknown key is an error, and a value equal to ``"auto"`` counts
as absent.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moe_locality.errors import ConfigError

SECTION = "moe_locality"
DEEPSPEED_KEYS = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("optimizer", "scheduler", "zero_optimization", "bf16", "fp16", "steps_per_print"),
}
"""A dict with one of these is a whole ds_config, not our section of one."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _auto_counts_as_absent(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        fields = cls.model_fields.items()
        keeps = {n for n, field in fields if "auto" in getattr(field.annotation, "__args__", ())}
        return {key: value for key, value in values.items() if value != "auto" or key in keeps}


class TraceConfig(_Section):
    """Record the routing. ``path`` is a directory; every rank writes its own shards into it."""

    enabled: bool = True
    path: str = Field(description="directory of the Parquet shards")
    weights: bool = Field(default=False, description="also keep the router weights (float16)")
    every_n_steps: int = Field(default=1, ge=1, description="record one step of n")
    shard_tokens: int = Field(default=262_144, ge=1, description="tokens per shard and rank")
    ring_tokens: int = Field(
        default=65_536, ge=1, description="tokens kept on the device per layer"
    )
    sequence_first: bool | None = Field(
        default=None,
        description="hidden states are [S, B, D]; None: found where input ids are [B, S]",
    )
    graph_replays: int = Field(
        default=0, ge=0, description="replays of a CUDA graph kept on the device between steps"
    )
    num_experts: int | None = Field(
        default=None, ge=1, description="record only the MoE layers with this many experts"
    )


class ClusterConfig(_Section):
    """Which rank is on which node: one of ``hostfile``, ``file`` (YAML), or ``num_nodes`` with
    ``ranks_per_node``. Without the section, host names are gathered at start."""

    hostfile: str | None = None
    file: str | None = Field(default=None, description="YAML description of the cluster")
    num_nodes: int | None = Field(default=None, ge=1)
    ranks_per_node: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_source(self) -> "ClusterConfig":
        given = [self.hostfile is not None, self.file is not None, self.num_nodes is not None]
        if sum(given) > 1:
            raise ValueError(
                "found several sources of the cluster, expected one: "
                "keep hostfile, file or num_nodes"
            )
        if (self.num_nodes is None) != (self.ranks_per_node is None):
            raise ValueError("num_nodes and ranks_per_node go together: give both or neither")
        return self


class CapacityConfig(_Section):
    """Buffers of a fixed size: ``rows`` that every rank has for every slot, or ``factor`` times
    what a slot gets where routes are even, T K / P (T: most tokens of a rank in the first step)."""

    rows: int | None = Field(default=None, ge=1)
    factor: float | None = Field(default=None, gt=0)
    on_overflow: Literal["error", "drop"] = Field(
        default="error", description="routes that find no row: an error on all ranks, or dropped"
    )

    @model_validator(mode="after")
    def _one_size(self) -> "CapacityConfig":
        if (self.rows is None) == (self.factor is None):
            raise ValueError("give one of rows and factor: how large the buffers are")
        return self

    def text(self) -> str:
        """The size in words."""
        return f"rows={self.rows}" if self.factor is None else f"factor={self.factor:g}"


class DispatchConfig(_Section):
    """How tokens travel. A payload other than ``none`` is lossy and opt-in."""

    exchange: Literal["auto", "flat", "hierarchical", "deepep"] = "auto"
    reduce_at_node: bool = Field(
        default=True, description="hierarchical: one sum per node goes home, not every result"
    )
    payload: Literal["none", "fp8", "mxfp8", "mxfp4"] = "none"
    combine_payload: Literal["none", "fp8", "mxfp8", "mxfp4"] = "none"
    capacity: CapacityConfig | None = Field(
        default=None, description="buffers of a fixed size, for CUDA graphs; flat exchange only"
    )
    timing: bool = Field(default=False, description="time the stages, for the traffic report")
    deepep_max_tokens_per_rank: int | None = Field(
        default=None, ge=1, description="deepep: the most tokens that a rank gives to a layer"
    )

    @model_validator(mode="after")
    def _capacity_is_flat(self) -> "DispatchConfig":
        if self.capacity is not None and self.exchange not in ("auto", "flat"):
            raise ValueError(
                f"found capacity with exchange {self.exchange!r}, expected 'flat' or 'auto': only "
                "the flat exchange has buffers of a fixed size"
            )
        return self


class OnlineConfig(_Section):
    """Refresh the plan while training, and move experts where it pays. Absent: never."""

    enabled: bool = True
    every_n_steps: int = Field(default=500, ge=1, description="look at the routing so often")
    pays_within_steps: int = Field(
        default=2000, ge=1, description="the saving has to pay the move within so many steps"
    )
    move_budget: float = Field(
        default=0.1, gt=0, le=1, description="most slots that may move at once, as a share"
    )
    max_imbalance: float = Field(default=1.05, ge=1)
    sample_tokens: int = Field(default=8192, ge=1, description="latest tokens kept per rank")
    half_life_tokens: float | None = Field(
        default=100_000.0, gt=0, description="after so many newer tokens a sampled one counts half"
    )


class TrackingConfig(_Section):
    """Lines about a training: to wandb (``mode="offline"`` needs no network), and to a directory
    that ``moe-locality compare`` reads."""

    enabled: bool = True
    project: str = "moe_locality"
    group: str | None = Field(default=None, description="default: the name of the model's class")
    name: str | None = None
    job_type: str = "train"
    mode: Literal["offline", "online", "disabled"] = "offline"
    dir: str | None = Field(default=None, description="where wandb keeps its files")
    run_dir: str | None = Field(
        default=None, description="run directory for `moe-locality compare`, with any mode"
    )
    every_n_steps: int = Field(default=10, ge=1, description="one line per n optimizer steps")


class MoeLocalityConfig(_Section):
    """The whole section. Everything is optional: an empty section only swaps the layers."""

    enabled: bool = Field(
        default=True, description="false: DeepSpeed's own layers; trace and tracking go on"
    )
    trace: TraceConfig | None = None
    plan: str | None = Field(default=None, description="placement plan (JSON)")
    cluster: ClusterConfig | None = None
    dispatch: DispatchConfig = DispatchConfig()
    kernels: Literal["auto", "cuda", "triton", "reference"] = "auto"
    experts: Literal["auto", "loop", "grouped"] = "auto"
    tracking: TrackingConfig | None = None
    online: OnlineConfig | None = None

    @model_validator(mode="after")
    def _places_only_our_layers(self) -> "MoeLocalityConfig":
        online = self.online is not None and self.online.enabled
        if not self.enabled and (self.plan is not None or online):
            raise ValueError(
                "found enabled=false with plan or online, expected neither: DeepSpeed's own layers "
                "know no placement"
            )
        return self


def read_config(
    source: "MoeLocalityConfig | dict[str, Any] | str | Path | None",
) -> MoeLocalityConfig:
    """Return the section from a ds_config (dict or JSON file), or from the section itself.

    A dict is taken as a ds_config when it has the key ``"moe_locality"`` or one of DeepSpeed's own,
    else as the section. None, and a ds_config without the section or with ``"auto"`` there, give
    the defaults. ConfigError: the file cannot be read, or a key or value is wrong."""
    if isinstance(source, MoeLocalityConfig):
        return source
    if source is None:
        return MoeLocalityConfig()
    where = "the moe_locality section"
    if isinstance(source, (str, Path)):
        where = f"{source}, section {SECTION!r}"
        source = _read_json(Path(source)).get(SECTION, {})
    elif SECTION in source or DEEPSPEED_KEYS & source.keys():
        source = source.get(SECTION, {})
    if source == "auto":
        return MoeLocalityConfig()
    try:
        return MoeLocalityConfig.model_validate(source)
    except ValidationError as error:
        found = ((".".join(map(str, e["loc"])) or "(section)", e["msg"]) for e in error.errors())
        lines = [f"{where} is not valid:", *(f"  {key}: {message}" for key, message in found)]
        lines.append("See docs/config.md for the keys and their values.")
        raise ConfigError("\n".join(lines)) from error


def refuse_settings(section: MoeLocalityConfig, where: str, advice: dict[str, str]) -> None:
    """Raise ConfigError where a section sets a key that a front end does not take.

    ``advice``: by key, what to do instead."""
    for name, instead in advice.items():
        if getattr(section, name) != getattr(MoeLocalityConfig(), name):
            raise ConfigError(
                f"found {name} in the moe_locality section {where}, expected it left out: {instead}"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise ConfigError(
            f"cannot read the configuration {path}: {error.strerror}: check the path"
        ) from error
    except ValueError as error:  # not UTF-8, not JSON, or a key twice
        raise ConfigError(
            f"the configuration {path} is not valid JSON: {error}: correct it"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"the configuration {path} holds a {type(content).__name__}, not an object"
        )
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """DeepSpeed refuses a ds_config that says a key twice; so do we."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"found {sorted({k for k in keys if keys.count(k) > 1})} more than once")
    return found

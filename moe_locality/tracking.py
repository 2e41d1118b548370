"""wandb, thinly: one tracker for a run, which does nothing where tracking is off.

Offline is the default: nothing leaves the machine until somebody runs ``wandb sync``. An online run
that finds no network, or no key, goes on offline with a warning. Keys that the project uses, over
the step metric ``tokens`` (tokens seen so far) or, for a training, ``step`` (optimizer steps); a
training's are described in docs/config.md:

    traffic/cross_node_bytes, traffic/cross_node_frac     bytes that crossed nodes; share of all
    traffic/cross_node_messages                           messages between nodes, all directions
    load/balancedness, load/node_imbalance                mean / max over ranks; max / mean of nodes
    quality/loss                                          nats per token
    time/step_us                                          wall time of a step, microseconds
    serving/tokens_per_s, serving/running, serving/...    of the serving engine (docs/serving.md)
"""

import contextlib
import importlib
import importlib.metadata
import io
import logging
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_locality.config import TrackingConfig
from moe_locality.errors import BackendUnavailable, ConfigError

AnyPath = str | os.PathLike[str]
Metadata = Mapping[str, Any] | None

logger = logging.getLogger(__name__)

STEP_METRIC = "tokens"
METRIC_FAMILIES = ("traffic/*", "load/*", "quality/*", "time/*", "trace/*", "online/*", "serving/*")
ONLINE_WAIT_S = 15.0
"""How long an online run may look for its server; wandb's own WANDB_INIT_TIMEOUT goes before."""
PACKAGES = (
    *("moe-locality", "numpy", "scipy", "numba", "pyarrow"),
    *("torch", "deepspeed", "transformers", "triton"),
)


def package_versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of Python and of those packages that are installed, without importing."""
    versions = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def git_commit(folder: AnyPath = ".") -> str | None:
    """Return the commit of the repository around ``folder`` ("-dirty": changed files), or None."""
    command = ["git", "-C", os.fspath(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


class Tracker:
    """One wandb run, or none (other ranks than 0, mode "disabled", no section "tracking"): then it
    does nothing. Made by :func:`start_tracking`; use it as a context manager."""

    def __init__(self, run: Any = None, step_metric: str = STEP_METRIC) -> None:
        self._run = run
        self.directory: Path | None = None if run is None else Path(run.dir).parent
        if run is not None:
            run.define_metric(step_metric)
            for family in METRIC_FAMILIES:
                run.define_metric(family, step_metric=step_metric)

    @property
    def active(self) -> bool:
        return self._run is not None

    def log(
        self, values: Mapping[str, float], *, tokens: int | None = None, step: int | None = None
    ) -> None:
        """Record scalars at a number of tokens seen, or of optimizer steps done, so far."""
        axes = {STEP_METRIC: tokens, "step": step}
        if self.active:
            self._run.log({**values, **{key: at for key, at in axes.items() if at is not None}})

    def log_summary(self, values: Mapping[str, Any]) -> None:
        """Record final values of the run."""
        if self.active:
            self._run.summary.update(dict(values))

    def log_table(self, key: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Record a table."""
        if self.active:
            import wandb

            table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
            self._run.log({key: table})

    def log_image(self, key: str, png: bytes, *, caption: str = "") -> None:
        """Record a picture, given as the bytes of a PNG file."""
        if not self.active:
            return
        _required("PIL.Image", "pillow")
        import PIL.Image
        import wandb

        image = PIL.Image.open(io.BytesIO(png))
        self._run.log({key: wandb.Image(image, caption=caption or None)})

    def log_artifact(
        self, name: str, kind: str, paths: Iterable[AnyPath], *, metadata: Metadata = None
    ) -> None:
        """Record files (or the files of a directory) as a versioned artifact."""
        if not self.active:
            return
        import wandb

        artifact = wandb.Artifact(name, type=kind, metadata=dict(metadata or {}))
        for path in map(Path, paths):
            if path.is_dir():
                artifact.add_dir(str(path), name=path.name)
            elif path.is_file():
                artifact.add_file(str(path))
            else:
                raise ConfigError(
                    f"artifact {name!r}: found nothing at {path}, expected a file or a directory: "
                    "give the path of something that was written"
                )
        self._run.log_artifact(artifact)

    def log_reference(
        self, name: str, kind: str, path: AnyPath, *, metadata: Metadata = None
    ) -> None:
        """Record where the files of a directory are, as an artifact that holds no copy of them."""
        if not self.active:
            return
        import wandb

        artifact = wandb.Artifact(name, type=kind, metadata=dict(metadata or {}))
        place = Path(path).resolve()
        for file in sorted(place.rglob("*")):
            name_there = file.relative_to(place).as_posix()
            # hidden: what another rank is still writing
            if file.is_file() and not re.search(r"(^|/)\.", name_there):
                artifact.add_reference(file.as_uri(), name=name_there, checksum=False)
        self._run.log_artifact(artifact)

    def finish(self, exit_code: int = 0) -> None:
        """Write what is left and close the run."""
        if self.active:
            self._run.finish(exit_code=exit_code)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.finish(exit_code=0 if kind is None else 1)


def require_wandb() -> Any:
    """Return the module wandb; BackendUnavailable: it is not installed."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when wandb is imported
    os.environ.setdefault("WANDB_SILENT", "true")  # artifacts print past the settings of a run
    return _required("wandb", "wandb")


def start_tracking(
    config: TrackingConfig | None,
    *,
    run_config: Mapping[str, Any] | None = None,
    rank: int = 0,
    step_metric: str = STEP_METRIC,
) -> Tracker:
    """Start a run as the section "tracking" says; other ranks than 0 get a tracker without one.

    ``run_config`` is the resolved configuration; versions, and the commit of the current folder
    where it names none, are added to it. BackendUnavailable: wandb is not installed; ConfigError:
    it refuses the settings, or its directory cannot be written."""
    if config is None or not config.enabled or config.mode == "disabled" or rank != 0:
        return Tracker()
    wandb = require_wandb()
    if config.dir is not None:
        try:
            Path(config.dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot make the wandb directory {config.dir}: {error.strerror}: give another one "
                "as tracking.dir"
            ) from error
    given = dict(run_config or {})
    if "commit" not in given:
        given["commit"] = git_commit()
    options: dict[str, Any] = {"project": config.project, "group": config.group}
    options |= {"name": config.name, "job_type": config.job_type, "dir": config.dir}
    options |= {"config": {"versions": package_versions(), **given}, "reinit": "create_new"}
    try:
        if config.mode == "online":
            run = _online_run(wandb, options)
        else:
            run = wandb.init(mode=config.mode, settings=_settings(wandb), **options)
    except wandb.Error as error:
        raise ConfigError(
            f"wandb could not start a run in mode {config.mode!r}: {error}: correct the tracking "
            'section, or set its mode to "offline"'
        ) from error
    return Tracker(run, step_metric)


def _online_run(wandb: Any, options: dict[str, Any]) -> Any:
    """Start an online run, or an offline one where the server is not reached in time."""
    waits = {"login_timeout": ONLINE_WAIT_S, "finish_timeout": 2 * ONLINE_WAIT_S}
    if "WANDB_INIT_TIMEOUT" not in os.environ:
        waits["init_timeout"] = ONLINE_WAIT_S
    try:
        return wandb.init(mode="online", settings=_settings(wandb, **waits), **options)
    except wandb.Error as error:
        run = wandb.init(mode="offline", settings=_settings(wandb), **options)
        logger.warning(
            "wandb could not start an online run (%s): this one is offline; `wandb sync %s` "
            "publishes it later",
            " ".join(str(error).split()),
            Path(run.dir).parent,
        )
        return run


def _settings(wandb: Any, **waits: float) -> Any:
    """Quiet, and about this project alone; waits that an older wandb does not know are left out."""
    known = {key: value for key, value in waits.items() if key in wandb.Settings.model_fields}
    return wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        x_disable_stats=True,
        x_disable_meta=True,
        **known,
    )


def _required(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendUnavailable(
            f"found no {package}, tracking needs it: pip install 'moe-locality[wandb]', or leave "
            "the tracking section out"
        ) from error

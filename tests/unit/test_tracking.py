"""The tracker, read back from the run file that wandb writes offline: no network, no mock."""

import io
import json
import socket
import struct
import subprocess
import sys

import pytest

from moe_locality import tracking
from moe_locality.config import TrackingConfig
from moe_locality.errors import BackendUnavailable, ConfigError
from moe_locality.tracking import Tracker, package_versions, start_tracking

wandb = pytest.importorskip("wandb")
BLOCK, HEAD, FILE_HEAD = 32_768, 7, 7


def records(path):
    """Yield the protobuf records of a run file: LevelDB log framing in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content = path.read_bytes()
    assert content[:4] == b":W&B"
    place, joined = FILE_HEAD, b""
    while place + HEAD <= len(content):
        left = BLOCK - place % BLOCK
        if left < HEAD:
            place += left
            continue
        _, size, part = struct.unpack("<IHB", content[place : place + HEAD])
        if part == 0:
            return
        joined += content[place + HEAD : place + HEAD + size]
        place += HEAD + size
        if part in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(joined)
            joined = b""


class ReadBack:
    """What a finished offline run holds."""

    def __init__(self, directory):
        wandb.teardown()  # run.finish() may return before the writer's last block is on disk
        (file,) = directory.glob("run-*.wandb")
        self.folder = directory
        self.records = list(records(file))

    def of(self, kind):
        return [getattr(r, kind) for r in self.records if r.WhichOneof("record_type") == kind]

    def history(self):
        return [
            {(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in line.item}
            for line in self.of("history")
        ]

    def config(self):
        return {u.key: json.loads(u.value_json) for u in self.of("run")[0].config.update}

    def summary(self):
        pairs = [u for s in self.of("summary") for u in s.update]
        return {u.key or ".".join(u.nested_key): json.loads(u.value_json) for u in pairs}


@pytest.fixture
def offline(tmp_path, monkeypatch):
    for name, value in {
        "WANDB_SILENT": "true",
        "WANDB_CACHE_DIR": str(tmp_path / "cache"),
        "WANDB_DATA_DIR": str(tmp_path / "data"),
        "WANDB_CONFIG_DIR": str(tmp_path / "config"),
    }.items():
        monkeypatch.setenv(name, value)
    yield TrackingConfig(
        project="locality", group="exp1", name="placed", job_type="train", dir=str(tmp_path / "w")
    )
    wandb.teardown()


def small_png() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (0, 114, 178)).save(buffer, format="png")
    return buffer.getvalue()


def test_an_offline_run_holds_what_was_logged(offline, tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text('{"format_version": 1}')
    with start_tracking(offline, run_config={"dispatch": {"exchange": "flat"}}) as tracker:
        assert isinstance(tracker, Tracker)
        for step in range(3):
            tracker.log(
                {"traffic/cross_node_bytes": 100.0 * step, "load/balancedness": 0.5},
                tokens=512 * step,
            )
        tracker.log_table("placement/layers", ["layer", "copies"], [[1, 2.5], [3, 1.5]])
        tracker.log_image("figures/traffic", small_png(), caption="simulated")
        tracker.log_artifact("plan", "plan", [plan], metadata={"digest": "abc"})
        tracker.log_summary({"quality/loss": 1.25})
        folder = tracker.directory
    back = ReadBack(folder)

    run = back.of("run")[0]
    assert (run.project, run.run_group, run.display_name, run.job_type) == (
        "locality",
        "exp1",
        "placed",
        "train",
    )
    config = back.config()
    assert config["dispatch"] == {"exchange": "flat"}
    assert config["versions"]["moe-locality"] == package_versions()["moe-locality"]
    assert "commit" in config

    lines = [h for h in back.history() if "traffic/cross_node_bytes" in h]
    assert [h["traffic/cross_node_bytes"] for h in lines] == [0, 100, 200]
    assert [h["tokens"] for h in lines] == [0, 512, 1024]
    assert back.summary()["quality/loss"] == 1.25

    metrics = {m.glob_name or m.name: m.step_metric for m in back.of("metric")}
    for family in ("traffic/*", "load/*", "quality/*", "time/*"):
        assert metrics[family] == "tokens"

    (table_file,) = (folder / "files" / "media" / "table").rglob("*.table.json")
    table = json.loads(table_file.read_text())
    assert (table["columns"], table["data"]) == (["layer", "copies"], [[1, 2.5], [3, 1.5]])
    assert len(list((folder / "files" / "media" / "images").rglob("*.png"))) == 1
    (artifact,) = [a for a in back.of("artifact") if a.type == "plan"]
    assert [entry.path for entry in artifact.manifest.contents] == ["plan.json"]
    assert json.loads(artifact.metadata) == {"digest": "abc"}


def test_an_online_run_without_network_goes_on_offline(offline, monkeypatch, caplog):
    """An online run whose server is not there stopped for 90 s and then raised. It waits [C1]
    for a short time, says so, and is offline.
    """
    with socket.socket() as silent:  # takes connections and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(tracking, "ONLINE_WAIT_S", 2.0)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        wandb.teardown()
        config = offline.model_copy(update={"mode": "online"})
        with start_tracking(config, step_metric="step") as tracker:
            tracker.log({"quality/loss": 1.0}, step=7)
    assert tracker.directory.name.startswith("offline-run-")
    assert f"`wandb sync {tracker.directory}` publishes it later" in caplog.text
    back = ReadBack(tracker.directory)
    assert [(h["step"], h["quality/loss"]) for h in back.history()] == [(7, 1.0)]
    assert {m.glob_name: m.step_metric for m in back.of("metric")}["quality/*"] == "step"


def test_two_runs_of_one_process_stay_apart(offline):
    first = start_tracking(offline)
    second = start_tracking(offline.model_copy(update={"name": "baseline"}))
    first.log({"quality/loss": 1.0}, tokens=1)
    second.log({"quality/loss": 2.0}, tokens=1)
    folders = first.directory, second.directory
    first.finish()
    second.finish()
    losses = [[h["quality/loss"] for h in ReadBack(f).history()] for f in folders]
    assert losses == [[1.0], [2.0]]


@pytest.mark.parametrize(
    ("config", "rank"),
    [
        (None, 0),
        (TrackingConfig(mode="disabled"), 0),
        (TrackingConfig(enabled=False), 0),
        (TrackingConfig(), 3),
    ],
)
def test_where_tracking_is_off_nothing_is_written(config, rank, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with start_tracking(config, rank=rank) as tracker:
        assert not tracker.active
        tracker.log({"quality/loss": 1.0}, tokens=3)
        tracker.log_summary({"a": 1})
        tracker.log_table("t", ["a"], [[1]])
        tracker.log_image("i", b"")
        tracker.log_artifact("a", "plan", ["nowhere"])
        tracker.log_reference("a", "trace", "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_a_reference_leaves_out_what_is_still_being_written(offline, tmp_path):
    """The trace of a training referred to temporary shards of other ranks, soon gone."""
    trace = tmp_path / "trace"
    (trace / ".tmp-dir").mkdir(parents=True)
    for name in ("part-00000-00000.parquet", ".tmp-1.parquet", ".tmp-dir/part.parquet"):
        (trace / name).write_bytes(b"x")
    with start_tracking(offline) as tracker:
        tracker.log_reference("trace", "trace", trace)
        directory = tracker.directory
    (artifact,) = ReadBack(directory).of("artifact")
    refs = [entry.ref for entry in artifact.manifest.contents]
    assert refs == [(trace / "part-00000-00000.parquet").resolve().as_uri()]


def test_an_artifact_of_nothing_is_refused(offline, tmp_path):
    with (
        pytest.raises(ConfigError, match=r"found nothing at .*gone"),
        start_tracking(offline) as tracker,
    ):
        tracker.log_artifact("plan", "plan", [tmp_path / "gone"])


def test_a_directory_that_cannot_be_made_is_named(offline, tmp_path):
    (tmp_path / "file").write_text("")
    bad = offline.model_copy(update={"dir": str(tmp_path / "file" / "w")})
    with pytest.raises(ConfigError, match="cannot make the wandb directory"):
        start_tracking(bad)


def test_without_wandb_the_message_says_how_to_install_it():
    code = (
        "import sys; sys.modules['wandb'] = None\n"
        "from moe_locality.config import TrackingConfig\n"
        "from moe_locality.errors import BackendUnavailable\n"
        "from moe_locality.tracking import start_tracking\n"
        "try: start_tracking(TrackingConfig())\n"
        "except BackendUnavailable as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "pip install 'moe-locality[wandb]'" in done.stdout, done.stderr
    assert issubclass(BackendUnavailable, RuntimeError)


def test_versions_are_read_without_importing_the_packages():
    code = (
        "import sys; from moe_locality.tracking import package_versions\n"
        "assert package_versions()['numpy']; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "deepspeed", "numpy", "wandb"} & set(done.stdout.split())

"""Configuration of a run and what it reports."""

import json

import pytest

from examples.lm.training import RUN_SIZES, Metrics, ds_config


def test_the_default_configuration_neither_clips_nor_compiles():
    config = ds_config(None, RUN_SIZES["demo"], 40)
    assert config["train_micro_batch_size_per_gpu"] == RUN_SIZES["demo"].per_rank
    assert config["gradient_clipping"] == 0  # absent means 1.0 to DeepSpeed
    assert config["optimizer"]["params"]["torch_adam"] is True
    assert config["scheduler"]["params"]["total_num_steps"] == 40


def test_a_configuration_file_wins(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "SGD"}}))
    config = ds_config(str(path), RUN_SIZES["tiny"], 4)
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["optimizer"] == {"type": "SGD"}
    assert "scheduler" not in config
    path.write_text(json.dumps({"gradient_accumulation_steps": 2}))
    with pytest.raises(ValueError, match="gradient_accumulation_steps is 2: the loop of this"):
        ds_config(str(path), RUN_SIZES["tiny"], 4)


def test_metrics_are_one_object_per_step_and_progress_lines(tmp_path, capsys):
    path = tmp_path / "new" / "metrics.jsonl"
    metrics = Metrics(str(path), total=6, append=False)
    for step in range(1, 6):
        metrics.step(step, loss=4.0 - step / 10, aux_loss=1.0, step_s=0.1)
    metrics.advance("evaluation")
    metrics.write(kind="eval", eval_loss=3.0)
    metrics.close()
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [entry.get("step") for entry in entries] == [1, 2, 3, 4, 5, None]
    assert entries[4]["loss"] == pytest.approx(3.5)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "progress 1 6 step 1 loss 3.900",
        "progress 5 6 step 5 loss 3.500",
        "progress 6 6 evaluation",
    ]


@pytest.mark.parametrize(("append", "lines"), [(True, 2), (False, 1)])
def test_a_resumed_run_appends_and_a_new_one_starts_over(tmp_path, append, lines):
    path = tmp_path / "metrics.jsonl"
    for again in (False, append):
        metrics = Metrics(str(path), total=1, append=again)
        metrics.step(1, loss=1.0)
        metrics.close()
    assert len(path.read_text().splitlines()) == lines

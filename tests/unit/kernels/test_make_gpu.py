"""``make gpu`` end to end without a GPU: every part is gone through, and no figure comes out."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_a_dry_run_goes_through_and_claims_nothing(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed (pip install triton)")
    command = ["make", "-s", "gpu", "DRY=1", "PEERS=others"]
    script = f"{sys.executable} benchmarks/kernels.py"
    done = subprocess.run(
        [*script.split(), "--dry", "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    planned = subprocess.run([*command, "-n"], cwd=ROOT, capture_output=True, text=True)
    parts = "build,test,sanitize,ours,peers,quantize,layer"
    assert f"benchmarks/kernels.py --part {parts} --dry" in planned.stdout
    assert "PYTHONPATH=.:others" in planned.stdout
    report = json.loads((tmp_path / "kernels_dry.json").read_text())
    assert report["dry"] is True
    assert report["test"] == "ok"
    for part in ("ours", "peers", "quantize", "layer"):
        assert report[part]["shapes"]
        for rows in report[part]["shapes"].values():
            assert all("ran" in facts or "left_out" in facts for facts in rows.values()), rows
    assert "_us" not in (tmp_path / "kernels_dry.json").read_text()
    assert {"reference", "triton"} <= set(report["ours"]["backends"])
    peers = report["peers"]["shapes"]["dry"]
    assert peers["ours, triton"] == {"ran": True}
    assert peers["torch index_select + index_add"]["ran"]
    assert len(peers) > 10
    for name, facts in peers.items():
        if not name.startswith("ours"):
            assert facts["read_from"], name
            why = facts.get("left_out", "absent: ")
            assert why.startswith(("absent: ", "not run on a CPU: ")), f"{name} {why}"
    fused = report["quantize"]["shapes"]["dry"]["fused permute and quantize mxfp8 | triton"]
    assert fused == {"ran": True}
    assert not re.search(r"\d us\b|% of copy", done.stdout)
    assert "DRY RUN: no GPU, no figure" in done.stdout
    assert "no figure was measured" in done.stdout


def test_a_machine_without_a_gpu_is_told(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = subprocess.run(
        [sys.executable, "benchmarks/kernels.py", "--part", "ours", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "use --dry" in done.stdout

"""The two-line recording of a Hugging Face model gives a trace with both stages and all labels."""

import importlib.util
from pathlib import Path

import numpy as np

from moe_locality import read_trace
from moe_locality.trace import DECODE, PREFILL

SCRIPT = Path(__file__).parents[3] / "examples" / "hf_record.py"


def test_prefill_and_decode_of_every_request_are_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))  # as when it is run as a script
    spec = importlib.util.spec_from_file_location("hf_record", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(["--out", str(tmp_path / "trace"), "--requests", "8", "--new-tokens", "3"])
    trace = read_trace(tmp_path / "trace")
    assert (trace.num_layers, trace.num_experts, trace.top_k) == (2, 16, 4)
    assert trace.num_tokens == 8 * (64 + 3)
    assert sorted(trace.domain) == ["arithmetic", "code", "markup", "prose"]
    for request in trace.request_ids:
        mine = trace.request_id == request
        assert np.bincount(trace.stage[mine], minlength=2).tolist() == [64, 3]
        assert trace.position[mine & (trace.stage == DECODE)].tolist() == [64, 65, 66]
        assert len(set(trace.domain_id[mine])) == 1
    assert (trace.expert_ids >= 0).all()
    assert PREFILL in trace.stage
    assert "536 tokens, 2 layers, top-4" in capsys.readouterr().out

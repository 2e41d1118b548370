import json
import subprocess
import sys

import numpy as np
import pytest

from moe_locality.analysis import analyze, drift
from moe_locality.errors import TraceError
from moe_locality.trace import RoutingTrace
from tests.unit.analysis.test_similarity import two_domains
from tests.unit.trace.cases import make_load_trace, make_trace


def test_everything_a_trace_can_tell():
    trace = two_domains(shift=3)
    result = analyze(trace, seed=3)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result == analyze(trace, seed=3)
    assert result["trace"]["content_hash"] == trace.content_hash()
    assert result["trace"]["num_tokens"] == 3000
    assert result["domains"]["names"] == ["a", "b"]
    assert result["domains"]["mean_js_bits"] > result["domains"]["mean_noise_floor_bits"]
    assert result["prefill_decode"]["num_requests"] == 60
    assert set(result["load"]["by_stage"]) == {"prefill", "decode"}
    assert list(result["left_out"]) == ["coactivation_pairs"]


def test_what_cannot_be_told_is_none_with_a_reason():
    result = analyze(make_load_trace())
    assert json.dumps(result, allow_nan=False)
    for part in ("prefill_decode", "overlap", "coactivation"):
        assert result[part] is None
        assert result["left_out"][part]
    single = analyze(make_trace(num_tokens=1, num_layers=1))
    assert single["domains"] is None
    assert "comparing needs 2" in single["left_out"]["domains"]
    assert single["coactivation"]["next_layer_information_bits"] is None
    assert json.dumps(single, allow_nan=False)


def test_missing_picks_are_counted():
    trace = make_trace(num_tokens=300)
    assert analyze(trace)["trace"]["missing_picks"] == int((trace.expert_ids < 0).sum()) > 0


def test_empty_traces_are_refused():
    """A trace without picks ended `analyze` with a TypeError, and drift was "0 of 2"."""
    trace = make_trace()
    nothing = trace.evolve(expert_ids=np.full_like(trace.expert_ids, -1))
    with pytest.raises(TraceError, match="no picks"):
        analyze(nothing)
    with pytest.raises(TraceError, match="expected picks on both sides"):
        drift.compare(trace, nothing)
    with pytest.raises(TraceError, match=r"empty trace \(0 rows"):
        analyze(make_trace(num_tokens=0))
    with pytest.raises(TraceError, match="0 layers"):
        analyze(make_trace().filter(layers=[]))


def test_real_summary(routing_data):
    result = analyze(RoutingTrace.from_npz(routing_data / "deepseek_v2_lite_esft_tasks.npz"))
    assert json.dumps(result, allow_nan=False)
    np.testing.assert_allclose(result["domains"]["mean_js_bits"], 0.1576, atol=6e-5)
    np.testing.assert_allclose(result["load"]["imbalance"]["mean"], 2.73, atol=6e-3)
    np.testing.assert_allclose(
        result["coactivation"]["top_5_percent_pair_share"]["mean"], 0.296, atol=6e-4
    )


def test_analysis_imports_no_torch():
    code = "import sys, moe_locality.trace, moe_locality.analysis; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

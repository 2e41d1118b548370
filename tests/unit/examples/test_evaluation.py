"""Rows of an evaluation: written whole, read back, compared request by request."""

import numpy as np
import pytest

from examples.lm.evaluation import (
    compare_evaluations,
    loss_by_domain,
    read_evaluation,
    write_evaluation,
)

DOMAINS = ("code", "prose")


def rows(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "request_id": np.arange(10, 16),
        "domain_id": np.array([0, 1] * 3, dtype=np.int32),
        "rank": np.zeros(6, dtype=np.int32),
        "loss": rng.random(6, dtype=np.float32),
        "last_logits": rng.random((6, 5), dtype=np.float32),
        "logits_digest": np.array([f"{i:016x}" for i in range(6)]),
    }


def test_written_rows_are_read_back(tmp_path):
    path = tmp_path / "deep" / "evaluation.npz"
    write_evaluation(rows(), DOMAINS, path)
    found = read_evaluation(path)
    assert found["domains"].tolist() == list(DOMAINS)
    for name, values in rows().items():
        assert np.array_equal(found[name], values)
    assert [file.name for file in path.parent.iterdir()] == ["evaluation.npz"]


def test_comparison_finds_the_request_that_differs():
    first, second = rows(), rows()
    second["loss"][2] += 0.5
    second["last_logits"][2, 1] -= 0.25
    second["logits_digest"][2] = "f" * 16
    found = compare_evaluations(first, second)
    assert found["requests"] == 6
    assert found["requests_bitwise_equal"] == 5
    assert found["max_loss_difference"] == pytest.approx(0.5)
    assert found["max_logit_difference"] == pytest.approx(0.25)


def test_other_requests_cannot_be_compared():
    second = rows()
    second["request_id"] = second["request_id"] + 1
    with pytest.raises(ValueError, match="6 and 6 requests that are not the same"):
        compare_evaluations(rows(), second)


def test_losses_by_domain_leave_out_a_domain_without_requests():
    found = loss_by_domain(rows(), (*DOMAINS, "markup"))
    assert list(found) == ["code", "prose"]
    assert found["code"] == pytest.approx(rows()["loss"][::2].mean())

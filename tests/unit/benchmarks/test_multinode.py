"""What the benchmark on nodes replays, predicts and writes: its pure parts."""

import csv
import itertools

import numpy as np
import pytest

from benchmarks import _multinode_page as page
from benchmarks import _multinode_rows as rows_of
from moe_locality.placement import PlacementPlan
from moe_locality.topology import ClusterTopology
from moe_locality.trace import RoutingTrace


@pytest.mark.parametrize(("experts", "top_k", "nodes"), [(8, 2, 2), (8, 3, 4), (6, 2, 3)])
def test_the_closed_form_is_the_mean_over_all_choices(experts, top_k, nodes):
    node_of = np.arange(experts) // (experts // nodes)
    picks = copies = 0
    for chosen in itertools.combinations(range(experts), top_k):
        away = [node for node in node_of[list(chosen)] if node != 0]
        picks += len(away)
        copies += len(set(away))
    assert rows_of.closed_form(experts, top_k, nodes) == pytest.approx(picks / copies)


def test_uniform_routes_repeat_no_expert_of_a_token():
    batches = rows_of.uniform_batches(ranks=2, tokens=50, experts=16, top_k=4)
    assert batches.shape == (1, 1, 2, 50, 4)
    ordered = np.sort(batches, axis=-1)
    assert (np.diff(ordered, axis=-1) > 0).all()
    assert (np.bincount(batches.ravel(), minlength=16) > 10).all()


def made(expert_ids, request_id, position) -> RoutingTrace:
    ids = np.asarray(expert_ids, np.int16)
    return RoutingTrace(
        model="made",
        num_experts=8,
        layer_ids=np.arange(ids.shape[1], dtype=np.int32),
        domain=("none",),
        expert_ids=ids,
        request_id=np.asarray(request_id),
        position=np.asarray(position, np.int32),
        stage=np.zeros(len(ids), np.uint8),
        domain_id=np.zeros(len(ids), np.int32),
    )


def test_requests_advance_together_after_the_tokens_that_are_skipped():
    # request 7 begins at position 10; layer 1 is layer 0 shifted by 4; the expert tells the token
    request, position = [5, 5, 5, 7, 7, 7, 9, 9], [0, 1, 2, 10, 11, 12, 0, 1]
    experts = [0, 1, 2, 3, 0, 1, 2, 3]
    trace = made([[[e], [e + 4]] for e in experts], request, position)
    homes = {5: 0, 7: 0, 9: 1}
    batches = rows_of.replayed_batches(trace, homes, ranks=2, tokens=3, steps=2, skip=1)
    assert batches.shape == (2, 2, 2, 3, 1)
    # rank 0: second tokens of 5 and 7, then the third ones, then from the start again
    assert batches[:, 0, 0, :, 0].ravel().tolist() == [1, 0, 2, 1, 1, 0]
    assert (batches[:, 1] == batches[:, 0] + 4).all()
    assert set(batches[:, 0, 1].ravel().tolist()) == {3}
    with pytest.raises(ValueError, match="rank 2 is home to no token"):
        rows_of.replayed_batches(trace, homes, ranks=3, tokens=3, steps=1, skip=1)


def test_predicted_rows_are_those_counted_by_hand():
    rng = np.random.default_rng(0)
    batches = rng.random((2, 3, 4, 20, 8)).argsort(axis=-1)[..., :3].astype(np.int16)
    slots = np.stack([rng.permutation(8) for _ in range(3)])
    linear = PlacementPlan.linear(8, [0, 1, 2], 2, 2)
    fields = {**linear.to_dict(), "physical_to_logical_map": slots.tolist()}
    plan = PlacementPlan.from_dict(fields)
    topology = ClusterTopology.uniform(2, 2)
    found = rows_of.predicted_rows(batches, plan, topology)
    for step, layer in itertools.product(range(2), range(3)):
        node_of = np.empty(8, int)
        node_of[slots[layer]] = np.arange(8) // 4
        nodes, home = node_of[batches[step, layer]], (np.arange(4) // 2)[:, None]
        away = nodes != home[..., None]
        assert found["flat"][step, layer] == away.sum()
        assert found["hierarchical"][step, layer] == away.any(axis=-1).sum()  # one other node


def ranks_of(marks):
    """Two nodes of two ranks; rank r of step s sent 100 r + s, and counted r rows of 10 bytes."""
    return [
        {
            "node": f"node{rank // 2}",
            "cases": [
                [
                    {"seconds": 1.0 + step, "cpu_s": rank}
                    | {m: {"link": [100 * rank + step, 7], "counted": [rank, 10]} for m in marks}
                    for step in range(3)
                ]
            ],
        }
        for rank in range(4)
    ]


def test_a_nodes_link_counts_once_and_our_counters_on_every_rank():
    found = rows_of.gathered(ranks_of(["step"]), 0)
    assert found["seconds"].tolist() == [1, 2, 3]
    assert found["cpu_s"].tolist() == [6, 6, 6]
    assert found["sent"].tolist() == [[0, 200], [1, 201], [2, 202]]
    assert found["received"].tolist() == [[7, 7]] * 3
    assert found["rows"].tolist() == [6] * 3
    assert found["counted"].tolist() == [40] * 3
    assert "dispatch_sent" not in found
    assert rows_of.gathered(ranks_of(["step", "dispatch"]), 0)["dispatch_rows"].tolist() == [6] * 3


def test_counted_rows_that_were_not_predicted_end_the_run():
    rows_of.check_rows("flat", np.array([4, 8]), np.array([4, 8]))
    with pytest.raises(RuntimeError, match=r"flat: counted \[4, 8\] rows between nodes, predicted"):
        rows_of.check_rows("flat", np.array([4, 8]), np.array([4, 9]))


def measured(scale: float, steps: int = 3) -> dict[str, np.ndarray]:
    sent = np.full((steps, 2), 1_000_000 * scale)
    return {
        "seconds": scale * np.arange(1, steps + 1),
        "cpu_s": np.full(steps, 0.5),
        "sent": sent,
        "received": sent / 2,
        "rows": np.full(steps, 1000 * scale),
        "counted": np.full(steps, 1_900_000 * scale),
        "dispatch_sent": sent / 4,
        "dispatch_counted": np.full(steps, 450_000 * scale),
    }


@pytest.fixture
def results(tmp_path):
    """A table of results with older rows of the same cases before the ones that count."""
    bytes_found = {"flat": measured(4), "hierarchical": measured(1)}
    coded = {"none": measured(2), "mxfp8": measured(1)}
    steps = {"DeepSpeed": measured(4), "ours, linear": measured(2), "ours, plan": measured(1)}
    compared = [("DeepSpeed", "ours, plan"), ("ours, linear", "ours, plan")]
    rows = [
        rows_of.row("2 nodes x 4, uniform", "fewer, on the wire", 99, "x", "old"),
        *rows_of.bytes_rows("2 nodes x 4, uniform", bytes_found, 4.01, "made"),
        *rows_of.payload_rows("2 nodes x 4, uniform", coded, "made"),
        *rows_of.step_rows("2 nodes, slow", steps, compared, bytes_per_s=1e6),
    ]
    path = tmp_path / "results.csv"
    columns = ["benchmark", "case", "metric", "value", "unit", "kind", "baseline", "note"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, "device", "versions", "commit", "date"], "")
        writer.writeheader()
        writer.writerows(rows)
    return path


PAGE = """# Page
<!-- multinode bytes -->
old
<!-- multinode end -->
between
<!-- multinode payload -->
<!-- multinode end -->
<!-- multinode steps -->
<!-- multinode end -->
after
"""


def test_the_page_shows_the_newest_rows(results, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    page.write_page(path, results, "2 nodes, slow")
    text = path.read_text()
    assert (
        "| 2 x 4 | 7.6, 8 | 1.9, 2 | +5.3 % and +5.3 % | 4.00x | 4.00x | 4.00x | 4.01x | 3.9x |"
        in text
    )
    assert "| MXFP8 | 0.45, " not in text
    assert "| MXFP8 | 0.45 | 0.5 | 2.00x | 2.00x | 1.9x |" in text
    assert "| DeepSpeed | 8,000 (4,000 to 12,000) | 8 | 4 | 500 |  |" in text
    assert "| ours, plan | 2,000 (1,000 to 3,000) | 2 | 1 | 500 | 4.00x |" in text
    assert "**ours, plan**, against ours, linear: time -50 % (aim -20 %)." in text
    assert "cases `2 nodes, slow: LAYER`: 3 rounds in turns" in text
    assert "between" in text
    assert "old" not in text
    assert "99" not in text
    assert text.endswith("<!-- multinode end -->\nafter\n")
    page.write_page(path, results, "2 nodes, slow")
    assert path.read_text() == text
    for name in ("bytes", "steps"):
        picture = tmp_path / "pictures" / f"multinode_{name}.svg"
        assert picture.stat().st_size < 60_000
        assert "<text" in picture.read_text()


def test_a_page_without_a_place_for_a_table_is_refused(results, tmp_path):
    path = tmp_path / "page.md"
    path.write_text(PAGE.replace("multinode payload", "multinode"))
    with pytest.raises(ValueError, match="found 0 places for the table 'payload', expected one"):
        page.write_page(path, results, "2 nodes, slow")
    with pytest.raises(ValueError, match="no rows of times that begin with 'elsewhere'"):
        page.write_page(path, results, "elsewhere")


def test_times_are_compared_round_by_round():
    slow, fast = measured(1), measured(1)
    slow["seconds"], fast["seconds"] = np.array([2.0, 9, 4]), np.array([1.0, 3, 4])
    rows = rows_of.step_rows("here", {"a": slow, "b": fast}, [("a", "b")], bytes_per_s=1e6)
    found = {(row["case"], row["metric"]): row for row in rows}
    assert found["here: b", "speed, median of rounds"]["value"] == "2"
    assert found["here: b", "speed, median of rounds"]["note"] == "rounds from 1.00 to 3.00"
    assert found["here: a", "busiest link at its rate"]["value"] == "1000"
    assert found["here: a", "busiest link at its rate"]["kind"] == "simulated"

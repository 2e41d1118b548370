"""SGLang's expert-distribution dumps, and the torch files that they are in."""

import io
import json
import logging
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.errors import TraceError
from moe_locality.trace import DECODE, PREFILL, import_trace
from moe_locality.trace.importers import find_format
from moe_locality.trace.reading import read_torch_file

torch = pytest.importorskip("torch")

# 2 layers x 6 slots for 4 experts; slot 4 and 5 are replicas
MAP = torch.tensor([[3, 2, 1, 0, 3, 2], [0, 1, 2, 3, 0, 1]])


def save(path, content):
    torch.save(content, path)
    return path


# -- the file --


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_tensors_are_read_as_torch_reads_them(tmp_path_factory, seed, legacy_name):
    rng = np.random.default_rng(seed)
    kinds = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.float32, torch.float16)
    base = torch.tensor(rng.integers(0, 99, (4, 3, 5))).to(kinds[seed % len(kinds)])
    content = {
        "plain": base,
        "view": base[1:, :, ::2],
        "turned": base.permute(2, 0, 1),
        "scalar": base[0, 0, 0],
        "empty": base[:0],
        "flags": base > 50,
        "rest": [1, "x", None, 2.5, (3, True)],
    }
    name = "plain" if legacy_name else "dump.pt"
    path = save(tmp_path_factory.mktemp("torch") / name, content)
    ours = read_torch_file(path)
    theirs = torch.load(path, weights_only=True)
    assert ours.keys() == theirs.keys()
    assert ours["rest"] == theirs["rest"]
    for key, tensor in theirs.items():
        if key != "rest":
            expected = tensor.numpy()
            assert ours[key].dtype == expected.dtype
            np.testing.assert_array_equal(ours[key], expected)


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def write_archive(path, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("dump/data.pkl", content)
    return path


def test_a_hostile_pickle_runs_nothing(tmp_path):
    marker = tmp_path / "was_run"
    content = pickle.dumps({"logical_count": Hostile(marker)})
    pickle.loads(content)["logical_count"].close()
    assert marker.exists()  # it would work
    marker.unlink()
    path = write_archive(tmp_path / "t.pt", content)
    assert find_format(path) == "sglang-dump"
    with pytest.raises(TraceError, match=r"asks for (io|_io)\.open, .* nothing was run"):
        import_trace(path)
    assert not marker.exists()


def test_names_inside_known_modules_are_refused_too(tmp_path):
    for name in (b"torch\nload", b"torch._utils\n_rebuild_parameter", b"collections\nCounter"):
        path = write_archive(tmp_path / "t.pt", b"\x80\x02c" + name + b"\n)R.")
        with pytest.raises(TraceError, match="nothing was run"):
            read_torch_file(path)


@pytest.mark.parametrize(
    ("shape", "stride", "offset"),
    [((10,), (1,), 0), ((2, 4), (4, 1), 1), ((1000, 1000), (0, 0), 0), ((2,), (-1,), 1)],
)
def test_tensors_outside_their_storage_are_refused(tmp_path, shape, stride, offset):
    from moe_locality.trace.reading import _rebuild_tensor

    with pytest.raises(ValueError, match="found a tensor of shape"):
        _rebuild_tensor(np.arange(8), offset, shape, stride, False, None)


def test_old_torch_files_are_refused(tmp_path):
    path = tmp_path / "t.pt"
    torch.save({"x": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(TraceError, match="cannot be read as a torch file"):
        import_trace(path)


# -- the dumps --


def stat_dump(path):
    counts = torch.zeros(4, 3, 5, dtype=torch.int32)
    counts[0, 1] = torch.tensor([1, 2, 3, 0, 0])
    counts[2, 2] = torch.tensor([0, 0, 4, 0, 1])
    return save(path, {"rank": 0, "logical_count": counts, "average_utilization_rate": None})


def test_counts(tmp_path):
    trace = import_trace(stat_dump(tmp_path / "t.pt"), model="m")
    assert (trace.kind, trace.num_experts, trace.model) == ("load", 5, "m")
    assert trace.layer_ids.tolist() == [1, 2]
    assert trace.step.tolist() == [0, 2]
    assert trace.expert_load.tolist() == [
        [[1, 2, 3, 0, 0], [0] * 5],
        [[0] * 5, [0, 0, 4, 0, 1]],
    ]
    with pytest.raises(TraceError, match="counts of 5 experts, expected 8"):
        import_trace(tmp_path / "t.pt", num_experts=8)


def pass_record(number, rank, counts):
    return {
        "forward_pass_id": number,
        "rank": rank,
        "gatherer_key": "primary",
        "global_physical_count": torch.tensor(counts, dtype=torch.int32),
    }


def test_passes_of_several_ranks_add_up(tmp_path):
    one = [[1, 0, 0, 0, 2, 0], [0, 0, 0, 0, 0, 5]]
    other = [[0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    for rank, counts in enumerate((one, other)):
        records = [pass_record(7, rank, counts)]
        save(tmp_path / f"{rank}.pt", {"records": records, "last_physical_to_logical_map": MAP})
    trace = import_trace(tmp_path)
    assert trace.step.tolist() == [7]
    assert trace.expert_load.tolist() == [[[0, 0, 1, 3], [1, 5, 0, 0]]]
    save(
        tmp_path / "0.pt", {"records": records, "last_physical_to_logical_map": MAP}
    )  # rank 1 again
    with pytest.raises(TraceError, match="forward pass 7 of rank 1 twice"):
        import_trace(tmp_path)


def token_record(number, physical, positions, lengths, mode, rank=0):
    """``physical`` [tokens][layers][K]; SGLang keeps 8 columns."""
    picks = torch.full((2, len(physical), 8), -1, dtype=torch.int32)
    picks[:, :, :2] = torch.tensor(physical, dtype=torch.int32).reshape(-1, 2, 2).transpose(0, 1)
    return {
        "forward_pass_id": number,
        "rank": rank,
        "gatherer_key": "primary",
        "input_ids": [5] * len(physical),
        "positions": positions,
        "extend_seq_lens": lengths,
        "forward_mode": mode,
        "topk_ids_of_layer": picks,
        "misc_objects": [],
        "global_physical_count": torch.zeros(2, 6, dtype=torch.int32),
    }


def token_dump(path, rank=0):
    """Prompts of 2 and 1 tokens, then two decode steps of both."""
    records = [
        token_record(
            3, [[[0, 1], [0, 1]], [[2, 3], [2, 3]], [[4, 1], [4, 3]]], [0, 1, 0], [2, 1], 1, rank
        ),
        token_record(4, [[[5, 2], [5, 2]], [[0, 3], [1, 0]]], [2, 1], None, 2, rank),
        token_record(5, [[[1, 0], [1, 0]], [[3, 2], [3, 2]]], [3, 2], None, 2, rank),
    ]
    return save(path, {"records": records, "last_physical_to_logical_map": MAP})


def test_tokens(tmp_path):
    trace = import_trace(token_dump(tmp_path / "t.pt"))
    assert (trace.num_experts, trace.top_k) == (4, 2)
    assert trace.layer_ids.tolist() == [0, 1]
    assert trace.stage.tolist() == [PREFILL] * 3 + [DECODE] * 4
    assert trace.position.tolist() == [0, 1, 0, 2, 1, 3, 2]
    assert trace.request_id.tolist() == [0, 0, 1, 0, 1, 0, 1]
    assert trace.step.tolist() == [3, 3, 3, 4, 4, 5, 5]
    # physical ids became logical: slots 0, 1 of layer 0 hold experts 3, 2
    assert trace.expert_ids[:3].tolist() == [
        [[3, 2], [0, 1]],
        [[1, 0], [2, 3]],
        [[3, 2], [0, 3]],
    ]


def test_ranks_that_recorded_the_same_tokens(tmp_path, caplog):
    token_dump(tmp_path / "0.pt", rank=0)
    token_dump(tmp_path / "1.pt", rank=1)
    with caplog.at_level(logging.WARNING):
        trace = import_trace(tmp_path)
    assert "left out tokens of ranks [1]" in caplog.text
    assert trace.same_content(import_trace(tmp_path / "0.pt"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "found a list, expected an SGLang"),
        ({"other": 1}, r"the keys \['other'\]"),
        ({"records": [], "last_physical_to_logical_map": MAP}, "no record of a forward pass"),
        ({"records": [{}], "last_physical_to_logical_map": MAP}, "forward_pass_id None"),
        (
            {"records": [{}], "last_physical_to_logical_map": None},
            "last_physical_to_logical_map as",
        ),
        (
            {"records": [{}], "last_physical_to_logical_map": [[0, 10**12]]},
            r"the expert 1000000000000 \(of 32767 at most\)",
        ),
        ({"logical_count": torch.zeros(2, 2, 2)}, "logical_count as float32"),
        ({"logical_count": torch.zeros(2, 2, 2, dtype=torch.int32)}, "no count above 0"),
        ({"logical_count": torch.zeros(2, 2, dtype=torch.int32)}, r"logical_count as int32 of"),
    ],
)
def test_wrong_dumps_are_named(tmp_path, content, message):
    path = save(tmp_path / "t.pt", content)
    with pytest.raises(TraceError, match=message) as caught:
        import_trace(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("topk_ids_of_layer", torch.full((2, 2, 8), 6), "outside a map"),
        ("topk_ids_of_layer", torch.zeros(3, 2, 8, dtype=torch.int32), "outside a map"),
        ("positions", [0], "1 positions for 2 tokens"),
        ("extend_seq_lens", [9], "pieces of 9 tokens in a pass of 2"),
        ("rank", -1, "rank -1 in a record"),
    ],
)
def test_wrong_records_are_named(tmp_path, key, value, message):
    record = token_record(0, [[[0, 1], [0, 1]], [[2, 3], [2, 3]]], [0, 1], [2], 1)
    record[key] = value
    path = save(tmp_path / "t.pt", {"records": [record], "last_physical_to_logical_map": MAP})
    with pytest.raises(TraceError, match=message):
        import_trace(path)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_dumps_end_in_a_trace_error(tmp_path_factory, data):
    """Bytes changed in the file, or in the pickle of a file that is whole otherwise."""
    folder = tmp_path_factory.mktemp("damaged")
    make = data.draw(st.sampled_from([stat_dump, token_dump]))
    path = make(folder / "t.pt")
    inside = data.draw(st.booleans())
    if inside:
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        name = next(n for n in entries if n.endswith("data.pkl"))
        content = bytearray(entries[name])
    else:
        content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[at] = data.draw(st.integers(0, 255))
        else:
            del content[at : at + data.draw(st.integers(1, 40))]
        content = content or bytearray(b"\0")
    if inside:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for other, value in entries.items():
                archive.writestr(other, bytes(content) if other == name else value)
        content = buffer.getvalue()
    path.write_bytes(bytes(content))
    logging.disable(logging.WARNING)
    try:
        import_trace(path)
    except TraceError:
        pass
    finally:
        logging.disable(logging.NOTSET)


# -- layers of different sizes --

MIXED = torch.tensor([[3, 2, 1, 0, 3, 2], [0, 1, 0, 1, 0, 1]])  # layer 1 has 2 experts


@pytest.mark.parametrize("mode", ["per_token", "per_pass", "json"])
def test_layers_of_different_sizes_are_refused_or_taken_apart(tmp_path, mode):
    """They were read as if all had the largest number of experts [D3]."""
    path = tmp_path / "t.pt"
    if mode == "per_token":
        token_dump(path)
        records = torch.load(path)["records"]
    else:
        records = [pass_record(7, 0, [[1, 0, 2, 0, 0, 4], [0, 3, 0, 0, 5, 0]])]
    if mode == "json":
        path = tmp_path / "t.json"
        path.write_text(json.dumps({"logical_count": [[[0, 2, 4, 1], [5, 3]]]}))
    else:
        save(path, {"records": records, "last_physical_to_logical_map": MIXED})
    found = r"different numbers of experts \(4 in layers \[0\], 2 in layers \[1\]\), expected one"
    with pytest.raises(TraceError, match=f"{found}.*--layers 0"):
        import_trace(path)
    load = {}
    for layer, experts in ((0, 4), (1, 2)):
        trace = import_trace(path, layers=[layer])
        assert (trace.layer_ids.tolist(), trace.num_experts) == ([layer], experts)
        load[layer] = trace.load()[0].tolist()
    if mode == "per_token":
        assert (sum(load[0]), sum(load[1])) == (14, 14)
    else:
        assert load == {0: [0, 2, 4, 1], 1: [5, 3]}


def test_dense_layers_have_no_number_of_experts(tmp_path):
    """Maps and counts have a row for them too. [D3]"""
    table = torch.cat([MAP, torch.zeros(1, 6, dtype=torch.int64)])
    records = [pass_record(7, 0, [[1, 0, 0, 0, 2, 0], [0, 0, 0, 0, 0, 5], [0] * 6])]
    path = save(tmp_path / "t.pt", {"records": records, "last_physical_to_logical_map": table})
    assert import_trace(path).num_experts == 4
    (tmp_path / "t.json").write_text(json.dumps({"logical_count": [[], [1, 2], [0, 3]]}))
    trace = import_trace(tmp_path / "t.json")
    assert (trace.num_experts, trace.layer_ids.tolist()) == (2, [1, 2])


# -- idle passes, speculative decoding --


def test_idle_passes_are_skipped(tmp_path):
    """A pass without tokens, as ranks of attention data parallelism have them, refused the [E1]
    whole recording: "found positions as float64 of shape (0,)"."""
    plain = import_trace(token_dump(tmp_path / "t.pt"))
    records = torch.load(tmp_path / "t.pt")["records"]
    idle = [token_record(n, [], [], lengths, 4) for n, lengths in ((2, None), (9, []))]
    content = {"records": [idle[0], *records, idle[1]], "last_physical_to_logical_map": MAP}
    assert import_trace(save(tmp_path / "idle.pt", content)).same_content(plain)
    for rank in range(2):
        idle[0]["rank"] = rank
        save(tmp_path / f"{rank}.pt", {**content, "records": [dict(idle[0])]})
    with pytest.raises(TraceError, match="no token in any forward pass"):
        import_trace(tmp_path / "0.pt")


def verify_record(number, roots, drafts):
    """A pass that verifies ``drafts`` tokens of each request, the first at its root."""
    positions = [root + i for root in roots for i in range(drafts)]
    physical = [[[p % 4, (p + 1) % 4]] * 2 for p in positions]
    return token_record(number, physical, positions, None, 5)


def test_speculative_decoding_keeps_requests_whole(tmp_path):
    """Each draft token became a request of its own; [D6]
    now a request goes on from pass to pass, and draft tokens that were rejected are no tokens of
    it."""
    prompt = [[[p % 4, (p + 1) % 4]] * 2 for p in (0, 1, 2, 0, 1)]
    records = [
        token_record(1, prompt, [0, 1, 2, 0, 1], [3, 2], 1),
        verify_record(2, [3, 2], 4),
        verify_record(3, [5, 6], 4),  # 2 and 4 accepted
        verify_record(4, [9, 7], 4),  # 4 and 1
    ]
    path = save(tmp_path / "t.pt", {"records": records, "last_physical_to_logical_map": MAP})
    trace = import_trace(path)
    assert sorted(set(trace.request_id.tolist())) == [0, 1]
    for request, last in ((0, 9), (1, 7)):
        rows = trace.request_id == request
        assert trace.position[rows].tolist() == list(range(last + 1))
        slots = [[p % 4, (p + 1) % 4] for p in range(last + 1)]
        assert trace.expert_ids[rows, 1].tolist() == slots  # layer 1: slot = expert below 4
        assert trace.stage[rows].tolist() == [PREFILL] * (3 - request) + [DECODE] * (
            last - 2 + request
        )


def test_a_wrong_position_among_drafts_makes_no_list_up_to_it(tmp_path):
    record = {**verify_record(1, [3], 4), "extend_seq_lens": [4]}
    record["positions"] = torch.tensor([3, 4, 5, 10**12])
    path = save(tmp_path / "t.pt", {"records": [record], "last_physical_to_logical_map": MAP})
    assert import_trace(path).position.tolist() == [3]  # drafts of a last pass are not sure


def test_trees_of_drafts_keep_what_is_sure(tmp_path):
    """Of two drafts for one position, a dump does not say which was accepted. [D6]"""
    tree = [3, 4, 4, 5]
    records = [
        token_record(1, [[[0, 1], [0, 1]]] * 3, [0, 1, 2], [3], 1),
        token_record(2, [[[0, 1], [0, 1]]] * 4, tree, None, 5),
        token_record(3, [[[0, 1], [0, 1]]] * 4, [p + 3 for p in tree], None, 5),
    ]
    path = save(tmp_path / "t.pt", {"records": records, "last_physical_to_logical_map": MAP})
    trace = import_trace(path)
    assert set(trace.request_id.tolist()) == {0}
    assert trace.position.tolist() == [0, 1, 2, 3, 5, 6]

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.errors import TraceError
from moe_locality.trace import RoutingTrace, read_trace, write_trace
from moe_locality.trace.npz import write_npz
from tests.unit.trace.cases import assert_equal, make_load_trace, make_trace, traces


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("npz")


@settings(max_examples=40, deadline=None)
@given(traces())
def test_round_trip(folder, trace):
    path = folder / "trace.npz"
    write_npz(trace, path)
    assert_equal(RoutingTrace.from_npz(path), trace)
    assert_equal(read_trace(str(path)), trace)


def test_round_trip_of_loads(tmp_path):
    trace = make_load_trace()
    write_trace(trace, tmp_path / "load.npz")
    assert_equal(RoutingTrace.from_npz(tmp_path / "load.npz"), trace)


def rewritten(tmp_path, **changes):
    """A good file with some arrays exchanged (None: left out)."""
    write_npz(make_trace(), tmp_path / "good.npz")
    with np.load(tmp_path / "good.npz") as file:
        arrays = dict(file)
    arrays.update(changes)
    path = tmp_path / "changed.npz"
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_ids": None}, "array 'expert_ids' is missing"),
        ({"phase": None}, "array 'phase' is missing"),
        ({"kind": np.array("other")}, "found kind 'other'"),
        ({"kind": np.array(3)}, "where one value is expected"),
        ({"format_version": np.array(2)}, "format_version 2, expected 1"),
        ({"top_k": np.array(3)}, "found 2 picks per token, expected top_k = 3"),
        ({"num_experts": np.array(4)}, "expert id .* expected -1 .no pick. to 3"),
        ({"num_experts": np.array([8])}, "where one value is expected"),
        ({"domain": np.array([1, 2, 3])}, "domain names as int64"),
        ({"domain": None}, "3 domain groups for 0 domains"),
        ({"model": np.array(["x"])}, "where one value is expected"),
        ({"expert_ids": np.array(["x"])}, "expert_ids of dtype <U1"),
        ({"layer_ids": np.array([None])}, "Object arrays cannot be loaded"),
    ],
)
def test_other_layouts_are_named(tmp_path, changes, message):
    path = rewritten(tmp_path, **changes)
    with pytest.raises(TraceError, match=message) as caught:
        RoutingTrace.from_npz(path)
    assert str(path) in str(caught.value)


def test_domains_and_extra_arrays_are_optional(tmp_path):
    path = rewritten(tmp_path, domain=None, domain_group=None, domain_id=None, note=np.array("x"))
    trace = RoutingTrace.from_npz(path)
    assert trace.domain == ()
    assert (trace.domain_id == -1).all()


def test_unsigned_ids_above_255_experts(tmp_path):
    ids = np.full((40, 3, 2), 65_535, np.uint16)
    ids[:, :, 0] = 299
    trace = RoutingTrace.from_npz(rewritten(tmp_path, expert_ids=ids, num_experts=np.array(300)))
    assert trace.expert_ids[0, 0].tolist() == [299, -1]
    ids[3, 1, 0] = 40_000
    with pytest.raises(TraceError, match="ids above 32767"):
        RoutingTrace.from_npz(rewritten(tmp_path, expert_ids=ids, num_experts=np.array(300)))


def test_absent_files_and_other_files(tmp_path):
    with pytest.raises(TraceError, match=r"found no file .*nowhere.npz"):
        RoutingTrace.from_npz(tmp_path / "nowhere.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(TraceError, match="single array"):
        RoutingTrace.from_npz(tmp_path / "one.npy")
    (tmp_path / "empty.npz").write_bytes(b"")
    with pytest.raises(TraceError, match=r"empty.npz cannot be read"):
        RoutingTrace.from_npz(tmp_path / "empty.npz")
    with pytest.raises(TraceError, match=r"ends in .npz"):
        write_npz(make_trace(), tmp_path / "trace.bin")
    with pytest.raises(TraceError, match="cannot be written"):
        write_npz(make_trace(), tmp_path / "no" / "such" / "folder.npz")


def attempt(path):
    try:
        return "", RoutingTrace.from_npz(path)
    except TraceError as error:
        return str(error), None


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_damaged_bytes_never_escape_as_another_error(folder, data):
    """Flip, cut or overwrite bytes anywhere: TraceError, or the very same content."""
    path = folder / "damaged.npz"
    trace = make_trace(num_tokens=8)
    write_npz(trace, path)
    if data.draw(st.booleans(), label="uncompressed"):
        with np.load(path) as file:
            np.savez(path, **dict(file))
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), label="cut"):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    message, result = attempt(path)
    assert str(path) in message if result is None else result.same_content(trace)


@pytest.mark.parametrize("place", ["find", "rfind"])
def test_a_damaged_name_does_not_hide_an_optional_array(tmp_path, place):
    """The archive names every array twice: before its bytes and in the directory at the end."""
    path = tmp_path / "trace.npz"
    write_npz(make_trace(), path)
    content = bytearray(path.read_bytes())
    content[getattr(content, place)(b"domain_group.npy")] ^= 1
    path.write_bytes(content)
    with pytest.raises(TraceError, match="cannot be read"):
        RoutingTrace.from_npz(path)


def test_writing_elsewhere_does_not_overwrite(tmp_path):
    path = tmp_path / "trace.npz"
    write_trace(make_trace(0), path)
    write_trace(make_trace(0), path)
    with pytest.raises(TraceError, match="found another trace"):
        write_trace(make_trace(1), path)
    write_trace(make_trace(1), path, overwrite=True)
    assert read_trace(path).same_content(make_trace(1))
    assert not read_trace(path).same_content(replace(make_trace(1), model="other"))

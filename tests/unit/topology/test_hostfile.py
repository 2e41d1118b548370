"""Our hostfile reader against DeepSpeed's own, over files and filters, valid and not."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moe_locality.errors import TopologyError
from moe_locality.topology import ClusterTopology
from moe_locality.topology.sources import read_hostfile, select_slots

HOSTFILES = {
    "two hosts": "worker-0 slots=4\nworker-1 slots=4\n",
    "comments and blank lines": "\n# fast\nworker-0 slots=2\n\n   # more\n  worker-1 slots=3\n",
    "uneven": "a slots=1\nb slots=3\nc slots=2",
    "tabs": "a\tslots=2\nb \t slots=2\n",
    "addresses": "10.0.0.1 slots=8\nhost-2.cluster.example slots=8\n",
    "text after the slots": "a slots=2 # leaf=A\nb slots=2 max_slots=4\n",
    "leading zero": "a slots=02\n",
    "windows line ends": "a slots=2\r\nb slots=2\r\n",
    "no slot on one host": "a slots=0\nb slots=2\n",
    "order kept": "z slots=1\na slots=1\nm slots=1\n",
    "bad: host twice": "a slots=2\nb slots=2\na slots=2\n",
    "bad: no slots": "a\n",
    "bad: MPI style": "a:4\n",
    "bad: word for number": "a slots=four\n",
    "bad: negative": "a slots=-1\n",
    "bad: spaces around =": "a slots = 4\n",
    "bad: upper case": "a SLOTS=4\n",
    "bad: slots first": "slots=4 a\n",
    "bad: empty": "",
    "bad: only comments": "# nothing\n\n",
    "bad: second line": "a slots=2\nthis is not a host\n",
}


def ours(path, include="", exclude=""):
    try:
        return list(select_slots(read_hostfile(path), include, exclude).items())
    except TopologyError:
        return "refused"


def deepspeeds(path, include="", exclude=""):
    runner = pytest.importorskip("deepspeed.launcher.runner")
    try:
        pool = runner.fetch_hostfile(str(path))
        kept = runner.parse_inclusion_exclusion(pool, include, exclude)
    except ValueError:
        return "refused"
    # where no host has a slot, the launcher ends without a process and without a word
    return list(kept.items()) if any(kept.values()) else "refused"


@pytest.mark.parametrize("name", HOSTFILES)
def test_hosts_and_slots_are_those_of_deepspeed(tmp_path, name):
    path = tmp_path / "hostfile"
    path.write_bytes(HOSTFILES[name].encode())
    assert ours(path) == deepspeeds(path)
    assert (ours(path) == "refused") == name.startswith("bad")


FILTERS = [
    ("a", ""),
    ("b@a", ""),
    ("a:0,2@c", ""),
    ("a:2,0,0", ""),
    ("a:1@a:3", ""),
    ("a@a:1", ""),
    ("", "a"),
    ("", "a:0@b"),
    ("", "a:0,1,2,3"),
    ("", "c:1@c:0"),
    ("a", "b"),
    ("d", ""),
    ("", "d"),
    ("d:0", ""),
    ("a:4", ""),
    ("", "b:9"),
    ("a:x", ""),
    ("a:", ""),
    ("a:0:1", ""),
    ("a@", ""),
    ("", "a@b@c"),
]


@pytest.mark.parametrize(("include", "exclude"), FILTERS)
def test_include_and_exclude_are_those_of_deepspeed(tmp_path, include, exclude):
    path = tmp_path / "hostfile"
    path.write_text("a slots=4\nb slots=2\nc slots=2\n")
    assert ours(path, include, exclude) == deepspeeds(path, include, exclude)


LINES = st.sampled_from(
    [
        *("a slots=0", "a slots=2", "b slots=3", "b slots=0", "  c\tslots=1", "d slots=2 # x"),
        *("", "# a slots=4", "a", "slots=2", "e slots=x", "f slots= 2"),
    ]
)
NAMED = st.sampled_from(["", "a", "b:0", "b:0,2@d", "a@c", "d:1@b:1", "c:0@c", "e", "a:2", "b:1,1"])


@example(lines=["a slots=2", "b slots=0"], include="", exclude="")
@example(lines=["a slots=0", "b slots=3"], include="a@b:0", exclude="")
@example(lines=["b slots=3", "a slots=0"], include="", exclude="b:0")
@given(lines=st.lists(LINES, max_size=6), include=NAMED, exclude=NAMED)
def test_any_file_and_filter_give_the_hosts_and_slots_of_deepspeed(
    tmp_path_factory, lines, include, exclude
):
    """A host with slots=0 was dropped where DeepSpeed keeps it; it stays now [E3].

    The launcher starts on it (and counts it in CROSS_SIZE), no rank does.
    """
    path = tmp_path_factory.getbasetemp() / "any_hostfile"
    path.write_text("\n".join(lines))
    assert ours(path, include, exclude) == deepspeeds(path, include, exclude)


def test_ranks_are_numbered_in_the_order_of_the_file(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("z slots=1\na slots=3\nm slots=0\nk slots=2\n")
    topology = ClusterTopology.from_hostfile(path)
    assert topology.node_names == ("z", "a", "k")
    assert topology.rank_to_node == (0, 1, 1, 1, 2, 2)
    filtered = ClusterTopology.from_hostfile(path, include="k@a:0,2", inter_node_gbps=25.0)
    assert (filtered.node_names, filtered.rank_to_node) == (("a", "k"), (0, 0, 1, 1))
    assert filtered.inter_node_gbps == 25.0


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a slots=2\n\n# x\nb slots\n", ["line 4", "'b slots'", "name slots=N"]),
        ("a slots=2\nb slots=1\na slots=2\n", ["line 3", "'a' again", "line 1", "each host once"]),
        ("# nothing\n", ["found no host", "worker-0 slots=8"]),
    ],
)
def test_an_error_names_the_file_the_line_and_what_was_expected(tmp_path, text, parts):
    path = tmp_path / "hosts.txt"
    path.write_text(text)
    with pytest.raises(TopologyError) as caught:
        read_hostfile(path)
    for part in ["hosts.txt", *parts]:
        assert part in str(caught.value)


def test_a_missing_or_binary_hostfile_is_an_error(tmp_path):
    with pytest.raises(TopologyError, match=r"cannot read the hostfile .*nowhere.*check the path"):
        read_hostfile(tmp_path / "nowhere")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TopologyError, match="cannot read the hostfile"):
        read_hostfile(tmp_path / "binary")


def test_a_wrong_filter_says_which_hosts_and_slots_there_are():
    slots = {"a": 2, "b": 1}
    with pytest.raises(TopologyError, match=r"found host 'c'.*expected one of the hostfile: a, b"):
        select_slots(slots, include="c:0")
    with pytest.raises(
        TopologyError, match=r"found slot '2' for host 'a'.*expected numbers 0 to 1"
    ):
        select_slots(slots, exclude="a:2")
    with pytest.raises(TopologyError, match=r"expected one of them: drop the other"):
        select_slots(slots, include="a", exclude="b")
    with pytest.raises(TopologyError, match=r"found no slot left after .*exclude='a@b'"):
        select_slots(slots, exclude="a@b")

"""The "moe_locality" section: what it takes, what it refuses, and where it is read from."""

import ast
import functools
import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from moe_locality import config as config_module
from moe_locality.config import SECTION, ClusterConfig, MoeLocalityConfig, read_config
from moe_locality.errors import ConfigError, MoeLocalityError

FULL = {
    "trace": {"path": "traces/a", "weights": True, "every_n_steps": 5, "shard_tokens": 1000},
    "plan": "plan.json",
    "cluster": {"num_nodes": 2, "ranks_per_node": 4},
    "dispatch": {"exchange": "hierarchical", "payload": "mxfp8"},
    "kernels": "triton",
    "experts": "loop",
    "tracking": {"project": "p", "mode": "disabled", "every_n_steps": 1},
}


def write(tmp_path, content):
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_nothing_gives_the_defaults(tmp_path):
    default = MoeLocalityConfig()
    assert (default.trace, default.plan, default.cluster, default.tracking) == (None,) * 4
    assert (default.dispatch.exchange, default.dispatch.payload) == ("auto", "none")
    assert default.kernels == "auto"
    without_section = write(tmp_path, {"train_batch_size": 8})
    for source in (None, {}, {SECTION: {}}, without_section, str(without_section)):
        assert read_config(source) == default


def test_the_same_section_from_a_file_a_ds_config_and_alone(tmp_path):
    ds_config = {"train_batch_size": 8, SECTION: FULL}
    path = write(tmp_path, ds_config)
    configs = [read_config(source) for source in (FULL, ds_config, path, str(path))]
    assert all(config == configs[0] for config in configs)
    assert configs[0].trace.every_n_steps == 5
    assert configs[0].trace.enabled  # naming a trace is asking for one
    assert configs[0].cluster == ClusterConfig(num_nodes=2, ranks_per_node=4)
    assert read_config(configs[0]) is configs[0]


def test_a_section_is_frozen():
    config = read_config(FULL)
    with pytest.raises(ValueError, match="frozen"):
        config.plan = "other.json"


@pytest.mark.parametrize(
    ("section", "where"),
    [
        ({"planx": "p"}, "planx"),
        ({"trace": {"path": "t", "every": 2}}, "trace.every"),
        ({"cluster": {"nodes": 2}}, "cluster.nodes"),
        ({"dispatch": {"payloads": "none"}}, "dispatch.payloads"),
        ({"tracking": {"entity": "me"}}, "tracking.entity"),
    ],
)
def test_an_unknown_key_is_named_with_its_place(section, where):
    with pytest.raises(ConfigError) as caught:
        read_config(section)
    assert f"  {where}: " in str(caught.value)
    assert "Extra inputs are not permitted" in str(caught.value)
    assert "docs/config.md" in str(caught.value)


def test_every_mistake_is_listed_at_once(tmp_path):
    path = write(tmp_path, {SECTION: {"kernels": "fast", "trace": {}, "nope": 1}})
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    message = str(caught.value)
    assert str(path) in message
    for where in ("kernels", "trace.path", "nope"):
        assert f"  {where}: " in message


@pytest.mark.parametrize(
    "section",
    [
        {"kernels": "cpu"},
        {"dispatch": {"exchange": "ring"}},
        {"dispatch": {"payload": "int4"}},
        {"trace": {"path": "t", "every_n_steps": 0}},
        {"trace": {"path": "t", "shard_tokens": -1}},
        {"trace": {"enabled": True}},
        {"tracking": {"mode": "on"}},
        {"tracking": {"every_n_steps": 0}},
        {"cluster": {"num_nodes": 0, "ranks_per_node": 1}},
        {"plan": 3},
        {"cluster": "2x8"},
    ],
)
def test_a_wrong_value_is_refused(section):
    with pytest.raises(ConfigError, match="is not valid"):
        read_config(section)


def test_auto_counts_as_absent():
    config = read_config(
        {
            "plan": "auto",
            "cluster": "auto",
            "trace": {"path": "t", "every_n_steps": "auto", "ring_tokens": "auto"},
            "dispatch": {"exchange": "auto", "payload": "auto"},
            "kernels": "auto",
        }
    )
    assert (config.plan, config.cluster, config.kernels) == (None, None, "auto")
    assert (config.trace.every_n_steps, config.trace.ring_tokens) == (1, 65_536)
    assert (config.dispatch.exchange, config.dispatch.payload) == ("auto", "none")
    # what has no default is then missing
    with pytest.raises(ConfigError, match=r"trace\.path: Field required"):
        read_config({"trace": {"path": "auto"}})


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        ({"hostfile": "h", "file": "f"}, "found several sources of the cluster, expected one"),
        (
            {"hostfile": "h", "num_nodes": 1, "ranks_per_node": 1},
            "keep hostfile, file or num_nodes",
        ),
        ({"num_nodes": 2}, "num_nodes and ranks_per_node go together"),
        ({"ranks_per_node": 2}, "num_nodes and ranks_per_node go together"),
        ({"file": "f", "ranks_per_node": 2}, "num_nodes and ranks_per_node go together"),
    ],
)
def test_sources_of_the_cluster_that_conflict(cluster, message):
    with pytest.raises(ConfigError, match=message):
        read_config({"cluster": cluster})


@pytest.mark.parametrize("cluster", [{"hostfile": "h"}, {"file": "f"}, {}])
def test_one_source_of_the_cluster_is_enough(cluster):
    assert read_config({"cluster": cluster}).cluster == ClusterConfig(**cluster)


def test_file_errors_say_what_is_wrong_with_which_file(tmp_path):
    with pytest.raises(
        ConfigError, match=r"cannot read the configuration .*none\.json.*check the path"
    ):
        read_config(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        read_config(tmp_path)
    with pytest.raises(ConfigError, match=r"ds\.json is not valid JSON: .*line 2.*correct it"):
        read_config(write(tmp_path, '{"a": 1,\n oops}'))
    with pytest.raises(ConfigError, match="holds a list, not an object"):
        read_config(write(tmp_path, [1]))
    with pytest.raises(ConfigError, match="section 'moe_locality' is not valid"):
        read_config(write(tmp_path, {SECTION: [1]}))


def test_config_errors_are_ours_and_value_errors():
    assert issubclass(ConfigError, MoeLocalityError)
    assert issubclass(ConfigError, ValueError)


def test_a_file_that_is_not_text_or_says_a_key_twice_is_refused(tmp_path):
    path = tmp_path / "ds.json"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        read_config(path)
    path.write_text('{"moe_locality": {"plan": "a", "plan": "b"}}')
    with pytest.raises(ConfigError, match=r"found \['plan'\] more than once"):
        read_config(path)


@pytest.mark.parametrize("value", [True, "3", 2.5])
def test_numbers_are_numbers(value):
    with pytest.raises(ConfigError, match="every_n_steps"):
        read_config({"trace": {"path": "traces", "every_n_steps": value}})


def test_a_ds_config_without_the_section_gives_the_defaults():
    assert read_config({"train_batch_size": 8}) == MoeLocalityConfig()
    assert read_config({"train_batch_size": 8, "moe_locality": "auto"}) == MoeLocalityConfig()


def test_deepspeeds_own_layers_know_no_placement():
    """``enabled: false`` keeps DeepSpeed's layers, so a plan would be ignored: refused [F4]."""
    assert read_config({"moe_locality": {"enabled": False, "trace": {"path": "t"}}}).plan is None
    for key, value in (("plan", "p.json"), ("online", {})):
        with pytest.raises(ConfigError, match="know no placement"):
            read_config({"moe_locality": {"enabled": False, key: value}})
    section = {"enabled": False, "online": {"enabled": False}}
    assert read_config({"moe_locality": section}).online is not None


# -- every key is read -----------------------------------------------------------------------------

PACKAGE = Path(config_module.__file__).parent
SECTIONS = {
    name: kind
    for name, kind in vars(config_module).items()
    if isinstance(kind, type) and issubclass(kind, BaseModel) and not name.startswith("_")
}
KEYS = {
    field: name
    for kind in SECTIONS.values()
    for field, info in kind.model_fields.items()
    for name in SECTIONS
    if name in str(info.annotation)
}
"""The keys that hold a section: "tracking" -> "TrackingConfig"."""


class Reads(ast.NodeVisitor):
    """The keys of sections that a module reads, as (section, key).

    Known to be a section: an argument or attribute annotated as one, what ``read_config`` returns,
    a section's own sections, and names that are assigned from these. ``model_dump()`` reads all but
    what it excludes.
    """

    def __init__(self, tree):
        self.found, self.names = set(), {}
        while True:  # a method may be above the one that assigns what it reads
            before = len(self.names), len(self.found)
            self.visit(tree)
            if before == (len(self.names), len(self.found)):
                return

    def section(self, node):
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute):
            if self.section(node.value) is not None and node.attr in KEYS:
                return KEYS[node.attr]
            return self.names.get("." + node.attr)
        if isinstance(node, ast.BoolOp):
            return next(filter(None, map(self.section, node.values)), None)
        if isinstance(node, ast.IfExp):
            return self.section(node.body) or self.section(node.orelse)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in ("read_config", "MoeLocalityConfig"):
                return "MoeLocalityConfig"
            return name if name in SECTIONS else None
        return None

    def know(self, target, section):
        if section is not None and isinstance(target, ast.Name):
            self.names[target.id] = section
        elif section is not None and isinstance(target, ast.Attribute):
            self.names["." + target.attr] = section

    def annotated(self, target, annotation):
        text = "" if annotation is None else ast.unparse(annotation)
        named = [name for name in SECTIONS if re.search(rf"\b{name}\b", text)]
        if len(named) == 1:
            self.know(target, named[0])

    def visit_FunctionDef(self, node):
        for argument in (*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs):
            self.names.pop(argument.arg, None)  # another function's
            self.annotated(ast.Name(argument.arg), argument.annotation)
        self.generic_visit(node)

    def visit_AnnAssign(self, node):
        self.annotated(node.target, node.annotation)
        if isinstance(node.target, ast.Name):
            self.annotated(ast.Attribute(attr=node.target.id), node.annotation)
        self.generic_visit(node)

    def visit_Assign(self, node):
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = zip(target.elts, node.value.elts, strict=True)
            for one, value in pairs:
                self.know(one, self.section(value))
        self.generic_visit(node)

    def visit_Attribute(self, node):
        section = self.section(node.value)
        if section is not None and isinstance(node.ctx, ast.Load):
            self.found.add((section, node.attr))
        self.generic_visit(node)

    def visit_Call(self, node):
        if isinstance(node.func, ast.Attribute) and node.func.attr == "model_dump":
            section = self.section(node.func.value)
            left_out = {n.value for k in node.keywords for n in ast.walk(k) if hasattr(n, "value")}
            for key in SECTIONS[section].model_fields if section else ():
                if key not in left_out:
                    self.found.add((section, key))
        self.generic_visit(node)


@functools.cache
def read_by(path):
    return frozenset(Reads(ast.parse(path.read_text(encoding="utf-8"))).found)


def unread(sources, extra=()):
    """Keys of all sections (and ``extra`` ones) that none of the sources reads."""
    found = set().union(*map(read_by, sources))
    keys = {(name, key) for name, kind in SECTIONS.items() for key in kind.model_fields}
    return (keys | set(extra)) - found


def readers():
    return [path for path in PACKAGE.rglob("*.py") if path.name != "config.py"]


def test_every_key_of_the_configuration_is_read_by_some_code():
    """The section "tracking" was accepted and ignored. A key that no code reads fails [C2]
    here.
    """
    assert unread(readers()) == set()


def test_a_key_that_nothing_reads_is_found():
    """A key is not taken for read because something else has an attribute of that name. [C2]"""
    made_up = {("TrackingConfig", "made_up"), ("TrackingConfig", "shape"), ("OnlineConfig", "path")}
    assert unread(readers(), made_up) == made_up
    without = [path for path in readers() if path.name != "run_log.py"]
    lost = {("TrackingConfig", "every_n_steps"), ("TrackingConfig", "run_dir")}
    assert unread(without) == lost

"""The command line: how it answers. What the commands compute is in test_cli_flow.py."""

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from moe_locality import __version__
from moe_locality.cli import app
from moe_locality.commands import doctor, output
from moe_locality.errors import BackendUnavailable, PlacementError
from moe_locality.placement.plan import PlacementPlan
from moe_locality.placement.solve import METHODS
from moe_locality.trace import write_trace
from tests.unit.made_trace import make_trace

COMMANDS = (
    "import",
    "export",
    "analyze",
    "place",
    "group",
    "evaluate",
    "simulate",
    "bake",
    "compare",
    "report",
    "record",
    "bench",
    "bench paper",
    "serve",
    "doctor",
    "demo",
)
HEAVY = {"numpy", "torch", "scipy", "numba", "pyarrow", "pydantic", "rich", "matplotlib", "wandb"}


def run(*words, **options):
    return CliRunner().invoke(app, [str(word) for word in words], **options)


def shell(*words, **options):
    command = [sys.executable, "-m", "moe_locality.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def one_json_object(text):
    lines = text.splitlines()
    assert len(lines) == 1, text
    value = json.loads(lines[0])
    assert isinstance(value, dict)
    return value


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "trace.npz"
    write_trace(make_trace(num_requests=24), path)
    return path


def test_help_names_every_command_and_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from moe_locality.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    for name in COMMANDS:
        assert f"\n  {name} " in done.stdout
    assert not HEAVY & set(done.stderr.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_takes_json(name):
    found = run(name, "--help")
    assert found.exit_code == 0
    assert "--json" in found.stdout
    assert "--debug" in found.stdout


def test_place_help_names_every_method():
    words = run("place", "--help").stdout.split()
    assert set(METHODS) <= {word.strip(",.") for word in words}


def test_app_has_these_commands_and_no_other():
    assert {command.name for command in app.registered_commands} == set(COMMANDS)


def test_as_command_takes_the_options_of_the_body_and_prints_its_result():
    def body(size: Annotated[int, typer.Option(help="How many.")] = 3) -> output.Result:
        """Say how many."""
        return output.Result(payload={"size": size}, text=(f"{size} of them",))

    small = typer.Typer()
    small.command()(output.as_command(body))
    shown = CliRunner().invoke(small, ["--help"]).stdout
    assert all(words in shown for words in ("Say how many.", "--size", "--json", "--debug"))
    assert CliRunner().invoke(small, ["--size", "4"]).stdout == "4 of them\n"
    assert one_json_object(CliRunner().invoke(small, ["--json"]).stdout) == {"size": 3}


def test_without_a_command_the_help_is_shown():
    found = run()
    assert found.exit_code == 0
    assert "Commands:" in found.stdout


def test_version():
    assert run("--version").stdout.strip() == __version__


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["place", "t.npz"], "Missing option '-o' / '--out'"),
        (["plaice"], "No such command 'plaice'"),
        (["place", "t.npz", "-o", "p.json", "--nodes", "0"], "Invalid value for '--nodes'"),
        (["evaluate", "t.npz", "--plan", "p.json", "--wat"], "No such option: --wat"),
    ],
)
def test_wrong_usage_is_exit_code_2_in_words_and_in_json(words, message):
    plain = run(*words)
    assert plain.exit_code == 2
    assert plain.stdout == ""
    assert message in plain.stderr
    found = run(*words, "--json")
    assert found.exit_code == 2
    error = one_json_object(found.stdout)["error"]
    assert error["type"] == "UsageError"
    assert message in error["message"]


def test_an_error_is_one_line_without_a_traceback(tmp_path):
    found = run("analyze", tmp_path / "gone.npz")
    assert found.exit_code == 1
    assert found.stdout == ""
    assert found.stderr.startswith("moe-locality: ")
    assert "gone.npz" in found.stderr
    assert "Traceback" not in found.stderr


def test_debug_shows_the_traceback_on_stderr_and_json_stays_clean(tmp_path):
    found = run("analyze", tmp_path / "gone.npz", "--debug", "--json")
    assert found.exit_code == 1
    assert "Traceback" in found.stderr
    assert one_json_object(found.stdout)["error"]["type"] == "TraceError"


def test_json_is_alone_on_stdout_of_a_real_process(trace_file, tmp_path):
    done = shell("analyze", trace_file, "--json")
    assert done.returncode == 0, done.stderr
    assert one_json_object(done.stdout)["trace"]["num_requests"] == 24
    done = shell("analyze", tmp_path / "gone", "--json")
    assert done.returncode == 1
    assert set(one_json_object(done.stdout)) == {"error"}


def test_what_a_command_prints_goes_to_stderr(capfd):
    with output.quiet_stdout():
        sys.stdout.write("from python\n")
        os.write(1, b"from C\n")
        subprocess.run(["sh", "-c", "echo from a child"], check=True)
    sys.stdout.write("after\n")
    found = capfd.readouterr()
    assert found.out == "after\n"
    for words in ("from python", "from C", "from a child"):
        assert words in found.err


@pytest.mark.parametrize(
    ("error", "code", "kind", "message"),
    [
        (PlacementError("bad plan"), 1, "PlacementError", "bad plan"),
        (BackendUnavailable("no wandb"), 2, "BackendUnavailable", "no wandb"),
        (typer.BadParameter("wrong"), 2, "UsageError", "Invalid value: wrong"),
        (typer.Abort(), 130, "KeyboardInterrupt", "interrupted"),
        (KeyboardInterrupt(), 130, "KeyboardInterrupt", "interrupted"),
        (ZeroDivisionError("oops"), 1, "ZeroDivisionError", "unexpected ZeroDivisionError: oops"),
        (
            MemoryError("9 TiB"),
            1,
            "MemoryError",
            "found too little memory for this input (9 TiB), expected enough: correct a number "
            "that is too large, or use a part",
        ),
    ],
)
def test_exit_codes_and_messages(error, code, kind, message, capsys):
    def fail():
        raise error

    assert output.guard(fail, as_json=True, debug=False) == code
    found = capsys.readouterr()
    body = one_json_object(found.out)["error"]
    assert (body["type"], body["message"], body["exit_code"]) == (kind, message, code)
    expected = not isinstance(error, ZeroDivisionError)
    assert ("Traceback" in found.err) is not expected


def test_json_has_only_its_own_types():
    import numpy as np

    value = {
        "a": np.arange(2),
        "b": float("nan"),
        3: (np.float32(1.5), {"x"}),
        "path": os.path,
        "inf": float("-inf"),
    }
    value["path"] = __import__("pathlib").Path("p")
    assert output.plain(value) == {
        "a": [0, 1],
        "b": None,
        "3": [1.5, ["x"]],
        "path": "p",
        "inf": None,
    }


def test_control_c_ends_quickly_and_in_words(tmp_path):
    """A real process reads a pipe that never ends; SIGINT must end it without a traceback."""
    pipe = tmp_path / "homes.json"
    os.mkfifo(pipe)
    code = (
        "import signal, sys\n"
        "from pathlib import Path\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it\n"
        "from moe_locality.placement.homes.assign import read_homes\n"
        "from moe_locality.commands.output import guard\n"
        "sys.exit(guard(lambda: read_homes(Path(sys.argv[1])), as_json=True, debug=False))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(pipe)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    writer = None
    while writer is None:  # until it has opened the pipe
        assert process.poll() is None, process.communicate()
        with contextlib.suppress(OSError):
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    os.close(writer)
    assert process.returncode == 130
    assert one_json_object(out)["error"]["message"] == "interrupted"
    assert "Traceback" not in err


def test_export_prints_a_name_that_stdout_has_no_letters_for(tmp_path):
    """A name in other letters than those of the terminal ended a finished command with an error."""
    PlacementPlan.linear(4, [0], 2, 1).write(tmp_path / "plan.json")
    words = ("export", tmp_path / "plan.json", "--to", "vllm", "-o", tmp_path / "карта.json")
    done = shell(*words, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, "1 MoE layers for vllm" in done.stdout) == (0, True), done.stderr


def test_doctor_lists_what_is_here():
    found = one_json_object(run("doctor", "--json").stdout)
    assert found["moe_locality"] == __version__
    assert found["packages"]["numpy"]["version"]
    assert found["packages"]["numpy"]["problem"] is None
    assert found["apex"]["state"] in ("absent", "wrong", "python-only", "cuda")
    assert found["kernels"]["reference"] == "available"
    assert found["front_ends"]["DeepSpeed MoE"].startswith("available")
    assert set(found["tools"]) == set(doctor.COMPILERS)


@pytest.mark.parametrize(
    ("files", "state", "words"),
    [
        ({"__init__.py": "raise SystemExit('imported')"}, "wrong", "pip uninstall apex"),
        (
            {"__init__.py": "", "normalization/__init__.py": "", "multi_tensor_apply/a.py": ""},
            "python-only",
            "without fused_layer_norm_cuda",
        ),
    ],
)
def test_doctor_tells_the_apex_of_nvidia_from_the_other(files, state, words, tmp_path, monkeypatch):
    for name, content in files.items():
        path = tmp_path / "apex" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    found = doctor.nvidia_apex_state()
    assert found[0] == state
    assert words in found[1]
    assert "apex" not in sys.modules


@pytest.mark.parametrize(
    ("installed", "least", "problem"),
    [("1.25.9", "1.26", True), ("1.26.0", "1.26", False), ("2.13.0+cpu", "2.10", False)],
)
def test_doctor_compares_versions_by_number(installed, least, problem, monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: installed)
    found = doctor._package("numpy", least, "everything", None)
    assert (found["problem"] is not None) is problem


def test_doctor_says_whose_models_run_here_without_importing_them(tmp_path):
    """Each front end by itself: without DeepSpeed, with one before AutoEP, and with everything."""
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "__init__.py").write_text("raise SystemExit('imported')")
    code = (
        "import json, sys\n"
        "from moe_locality.commands.doctor import _front_ends\n"
        "have = {'torch': '2.13', 'transformers': '5.24', 'accelerate': '1.9', 'deepspeed': '1'}\n"
        "found = [_front_ends({**have, 'deepspeed': None}), _front_ends(have)]\n"
        "open(sys.path[0] + '/deepspeed/module_inject/auto_ep_layer.py', 'w').close()\n"
        "print(json.dumps([*found, _front_ends(have)]))\n"
        "assert not {'torch', 'transformers', 'deepspeed'} & sys.modules.keys()\n"
    )
    (tmp_path / "deepspeed" / "module_inject").mkdir()
    (tmp_path / "script.py").write_text(code)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    without, old, everything = json.loads(done.stdout)
    lacking = "needs deepspeed 0.19.4: pip install -U 'moe-locality[deepspeed]'"
    assert without["DeepSpeed MoE"] == without["DeepSpeed AutoEP"] == lacking
    assert old["DeepSpeed AutoEP"] == "deepspeed 1 has no AutoEP: pip install -U deepspeed"
    assert old["DeepSpeed MoE"].startswith("available")
    for found in (without, everything):
        assert found["transformers"] == "available: moe_locality.register"
    assert all(words.startswith("available") for words in everything.values())


def test_doctor_does_not_complain_about_what_nobody_asked_for(monkeypatch):
    """Optional packages were "missing"; another apex and an older transformers problems [F11]."""
    needed = {"numpy", "scipy", "numba", "pyarrow"}
    versions = {"transformers": "5.22.0"}
    monkeypatch.setattr(
        doctor, "_version", lambda name: "99" if name in needed else versions.get(name)
    )
    monkeypatch.setattr(doctor, "nvidia_apex_state", lambda: ("wrong", "not NVIDIA's"))
    done = run("doctor", "--json")
    found = one_json_object(done.stdout)
    assert (done.exit_code, found["problems"]) == (0, [])
    why = "needs torch 2.10, transformers 5.23 (found 5.22.0), accelerate 1.0: pip install -U "
    assert found["front_ends"]["transformers"] == f"{why}'moe-locality[hf]'"
    shown = " ".join(run("doctor").stdout.split())
    assert "Everything fits." in shown
    assert "missing" not in shown
    assert "wandb not installed optional:" in shown
    assert "pip install 'moe-locality[solver]'" in shown  # not taken for a style
    assert found["packages"]["wandb"]["install"] == "pip install 'moe-locality[wandb]'"


def test_record_prints_the_launch_line_and_the_section(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=2\nb slots=2\n")
    found = one_json_object(
        run("record", "train.py", "--trace", "tr", "--hostfile", hosts, "--json").stdout
    )
    expected = f"deepspeed --hostfile {hosts} train.py --deepspeed_config ds_config.json"
    assert found["launch"] == expected
    assert found["slots"] == {"a": 2, "b": 2}
    assert found["section"] == {"moe_locality": {"trace": {"path": "tr"}}}
    assert not found["records_already"]
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"moe_locality": {"trace": {"path": "there", "weights": True}}}))
    found = one_json_object(run("record", "--deepspeed-config", config, "--json").stdout)
    assert found["records_already"]
    assert found["section"]["moe_locality"]["trace"]["path"] == "there"
    config.write_text(json.dumps({"moe_locality": {"tracee": {}}}))
    found = run("record", "--deepspeed-config", config)
    assert found.exit_code == 1
    assert "tracee" in found.stderr


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (None, "check the path"),
        ("", "found no host"),
        ("a slots=2\nb\n", "line 2"),
        ("a slots=2\na slots=2\n", "each host once"),
        ("a slots=0\n", "found no slot left"),
        ("a slots=1000000000000\n", "found 1,000,000,000,000 ranks, expected at most 1,048,576"),
    ],
)
def test_record_reads_the_hostfile_that_it_is_given(tmp_path, text, part):
    """The file was never opened: DeepSpeed then trains on this machine alone [E3]."""
    hosts = tmp_path / "hosts"
    if text is not None:
        hosts.write_text(text)
    found = run("record", "--hostfile", hosts)
    assert found.exit_code == 1
    assert part in found.stderr


def test_record_says_which_hosts_get_ranks(tmp_path):
    """Hosts without a rank, and hosts of different size, are named [E3]."""
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=2\nb slots=0\nc slots=1\n")
    found = run("record", "--hostfile", hosts).stdout
    assert "on 3 ranks: a 2, c 1" in found
    assert "b: 0 slots, so no rank runs there" in found
    assert "Hosts of different size" in found


def test_the_page_of_the_command_line_names_only_what_exists():
    import re
    import shlex

    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    group = typer.main.get_command(app)
    lines = re.findall(r"^\$ moe-locality (.*)$", page, flags=re.MULTILINE)
    commands = [
        max((n for n in COMMANDS if f"{line} ".startswith(f"{n} ")), key=len) for line in lines
    ]
    for name, words in zip(commands, map(shlex.split, lines), strict=True):
        known = {option for p in group.commands[name].params for option in p.opts}
        assert {word for word in words if word.startswith("-")} <= known, name
    assert set(commands) == set(COMMANDS)
    assert set(re.findall(r"^## ([\w ]+)$", page, flags=re.MULTILINE)) == set(COMMANDS)


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """Folder, and command → words that it accepts there; bake gets as far as the checkpoint."""
    folder = tmp_path_factory.mktemp("lines")
    write_trace(make_trace(num_requests=24, tokens_per_request=4, num_layers=2), folder / "t.npz")
    picks = base64.b64encode(np.arange(12, dtype=np.int32).tobytes()).decode()
    answer = {"meta_info": {"routed_experts": picks, "prompt_tokens": 2, "completion_tokens": 2}}
    (folder / "sglang.json").write_text(json.dumps([answer]))
    (folder / "llama.csv").write_text("layer,expert\n0,1\n0,2\n")
    trace, plan, cluster = folder / "t.npz", folder / "plan.json", ("--nodes", 2)
    cluster = (*cluster, "--ranks-per-node", 2)
    assert run("place", trace, *cluster, "-o", plan).exit_code == 0
    (folder / "online.json").write_text('{"moe_locality": {"online": {}}}')
    new, planned = folder / "new", (trace, "--plan", plan)
    return folder, {
        "import": (trace, "--out", new),
        "export": (plan, "--to", "sglang", "--num-hidden-layers", 4, "--out", new),
        "analyze": (trace, *cluster),
        "place": (trace, *cluster, "--out", new),
        "group": (*planned, "--out", new),
        "evaluate": planned,
        "simulate": planned,
        "bake": (folder, "--plan", plan, "--out", new),
        "compare": planned,
        "report": (*planned, "--out", new),
        "record": (),
        "bench": (trace, *cluster, "--method", "linear"),
        "bench paper": (trace,),
        "serve": (folder / "sglang.json", "--model", folder, "--out", new),
        "doctor": (),
        "demo": ("--out", new, "--trace", trace),
    }


BAD_VALUES = {
    **dict.fromkeys(("trace", "against", "table", "checkpoint", "plan", "baseline"), ("GONE",)),
    **dict.fromkeys(("homes", "cluster", "hostfile", "start", "deepspeed_config"), ("GONE",)),
    **dict.fromkeys(("out", "report", "figure"), ("t.npz/new",)),
    **dict.fromkeys(("format", "to", "method", "objective", "predict", "sweep"), ("wrong",)),
    **dict.fromkeys(("rule", "transport", "serving_rule"), ("wrong",)),
    **dict.fromkeys(("exchange", "payload", "wandb_mode", "tag", "layers"), ("wrong",)),
    **dict.fromkeys(("max_imbalance", "max_home_imbalance"), ("0.5", "nan")),
    "sampling_unit": ("0", "words"),
    **dict.fromkeys(("compute_us", "expert_us", "row_us", "held_out"), ("-1", "nan")),
    **dict.fromkeys(("batch_tokens", "hidden", "ffn", "groups", "top_k", "seed"), ("-1",)),
    **dict.fromkeys(("nodes", "ranks_per_node", "redundant_experts"), ("3", "40", "-1")),
    "files": ("GONE", "sglang.json", "llama.csv"),
    "first": ("GONE",),
    "second": ("GONE",),
    "num_experts": ("3", "0"),
    "num_layers": ("0",),
    "num_hidden_layers": ("1", "0"),
    "expert_groups": ("3", "0"),
    "bound_seconds": ("-1", "inf", "nan"),
    "windows": ("1",),
    "move_budget": ("7", "nan"),
    "row_bytes": ("-1", "nan"),
    "requests": ("GONE",),
    "config": ("GONE", "online.json"),  # a section that training alone has
    **dict.fromkeys(("dtype", "grouping", "watch", "expert_store"), ("wrong",)),
    **dict.fromkeys(("max_num_seqs", "max_num_batched_tokens", "max_model_len"), ("0", "-1")),
    **dict.fromkeys(("max_num_kv_tokens", "max_tokens"), ("0", "-1")),
    "max_num_ready": ("-1",),
    "watch_every": ("0",),
    "metrics_port": ("-1", "70000"),
    "temperature": ("-1", "nan"),
}
"""Parameter of a command → values that it must refuse; GONE: a path where nothing is."""
ANY_VALUE = {"model", "script", "wandb", "wandb_dir", "group", "record trace", "serve trace"}
ANY_VALUE |= {"metrics_host"}  # without a port
SWITCHES = {"help", "as_json", "debug", "overwrite", "bound", "prove", "equal_requests"}
SWITCHES |= {"metrics", "one_layout", "trust_checkpoint", "trust_parameter_order"}
SWITCHES |= {"redundant_per_layer"}
TOGETHER = (
    ("place", "--start", "plan.json", "--homes", "joint"),
    ("place", "--start", "plan.json", "--move-budget", "7"),
    ("place", "--homes", "joint", "--method", "eplb"),
    ("place", "--objective", "picks"),
    ("place", "--objective", "picks", "--homes", "joint", "--redundant-experts", "4"),
    ("place", "--objective", "rank_copies", "--method", "eplb"),
    ("place", "--objective", "rank_copies", "--redundant-experts", "4"),
    ("place", "--expert-groups", "4", "--method", "seed"),
    ("place", "--one-layout", "--homes", "joint"),
    ("place", "--redundant-per-layer", "--redundant-experts", "8", "--method", "eplb"),
    ("group", "--predict", "domain"),
    ("export", "--to", "sglang", "--num-hidden-layers", "2"),
    ("simulate", "--sweep", "k", "--figure", "t.npz/new.svg"),
)
"""Options that do not go together, or not with the trace and the plan."""


def python_names(command, told):
    """The arguments of functions in a message, of those that the command has a flag for."""
    import re

    flags = [one.name for one in command.params if one.opts[-1].startswith("--")]
    names = {name for flag in flags for name in (flag, f"num_{flag}", f"{flag}_size")}
    found = {name for name in names if re.search(rf"(^|: ){name}: |(?<![-\w]){name} ?=", told)}
    return found | {name for name in names if "_" in name and re.search(rf"\b{name}\b", told)}


def test_errors_name_flags_and_no_python_argument(lines, monkeypatch):
    """``--max-imbalance 0.5`` was answered with "max_imbalance: found 0.5" [F11].

    Every option of every command with a bad value, and some that do not go together.
    """
    folder, accepted = lines
    monkeypatch.chdir(folder)
    wrong = []
    for name, command in typer.main.get_command(app).commands.items():
        tried = [(*accepted[name], *words) for first, *words in TOGETHER if first == name]
        positions = [one.name for one in command.params if one.param_type_name == "argument"]
        for one in command.params:
            free = {one.name, f"{name} {one.name}"} & (ANY_VALUE | SWITCHES)
            values = () if free else BAD_VALUES[one.name]
            if one.name in positions:
                at = positions.index(one.name)
                rest = accepted[name][at + (one.name != "second") :]
                tried += [(*accepted[name][:at], value, *rest) for value in values]
            else:
                tried += [(*accepted[name], one.opts[-1], value) for value in values]
        for words in tried:
            done = run(name, *words, "--json")
            told = json.loads(done.stdout)["error"]["message"] if done.exit_code else "no error"
            if not done.exit_code or "unexpected" in told or python_names(command, told):
                wrong.append((*map(str, (name, *words)), told))
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("hidden_size: found 0, but a plan", "--hidden: found 0, but a plan"),
        ("p.json: num_nodes: found 3", "p.json: --nodes: found 3"),
        ("num_nodes=3 (nodes=-1) plan='a b'", "--nodes 3 (--nodes -1) --plan a b"),
        ("nodes = 3, use seed= or plan=True", "--nodes 3, use --seed or --plan"),
        ("t.yaml, nodes: found 3, expected num_nodes", None),
        ("no seed, no plan: nodes are found", None),
        ("cannot read runs/seed=0", None),
        ("cannot read plan=7/p.json", None),  # the user's own word, see below
    ],
)
def test_in_flags_changes_arguments_and_leaves_words_alone(message, shown):
    """An argument stands before "=" or ": found"; what the user typed stays as it is [F11]."""
    flags = {name: f"--{name}" for name in ("hidden", "nodes", "seed", "plan")}
    found = output.in_flags(message, flags, ["place", "plan=7/p.json"])
    assert found == (message if shown is None else shown)

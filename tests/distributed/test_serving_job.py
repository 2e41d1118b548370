"""Jobs of the serving engine: results on disk as they come, signals, and ranks that die."""

import json
import os
import signal
import subprocess
import time

import pytest
import torch
import torch.distributed as dist

from moe_locality.config import OnlineConfig
from tests.distributed.fault_cases import VICTIM, WORLD, die, end_together
from tests.distributed.test_serving import (
    expected,
    placed,
    plan_with_homes,
    prompts_of,
    usual_order,
)
from tests.distributed.test_transformers_ep import save_tiny
from tests.launch import run_ranks
from tests.unit.serving.test_engine import with_rounded_experts
from tests.unit.test_launch_scripts import ROOT, environment, run

transformers = pytest.importorskip("transformers")

LIMITS = {"max_num_seqs": 4, "max_num_batched_tokens": 24, "max_model_len": 64}
WATCHED = OnlineConfig(
    every_n_steps=40, pays_within_steps=10**9, move_budget=0.5, max_imbalance=1.5
)


def write_requests(path, count, words=None):
    """``words``: each half of four ranks has only so many of its own."""
    requests = [{**request, "request_id": i} for i, request in enumerate(prompts_of(0, count))]
    for request in requests if words else ():
        first = 32 * (request["request_id"] % 4 // 2)
        ids = request["prompt_token_ids"]
        request["prompt_token_ids"] = [first + token % words for token in ids]
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))
    return requests


def tokens_in(out):
    from moe_locality.serving.jobs import read_results

    return {r["request_id"]: r["outputs"][0]["token_ids"] for r in read_results(out)}


def engine_of(path, world, homes="arrival", plan=None, **options):
    import moe_locality
    from moe_locality.serving import Engine, Limits

    model, _ = placed(path, world, None)
    if homes == "predicted":
        plan = plan_with_homes(path, world)
        moe_locality.apply(model, plan=plan)
    return Engine(model, limits=Limits(**LIMITS), homes=homes, plan=plan, **options)


def drained_then_finished(rank, world, path, folder):
    """Serve with a signal on one rank, then again without one."""
    from moe_locality.serving.jobs import serve_file

    results = []

    def signalled(result):
        results.append(result)
        if rank == 1 and len(results) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    engine = engine_of(path, world)
    first = serve_file(engine, folder / "in.jsonl", folder / "out", on_result=signalled)
    assert signal.getsignal(signal.SIGTERM) is before
    seen = tokens_in(folder / "out")
    dist.barrier()
    second = serve_file(engine_of(path, world), folder / "in.jsonl", folder / "out")
    return first, seen, second


def test_serve_file_drains_at_a_signal_and_goes_on_when_started_again(tmp_path):
    """[F17 faults] What has begun is finished on all ranks; the rest is served by the next job."""
    path = save_tiny(tmp_path, "Mixtral")
    requests = write_requests(tmp_path / "in.jsonl", 60)
    results = run_ranks(drained_then_finished, 4, path, tmp_path, timeout_s=300.0)
    first, seen, second = results[0]
    assert [other[0]["served"] for other in results] == [first["served"]] * 4
    assert 0 < first["served"] == len(seen) < 60
    assert second["served"] == first["unserved"] == 60 - first["served"]
    assert second["refused"] == first["refused"] == 0
    assert tokens_in(tmp_path / "out") == expected(path, requests)


def serve_many(rank, world, path, folder):
    from moe_locality.serving.jobs import serve_file

    return serve_file(engine_of(path, world, "predicted"), folder / "in.jsonl", folder / "four")


@pytest.mark.slow
def test_serve_file_gives_the_same_tokens_on_four_ranks_as_on_one(tmp_path):
    """[F17 faults] 500 requests of mixed lengths, homes predicted, two nodes."""
    from moe_locality.serving import Engine, Limits
    from moe_locality.serving.jobs import serve_file

    path = save_tiny(tmp_path, "Mixtral", sliding_window=10)
    write_requests(tmp_path / "in.jsonl", 500)
    spread = run_ranks(serve_many, 4, path, tmp_path, timeout_s=500.0)[0]
    assert spread["served"] == 500
    assert spread["moved"] > 50
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    serve_file(Engine(model, limits=Limits(**LIMITS)), tmp_path / "in.jsonl", tmp_path / "one")
    assert tokens_in(tmp_path / "four") == tokens_in(tmp_path / "one")


def dies_while_serving(rank, folder, path, homes, kind):
    from moe_locality.integrations.transformers_ep import LocalityEP
    from moe_locality.serving.jobs import serve_file

    def on_step(counts):
        served = len(tokens_in(folder / "out")) > 8
        moved = kind != "handover" or counts["moved"] > 2
        if kind == "move":
            return  # dies between the layers
        if rank == VICTIM and served and moved and (counts["kind"] == kind or kind == "handover"):
            die()

    options: dict = {}
    if kind == "move":
        options = {"watch": "apply", "online": WATCHED, "plan": usual_order()}
        place, left = LocalityEP.place, [2]

        def place_or_die(layer, *args):
            left[0] -= 1
            if rank == VICTIM and left[0] < 1:
                assert len(tokens_in(folder / "out")) > 8
                die()
            return place(layer, *args)

        LocalityEP.place = place_or_die
    engine = engine_of(path, WORLD, homes, on_step=on_step, **options)
    serve_file(engine, folder / "in.jsonl", folder / "out")


@pytest.mark.parametrize(
    "kind",
    ["decode", *(pytest.param(k, marks=pytest.mark.slow) for k in ("prefill", "handover", "move"))],
)
def test_serve_file_ends_on_all_ranks_when_one_dies(tmp_path, kind):
    """[F17 faults] Soon, with a message that names the rank; what was finished is on disk."""
    path = save_tiny(tmp_path, "Mixtral")
    requests = write_requests(tmp_path / "in.jsonl", 200, words=6 if kind == "move" else None)
    homes = "predicted" if kind == "handover" else "arrival"
    said = end_together(dies_while_serving, tmp_path, path, homes, kind)
    assert sorted(said) == [rank for rank in range(WORLD) if rank != VICTIM]
    for one in said.values():
        assert one["error"] is not None
        assert f"{VICTIM}" in one["text"], one["text"]
        assert "died or left" in one["text"] or "exited" in one["text"], one["text"]
        assert kind != "move" or "move to another plan" in one["text"], one["text"]
    found = tokens_in(tmp_path / "out")
    assert 8 < len(found) < 200
    wanted = expected(path, [request for request in requests if request["request_id"] in found])
    assert found == wanted


def check_report(out, tokens):
    """The report of the run says what its ranks did [F17.6]."""
    from typer.testing import CliRunner

    from moe_locality.cli import app
    from moe_locality.serving.metrics import read_metrics

    last = [lines[-1] for lines in read_metrics(out)]
    assert len(last) == 2
    told = [line["values"]["generation_tokens_total"][""] for line in last]
    assert sum(told) == tokens
    assert all(line["values"]["exchange_bytes_total"]["cross_node"] > 0 for line in last)
    assert all(line["values"]["step_seconds_total"]["decode,exchange"] > 0 for line in last)
    told = [[{**one, "seconds": 0} for one in line["decisions"]] for line in last]
    assert told[0] == told[1] != []
    page = out / "report.html"
    done = CliRunner().invoke(app, ["report", str(out), "-o", str(page), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["figures"] == [
        "Expert load of prefill against decode", "Traffic per step", "Tokens per step", "Latencies",
    ]  # fmt: skip
    assert "Decisions of the watch" in page.read_text()


@pytest.mark.slow
def test_serve_is_one_command_on_all_ranks(tmp_path):
    """[F17.1] launch/serve.sh, on real launched ranks: results, refusals, one summary; [F17.5] with
    experts in low bits.
    """
    from moe_locality.demo.launch import free_port

    path = save_tiny(tmp_path, "Mixtral")
    requests = write_requests(tmp_path / "in.jsonl", 10)
    with (tmp_path / "in.jsonl").open("a") as lines:
        lines.write('{"prompt_token_ids": [1], "temperature": -1}\nno json\n')
    usual_order(2, 1).write(tmp_path / "plan.json")
    port = {"DEEPSPEED_ARGS": f"--master_port {free_port()}"}
    done = run(
        "serve", "--ranks", "2", "--plan", str(tmp_path / "plan.json"),
        str(tmp_path / "in.jsonl"), "--model", path, "--out", str(tmp_path / "out"),
        "--max-num-seqs", "4", "--max-model-len", "64", "--dtype", "float32",
        "--trace", str(tmp_path / "trace"), "--metrics", "--nodes", "2",
        "--watch", "propose", "--watch-every", "12", "--expert-store", "mxfp8",
        cwd=tmp_path, **port,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("10 served, 2 refused, 0 unserved") == 1
    check_report(tmp_path / "out", sum(request["max_tokens"] for request in requests))
    from moe_locality.serving.jobs import read_results
    from moe_locality.trace import read_trace

    results = {r["request_id"]: r for r in read_results(tmp_path / "out")}
    assert results["line 11"]["error"].startswith("found temperature=-1")
    assert "no JSON in line 12" in results["line 12"]["error"]
    found = {i: results[i]["outputs"][0]["token_ids"] for i in range(10)}
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with_rounded_experts(model, "mxfp8").save_pretrained(f"{path}-rounded")
    assert found == expected(f"{path}-rounded", requests)
    assert set(read_trace(tmp_path / "trace").request_id.tolist()) == set(range(10))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_script_drains_at_a_signal(tmp_path, number):
    """[F17 faults] Ctrl-C reaches all processes of the terminal, a scheduler's SIGTERM the script
    alone; nothing is left behind.
    """
    from moe_locality.demo.launch import free_port

    path = save_tiny(tmp_path, "Mixtral")
    requests = write_requests(tmp_path / "in.jsonl", 4000)  # never done before the signal
    out = tmp_path / "out"
    command = [ROOT / "launch" / "serve.sh", "--ranks", "2", tmp_path / "in.jsonl"]
    command += ["--model", path, "--out", out, "--max-num-seqs", "2", "--dtype", "float32"]
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(
            [*map(str, command), "--max-model-len", "64"],
            env=environment(DEEPSPEED_ARGS=f"--master_port {free_port()}"),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        until = time.monotonic() + 240
        while job.poll() is None and time.monotonic() < until and not tokens_in(out):
            time.sleep(0.05)
        (os.killpg if number == signal.SIGINT else os.kill)(job.pid, number)
        code = job.wait(timeout=240)
    said = (tmp_path / "log").read_text()
    assert code == 0, said
    found = tokens_in(out)
    assert 0 < len(found) < 4000
    assert f"{len(found)} served, 0 refused, " in said
    assert found == expected(path, [one for one in requests if one["request_id"] in found])
    listed = subprocess.run(["pgrep", "-f", str(out)], capture_output=True, text=True, check=False)
    assert not listed.stdout.split()


def one_port_is_taken(rank, world):
    """Start the metrics of every rank; return the error."""
    import socket

    from moe_locality.commands.serve import _metrics
    from moe_locality.errors import ConfigError
    from moe_locality.topology.groups import exchange_objects

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = exchange_objects(taken.getsockname()[1])[1]
        os.environ["LOCAL_RANK"] = str(rank)
        with pytest.raises(ConfigError) as raised:
            _metrics(rank, port - 1 if rank else None, "127.0.0.1", None, model="tiny")
        return str(raised.value)


def test_serve_names_a_port_that_is_taken_on_all_ranks(tmp_path):
    """[F17.6] No rank goes on to load the model and waits there for the one that stopped."""
    found = run_ranks(one_port_is_taken, 2)
    assert all("found no way to listen on 127.0.0.1" in words for words in found)


def write_plan(rank, world, path, file):
    plan = plan_with_homes(path, world)
    if rank == 0:
        plan.write(file)


@pytest.mark.slow
def test_serve_sends_requests_home_over_ranks_that_stand_for_nodes(tmp_path):
    """[F17.2] Homes over the command's own process groups, which name no backend; ranks that idle
    after a padded prefill; a refused request is tried again when its line was corrected.
    """
    from moe_locality.demo.launch import free_port

    path, lines = save_tiny(tmp_path, "Mixtral"), tmp_path / "in.jsonl"
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    run_ranks(write_plan, 4, path, plan)
    requests = write_requests(lines, 16)
    for request in requests:  # all but the first rank are done with their prompts
        request["max_tokens"] = 12 if request["request_id"] % 4 == 0 else 1
    wrong = {**requests[5], "temperature": -1}
    told = [*requests[:5], wrong, *requests[6:]]
    arguments = (
        "serve", "--ranks", "4", "--plan", str(plan), str(lines), "--model", path,
        "--out", str(out), "--max-num-seqs", "4", "--nodes", "2", "--homes", "predicted",
        "--dtype", "float32",
    )  # fmt: skip
    for given, summary in ((told, "15 served, 1 refused"), (requests, "1 served, 0 refused")):
        lines.write_text("".join(json.dumps(request) + "\n" for request in given))
        port = {"DEEPSPEED_ARGS": f"--master_port {free_port()}"}
        done = run(*arguments, cwd=tmp_path, **port)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count(f"{summary}, 0 unserved") == 1, done.stdout
    from moe_locality.serving.jobs import read_results

    served = [result for result in read_results(out) if not result["error"]]
    found = {result["request_id"]: result["outputs"][0]["token_ids"] for result in served}
    assert found == expected(path, requests)
    assert any(result["home"] != result["arrival"] for result in served)

"""The proxy that gives requests homes, as a process of its own, before a fake engine over HTTP."""

import contextlib
import http.client
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from moe_locality.placement import PlacementPlan, solve
from moe_locality.placement.homes.assign import domain_scores
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.trace.schema import RoutingTrace

SCRIPT = Path(__file__).parents[3] / "examples" / "home_router.py"
PROSE = "prose/проза"
TEXTS = {"code": "def f(x):\n    return x + 1\n" * 50, PROSE: "It was a dark night. " * 50}
SECONDS = 200


class Engine(BaseHTTPRequestHandler):
    """Remembers what it was asked; ``/stream`` sends a second piece once the test has the first,
    ``/break`` promises more than it sends.
    """

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, self.headers.items(), body))
        if self.path == "/stream":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"6\r\nfirst \r\n")
            assert self.server.seen.wait(SECONDS)
            self.wfile.write(b"6\r\nsecond\r\n0\r\n\r\n")
            return
        self.send_response(201)
        self.send_header("Set-Cookie", "a=1")
        self.send_header("Set-Cookie", "b=2")
        self.send_header("Content-Length", str(len(body) + 9 * (self.path == "/break")))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = self.path == "/break"

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.items(), b""))
        self.send_response(204)
        self.end_headers()


@contextlib.contextmanager
def serving():
    """(fake engine, its address)"""
    with ThreadingHTTPServer(("127.0.0.1", 0), Engine) as engine:
        engine.asked, engine.seen = [], threading.Event()
        thread = threading.Thread(target=engine.serve_forever)
        thread.start()
        try:
            yield engine, f"http://127.0.0.1:{engine.server_port}"
        finally:
            engine.shutdown()
            thread.join()


def write_plan(path):
    """Domain code picks experts 0 to 3, prose the others; 2 nodes of 2 ranks, joint homes."""
    rng = np.random.default_rng(0)
    domain = np.repeat(np.arange(40) % 2, 20)
    ids = np.stack([rng.permutation(4)[:2] for _ in domain]) + 4 * domain[:, None]
    trace = RoutingTrace(
        model="made",
        num_experts=8,
        layer_ids=np.array([0]),
        domain=("code", PROSE),
        expert_ids=ids[:, None].astype(np.int16),
        request_id=np.repeat(np.arange(40), 20),
        position=np.tile(np.arange(20), 40),
        domain_id=domain,
    )
    plan = solve(trace, ClusterTopology.uniform(2, 2), homes="joint", max_imbalance=1.2)
    plan.write(path)
    scores, known = domain_scores(plan, list(TEXTS), {})
    assert known.all()
    return plan, dict(zip(TEXTS, scores.argmax(axis=1).tolist(), strict=True))


def command(plan, engine, *more):
    words = [sys.executable, SCRIPT, "--plan", plan, "--engine", engine, "--port", "0", *more]
    return [str(word) for word in words]


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    """(engine, port of the proxy, plan, home of each domain, what the proxy printed on stderr)"""
    folder = tmp_path_factory.mktemp("router")
    plan, home_of = write_plan(folder / "plan.json")
    texts = folder / "texts"
    (texts / PROSE).parent.mkdir(parents=True)
    for name, text in TEXTS.items():
        (texts / f"{name}.txt").write_text(text)
    errors = folder / "stderr"
    with serving() as (engine, address), errors.open("w") as sink:
        words = command(folder / "plan.json", address, "--texts", texts, "--slack", 2)
        proxy = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=sink, text=True)
        try:
            told = proxy.stdout.readline().strip()
            assert told.startswith("http://127.0.0.1:"), errors.read_text()
            yield engine, int(told.rpartition(":")[2]), plan, home_of, errors
        finally:
            proxy.terminate()
            proxy.wait(SECONDS)
            proxy.stdout.close()


def ask(port, path="/v1/completions", body=b"", headers=()):
    """(answer, its connection); headers may come twice."""
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    line.putrequest("POST", path)
    for name, value in headers:
        line.putheader(name, value)
    line.putheader("Content-Length", str(len(body)))
    line.endheaders(body)
    return line.getresponse(), line


def ranks_of(headers):
    return [value for name, value in headers if name.lower() == "x-data-parallel-rank"]


def test_home_router_sets_the_home_of_the_domain_and_changes_nothing_else(routed):
    engine, port, plan, home_of, errors = routed
    assert plan.rank_to_node[home_of["code"]] != plan.rank_to_node[home_of[PROSE]]
    body = b'{"prompt": "\xc3\xa9\x00", "n": 1}'
    for domain, home in home_of.items():
        sent = [
            ("X-Domain", domain.encode().decode("latin-1")),
            ("X-Twice", "1"),
            ("X-Twice", "2"),
            ("Cookie", "c"),
        ]
        answer, line = ask(port, "/v1/completions?x=%20y", body, sent)
        assert (answer.status, answer.read()) == (201, body)
        assert answer.headers.get_all("Set-Cookie") == ["a=1", "b=2"]
        path, headers, taken = engine.asked[-1]
        assert (path, taken) == ("/v1/completions?x=%20y", body)
        assert ranks_of(headers) == [str(home)]
        own = [one for one in headers if one[0] not in ("Host", "X-data-parallel-rank")]
        more = [("Accept-Encoding", "identity"), ("Content-Length", str(len(body)))]
        assert sorted(own) == sorted(sent + more)
        line.close()
    assert errors.read_text() == ""  # no log


def test_home_router_tells_the_domain_from_the_text(routed):
    engine, port, _, home_of, _ = routed
    for domain, text in (("code", b"    return x + 1\n"), (PROSE, b"a dark night. It was")):
        answer, line = ask(port, body=b'{"prompt": "' + text * 4 + b'"}')
        answer.read()
        line.close()
        assert ranks_of(engine.asked[-1][1]) == [str(home_of[domain])]


def test_home_router_leaves_a_rank_that_the_client_chose(routed):
    engine, port, _, _, _ = routed
    answer, line = ask(port, headers=[("x-data-parallel-rank", "3"), ("X-Domain", "code")])
    answer.read()
    line.close()
    assert ranks_of(engine.asked[-1][1]) == ["3"]


def test_home_router_passes_streams_on_as_they_come_and_fills_no_rank(routed):
    """The engine waits for the client to have the first piece: a proxy that keeps it would hang.

    With 3 requests of one domain in flight its rank has 2 above the mean: the next goes elsewhere.
    """
    engine, port, _, home_of, _ = routed
    engine.seen.clear()
    before = len(engine.asked)
    streams = [ask(port, "/stream", b"s", [("X-Domain", "code")]) for _ in range(4)]
    try:
        for answer, _ in streams:
            assert answer.read1(100) == b"first "
        homes = [ranks_of(headers)[0] for _, headers, _ in engine.asked[before:]]
    finally:
        engine.seen.set()
    for answer, line in streams:
        assert answer.read() == b"second"
        line.close()
    assert homes.count(str(home_of["code"])) == 3


def test_home_router_shows_what_breaks(routed, tmp_path):
    _, port, plan, _, _ = routed
    answer, line = ask(port, "/break", b"half")
    with pytest.raises(http.client.IncompleteRead):
        answer.read()
    line.close()
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    line.request("GET", "/health")
    empty = line.getresponse()
    assert (empty.status, empty.read(), line.sock is not None) == (204, b"", True)
    line.putrequest("POST", "/v1/completions")
    line.putheader("Transfer-Encoding", "chunked")
    line.endheaders()
    assert select.select([line.sock], [], [], SECONDS)[0]  # refused before its body has come
    for _ in range(20):
        line.send(b"4\r\nmore\r\n")
        time.sleep(0.01)
    line.send(b"0\r\n\r\n")
    assert line.getresponse().status == 411
    line.close()
    PlacementPlan.from_dict({**plan.to_dict(), "home_profiles": None}).write(tmp_path / "p.json")
    plan.write(tmp_path / "plan.json")
    (tmp_path / "law.txt").write_text("the court")
    engine = "http://127.0.0.1:1"
    for words, message in (
        (("p.json", engine), "found no domain profiles"),
        (("gone.json", engine), "cannot read the plan"),
        (("plan.json", engine, "--dp-size", 3), "found 3 data-"),
        (("plan.json", engine, "--slack", 0), "found --slack 0"),
        (("plan.json", engine, "--texts", tmp_path), "found ['law'] in --texts"),
        (("plan.json", engine, "--texts", tmp_path / "none"), "found no file in --texts"),
        (("plan.json", f"{engine}x"), "expected http://HOST:PORT"),
    ):
        done = subprocess.run(
            command(tmp_path / words[0], *words[1:]),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr


def test_home_router_answers_502_where_no_engine_is(tmp_path):
    write_plan(tmp_path / "plan.json")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen; nobody else can meanwhile
        address = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        words = command(tmp_path / "plan.json", address, "--dp-size", 2)
        proxy = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        try:
            port = int(proxy.stdout.readline().rpartition(":")[2])
            proxy.send_signal(signal.SIGSTOP)  # it takes none of a burst of connections up
            burst = [socket.create_connection(("127.0.0.1", port), SECONDS / 10) for _ in range(64)]
            proxy.send_signal(signal.SIGCONT)
            for line in burst:
                line.sendall(b"GET / HTTP/1.0\r\n\r\n")
                assert line.recv(12) == b"HTTP/1.1 502"
                line.close()
        finally:
            proxy.kill()  # also where it is stopped
            proxy.wait(SECONDS)
            proxy.stdout.close()

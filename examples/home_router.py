"""A proxy in front of vLLM or SGLang that gives every request a home: the data-parallel rank whose
node holds its experts.

    moe-locality place traces/run1 --nodes 4 --ranks-per-node 8 --homes joint -o plan.json
    python examples/home_router.py --plan plan.json --engine http://127.0.0.1:8000 --texts texts/

The home follows from the request's domain and the plan's home profiles. The domain is that of the
header ``X-Domain``, else what the body looks like: ``texts/code.txt``, ``texts/mmlu/law.txt``, ...
have some text of the domains of the trace (runs of four bytes, naive Bayes). Both engines read the
header ``X-data-parallel-rank``, which is all that is added; one that the client sent stays.

Bodies are passed on byte by byte and neither kept nor logged; a stream is passed on as it comes.
A rank with more requests in flight than the others takes no more. Listens on this machine only
unless told otherwise: there is no encryption and no authentication here.
"""

import argparse
import contextlib
import http.client
import socket
import threading
import time
import urllib.parse
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from moe_locality import PlacementPlan
from moe_locality.errors import MoeLocalityError, PlacementError
from moe_locality.placement.homes.assign import domain_scores

RANK, DOMAIN = "X-data-parallel-rank", "X-Domain"
HOP_BY_HOP = {"connection", "keep-alive", "proxy-connection", "te", "trailer", "upgrade"}
HOP_BY_HOP |= {"transfer-encoding", "host", "content-length", "expect"}
MOST_BYTES = 1 << 26
LOOKED_AT = 1 << 14
LINGER_S = 30.0
RUN, KINDS = 4, 1 << 14
"""Bytes of a body that are looked at; runs of bytes, and how many kinds of them are told apart."""


def log_shares(text: bytes) -> np.ndarray:
    """[KINDS] log of the share of each kind of run in a text, unseen ones included."""
    count = np.bincount(kinds_of(text), minlength=KINDS) + 0.1
    return np.log(count / count.sum())


def kinds_of(text: bytes) -> np.ndarray:
    """[n] kind of each run of bytes of a text."""
    codes = np.frombuffer(text, np.uint8).astype(np.uint64)
    runs = np.lib.stride_tricks.sliding_window_view(codes, RUN) if len(codes) >= RUN else codes[:0]
    weight = np.uint64(257) ** np.arange(RUN, dtype=np.uint64)
    return ((runs.reshape(-1, RUN) @ weight) % np.uint64(16381)).astype(np.int64)


def engine_at(address: str) -> urllib.parse.SplitResult:
    """The parts of http://HOST:PORT."""
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(address)
        if parts.scheme == "http" and parts.hostname and parts.port != 0:
            return parts
    raise PlacementError(f"found --engine {address}, expected http://HOST:PORT")


def read_texts(folder: Path, plan: PlacementPlan) -> dict[str, bytes]:
    """The text of each domain, by the name of its file in the folder."""
    files = {
        file.relative_to(folder).with_suffix("").as_posix(): file
        for file in sorted(folder.rglob("*.txt"))
    }
    known = domain_scores(plan, list(files), {})[1]
    wrong = [name for name, is_known in zip(files, known, strict=True) if not is_known]
    if wrong or not files:
        raise PlacementError(
            f"found {wrong or 'no file'} in --texts {folder}, expected DOMAIN.txt of domains of "
            f"the plan ({sorted((plan.home_profiles or {})['domain_rank_share'])[:9]}, ...)"
        )
    return {name: file.read_bytes() for name, file in files.items()}


class Homes:
    """Homes of requests: ``choose`` one, ``release`` it when the request is done."""

    def __init__(
        self, plan: PlacementPlan, ranks: int, slack: int, texts: dict[str, bytes]
    ) -> None:
        if ranks < 1 or plan.num_ranks % ranks:
            raise PlacementError(
                f"found {ranks} data-parallel ranks for {plan.num_ranks} ranks of the plan, "
                "expected as many, or a divisor: correct --dp-size"
            )
        if slack < 1:
            raise PlacementError(f"found --slack {slack}, expected at least 1: some rank has room")
        self.plan, self.ranks, self.slack = plan, ranks, slack
        self.texts = {name: log_shares(text) for name, text in texts.items()}
        self.in_flight = Counter[int]()
        self.lock = threading.Lock()
        self.release(self.choose(None, b""))  # a plan without home profiles fails here

    def choose(self, domain: str | None, body: bytes) -> int:
        """The home of a request, which counts as in flight from now on."""
        if domain is None and self.texts and body:
            kinds = kinds_of(body[:LOOKED_AT])
            domain = max(self.texts, key=lambda name: self.texts[name][kinds].sum())
        scores, _ = domain_scores(self.plan, [domain], {})
        score = scores[0].reshape(self.ranks, -1).mean(axis=1)
        with self.lock:
            most = self.in_flight.total() / self.ranks + self.slack
            free = [rank for rank in range(self.ranks) if self.in_flight[rank] < most]
            home = max(free, key=lambda rank: (score[rank], -self.in_flight[rank]))
            self.in_flight[home] += 1
        return home

    def release(self, home: int) -> None:
        with self.lock:
            self.in_flight[home] -= 1


class Handler(BaseHTTPRequestHandler):
    """One request: its body is read, its home set, the answer passed on piece by piece."""

    protocol_version = "HTTP/1.1"
    homes: Homes
    engine: urllib.parse.SplitResult

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def body(self) -> bytes | None:
        """The whole body; None where it has no known length, is too long or breaks off."""
        length = self.headers.get("Content-Length", "0")
        known = length.isdecimal() and "Transfer-Encoding" not in self.headers
        if not known or int(length) > MOST_BYTES:
            return None
        body = self.rfile.read(int(length))
        return body if len(body) == int(length) else None

    def drain(self) -> None:
        """Read the rest of a refused body for a while: a client that is still sending when its line
        is closed sees a broken line, not the answer.
        """
        self.wfile.flush()
        self.connection.settimeout(LINGER_S)
        last = time.monotonic() + LINGER_S
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while time.monotonic() < last and self.rfile.read1(1 << 16):
                pass

    def forward(self) -> None:
        body = self.body()
        if body is None:
            self.send_error(411, f"give the Content-Length of a body of at most {MOST_BYTES} bytes")
            self.drain()
            return
        given = RANK in self.headers
        domain = self.headers.get(DOMAIN)
        with contextlib.suppress(UnicodeError):  # headers are read as Latin-1; most send UTF-8
            domain = domain and domain.encode("latin-1").decode("utf-8")
        home = None if given else self.homes.choose(domain, body)
        upstream = http.client.HTTPConnection(self.engine.hostname or "", self.engine.port)
        try:
            self.answer(self.ask(upstream, home, body))
        except (OSError, http.client.HTTPException):
            if not self.answered:
                self.send_error(502, "the engine does not answer")
            self.close_connection = True  # the other side sees that the answer broke off
        finally:
            upstream.close()
            if home is not None:
                self.homes.release(home)

    def ask(
        self, upstream: http.client.HTTPConnection, home: int | None, body: bytes
    ) -> http.client.HTTPResponse:
        self.answered = False
        path = self.engine.path.rstrip("/") + self.path
        upstream.putrequest(self.command, path, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in HOP_BY_HOP:
                upstream.putheader(name, value)
        if home is not None:
            upstream.putheader(RANK, str(home))
        if "Content-Length" in self.headers:
            upstream.putheader("Content-Length", str(len(body)))
        upstream.endheaders(body)
        return upstream.getresponse()

    def answer(self, response: http.client.HTTPResponse) -> None:
        length = response.getheader("Content-Length")
        empty = self.command == "HEAD" or response.status in (204, 304)
        chunked = length is None and not empty and self.request_version != "HTTP/1.0"
        self.answered, left = True, int(length or 0)
        self.send_response_only(response.status, response.reason)
        for name, value in response.getheaders():
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", length)
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while not empty and (piece := response.read1(1 << 16)):
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            left -= len(piece)
        if chunked:
            self.wfile.write(b"0\r\n\r\n")
        elif not empty and left:  # broke off, or of unknown length
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_OPTIONS = forward


class Server(ThreadingHTTPServer):
    """Keeps a burst of connections waiting; of more than six the library's own loses some."""

    request_queue_size = 512


def main() -> None:
    parser = argparse.ArgumentParser(description="Gives requests homes.")
    parser.add_argument("--plan", type=Path, required=True, help="made with --homes joint")
    parser.add_argument("--engine", required=True, help="http://HOST:PORT of vLLM or SGLang")
    parser.add_argument("--dp-size", type=int, help="data-parallel ranks; the plan's ranks")
    parser.add_argument("--texts", type=Path, help="folder of DOMAIN.txt")
    parser.add_argument("--slack", type=int, default=4, help="requests above the mean of a rank")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080, help="0: any that is free")
    options = parser.parse_args()
    try:
        Handler.engine = engine_at(options.engine)
        plan = PlacementPlan.read(options.plan)
        texts = read_texts(options.texts, plan) if options.texts else {}
        ranks = plan.num_ranks if options.dp_size is None else options.dp_size
        Handler.homes = Homes(plan, ranks, options.slack, texts)
        server = Server((options.host, options.port), Handler)
    except MoeLocalityError as error:
        parser.error(str(error))
    except (OSError, OverflowError) as error:  # a text, or the address
        parser.error(f"found {error}: correct --texts, --host or --port")
    with server:
        print(f"http://{options.host}:{server.server_port}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


if __name__ == "__main__":
    main()

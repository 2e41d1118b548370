"""A launcher that forks the ranks of a script from the process of the tests, which has imported
everything, where that of DeepSpeed makes an interpreter for each: for tests of what a script does,
not of how it is launched.
"""

import atexit
import functools
import gc
import json
import logging
import os
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import threading
import traceback
import weakref
from pathlib import Path

from moe_locality.demo.launch import free_port
from moe_locality.trace.recorder import core as recorder
from tests.launch import preload

CLIENT = """
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    job = json.dumps([dict(os.environ), os.getcwd(), *sys.argv[2:]]).encode()
    socket.send_fds(server, [b"%16d" % len(job)], [0, 1, 2])
    server.sendall(job)
    sys.exit(int(server.recv(3) or 1))
"""
"""Arguments: the server's address, ranks, port, script and its own. Hands them over with its
environment, directory and streams; ends as the job ends.
"""


def forked_command(num_ranks: int, script: Path, arguments: list[str]) -> list[str]:
    """The command line that stands for that of ``demo.launch.launch_command``."""
    command = [sys.executable, "-IS", "-c", CLIENT, server_address()]
    return [*command, str(num_ranks), str(free_port()), str(script), *arguments]


@functools.cache
def server_address() -> str:
    """Fork a server that lives as long as this process."""
    preload(deepspeed=True)
    address = os.path.join(tempfile.mkdtemp(), "server")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    lives, end = os.pipe()
    if os.fork():
        os.close(lives)
        listener.close()
        return address
    os.close(end)

    def end_with_the_tests() -> None:
        os.read(lives, 1)
        shutil.rmtree(os.path.dirname(address))
        os._exit(0)

    threading.Thread(target=end_with_the_tests, daemon=True).start()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a job
    gc.freeze()
    while True:
        client, _ = listener.accept()
        if not os.fork():
            try:
                _launch(client)
            finally:
                traceback.print_exc()
                os._exit(1)
        client.close()


def _launch(client: socket.socket) -> None:
    """Fork, run the script in every rank with what it registered for its exit, and answer with the
    worst.
    """
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, *_ = socket.recv_fds(client, 16, 3)
    with client.makefile("rb") as sent:
        environment, folder, ranks, port, script, *arguments = json.loads(sent.read(int(size)))
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", 1, closefd=False) for n in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    _forget_the_tests()
    running = []
    for rank in range(int(ranks)):
        if not (process := os.fork()):
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
            os.environ.update(WORLD_SIZE=ranks, LOCAL_SIZE=ranks, MASTER_PORT=port)
            os.environ.update(CROSS_RANK="0", CROSS_SIZE="1")
            os._exit(_run(script))  # taking apart all that was imported takes a rank seconds
        running.append(process)

    def end_with_the_client() -> None:
        client.recv(1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=end_with_the_client, daemon=True).start()
    failed = 0
    while running:
        ended, status = os.wait()
        running.remove(ended)
        if status and not failed:
            failed = abs(os.waitstatus_to_exitcode(status))
            for process in running:
                os.kill(process, signal.SIGTERM)
    client.sendall(b"%3d" % failed)
    os._exit(0)


def _forget_the_tests() -> None:
    """Drop what is for the process of the tests to do at its exit, and its handlers of logging."""
    atexit._clear()
    weakref.finalize._registry.clear()
    atexit.register(weakref.finalize._exitfunc)
    atexit.register(recorder._close_all)
    logging.getLogger().handlers.clear()
    for logger in map(logging.getLogger, list(logging.root.manager.loggerDict)):
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:  # no file
                handler.setStream(sys.stdout)


def _run(script: str) -> int:
    """Run the script in this rank; returns what its process would exit with."""
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)  # noqa: T201
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    return code

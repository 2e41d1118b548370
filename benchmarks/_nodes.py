"""Nodes on one machine: network namespaces joined by links of a given rate, an sshd in each.

A node is a network namespace with a host name of its own, an address on a switch (a bridge in one
more namespace) and two limited queues (``tc tbf``), one per direction, that make its link as fast
as asked. Nothing is made in the machine's own namespace. DeepSpeed's launcher reaches the nodes
over pdsh and ssh, as it would real ones; they share the machine's files, cores and memory.

Names hold the process id of their owner, so that the next run finds what a killed one left behind.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

PREFIX = "moeloc"
NETNS, HOSTS = Path("/run/netns"), Path("/etc/netns")
SSH_PORT = 2222
MASTER_PORT = 29500
ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("ip", "tc", "unshare", "ssh", "ssh-keygen", "sshd", "pdsh")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def why_not() -> str | None:
    """Return what keeps this machine from having nodes, or None."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    absent = [tool for tool in NEEDED if shutil.which(tool, path=PATH) is None]
    if absent:
        return f"found no {', '.join(absent)} (Debian: apt install iproute2 openssh-server pdsh)"
    name = f"{PREFIX}{os.getpid()}x"
    try:
        _ip("netns", "add", name)
        try:
            _run("ip", "-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
            _limit(name, "eth0", 100)
        finally:
            _ip("netns", "del", name)
    except RuntimeError as error:
        return f"cannot make a limited link in a network namespace: {error}"
    return None


def remove_leftovers() -> list[str]:
    """Remove the nodes whose owner is gone, with all that runs in them; return their names."""
    removed = []
    for entry in sorted(NETNS.glob(f"{PREFIX}*")) if NETNS.is_dir() else []:
        owner = re.fullmatch(rf"{PREFIX}(\d+)x.*", entry.name)
        if owner and not Path("/proc", owner[1]).exists():
            _remove(entry.name)
            removed.append(entry.name)
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*x-*"):
        owner = re.match(rf"{PREFIX}(\d+)x-", folder.name)
        if owner and not Path("/proc", owner[1]).exists():
            shutil.rmtree(folder, ignore_errors=True)
    return removed


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A launch that ended: exit code (None: ended past its time limit), output, seconds."""

    code: int | None
    output: str
    seconds: float


class Nodes:
    """``with Nodes(4, mbit_per_s=200) as nodes:`` makes ``node0``, ... of ``slots`` ranks each.

    ``mbit_per_s`` None leaves the links as fast as the machine. With ``frame_bytes``
    every packet is an Ethernet frame with at most as much in it (the MTU), as a network card sends
    and counts them; else the kernel passes up to 64 KB as one, with one header. ``hostfile`` is
    DeepSpeed's.
    """

    _made = itertools.count()

    def __init__(
        self,
        count: int = 2,
        *,
        slots: int = 2,
        mbit_per_s: float | None = None,
        frame_bytes: int | None = None,
    ) -> None:
        self.count, self.slots, self.mbit_per_s = count, slots, mbit_per_s
        self.frame_bytes = frame_bytes
        base = f"{PREFIX}{os.getpid()}x{next(self._made)}n"
        self.switch = f"{base}sw"
        self.namespaces = [f"{base}{node}" for node in range(count)]
        self.names = [f"node{node}" for node in range(count)]
        self.addresses = [f"10.77.0.{node + 1}" for node in range(count)]

    def __enter__(self) -> "Nodes":
        remove_leftovers()
        self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}x-"))
        try:
            self._make_keys()
            _ip("netns", "add", self.switch)
            _run("ip", "-n", self.switch, "link", "add", "br0", "type", "bridge")
            _run("ip", "-n", self.switch, "link", "set", "br0", "up")
            for node in range(self.count):
                self._make_node(node)
            self.hostfile = self.folder / "hostfile"
            lines = [f"{name} slots={self.slots}\n" for name in self.names]
            self.hostfile.write_text("".join(lines))
            self._wait_for_ssh()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the nodes and all that runs in them."""
        for name in (*self.namespaces, self.switch):
            _remove(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _make_keys(self) -> None:
        for key in ("id", "hostkey"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key))
        shutil.copy(self.folder / "id.pub", self.folder / "authorized_keys")
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd's privilege separation wants it

    def _make_node(self, node: int) -> None:
        name, port = self.namespaces[node], f"port{node}"
        known = [f"{a} {n}\n" for a, n in zip(self.addresses, self.names, strict=True)]
        (HOSTS / name).mkdir(parents=True)  # "ip netns exec" shows it as /etc/hosts
        (HOSTS / name / "hosts").write_text("127.0.0.1 localhost\n" + "".join(known))
        _ip("netns", "add", name)
        inside, switch = ("ip", "-n", name), ("ip", "-n", self.switch)
        peer = ("type", "veth", "peer", "name", port, "netns", self.switch)
        _run(*inside, "link", "add", "eth0", *peer)
        _run(*switch, "link", "set", port, "master", "br0", "up")
        _run(*inside, "link", "set", "lo", "up")
        _run(*inside, "addr", "add", f"{self.addresses[node]}/24", "dev", "eth0")
        _run(*inside, "link", "set", "eth0", "up")
        if self.frame_bytes is not None:
            for end in ((*inside, "link", "set", "eth0"), (*switch, "link", "set", port)):
                _run(*end, "mtu", str(self.frame_bytes), "gso_max_segs", "1")
        if self.mbit_per_s is not None:  # what leaves the node, and what comes to it
            _limit(name, "eth0", self.mbit_per_s)
            _limit(self.switch, port, self.mbit_per_s)
        options = {
            "ListenAddress": self.addresses[node],
            "PidFile": "none",
            "AuthorizedKeysFile": self.folder / "authorized_keys",
            "StrictModes": "no",
            "PermitRootLogin": "prohibit-password",
            "PasswordAuthentication": "no",
            "UsePAM": "no",
            "MaxStartups": 100,
        }
        sshd = [shutil.which("sshd", path=PATH) or "sshd", "-D", "-e", "-f", "/dev/null"]
        sshd += ["-p", str(SSH_PORT), "-h", str(self.folder / "hostkey")]
        sshd += [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        named = f'hostname {self.names[node]} && exec "$@"'
        with (self.folder / f"sshd{node}.log").open("w") as log:
            subprocess.Popen(
                [*self.enter(node), "unshare", "--uts", "sh", "-c", named, "sh", *sshd],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait_for_ssh(self, limit_s: float = 30) -> None:
        deadline = time.monotonic() + limit_s
        for node, name in enumerate(self.names):
            command = [*self.enter(0), "ssh", *self._ssh_options(), "-p", str(SSH_PORT), name]
            while True:
                asked = [*command, "hostname"]
                done = subprocess.run(asked, capture_output=True, text=True, check=False)
                if done.returncode == 0 and done.stdout.strip() == name:
                    break
                if time.monotonic() > deadline:
                    log = (self.folder / f"sshd{node}.log").read_text()
                    raise RuntimeError(f"no sshd on {name}: {done.stderr or done.stdout}{log}")
                time.sleep(0.2)

    def _ssh_options(self) -> list[str]:
        options = {
            "IdentitiesOnly": "yes",
            "StrictHostKeyChecking": "no",
            "UserKnownHostsFile": "/dev/null",
            "LogLevel": "ERROR",
            # without these pdsh waits for a node whose link is down until the kernel gives up
            "ServerAliveInterval": 5,
            "ServerAliveCountMax": 3,
        }
        said = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        return ["-i", str(self.folder / "id"), *said]

    def enter(self, node: int) -> list[str]:
        """Return the start of a command line that runs on a node."""
        return ["ip", "netns", "exec", self.namespaces[node]]

    def set_link(self, node: int, state: str) -> None:
        """Pull the plug of a node at its switch (``"down"``), or put it in again (``"up"``)."""
        _run("ip", "-n", self.switch, "link", "set", f"port{node}", state)

    def link_bytes(self) -> list[dict[str, int]]:
        """Return what the kernel counted on each node's link so far: ``sent`` and ``received``."""
        text = _run("ip", "-n", self.switch, "-s", "-j", "link", "show")
        stats = {link["ifname"]: link["stats64"] for link in json.loads(text)}
        ports = [stats[f"port{node}"] for node in range(self.count)]
        return [{"sent": p["rx"]["bytes"], "received": p["tx"]["bytes"]} for p in ports]

    def start(
        self, script: str | Path, arguments: Sequence[str] = (), **environment: str
    ) -> subprocess.Popen[str]:
        """Start a Python script on all nodes with ``deepspeed --hostfile ... --launcher pdsh``, or
        a script of ``launch/`` that does so itself.
        """
        everywhere = {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "NUMBA_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "eth0",
            **environment,
        }
        lines = [f"{key}={value}\n" for key, value in everywhere.items()]
        (self.folder / ".deepspeed_env").write_text("".join(lines))
        ssh = " ".join(self._ssh_options())
        options = ["--launcher", "pdsh", "--no_ssh_check", "--ssh_port", str(SSH_PORT)]
        options += ["--master_addr", self.addresses[0], "--master_port", str(MASTER_PORT)]
        hostfile = ["--hostfile", str(self.hostfile)]
        if Path(script).suffix == ".sh":
            command = [str(script), *hostfile]
            everywhere["DEEPSPEED_ARGS"] = " ".join(options)
            everywhere["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        else:
            runner = [sys.executable, "-m", "deepspeed.launcher.runner"]
            command = [*runner, *hostfile, *options, str(script)]
        python = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1"}
        python["PYTHONFAULTHANDLER"] = "1"  # a rank that crashes says where
        return subprocess.Popen(
            [*self.enter(0), *command, *arguments],
            cwd=self.folder,
            env={**os.environ, **python, **everywhere, "PDSH_SSH_ARGS_APPEND": ssh},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, process: subprocess.Popen[str], limit_s: float) -> Finished:
        """Wait for a launch; past the limit all that it started on the nodes is ended too."""
        start, code = time.monotonic(), None
        try:
            output, _ = process.communicate(timeout=limit_s)
            code = process.returncode
        except subprocess.TimeoutExpired:
            self.end_launch(process)
            output, _ = process.communicate()
        return Finished(code=code, output=output, seconds=time.monotonic() - start)

    def end_launch(self, process: subprocess.Popen[str]) -> None:
        """Kill a launch: the launcher here, and its ranks on the nodes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for pid in self.programs():
            _kill(pid)

    def programs(self) -> list[int]:
        """Return the process ids of what runs on the nodes, but for sshd."""
        pids = [pid for name in self.namespaces for pid in _processes(name)]
        return [pid for pid in pids if b"sshd" not in _command_line(pid)]


def _limit(namespace: str, interface: str, mbit_per_s: float) -> None:
    queue = ("tbf", "rate", f"{mbit_per_s:g}mbit", "burst", "256kb", "latency", "400ms")
    _run("tc", "-n", namespace, "qdisc", "replace", "dev", interface, "root", *queue)


def _remove(namespace: str) -> None:
    """Kill what runs in a namespace, and delete it with its links; nothing where it is gone."""
    for _ in range(20):
        pids = _processes(namespace)
        if not pids:
            break
        for pid in pids:
            _kill(pid)
        time.sleep(0.05)
    if (NETNS / namespace).exists():
        _ip("netns", "del", namespace)
    shutil.rmtree(HOSTS / namespace, ignore_errors=True)


def _processes(namespace: str) -> list[int]:
    if not (NETNS / namespace).exists():
        return []
    return [int(pid) for pid in _ip("netns", "pids", namespace).split()]


def _command_line(pid: int) -> bytes:
    try:
        return Path("/proc", str(pid), "cmdline").read_bytes()
    except OSError:
        return b""


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    environment: dict[str, Any] = {**os.environ, "PATH": PATH}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout

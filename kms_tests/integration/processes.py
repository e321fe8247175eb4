"""Run the real programs: a machine with a data directory of its own, its server, and the commands that talk to it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

ROOT: Final = Path(__file__).resolve().parents[2]
PASSPHRASE: Final = "correct horse battery staple"
DEADLINE: Final = 180.0
"""Seconds after which what waits for something is taken to wait for ever: no bound that a busy machine could reach."""

_MEASURE: Final = """
import os, sys
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(pid, 0)
print("PEAK", usage.ru_maxrss, file=sys.stderr)
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""A child's ru_maxrss is at least what its parent had at the fork, so the parent has to be a small one."""


UNPRIVILEGED: Final = """
import ctypes, os
if os.geteuid() == 0:
    PR_CAPBSET_DROP = 24
    for capability in (1, 2, 19):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_SYS_PTRACE
        assert ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0
"""
"""A prologue: under root, give up what makes a file's mode and another process's memory no bounds."""


def after(prologue: str | None, command: list[str]) -> list[str]:
    """`command`, in a process that has run `prologue` first.

    Instead of `preexec_fn`, which warns in a process with threads, and other tests leave some.
    """
    if prologue is None:
        return command
    return [sys.executable, "-S", "-c", f"{prologue}\nimport os, sys\nos.execv(sys.argv[1], sys.argv[1:])", *command]


_BEGIN: Final = """
import sys
from importlib.util import find_spec
if find_spec("kms.cli.start"):
    from kms.cli.start import {name} as main
else:  # a checkout that is older than that, to compare with
    from kms.cli.{name} import main
sys.exit(main())
"""


def program(name: str, change: str = "") -> list[str]:
    """How to run `client`, `admin` or `server`, installed or not; `change` is Python that it runs before it begins."""
    return [sys.executable, "-c", f"{change}{_BEGIN.format(name=name)}"]


def measured(
    command: list[str], environment: Mapping[str, str], timeout: float = DEADLINE
) -> tuple[subprocess.CompletedProcess[str], int]:
    """Run `command`, which begins with the path of a program: how it ended, and the most memory it had, in KiB."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", _MEASURE, *command],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    found = re.search(r"PEAK (\d+)", done.stderr)
    assert found is not None, done.stderr
    return done, int(found[1])


def eventually(what: str, condition: Callable[[], bool]) -> None:
    """Return once `condition` holds; fail, naming `what`, when it does not in time."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"in {DEADLINE} s it never came to this: {what}"
        time.sleep(0.005)


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    stdout: bytes
    stderr: str

    def said_one_line(self, name: str) -> str:
        """The one line on stderr, which begins with the name of the program."""
        assert self.stderr.count("\n") == 1, self.stderr
        assert self.stderr.endswith("\n")
        assert self.stderr.startswith(f"{name}: "), self.stderr
        return self.stderr


class Wire:
    """A bare connection: what goes over it is what the test says."""

    def __init__(self, address: Path | int) -> None:
        if isinstance(address, Path):
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.settimeout(DEADLINE)
            self.sock.connect(str(address))
        else:
            self.sock = socket.create_connection(("127.0.0.1", address), DEADLINE)
        self._replies = self.sock.makefile("rb")

    def send(self, *requests: Mapping[str, Any]) -> None:
        self.sock.sendall(b"".join(json.dumps(request).encode() + b"\n" for request in requests))

    def reply(self) -> dict[str, Any]:
        line = self._replies.readline()
        assert line.endswith(b"\n"), f"the server closed the connection: {line!r}"
        reply = json.loads(line)
        assert isinstance(reply, dict)
        return reply

    def ask(self, **request: Any) -> dict[str, Any]:
        self.send(request)
        return self.reply()

    def is_at_end(self) -> bool:
        """Whether the server has closed the connection; waits for that or for a byte."""
        try:
            return self._replies.read(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self._replies.close()
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Server:
    """A running kms-server. Its stderr is a file, so that it can say what it likes without being read."""

    def __init__(self, process: subprocess.Popen[bytes], machine: Machine, log: Path) -> None:
        self.process = process
        self.machine = machine
        self.log = log
        self.port = 0
        self.socket = machine.socket

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stderr(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def wait_until_ready(self) -> None:
        eventually("the server is ready or has ended", lambda: "ready on" in self.stderr or self.process.poll() is not None)
        assert self.process.poll() is None, self.stderr
        eventually("the line is whole", lambda: re.search(r"ready on .*\n", self.stderr) is not None)
        line = next(line for line in self.stderr.splitlines() if "ready on" in line)
        if found := re.search(r"127\.0\.0\.1:(\d+)", line):
            self.port = int(found[1])
        if found := re.search(r"(/\S+\.sock)", line):
            self.socket = Path(found[1])

    def tcp(self) -> Wire:
        return Wire(self.port)

    def unix(self) -> Wire:
        return Wire(self.socket)

    def groups(self) -> dict[str, dict[int, str]]:
        """Each group's versions and their states."""
        with self.unix() as wire:
            reply = wire.ask(type="ListKeyGroups", token=self.machine.admin_token)
        return {
            group["keyId"]: {version["version"]: version["status"] for version in group["versions"]}
            for group in reply["keyGroups"]
        }

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(DEADLINE)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE)

    def client(self, *arguments: str, **options: Any) -> Outcome:
        """kms-client over this server's Unix socket."""
        return self.machine.client("--unix", str(self.socket), *arguments, **options)

    def client_over_tcp(self, *arguments: str, **options: Any) -> Outcome:
        return self.machine.client("--tcp", f"127.0.0.1:{self.port}", *arguments, **options)

    def admin(self, *arguments: str, **options: Any) -> Outcome:
        return self.machine.admin("--unix", str(self.socket), *arguments, **options)


class Machine:
    """A data directory and an environment that know nothing of the real user's."""

    def __init__(self, template: Path | None = None, source: Path = ROOT) -> None:
        """A copy of the data directory `template`, or a machine where nobody has run anything yet.

        The programs are those of the checkout at `source`.
        """
        # Short, as a Unix socket's path has at most 107 bytes, which pytest's own tmp_path can exceed.
        self.root = Path(tempfile.mkdtemp(prefix="kms", dir="/tmp"))
        self.data = self.root / "mini-kms"
        self.keystore = self.data / "keystore.json"
        self.socket = self.data / "kms.sock"
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("MINIKMS_", "XDG_")) and name not in ("NOTIFY_SOCKET", "CREDENTIALS_DIRECTORY")
        } | {
            "HOME": str(self.root),
            "XDG_DATA_HOME": str(self.root),
            "PYTHONPATH": str(source.resolve()),
            "MINIKMS_PASSPHRASE": PASSPHRASE,
            "TERM": "dumb",
        }
        self._servers: list[Server] = []
        if template is not None:
            shutil.copytree(template, self.data)

    @property
    def api_token(self) -> str:
        return (self.data / "api.token").read_text(encoding="ascii").strip()

    @property
    def admin_token(self) -> str:
        return (self.data / "admin.token").read_text(encoding="ascii").strip()

    def file(self, name: str, content: bytes) -> Path:
        path = self.root / name
        path.write_bytes(content)
        return path

    def path(self) -> str:
        """A PATH on which the three programs come first, as scripts that run this checkout's code."""
        programs = self.root / "bin"
        programs.mkdir(exist_ok=True)
        for name in ("client", "admin", "server"):
            script = programs / f"kms-{name}"
            script.write_text(f'#!/bin/sh\nexec {shlex.join(program(name))} "$@"\n', encoding="utf-8")
            script.chmod(0o755)
        return f"{programs}{os.pathsep}{os.environ.get('PATH', os.defpath)}"

    def changed(self, environment: Mapping[str, str | None] | None) -> dict[str, str]:
        """This machine's environment with some variables changed, or (None) removed."""
        merged: dict[str, str | None] = {**self.environment, **(environment or {})}
        return {name: value for name, value in merged.items() if value is not None}

    def popen(
        self,
        name: str,
        *arguments: str,
        environment: Mapping[str, str | None] | None = None,
        stderr: int | BinaryIO = subprocess.PIPE,
        stdout: int | BinaryIO = subprocess.PIPE,
        prologue: str | None = None,
        change: str = "",
        stdin: int | BinaryIO = subprocess.PIPE,
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            after(prologue, [*program(name, change), *arguments]),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=self.changed(environment),
            cwd=self.root,
            # A session of its own has no terminal, so nothing can stop to ask for a secret.
            start_new_session=True,
        )

    def run(self, name: str, *arguments: str, stdin: bytes = b"", **options: Any) -> Outcome:
        with self.popen(name, *arguments, **options) as process:
            try:
                stdout, stderr = process.communicate(stdin, timeout=DEADLINE)
            except BaseException:
                process.kill()
                raise
        return Outcome(process.returncode, stdout or b"", stderr.decode())

    def client(self, *arguments: str, **options: Any) -> Outcome:
        return self.run("client", *arguments, **options)

    def admin(self, *arguments: str, **options: Any) -> Outcome:
        return self.run("admin", *arguments, **options)

    def client_peak(self, *arguments: str) -> tuple[int, int]:
        """Run kms-client; its exit status and the most memory it had, in KiB."""
        done, peak = measured([*program("client"), *arguments], self.environment)
        return done.returncode, peak

    def start(self, *flags: str, ready: bool = True, tcp_port: str | None = "0", **options: Any) -> Server:
        """Start kms-server, by default on any free port, and wait for it to be ready."""
        if tcp_port is not None:
            flags = ("--tcp-port", tcp_port, *flags)
        log = self.root / f"server-{len(self._servers)}.stderr"
        with log.open("wb") as stderr:
            process = self.popen("server", *flags, stderr=stderr, stdout=subprocess.DEVNULL, **options)
        assert process.stdin is not None
        process.stdin.close()
        server = Server(process, self, log)
        self._servers.append(server)
        if ready:
            server.wait_until_ready()
        return server

    def refused_start(self, *flags: str, **options: Any) -> Outcome:
        """Start kms-server when it cannot start; how that ended."""
        server = self.start(*flags, ready=False, **options)
        status = server.process.wait(DEADLINE)
        return Outcome(status, b"", server.stderr)

    def temp_files(self) -> list[Path]:
        return [path for path in self.root.rglob(".*") if ".tmp-" in path.name or path.name.startswith(".kms-")]

    def dispose(self) -> None:
        """Stop what still runs, each as a service manager would, and remove everything."""
        try:
            for server in self._servers:
                if server.process.poll() is None:
                    assert server.stop() == 0, server.stderr
        finally:
            for server in self._servers:
                if server.process.poll() is None:
                    server.kill()
            shutil.rmtree(self.root)

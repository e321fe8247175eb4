"""Signals and terminals around real processes: from the first instant of a program to its last."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from kms_tests.integration.processes import DEADLINE, PASSPHRASE, Machine, Server, eventually, program

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace delivers a signal at a system call")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes a namespace of process ids")
SHELL: Final = ["bash", "--norc", "--noediting", "-i"]


class Screen:
    """A terminal, and what has appeared on it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.text = ""

    def shows(self, what: str) -> str:
        """Wait for `what`, and return all that stood there up to its end; the next one is looked for behind it."""
        while what not in self.text:
            ready, _, _ = select.select([self._descriptor], [], [], DEADLINE)
            assert ready, f"it never showed {what!r}: {self.text!r}"
            try:
                piece = os.read(self._descriptor, 4096)
            except OSError:
                piece = b""
            assert piece, f"it ended without {what!r}: {self.text!r}"
            self.text += piece.decode("utf-8", "replace")
        before, found, self.text = self.text.partition(what)
        return before + found

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())


_AT_TERMINAL: Final = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""


@contextmanager
def shell_at_a_terminal(machine: Machine) -> Iterator[Screen]:
    """An interactive shell; at the end its window is closed."""
    ours, theirs = pty.openpty()
    with open(theirs, "r+b", buffering=0) as terminal:  # noqa: PTH123 - a descriptor, not a path
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", _AT_TERMINAL, *SHELL],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            cwd=machine.root,
            env=machine.changed({"PATH": machine.path(), "PS1": "@ ", "MINIKMS_PASSPHRASE": None}),
        )
    screen = Screen(ours)
    try:
        screen.shows("@ ")
        yield screen
    finally:
        os.close(ours)
        try:
            process.wait(DEADLINE)
        finally:
            process.kill()


def _of_init(machine: Machine) -> list[int]:
    """The processes of a `kms-admin init` on this machine."""
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            command = (process / "cmdline").read_bytes().split(b"\0")
            if b"init" in command and (process / "cwd").samefile(machine.root):
                found.append(int(process.name))
    return sorted(found)


@pytest.mark.parametrize("stop", ["\x1a", "a kill -STOP"])
def test_a_prompt_that_was_stopped_asks_again_and_shows_no_passphrase(bare: Machine, stop: str) -> None:
    with shell_at_a_terminal(bare) as screen:
        screen.type("stty -a | tr ' ' '\\n' | grep -x -e echo -e -echo; kms-admin init\n")
        assert "\r\necho\r\n" in screen.shows("passphrase: ")
        if stop == "\x1a":
            screen.type(stop)
        else:
            os.kill(_of_init(bare)[-1], signal.SIGSTOP)
        screen.shows("Stopped")
        screen.shows("@ ")
        screen.type("fg\n")
        screen.shows("passphrase: ")
        screen.type(PASSPHRASE + "\n")
        assert PASSPHRASE not in screen.shows("passphrase again: ")
        screen.type(PASSPHRASE + "\n")
        assert PASSPHRASE not in screen.shows("keystore ")
        screen.shows("@ ")
        screen.type("stty -a | tr ' ' '\\n' | grep -x -e echo -e -echo\n")
        assert "\r\necho\r\n" in screen.shows("@ ")
    assert bare.keystore.exists()


def test_a_prompt_in_the_background_waits_and_is_answered_in_the_foreground(bare: Machine) -> None:
    with shell_at_a_terminal(bare) as screen:
        screen.type("kms-admin init &\n")
        # By then the shell edits its next line, with the terminal in modes of its own.
        eventually("it is there", lambda: bool(_of_init(bare)))
        status = Path(f"/proc/{_of_init(bare)[-1]}/stat")
        eventually("it is stopped", lambda: status.read_text().rpartition(")")[2].split()[0] == "T")
        screen.type("fg\n")
        for question in ("passphrase: ", "passphrase again: "):
            assert screen.shows(question).count("passphrase") == 1, "it asks once"
            screen.type(PASSPHRASE + "\n")
        assert PASSPHRASE not in screen.shows("keystore ")


@pytest.mark.parametrize(("key", "status"), [("\x03", 130), ("\x1c", 131)])
def test_a_prompt_that_is_ended_gives_the_echo_back(bare: Machine, key: str, status: int) -> None:
    with shell_at_a_terminal(bare) as screen:
        screen.type("kms-admin init\n")
        screen.shows("passphrase: ")
        screen.type(key)
        screen.shows("@ ")
        screen.type("echo $?; stty -a | tr ' ' '\\n' | grep -x -e echo -e -echo\n")
        shown = screen.shows("@ ")
        assert f"\r\n{status}\r\n" in shown
        assert "\r\necho\r\n" in shown
    assert not bare.data.exists()


@pytest.mark.parametrize("end", [" &", ""], ids=["in the background", "in the foreground"])
def test_a_server_whose_terminal_is_closed_stops(machine: Machine, end: str) -> None:
    with shell_at_a_terminal(machine) as screen:
        screen.type(f"MINIKMS_PASSPHRASE='{PASSPHRASE}' kms-server --no-tcp{end}\n")
        found = re.search(r"\(pid (\d+)\)", screen.shows("(pid ") + screen.shows(")"))
        assert found is not None
        server = os.pidfd_open(int(found[1]))
    # The terminal went with its shell: the kernel told whoever was at it.
    ready, _, _ = select.select([server], [], [], DEADLINE)
    os.close(server)
    assert ready, "it lives on without its log"
    assert not machine.socket.exists(), "it stopped in order"


def test_a_server_that_nohup_has_started_outlives_its_terminal_and_reloads(machine: Machine) -> None:
    with shell_at_a_terminal(machine) as screen:
        screen.type(f"MINIKMS_PASSPHRASE='{PASSPHRASE}' nohup kms-server --no-tcp > log 2>&1 < /dev/null &\n")
        log = machine.root / "log"
        eventually("it is ready", lambda: log.exists() and "(pid " in log.read_text() and ")\n" in log.read_text())
        found = re.search(r"\(pid (\d+)\)", log.read_text())
        assert found is not None
        pid = int(found[1])
    try:
        os.kill(pid, signal.SIGHUP)
        eventually("it has reloaded", lambda: "reloaded" in log.read_text())
        assert machine.client("health").status == 0
    finally:
        os.kill(pid, signal.SIGTERM)
        eventually("it has stopped", lambda: not machine.socket.exists())


_AT_ITS_IMPORTS: Final = """
import pathlib, sys
sys.addaudithook(lambda event, what: event == "import" and what[0] == "kms.cli.server" and pathlib.Path("there").touch())
"""
"""It has begun, and is about to load the rest."""
_AT_ITS_KEYSTORE: Final = """
import pathlib, time, kms.storage.passphrases
def stuck(*_):
    pathlib.Path("there").touch()
    time.sleep(1000)
kms.storage.passphrases.opening_form = stuck
"""
"""In the place of a key derivation that takes long."""


@needs_root
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("change", [_AT_ITS_IMPORTS, _AT_ITS_KEYSTORE], ids=["at its imports", "at its keystore"])
def test_a_server_that_is_process_1_stops_at_once_before_it_is_ready(machine: Machine, number: int, change: str) -> None:
    inside = ["unshare", "--pid", "--fork", "--kill-child", *program("server", change), "--no-tcp"]
    with subprocess.Popen(
        inside, env=machine.environment, cwd=machine.root, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        eventually("it is there", (machine.root / "there").exists)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        os.kill(int(children.read_text().split()[0]), number)
        assert process.wait(DEADLINE) == 128 + number
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()


@needs_strace
@pytest.mark.parametrize("name", ["client", "admin", "server"])
def test_an_interrupt_at_any_instant_is_no_traceback(machine: Machine, server: Server, name: str, tmp_path: Path) -> None:
    arguments = {"client": ["health"], "admin": ["list-keys"], "server": ["--help"]}[name]
    log = tmp_path / "calls"
    command = ["strace", "-f", "-qq", "-o", str(log), "-e", "trace=openat,read,write,mmap,munmap,recvfrom"]
    traced = [*program(name), *arguments]
    environment = machine.environment | {"MINIKMS_UNIX_SOCKET": str(server.socket)}
    done = subprocess.run([*command, *traced], env=environment, cwd=machine.root, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    calls = log.read_text().splitlines()
    # The interpreter's own start is not ours; from where it has read our first module on, everything is.
    begin = next(
        number
        for number, call in enumerate(calls, 1)
        if "kms/host/__pycache__/occupied" in call or "kms/host/occupied.py" in call
    )
    kinds = {
        kind: [n for n, call in enumerate(calls, 1) if re.match(rf"\d+ +{kind}\(", call)]
        for kind in ("openat", "read", "mmap", "write")
    }
    seen: set[int] = set()
    for kind, numbers in kinds.items():
        for count, number in enumerate(numbers, 1):
            if number <= begin + 4 or (count % 23 and kind != "write"):
                continue
            fault = ["-e", f"inject={kind}:signal=INT:when={count}"]
            done = subprocess.run(
                [*command, *fault, *traced], env=environment, cwd=machine.root, capture_output=True, check=False
            )
            seen.add(done.returncode)
            assert done.returncode in (0, 130, -signal.SIGINT), (kind, count, done)
            assert b"Traceback" not in done.stderr, (kind, count, done.stderr)
            assert b"Exception ignored" not in done.stderr, (kind, count, done.stderr)
    assert seen & {130, -signal.SIGINT}

"""Watch the system calls of a process with strace(1), and make one of them fail.

Strings and paths are printed in hexadecimal, so nothing in them can be taken for punctuation, and every descriptor comes
with its path. A server forbids others to look into it (PR_SET_DUMPABLE), so only root may attach to one.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kms_tests.integration.processes import DEADLINE, eventually

WATCHED: Final = "trace=%file,%desc,%network"
"""Whatever takes a path or a descriptor, known to these tests or not."""

_LINE: Final = re.compile(r"^(\d+) +(.*)$")
_UNFINISHED: Final = " <unfinished ...>"
_DETACHED: Final = " <detached ...>"
_RESUMED: Final = re.compile(r"^<\.\.\. \w+ resumed>")
_CALL: Final = re.compile(r"^(\w+)\((.*)\) += +(-?\d+|\?)(.*)$")
_STRING: Final = re.compile(r'^"((?:\\x[0-9a-f]{2})*)"$')
_DESCRIPTOR: Final = re.compile(r"^(?:\d+|AT_FDCWD)<((?:\\x[0-9a-f]{2})*)>(?:\(deleted\))?$")


@dataclass(frozen=True)
class Call:
    """A system call that returned, or the end of the process (`exit`)."""

    thread: int
    name: str
    arguments: tuple[str, ...]
    result: int | None
    """None when it never returned."""

    injected: bool = False

    def text(self, index: int) -> bytes:
        """The string that is this argument."""
        found = _STRING.match(self.arguments[index])
        assert found is not None, f"not a whole string: {self}"
        return _unhex(found[1])

    def descriptor(self, index: int = 0) -> tuple[int, Path]:
        """The number and the path of the descriptor that is this argument; AT_FDCWD has -1."""
        argument = self.arguments[index]
        found = _DESCRIPTOR.match(argument)
        assert found is not None, f"not a descriptor with its path: {self}"
        number = argument.partition("<")[0]
        return -1 if number == "AT_FDCWD" else int(number), Path(os.fsdecode(_unhex(found[1])))

    @property
    def takes_a_file(self) -> bool:
        return any(_STRING.match(argument) or _DESCRIPTOR.match(argument) for argument in self.arguments)

    def path(self, index: int) -> Path:
        """The path that is this argument, relative to the directory before it if it comes after one."""
        name = Path(os.fsdecode(self.text(index)))
        if index and _DESCRIPTOR.match(self.arguments[index - 1]):
            return self.descriptor(index - 1)[1] / name
        return name


@dataclass(frozen=True)
class Fault:
    """What to do to the `when`-th call of a name that a thread makes: `signal=KILL`, or `error=EIO` instead of it."""

    name: str
    when: int
    action: str

    @property
    def kills(self) -> bool:
        return self.action == "signal=KILL"

    @property
    def option(self) -> str:
        return f"inject={self.name}:{self.action}:when={self.when}"

    def __str__(self) -> str:
        return f"{self.action} at {self.name} #{self.when}"


def require(*, attach: bool) -> None:
    """Fail where strace, or the right to attach it to a server, is missing."""
    assert shutil.which("strace") is not None, "strace is missing; install it: apt-get install strace"
    assert not attach or os.geteuid() == 0, "only root may attach strace to a server; run this as root"


@contextlib.contextmanager
def attached(pid: int, log: Path, fault: Fault | None = None) -> Iterator[None]:
    """strace on every thread of a running process, its lines going to `log`. Each counts its calls from here on."""
    require(attach=True)
    command = [*_command(log, fault), "-p", str(pid)]
    messages = log.with_suffix(".messages")
    with messages.open("wb") as stderr, subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=stderr) as process:
        try:
            eventually("strace is attached", lambda: b" attached" in messages.read_bytes() or process.poll() is not None)
            assert process.poll() is None, messages.read_text(encoding="utf-8")
            yield
        finally:
            # It ends with a process that it kills; told to leave just then, it would wait for ever.
            if fault is None or not fault.kills:
                process.send_signal(signal.SIGINT)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()


def run(
    command: Sequence[str], environment: Mapping[str, str], log: Path, fault: Fault | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `command` under strace from its start."""
    require(attach=False)
    return subprocess.run(
        [*_command(log, fault), *command],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
        start_new_session=True,
    )


def _command(log: Path, fault: Fault | None) -> list[str]:
    command = ["strace", "-f", "-y", "-xx", "-s", str(1 << 20), "-o", str(log), "-e", WATCHED]
    return command if fault is None else [*command, "-e", fault.option]


def read(log: Path) -> list[Call]:
    """The calls in the order in which they returned."""
    calls: list[Call] = []
    begun: dict[int, str] = {}
    for line in log.read_text(encoding="ascii").splitlines():
        found = _LINE.match(line)
        assert found is not None, line
        thread, text = int(found[1]), found[2]
        if text.endswith(_DETACHED):
            # The call that a thread slept in when strace left.
            continue
        if text.endswith(_UNFINISHED):
            begun[thread] = text.removesuffix(_UNFINISHED)
            continue
        if _RESUMED.match(text):
            text = begun.pop(thread) + _RESUMED.sub("", text)
        if text.startswith("+++ exited with "):
            # strace says so of each thread; the process ends with its last.
            calls = [call for call in calls if call.name != "exit"]
            calls.append(Call(thread, "exit", (), int(text.split()[3])))
        elif not text.startswith(("+++", "---")):
            calls.append(_parse(thread, text))
    return calls


def _parse(thread: int, text: str) -> Call:
    found = _CALL.match(text)
    assert found is not None, f"strace printed what these tests cannot read: {text}"
    name, arguments, result, rest = found.groups()
    return Call(
        thread, name, tuple(arguments.split(", ")), None if result == "?" else int(result), rest.endswith("(INJECTED)")
    )


def _unhex(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))

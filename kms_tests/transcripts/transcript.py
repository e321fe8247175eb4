"""Transcripts: text files that show what to type, what is printed then, and how it ends; and that are held to it.

- `# ...` is prose, with which a file begins. `with: nothing` may follow, for a machine where nobody has run anything, or
  `with: init`, which is what holds without it: a data directory as `kms-admin init` makes it.
- `$ COMMAND` is run by `sh -c`, in a directory of its own that is empty at first, with the three programs on PATH, no
  terminal, and nothing on standard input. `> MORE`, directly below, is the next line of the same command.
- Below it stand the lines of its standard output and, behind `! `, those of standard error, each in order and none left
  out. How the two are interleaved says nothing, nor does a line end that the last line lacks. `[exit N]` comes last;
  without it the exit status is 0.
- `…` in a line stands for any text on it, also none. A line that is only that stands for any lines, also none.
- A blank line between two lines of output is one of output; others only separate.
- `$ kms-server FLAGS &`, or `$ NAME=VALUE kms-server ...`, starts a server, on any free TCP port (MINIKMS_TCP_PORT from
  then on) unless a flag says otherwise, and waits until it is ready. At the end it is stopped, with status 0.
- `$ kill %1` stops the first server, and `$ kill -HUP %1` signals it. Behind `! ` below these and below its start may
  stand what it says, all since the one before. It is waited for; where nothing is shown it may say anything.
- `% COMMAND` is run at a terminal of 80 columns, where both outputs are one, and nobody sees spaces at the end of a line.
  `< TEXT` is typed there, once what stands above it has appeared, a question and a space last. What comes then begins
  with what the terminal echoes: TEXT once more, or a blank line for a secret.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import termios
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from kms_tests.integration.processes import DEADLINE, Machine, Server, after, eventually

ANY: Final = "…"
# A prologue: make standard input the terminal that /dev/tty is.
_HAVE_TERMINAL: Final = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"
_START: Final = re.compile(r"((?:\w+=\S+ )*)kms-server\b(.*)&")
_KILL: Final = re.compile(r"kill (?:-(\w+) )?%([1-9]\d*)")


class Line(NamedTuple):
    """A line of a file and its number there."""

    number: int
    text: str


@dataclass
class Step:
    """A command and what is shown of it: `screens` has one part more than there are answers in `typed`."""

    line: Line
    command: str
    is_at_terminal: bool
    screens: list[list[Line]] = field(default_factory=lambda: [[]])
    typed: list[Line] = field(default_factory=list)
    stderr: list[Line] = field(default_factory=list)
    status: int = 0


@dataclass(frozen=True)
class Transcript:
    """A file as it was read."""

    name: str
    is_initialised: bool
    steps: list[Step]


def parse(name: str, text: str) -> Transcript:
    """The transcript that `text` is; `name` is for messages. Raises `ValueError`, naming the line, for what is none."""
    has_prose, start = False, ""
    steps: list[Step] = []
    step: Step | None = None
    for line in map(Line._make, enumerate(text.split("\n"), 1)):
        mark, rest = line.text[:2], line.text[2:]
        if line.text.startswith("#"):
            has_prose, step = True, None
        elif line.text and not has_prose:
            raise ValueError(f"{name}:{line.number}: a transcript begins with prose")
        elif mark in ("$ ", "% "):
            step = Step(line, rest, mark == "% ")
            steps.append(step)
        elif step is None:
            if line.text in ("with: init", "with: nothing") and not start and not steps:
                start = line.text
            elif line.text:
                raise ValueError(f"{name}:{line.number}: this belongs to no command")
        elif mark in ("> ", ">") and step.screens == [[]] and not step.stderr:
            step.command += f"\n{rest}"
        elif found := re.fullmatch(r"\[exit (\d+)\]", line.text):
            step.status, step = int(found[1]), None
        elif mark in ("< ", "! ") and step.is_at_terminal == (mark == "< "):
            (step.typed if step.is_at_terminal else step.stderr).append(Line(line.number, rest))
            step.screens += [[]] if step.is_at_terminal else []
        elif mark in ("< ", "! "):
            raise ValueError(f"{name}:{line.number}: `{mark}` is not for what begins with `{step.line.text[:2]}`")
        else:
            step.screens[-1].append(line)
    for screen in (step.screens[-1] for step in steps):
        while screen and not screen[-1].text:
            screen.pop()
    return Transcript(name, start != "with: nothing", steps)


def difference(shown: Sequence[Line], real: Sequence[str]) -> tuple[int, str] | None:
    """None if the lines `real` are as `shown`; else the number of the first line that is not (or 0), and a diff."""
    whole = "".join(f"{text}\n" for text in real)
    texts = [line.text for line in shown]
    fitting = [".*".join(map(re.escape, text.split(ANY))) + "\n" for text in texts]
    anything = r"(?:.*\n)*"
    patterns = [anything if text == ANY else one for text, one in zip(texts, fitting, strict=True)]
    if re.fullmatch("".join(patterns), whole):
        return None
    untrue = (line.number for n, line in enumerate(shown, 1) if not re.match("".join(patterns[:n]), whole))
    number = next(untrue, shown[-1].number if shown else 0)

    def like_shown(line: str) -> str:
        """`line` as it is shown, if it is anywhere, so that it is no difference."""
        return next((texts[i] for i, one in enumerate(fitting) if texts[i] != ANY and re.match(one, f"{line}\n")), line)

    return number, "\n".join([*difflib.unified_diff(texts, [*map(like_shown, real)], lineterm="", n=len(texts))][3:])


def run(transcript: Transcript, machine: Machine) -> None:
    """Do on `machine` what `transcript` shows, as far as it holds.

    Raises `AssertionError`, which names file and line and shows the difference, where it does not.
    """
    stage = _Stage(machine)
    for step in transcript.steps:
        try:
            stage.take(step)
        except (AssertionError, IndexError, subprocess.TimeoutExpired) as error:
            raise AssertionError(f"{transcript.name}:{step.line.number}: {step.line.text}\n{error}") from None
    for line, server in stage.servers:
        assert server.stop() == 0, f"{transcript.name}:{line.number}: it did not stop as it should:\n{server.stderr}"


class _Stage:
    """A machine, and the servers that a transcript has started on it."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.home = machine.root / "work"
        self.servers: list[tuple[Line, Server]] = []
        self.heard: dict[Server, int] = {}
        self.home.mkdir(mode=0o700)
        # What would change the look of the output from one terminal, language or build service to the next.
        dropped = dict.fromkeys(("COLUMNS", "LINES", "FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"))
        self.environment = machine.changed({**dropped, "PATH": machine.path(), "NO_COLOR": "1", "LC_ALL": "C.UTF-8"})

    def take(self, step: Step) -> None:
        """Do one step; raises `AssertionError`, `IndexError` or `TimeoutExpired` if it is not as it is shown."""
        if step.is_at_terminal:
            self._at_terminal(step)
        elif found := _START.fullmatch(step.command):
            self._start(step, *found.groups())
        elif found := _KILL.fullmatch(step.command):
            server = self.servers[int(found[2]) - 1][1]
            if found[1]:
                server.process.send_signal(signal.Signals[f"SIG{found[1]}"])
            else:
                assert server.stop() == 0, server.stderr
            self._hear(step, server)
        else:
            with self._running(["/bin/sh", "-c", step.command], subprocess.DEVNULL, subprocess.PIPE) as process:
                stdout, stderr = process.communicate(timeout=DEADLINE)
            _check(step, step.screens[0], _lines(stdout), _lines(stderr), process.returncode)

    @contextlib.contextmanager
    def _running(self, command: list[str], stdin: int, output: int) -> Iterator[subprocess.Popen[bytes]]:
        # A session of its own has no terminal but the one that it is given.
        with subprocess.Popen(
            command, stdin=stdin, stdout=output, stderr=output, env=self.environment, cwd=self.home, start_new_session=True
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def _at_terminal(self, step: Step) -> None:
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 80))
        command = after(_HAVE_TERMINAL, ["/bin/sh", "-c", step.command])
        with self._running(command, theirs, theirs) as process, os.fdopen(ours, "r+b", buffering=0) as terminal:
            os.close(theirs)
            for shown, answer in zip(step.screens, step.typed, strict=False):
                _check(step, shown, _read(ours, shown), [], step.status)
                terminal.write(f"{answer.text}\n".encode())
            seen = _read(ours)
            _check(step, step.screens[-1], seen, [], step.status)
            _check(step, step.screens[-1], seen, [], process.wait(DEADLINE))

    def _start(self, step: Step, variables: str, flags: str) -> None:
        arguments = shlex.split(flags)
        port = None if {"--tcp-port", "--no-tcp"}.intersection(arguments) else "0"
        changes = dict(one.split("=", 1) for one in shlex.split(variables))
        server = self.machine.start(*arguments, tcp_port=port, environment=changes)
        self.servers.append((step.line, server))
        self.environment["MINIKMS_TCP_PORT"] = str(server.port)
        self._hear(step, server)

    def _hear(self, step: Step, server: Server) -> None:
        start = self.heard.get(server, 0)

        def said() -> list[str]:
            return _lines(server.log.read_bytes()[start:]) if step.stderr else []

        with contextlib.suppress(AssertionError):
            eventually("it says what is shown", lambda: not difference(step.stderr, said()))
        self.heard[server] = server.log.stat().st_size
        _check(step, step.screens[0], [], said(), 0)


def _check(step: Step, shown: Sequence[Line], stdout: list[str], stderr: list[str], status: int) -> None:
    found = [
        f"line {different[0] or step.line.number}: {what} is not so (- shown, + real):\n{different[1]}"
        for what, lines, real in (("standard output", shown, stdout), ("standard error", step.stderr, stderr))
        if (different := difference(lines, real))
    ]
    if status != step.status:
        found.append(f"it ended with {status}; shown is [exit {step.status}]")
    assert not found, "\n".join(found)


def _read(terminal: int, shown: Sequence[Line] | None = None) -> list[str]:
    """What stands on the screen of `terminal` once that is as `shown`, or is all there is, or when the time is over."""
    seen, end = b"", time.monotonic() + DEADLINE
    with contextlib.suppress(OSError):  # EIO: nobody has it any more
        while select.select([terminal], [], [], max(0.0, end - time.monotonic()))[0]:
            seen += os.read(terminal, 4096)
            if shown is not None and seen.endswith(b" ") and not difference(shown, _screen(seen)):
                break
    return _screen(seen)


def _lines(output: bytes) -> list[str]:
    return output.decode("utf-8", "backslashreplace").removesuffix("\n").split("\n") if output else []


def _screen(output: bytes) -> list[str]:
    return [line.rstrip() for line in _lines(output.replace(b"\r", b""))]

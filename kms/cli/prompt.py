"""Secrets from whoever runs the command: from the environment, a private file, a descriptor, or typed without echo.

Whichever way it comes, a secret lands in a buffer that can be wiped. A typed one is read from the terminal's
descriptor into that buffer, never through `input` or `getpass`, which make immutable strings of it. What it may be is the
same for all ways (`kms.host.secret_input`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import termios
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final, Self

import rich_click as click

from kms.cli.words import fitted
from kms.core import strength
from kms.core.secret import Passphrase, Secret
from kms.errors import ConfigError, InputError
from kms.host import secret_input, terminal
from kms.host.descriptors import STANDARD_INPUT, descriptor_named
from kms.host.hardening import take_environment
from kms.limits import MAX_SECRET_BYTES, MIN_PASSPHRASE_CHARACTERS

TERMINAL: Final = terminal.PATH
"""The terminal itself: standard input may be the data."""

_INPUT_FLAGS: Final = 0
_LOCAL_FLAGS: Final = 3
_LONGEST_LINE: Final = 4096
"""What the kernel keeps of a typed line, its end included; the rest of a longer one is dropped without a word."""


_PROMPT: Final = "the prompt"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A secret that a command needs, and where it may be: what the flag names, the variable, a file, or at the prompt."""

    name: str
    variable: str
    option: str
    flag: str | None = None
    """What was given after `option`; it wins over the variable."""
    file: Callable[[], Path | None] = lambda: None
    """The file that is taken when neither flag nor variable gives it; asked for only then."""
    allow_group: bool = False

    @property
    def is_asked_for(self) -> bool:
        """Whether somebody is going to be asked for it; looked at before it is obtained."""
        return self.origin == _PROMPT and _can_ask()

    @property
    def origin(self) -> str:
        """Where it comes from, for people; asked before it is obtained, which takes the variable out of the environment."""
        if self.flag is None and os.environ.get(self.variable):
            return self.variable
        path = _named(self.flag, self.option) if self.flag is not None else self.file()
        if path is None or _is_typed(path):
            return _PROMPT
        return "standard input" if path == STANDARD_INPUT else str(path)

    @property
    def remedy(self) -> str:
        return f"set {self.variable}, or name a file with {self.option}"


def obtain(wanted: Wanted) -> Secret:
    """The token. Raises `InputError` or `ConfigError` for what cannot be one, what `read_token` raises, and `ConfigError`
    when nothing gives it and there is no terminal to ask at.
    """
    return obtain_if_given(wanted) or ask(wanted.name, wanted.remedy)


def obtain_if_given(wanted: Wanted) -> Secret | None:
    """The token, or None where it would have to be asked for; raises what `obtain` raises."""
    value, path = _given(wanted)
    if value is not None:
        with _configured():
            return secret_input.token(value, len(value), wanted.variable)
    if path is None:
        return None
    if _is_typed(path):
        return ask(wanted.name, wanted.remedy)
    return secret_input.read_token(path, allow_group=wanted.allow_group)


def obtain_passphrase(wanted: Wanted) -> Passphrase:
    """The passphrase that something is under already; raises what `obtain` raises."""
    value, path = _given(wanted)
    if value is not None:
        with _configured():
            return secret_input.passphrase(value, len(value), wanted.variable, keeps_line_end=True)
    if path is not None and not _is_typed(path):
        return secret_input.read_passphrase(path, allow_group=wanted.allow_group)
    return _ask_passphrase(wanted.name, wanted.remedy)


def obtain_new_passphrase(
    wanted: Wanted,
    warn: Callable[[str], None],
    *,
    allow_weak: bool = False,
    weak_remedy: str = "give --allow-weak",
) -> Passphrase:
    """A passphrase that something is to be under; typed twice. `warn` is told how weak a weak one is.

    Raises what `obtain` raises, and `InputError` for one of less than 8 characters unless `allow_weak`; `weak_remedy` is
    how somebody can have that all the same.
    """

    def check(new: Passphrase) -> None:
        if new.complaint is not None:
            raise InputError(new.complaint)
        if not allow_weak:
            _check_length(new, wanted.name, weak_remedy)

    value, path = _given(wanted)
    if value is not None:
        with _configured():
            new = secret_input.passphrase(value, len(value), wanted.variable)
    elif path is not None and not _is_typed(path):
        new = secret_input.read_passphrase(path, allow_group=wanted.allow_group)
    else:
        new = _ask_twice(wanted, check)
    try:
        check(new)
        _warn_of_weakness(new, wanted.name, warn)
    except BaseException:
        new.wipe()
        raise
    return new


def _check_length(new: Passphrase, name: str, weak_remedy: str) -> None:
    length = sum(1 for _ in secret_input.characters(new))
    if length < MIN_PASSPHRASE_CHARACTERS:
        raise InputError(
            f"the {name} has only {length} characters; take {MIN_PASSPHRASE_CHARACTERS} at least, better several words, "
            f"or {weak_remedy}"
        )


def _warn_of_weakness(new: Passphrase, name: str, warn: Callable[[str], None]) -> None:
    bits = strength.bits(secret_input.characters(new))
    if bits < strength.WEAK_BITS:
        warn(
            f"the {name} is weak: at {strength.GUESSES_PER_SECOND:,} guesses a second, who gets a copy of the keystore "
            f"finds it {strength.time_to_guess(bits)}; several words that nobody would guess are better"
        )


def _given(wanted: Wanted) -> tuple[bytearray | None, Path | None]:
    """The value of the variable, or else the file; neither where it has to be typed."""
    # It goes from the environment whether it is used or not.
    value = take_environment(wanted.variable)
    if wanted.flag is None and value:
        return value, None
    if value:
        Secret(value).wipe()
    if wanted.flag is None:
        return None, wanted.file()
    return None, _named(wanted.flag, wanted.option)


def _named(flag: str, option: str) -> Path:
    """The file that `flag`, which was given after `option`, names."""
    if not flag.strip():
        # From an unset variable of a script: no reason to take another secret than was meant.
        raise ConfigError(f"{option}: name a file; - is standard input")
    return STANDARD_INPUT if flag == "-" else Path(flag)


def _is_typed(path: Path) -> bool:
    """Whether it names a terminal, where a secret is asked for without an echo."""
    number = descriptor_named(path)
    return number is not None and os.isatty(number)


@contextlib.contextmanager
def _configured() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise ConfigError(str(error)) from None


def ask(name: str, remedy: str) -> Secret:
    """Ask for a token at the terminal, once. Raises `ConfigError` with `remedy` where there is none."""
    buffer, length = _typed(name, remedy)
    return secret_input.token(buffer, length, f"the {name}")


def _ask_passphrase(name: str, remedy: str) -> Passphrase:
    buffer, length = _typed(name, remedy)
    return secret_input.passphrase(buffer, length, f"the {name}")


def confirm(question: str, remedy: str) -> None:
    """Return when the answer typed at the terminal is `yes`; raises `click.Abort` for any other."""
    if _answer(question, "Type yes to go on: ", remedy).lower() != b"yes":
        raise click.Abort


def confirm_by_name(question: str, name: str, what: str, remedy: str) -> None:
    """Return when `name`, which is shown as `what`, is typed at the terminal; raises `click.Abort` for anything else."""
    if _answer(question, f"Type {what} to go on: ", remedy) != name.encode().strip():
        raise click.Abort


def _answer(told: str, question: str, remedy: str) -> bytes:
    with _terminal(f"no terminal to confirm this at; {remedy}") as descriptor:
        lines = [*told.split("\n"), question.rstrip()]
        text = "\n".join(fitted(line, descriptor) for line in lines) + " "
        with _aborted_by_interrupt(), _Question(descriptor, text, is_silent=False) as asked:
            asked.wait()
            answer = os.read(descriptor, MAX_SECRET_BYTES)
            if not answer:
                raise click.Abort
            return answer.strip()


@contextlib.contextmanager
def _aborted_by_interrupt() -> Iterator[None]:
    """Until somebody has answered, nothing is begun that an interrupt could leave unfinished."""
    try:
        yield
    except KeyboardInterrupt:
        raise click.Abort from None


def _ask_twice(wanted: Wanted, check: Callable[[Passphrase], None]) -> Passphrase:
    first = _ask_passphrase(wanted.name, wanted.remedy)
    try:
        # Before it has to be typed again.
        check(first)
        with _ask_passphrase(f"{wanted.name} again", wanted.remedy) as second:
            same = first.is_same(second)
        if not same:
            raise ConfigError(f"the {wanted.name} was not typed twice the same; nothing was changed, start again")
    except BaseException:
        first.wipe()
        raise
    return first


def _can_ask() -> bool:
    try:
        with _terminal(""):
            return True
    except ConfigError:
        return False


@contextlib.contextmanager
def _terminal(complaint: str) -> Iterator[int]:
    try:
        descriptor = os.open(TERMINAL, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        raise ConfigError(complaint) from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _typed(name: str, remedy: str) -> tuple[bytearray, int]:
    """A line that is typed without echo, and its length."""
    with _terminal(f"no terminal to ask for the {name} at; {remedy}") as descriptor:
        buffer = bytearray(_LONGEST_LINE)
        try:
            with _aborted_by_interrupt(), _Question(descriptor, f"{name}: ", is_silent=True) as asked:
                asked.wait()
                length = os.readv(descriptor, [buffer])
        except BaseException:
            Secret(buffer).wipe()
            raise
        if not length:
            raise click.Abort
        if length == _LONGEST_LINE:
            Secret(buffer).wipe()
            raise InputError(f"the {name} is longer than a line that can be typed; put it into a file")
        return buffer, length


class _Question:
    """A question on a terminal, for as long as it is entered: without echo when it is silent, whatever happens.

    A shell takes the terminal back from who is stopped (Ctrl-Z), with its own modes, and gives it with those: so before
    it stops this puts back what it found, and when it goes on it silences the terminal and asks again.
    """

    def __init__(self, descriptor: int, question: str, *, is_silent: bool) -> None:
        self._descriptor = descriptor
        self._question = question.encode("utf-8", "backslashreplace")
        self._is_silent = is_silent
        self._is_asking = self._was_continued = False
        self._times = 0
        self._woken = -1
        """Readable once a signal has come."""
        self._pipe = contextlib.ExitStack()
        self._handlers: dict[int, Any] = {}
        self._before = termios.tcgetattr(descriptor)
        self._modes: list[Any] | None = None
        """Those that are set while it is asked."""

    def __enter__(self) -> Self:
        # Only the main thread has signals.
        if threading.current_thread() is threading.main_thread():
            self._woken, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            self._pipe.callback(os.close, self._woken)
            self._pipe.callback(os.close, waker)
            self._pipe.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(waker, warn_on_full_buffer=False))
            for number, handler in (
                (signal.SIGTSTP, self._suspend),
                (signal.SIGQUIT, self._suspend),
                (signal.SIGCONT, self._resume),
            ):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._handlers[number] = signal.signal(number, handler)
        try:
            self._ask()
        except BaseException:
            self._leave(ends_line=True)
            raise
        return self

    def wait(self) -> None:
        """Return once there is an answer to read.

        Not by reading: a signal that comes between the interpreter's last look for one and the system call would be heeded
        only with the next line.
        """
        waited_for = [self._descriptor, *([self._woken] if self._woken >= 0 else [])]
        while self._descriptor not in (ready := select.select(waited_for, [], [])[0]):
            if ready:
                os.read(self._woken, _LONGEST_LINE)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Where no line was typed, its end has to come from here.
        self._leave(ends_line=self._is_silent or kind is not None)

    def _leave(self, *, ends_line: bool) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._pipe.close()
        # A terminal that is gone has no modes any more, and nobody to show a line end to.
        with contextlib.suppress(termios.error, OSError):
            self._set(self._before)
            if ends_line:
                os.write(self._descriptor, b"\n")

    def _ask(self) -> None:
        while True:
            self._is_asking = True
            self._wait_for_foreground()
            self._was_continued = False
            self._put()
            self._is_asking = False
            # Stopped and continued since: by now the modes may be the shell's again. Who looks at it later, sees no asking.
            if not self._was_continued:
                return

    def _put(self) -> None:
        found = termios.tcgetattr(self._descriptor)
        if found != self._modes:
            # Not those from before it was stopped: a shell that edits a line has the terminal in modes of its own.
            self._before = found
        modes = list(self._before)
        # Line mode, signals and erase on: the kernel edits the line, Enter ends it, and Ctrl-C still interrupts.
        modes[_INPUT_FLAGS] = (modes[_INPUT_FLAGS] & ~(termios.IGNCR | termios.INLCR)) | termios.ICRNL
        modes[_LOCAL_FLAGS] |= termios.ICANON | termios.ISIG
        if self._is_silent:
            modes[_LOCAL_FLAGS] &= ~termios.ECHO
        self._set(modes)
        self._modes = termios.tcgetattr(self._descriptor)
        self._times += 1
        os.write(self._descriptor, self._question)

    def _wait_for_foreground(self) -> None:
        """Stop, as who reads from the background is stopped, before the terminal is looked at."""
        with contextlib.suppress(OSError):  # it is not the controlling one
            if os.tcgetpgrp(self._descriptor) != os.getpgrp():
                os.kill(os.getpid(), signal.SIGTTIN)

    def _set(self, modes: list[Any]) -> None:
        while True:
            try:
                # Flush: what was typed before the question is not an answer to it.
                termios.tcsetattr(self._descriptor, termios.TCSAFLUSH, modes)
            except termios.error as error:
                # Who sets them from the background is stopped first.
                if error.args[0] != errno.EINTR:
                    raise
            else:
                return

    def _suspend(self, number: int, _frame: FrameType | None) -> None:
        self._set(self._before)
        times = self._times
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        # Here it goes on. Where nobody could continue it, the kernel has not stopped it either.
        signal.signal(number, self._suspend)
        if self._times == times and not self._is_asking:
            self._ask()

    def _resume(self, _number: int, _frame: FrameType | None) -> None:
        self._was_continued = True
        if not self._is_asking:
            self._ask()

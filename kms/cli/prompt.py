"""Secrets from whoever runs the command: from the environment, a private file, or typed without echo.

Whichever way it comes, a secret lands in a buffer that can be wiped. A typed one is read from the terminal's
descriptor into that buffer, never through `input` or `getpass`, which make immutable strings of it.
"""

from __future__ import annotations

import contextlib
import os
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import rich_click as click

from kms.core.secret import Secret
from kms.errors import ConfigError
from kms.host.hardening import take_environment
from kms.host.private import read_secret, trimmed
from kms.limits import MAX_SECRET_BYTES

TERMINAL: Final = "/dev/tty"
"""The terminal itself: standard input may be the data."""

_LOCAL_FLAGS: Final = 3


def obtain(name: str, variable: str, file: Path | None, option: str, *, new: bool = False) -> Secret:
    """The secret called `name`: from the environment's `variable`, else from `file`, else typed (twice when `new`).

    `option` is the flag that would name a file, for the remedy. Raises what `read_secret` raises, or `ConfigError`
    when nothing gives the secret and there is no terminal to ask at.
    """
    value = take_environment(variable)
    if value:
        if len(value) > MAX_SECRET_BYTES:
            Secret(value).wipe()
            raise ConfigError(f"{variable} holds more than {MAX_SECRET_BYTES} bytes; give the {name} itself")
        return Secret(value)
    if file is not None:
        return read_secret(file)
    remedy = f"set {variable}, or name a file with {option}"
    return _ask_twice(name, remedy) if new else ask(name, remedy)


def ask(name: str, remedy: str) -> Secret:
    """Ask for `name` at the terminal, once. Raises `ConfigError` with `remedy` where there is none."""
    with _terminal(f"no terminal to ask for the {name} at; {remedy}") as descriptor:
        return _read_silently(descriptor, name)


def confirm(question: str, remedy: str) -> None:
    """Return when the answer typed at the terminal is `yes`; raises `click.Abort` for any other."""
    if _answer(f"{question}\nType yes to go on: ", remedy).lower() != b"yes":
        raise click.Abort


def confirm_by_name(question: str, name: str, what: str, remedy: str) -> None:
    """Return when `name`, which is shown as `what`, is typed at the terminal; raises `click.Abort` for anything else."""
    if _answer(f"{question}\nType {what} to go on: ", remedy) != name.encode().strip():
        raise click.Abort


def _answer(question: str, remedy: str) -> bytes:
    with _terminal(f"no terminal to confirm this at; {remedy}") as descriptor:
        # What was typed before the question is not an answer to it.
        termios.tcflush(descriptor, termios.TCIFLUSH)
        os.write(descriptor, question.encode())
        return os.read(descriptor, MAX_SECRET_BYTES).strip()


def _ask_twice(name: str, remedy: str) -> Secret:
    first = ask(name, remedy)
    try:
        with ask(f"{name} again", remedy) as second, first.view() as left, second.view() as right:
            same = left == right
        if not same:
            raise ConfigError(f"the two inputs of the {name} differ; nothing was changed, start again")
    except BaseException:
        first.wipe()
        raise
    return first


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


def _read_silently(descriptor: int, name: str) -> Secret:
    before = termios.tcgetattr(descriptor)
    silent = list(before)
    # Echo off, but line mode, signals and erase on: the kernel edits the line, and Ctrl-C still interrupts.
    silent[_LOCAL_FLAGS] = (silent[_LOCAL_FLAGS] & ~termios.ECHO) | termios.ICANON | termios.ISIG
    buffer = bytearray(MAX_SECRET_BYTES)
    try:
        # Flush: what was typed before the question is not an answer to it.
        termios.tcsetattr(descriptor, termios.TCSAFLUSH, silent)
        os.write(descriptor, f"{name}: ".encode())
        length = os.readv(descriptor, [buffer])
    except BaseException:
        Secret(buffer).wipe()
        raise
    finally:
        termios.tcsetattr(descriptor, termios.TCSAFLUSH, before)
        os.write(descriptor, b"\n")
    if not length:
        raise click.Abort
    return trimmed(buffer, length, f"the {name}")

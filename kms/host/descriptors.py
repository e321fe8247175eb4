"""Paths that name a descriptor which this process was started with: `/dev/stdin`, `/dev/fd/3`, `/proc/self/fd/3`."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from pathlib import Path
from typing import Final

from kms.errors import InputError

STANDARD_INPUT: Final = Path("/dev/stdin")

_DESCRIPTOR: Final = re.compile(r"/(?:dev/fd|proc/(?:self|thread-self|(?P<process>[0-9]+))/fd)/(?P<number>[0-9]{1,9})")
_STANDARD: Final = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
_MOST_LINKS: Final = 40


def descriptor_named(path: Path) -> int | None:
    """The number of the descriptor that `path` names, by way of symbolic links too."""
    current = path
    if not path.is_absolute():
        # Of a directory that was removed there is no path.
        with contextlib.suppress(OSError):
            current = Path.cwd() / path
    # One link after the other: what lies behind the last, in /proc, is no path.
    for _ in range(_MOST_LINKS):
        text = os.path.normpath(current)
        if text in _STANDARD:
            return _STANDARD[text]
        found = _DESCRIPTOR.fullmatch(text)
        # Of another process it is a file like any other.
        if found is not None and found["process"] in (None, str(os.getpid())):
            return int(found["number"])
        try:
            current = current.parent / current.readlink()
        except OSError:
            return None
    return None


def duplicate(number: int, path: Path) -> int:
    """Another descriptor of the same open file: it keeps its position, and O_APPEND.

    Raises `InputError`, naming `path`, where this process was not started with it.
    """
    try:
        # Those that we opened ourselves are closed on exec; what a shell hands on is not.
        if number not in _STANDARD.values() and not os.get_inheritable(number):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return os.dup(number)
    except OSError:
        raise InputError(f"{path} is no descriptor that this command was started with; name a file") from None

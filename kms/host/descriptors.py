"""Paths that name a descriptor which this process was started with: `/dev/stdin`, `/dev/fd/3`, `/proc/self/fd/3`."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Final

from kms.errors import InputError

STANDARD_INPUT: Final = Path("/dev/stdin")

_DESCRIPTOR: Final = re.compile(r"/(?:dev/fd|proc/(?:self|thread-self|[0-9]+)/fd)/([0-9]{1,9})")
_STANDARD: Final = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
_MOST_LINKS: Final = 40


def descriptor_named(path: Path) -> int | None:
    """The number of the descriptor that `path` names, by way of symbolic links too."""
    # One link after the other: what lies behind the last, in /proc, is no path.
    current = Path.cwd() / path
    for _ in range(_MOST_LINKS):
        text = os.path.normpath(current)
        if text in _STANDARD:
            return _STANDARD[text]
        found = _DESCRIPTOR.fullmatch(text)
        if found is not None:
            return int(found[1])
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

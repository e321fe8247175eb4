"""Output that would go to a terminal: a terminal obeys what is written to it, and a person meant a file."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from kms.errors import InputError
from kms.host.descriptors import descriptor_named
from kms.host.streams import write_all

_MOST_BYTES: Final = 1 << 20
"""More is not meant to be read."""
_LAYOUT: Final = {"\n", "\t"}


@contextlib.contextmanager
def target(text: str, *, force: bool) -> Iterator[Any]:
    """What `kms.client.files` writes to for `--out text`: a path, None for standard output; a terminal takes only text.

    With `force` it takes anything.
    """
    path = None if text == "-" else Path(text)
    with contextlib.ExitStack() as opened:
        descriptor = None if force else _terminal(path, opened)
        yield path if descriptor is None else cast("BinaryIO", _Screen(descriptor))


def path_of(destination: Any) -> Path | None:
    """The path that is written to, if it is one."""
    return destination if isinstance(destination, Path) else None


def _terminal(path: Path | None, opened: contextlib.ExitStack) -> int | None:
    """The descriptor of the terminal that `path` is, if it is one."""
    number = 1 if path is None else descriptor_named(path)
    try:
        if number is None and path is not None and stat.S_ISCHR(path.stat().st_mode):
            number = os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
            opened.callback(os.close, number)
    except OSError:
        # What is wrong with it, is told by who writes to it.
        return None
    return number if number is not None and os.isatty(number) else None


class _Screen:
    """Takes what is written, and shows all of it at `flush` if it is printable text; else `InputError`, and nothing."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._content = bytearray()

    def write(self, data: memoryview) -> int:
        self._content += data
        if len(self._content) > _MOST_BYTES:
            raise InputError(f"this is more than a terminal shows; {_REMEDY}")
        return len(data)

    def flush(self) -> None:
        if not _is_printable(self._content):
            raise InputError(f"this is not printable text, and a terminal may obey it; {_REMEDY}")
        write_all(self._descriptor, self._content)

    def fileno(self) -> int:
        return self._descriptor


_REMEDY: Final = "name a file with --out, or give --force"


def _is_printable(content: bytearray) -> bool:
    try:
        text = content.decode().replace("\r\n", "\n")
    except UnicodeDecodeError:
        return False
    return all(mark.isprintable() or mark in _LAYOUT for mark in text)

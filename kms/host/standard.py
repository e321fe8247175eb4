"""Standard input, output and error, made what a command can rely on, whatever the process was started with.

What is written is written whole: the interpreter's own stream takes a short write for done under PYTHONUNBUFFERED, and
loses what a full pipe that does not block did not take. That all three descriptors are there is seen to before this is even
loaded (`kms.host.occupied`).
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

from kms.host.streams import write_all

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


def take() -> None:
    """Do so for this process, once."""
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - for as long as the process lives
    sys.stdout = _text_stream(1, sys.stdout)
    sys.stderr = _text_stream(2, sys.stderr)


def _text_stream(descriptor: int, before: TextIO | None) -> io.TextIOWrapper:
    encoding = None if before is None else before.encoding
    # What that cannot write is escaped, not a reason to fail after the work is done.
    whole = io.BufferedWriter(WholeWriter(descriptor))
    return io.TextIOWrapper(whole, encoding, errors="backslashreplace", line_buffering=descriptor == 2)


class WholeWriter(io.RawIOBase):
    """An open descriptor that takes all it is given, however little at a time, or raises `OSError`."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._is_abandoned = False

    def write(self, data: ReadableBuffer, /) -> int:
        if not self._is_abandoned:
            write_all(self._descriptor, data)
        return memoryview(data).nbytes

    def abandon(self) -> None:
        """Drop what is written from now on: it failed once, and was told; the interpreter would try again at its end."""
        self._is_abandoned = True

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)


def finish_output() -> None:
    """Raise `OSError` unless all that was printed is out."""
    for stream in _streams():
        stream.flush()
    with contextlib.suppress(AttributeError, io.UnsupportedOperation):
        # A network file system says only at a close(2), of any descriptor, that it could not keep what it took.
        os.close(os.dup(sys.stdout.fileno()))


def abandon_output() -> None:
    """Drop what cannot be written, and all that is printed after it."""
    for stream in _streams():
        try:
            stream.flush()
        except OSError:
            raw = getattr(getattr(stream, "buffer", None), "raw", None)
            if isinstance(raw, WholeWriter):
                raw.abandon()


def _streams() -> list[TextIO]:
    return [stream for stream in (sys.stdout, sys.stderr) if stream is not None]

"""Reading a stream to its end and writing all of what there is, whatever it is connected to."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import stat
import sys
from typing import TYPE_CHECKING, BinaryIO, Final, cast

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


_PIPE_BYTES: Final = 1 << 20


def standard_input() -> BinaryIO:
    """Standard input without its buffer.

    The buffered reader goes on reading in C between two system calls without a look at signals: one that arrives just
    there would be noticed only with the next data, so Ctrl-C on a quiet pipe could hang.
    """
    return cast("BinaryIO", getattr(sys.stdin.buffer, "raw", sys.stdin.buffer))


def widen(stream: object) -> None:
    """Have a pipe hold a megabyte where it may: with the usual 64 KiB its ends wake each other sixteen times as often."""
    # Whoever has opened many pipes may have no more such room left, and what is no pipe has none.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        descriptor = stream.fileno()  # type: ignore[attr-defined]
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def fill(stream: BinaryIO, buffer: memoryview) -> int:
    """Read into `buffer` until it is full or the stream ends; returns how many bytes there are. Raises `OSError`."""
    length = 0
    while length < len(buffer):
        count: int | None = stream.readinto(buffer[length:])  # type: ignore[attr-defined]  # typeshed's BinaryIO lacks it
        if count is None:
            # Somebody made the pipe non-blocking: nothing is there yet, which is not the end.
            select.select([stream], [], [])
            continue
        if not count:
            break
        length += count
    return length


def put(stream: BinaryIO, data: ReadableBuffer) -> None:
    """Write all of `data` to an open file, buffered or not. Raises `OSError`."""
    with memoryview(data).cast("B") as rest:
        written = 0
        while written < len(rest):
            with rest[written:] as unwritten:
                count: int | None = stream.write(unwritten)
            if count is None:
                _wait_for_room(stream.fileno())
            else:
                written += count


def write_all(descriptor: int, data: ReadableBuffer) -> None:
    """Write all of `data` to `descriptor`, however little it takes at a time, and whether it waits by itself or not."""
    with memoryview(data).cast("B") as rest:
        written = 0
        while written < len(rest):
            # Let go even when it fails: what still refers to a buffer keeps it from being filled anew.
            with rest[written:] as unwritten:
                try:
                    written += os.write(descriptor, unwritten)
                except BlockingIOError:
                    _wait_for_room(descriptor)


def write_all_at(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of `data` into a file from `offset` on."""
    written = 0
    with memoryview(data) as rest:
        while written < len(rest):
            written += os.pwrite(descriptor, rest[written:], offset + written)


def _wait_for_room(descriptor: int) -> None:
    # Not select(2), which knows no descriptor above 1023.
    waiting = select.poll()
    waiting.register(descriptor, select.POLLOUT)
    waiting.poll()

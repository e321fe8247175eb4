"""Reading a stream to its end, whatever it is connected to."""

from __future__ import annotations

import select
import sys
from typing import BinaryIO, cast


def standard_input() -> BinaryIO:
    """Standard input without its buffer.

    The buffered reader goes on reading in C between two system calls without a look at signals: one that arrives just
    there would be noticed only with the next data, so Ctrl-C on a quiet pipe could hang.
    """
    return cast("BinaryIO", getattr(sys.stdin.buffer, "raw", sys.stdin.buffer))


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

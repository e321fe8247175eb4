"""Lines that hold nobody up."""

from __future__ import annotations

import fcntl
import os

import pytest

from kms.cli.lines import BackgroundLines
from kms.limits import MAX_QUEUED_LINES


@pytest.fixture
def pipe() -> tuple[int, int]:
    return os.pipe()


def named(text: str) -> str:
    return f"kms-server: {text}\n"


def test_what_is_said_is_written_in_order_before_the_end(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    with BackgroundLines(writing, named) as lines:
        for number in range(3):
            lines.write(f"{number}\n")
    assert os.read(reading, 100) == b"0\n1\n2\n"


def test_a_pipe_that_nobody_reads_holds_nobody_up_and_what_was_dropped_is_counted(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    line = "x" * 1023 + "\n"
    said = MAX_QUEUED_LINES + 100
    with BackgroundLines(writing, named) as lines:
        for _ in range(said):
            lines.write(line)
        # The writer is stuck in the pipe. Once it is read, it says how much is missing before what is left.
        received = b""
        while b"lines were dropped" not in received:
            received += os.read(reading, 1 << 20)
    assert b"kms-server: " in received
    dropped = next(int(part.split()[1]) for part in received.decode().splitlines() if "dropped" in part)
    assert 90 <= dropped <= 100


def test_a_reader_that_has_gone_is_no_failure(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    os.close(reading)
    with BackgroundLines(writing, named) as lines:
        lines.write("nobody\n")

"""Reading a stream to its end."""

from __future__ import annotations

import fcntl
import io
import os
import sys
import threading
import time
from pathlib import Path

import pytest

from kms.host import streams
from kms.host.streams import fill, standard_input


def test_short_reads_are_no_end() -> None:
    reader, writer = os.pipe()
    with open(reader, "rb", buffering=0) as stream:  # noqa: PTH123 - a descriptor, not a path

        def write() -> None:
            with open(writer, "wb", buffering=0) as pipe:  # noqa: PTH123 - a descriptor, not a path
                for _ in range(5):
                    pipe.write(b"ab")

        thread = threading.Thread(target=write)
        thread.start()
        buffer = bytearray(100)
        assert fill(stream, memoryview(buffer)) == 10
        thread.join()
    assert buffer.startswith(b"ababababab\0")


def test_a_stream_that_has_nothing_yet_is_no_end() -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    with open(reader, "rb", buffering=0) as stream:  # noqa: PTH123 - a descriptor, not a path

        def write() -> None:
            time.sleep(0.05)  # so that the reader finds the pipe empty first
            os.write(writer, b"late")
            os.close(writer)

        thread = threading.Thread(target=write)
        thread.start()
        buffer = bytearray(100)
        assert fill(stream, memoryview(buffer)) == 4
        thread.join()


def test_it_stops_when_the_buffer_is_full() -> None:
    buffer = bytearray(3)
    assert fill(io.BytesIO(b"abcdef"), memoryview(buffer)) == 3
    assert buffer == b"abc"


def test_standard_input_is_the_unbuffered_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    with io.TextIOWrapper(io.BufferedReader(io.FileIO(os.devnull))) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert standard_input() is stdin.buffer.raw


def test_a_pipe_holds_a_megabyte_where_it_may_and_nothing_else_is_touched(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    with os.fdopen(write_end, "wb", buffering=0) as pipe:
        streams.widen(pipe)
        assert fcntl.fcntl(read_end, fcntl.F_GETPIPE_SZ) == 1 << 20
    os.close(read_end)
    streams.widen(io.BytesIO())
    streams.widen(object())
    with (tmp_path / "file").open("wb") as file:
        streams.widen(file)
    streams.widen(file)

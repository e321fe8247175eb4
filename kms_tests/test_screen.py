"""What a terminal is given to show, and what it is not."""

from __future__ import annotations

import os
import pty
from collections.abc import Iterator
from pathlib import Path

import pytest

from kms.cli import screen
from kms.client.files import write_output
from kms.errors import InputError


@pytest.fixture
def terminal() -> Iterator[tuple[int, str]]:
    """The descriptor on which can be read what appears on a terminal, and its path."""
    ours, theirs = pty.openpty()
    yield ours, os.ttyname(theirs)
    os.close(ours)
    os.close(theirs)


def _write(path: str, data: bytes, *, force: bool = False) -> None:
    with screen.target(path, force=force) as target:
        write_output(target, data)


@pytest.mark.parametrize("text", ["hello", "two\nlines\n", "a\tb", "d\r\nos\r\n", "한글", ""])
def test_printable_text_is_shown(terminal: tuple[int, str], text: str) -> None:
    _write(terminal[1], text.encode())
    _write(terminal[1], b"END")
    seen = b""
    while not seen.endswith(b"END"):
        seen += os.read(terminal[0], 1024)
    assert seen.removesuffix(b"END").replace(b"\r", b"") == text.replace("\r", "").encode()


@pytest.mark.parametrize(
    "data",
    [
        b"\x1b]0;PWNED\x1b\\\\",
        b"a\x9bb",
        "a\u009bb".encode(),
        "a\u202eb".encode(),
        b"over\rwritten",
        b"bell\x07",
        b"\x00",
        b"\xff",
        b"x" * ((1 << 20) + 1),
    ],
)
def test_what_a_terminal_may_obey_is_refused_whole_unless_it_is_forced(terminal: tuple[int, str], data: bytes) -> None:
    with pytest.raises(InputError, match="name a file with --out, or give --force"):
        _write(terminal[1], b"harmless " + data if len(data) < 100 else data)
    if len(data) < 100:
        _write(terminal[1], data, force=True)
        assert os.read(terminal[0], 1024).replace(b"\r", b"").startswith(data.replace(b"\r", b"")), "and nothing before it"


def test_a_file_and_a_pipe_take_anything(tmp_path: Path) -> None:
    _write(str(tmp_path / "file"), b"\x1b\xff")
    assert (tmp_path / "file").read_bytes() == b"\x1b\xff"
    with screen.target(str(tmp_path / "new"), force=False) as target:
        assert target == tmp_path / "new"
    with screen.target("-", force=True) as target:
        assert target is None

"""A lock between processes."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kms.host import locking

HOLDER = """
import sys
from pathlib import Path
from kms.host import locking
locking.hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_held_lock_is_refused_with_its_holder_until_that_process_ends(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(locking.LockHeldError) as refused:
            locking.hold(path)
        assert refused.value.holder == str(holder.pid)
        holder.kill()
        holder.wait()
    os.close(locking.hold(path))
    assert path.read_text(encoding="ascii") == f"{os.getpid()}\n", "and the file stays, with the last holder's pid"


def test_a_holder_that_has_not_said_its_pid_yet_is_unknown(tmp_path: Path) -> None:
    descriptor = locking.hold(tmp_path / "lock")
    os.truncate(tmp_path / "lock", 0)
    with pytest.raises(locking.LockHeldError, match="unknown"):
        locking.hold(tmp_path / "lock")
    os.close(descriptor)


def test_a_lock_that_fails_is_not_taken_for_one_that_is_held_and_leaves_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)
    before = len(list(Path("/dev/fd").iterdir()))
    for _ in range(5):
        with pytest.raises(OSError, match="No locks available"):
            locking.hold(tmp_path / "lock")
    assert len(list(Path("/dev/fd").iterdir())) == before


@pytest.mark.parametrize("content", [b'{"formatVersion":3}', b"a token that somebody keeps here\n", b"1" * 17])
def test_a_file_that_is_no_lock_is_not_written_to(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_bytes(content)
    with pytest.raises(FileExistsError, match="another file has its name"):
        locking.hold(path)
    assert path.read_bytes() == content


def test_nor_is_one_with_a_second_name(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    for content in (b"", b"123\n"):
        (tmp_path / "other").write_bytes(content)
        os.link(tmp_path / "other", path)
        with pytest.raises(FileExistsError):
            locking.hold(path)
        assert path.read_bytes() == content
        path.unlink()


def test_nor_is_a_pipe_a_directory_or_what_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "directory", "pipe"):
        with pytest.raises(OSError, match=r"[Tt]oo many|Is a directory|another file"):
            locking.hold(tmp_path / name)


def test_a_lock_whose_file_was_removed_or_exchanged_is_not_held(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    descriptor = locking.hold(path)
    assert locking.is_held(path, descriptor)
    path.unlink()
    assert not locking.is_held(path, descriptor)
    another = locking.hold(path)
    assert not locking.is_held(path, descriptor)
    assert locking.is_held(path, another)
    os.close(descriptor)
    os.close(another)


def test_an_earlier_holders_longer_pid_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "lock").write_bytes(b"1234567890123\n")
    os.close(locking.hold(tmp_path / "lock"))
    assert (tmp_path / "lock").read_text(encoding="ascii") == f"{os.getpid()}\n"


@pytest.mark.parametrize("content", [b"", b"12", b"\0\0\0", b"12\n34\n", b"\x7f\xa5\n"])
def test_a_lock_file_that_a_crash_has_cut_short_is_one(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "lock").write_bytes(content)
    os.close(locking.hold(tmp_path / "lock"))
    assert (tmp_path / "lock").read_text(encoding="ascii") == f"{os.getpid()}\n"

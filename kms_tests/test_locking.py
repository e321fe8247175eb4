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

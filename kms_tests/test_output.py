from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kms.errors import InputError
from kms.host import output
from kms.host.durable import RenameError
from kms.host.output import OutputFile, open_stream


@pytest.fixture(params=["unnamed", "named"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways: as on a file system that has files without a name, and as on one that has none."""
    if request.param == "named":
        monkeypatch.setattr(OutputFile, "_unnamed", lambda _: -1)
    return str(request.param)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out"


def put(path: Path, content: bytes = b"new") -> None:
    with OutputFile(path) as file:
        file.write(content)
        file.commit()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_written_is_there_after_the_commit_and_nothing_else(kind: str, path: Path) -> None:
    with OutputFile(path) as file:
        file.write(b"new")
        assert not path.exists()
        file.commit()
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]
    assert mode(path) == 0o600


def test_what_is_not_committed_leaves_nothing(kind: str, path: Path) -> None:
    path.write_bytes(b"old")
    with OutputFile(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_until_it_is_whole_it_has_no_name(path: Path) -> None:
    with OutputFile(path) as file:
        if file._temp:
            pytest.skip("this file system has no files without a name")
        file.write(b"unverified")
        assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("number", sorted(output._NO_UNNAMED_FILES))
def test_where_there_are_no_files_without_a_name_it_has_one_from_the_start(
    number: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(name: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(number, os.strerror(number))
        return real(name, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuse)
    with OutputFile(path) as file:
        assert len(list(path.parent.iterdir())) == 1
        file.write(b"new")
        file.commit()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["x" * 255, "\udcff" * 255, "é" * 127])
def test_a_name_may_be_as_long_as_the_file_system_takes(kind: str, name: str, tmp_path: Path) -> None:
    put(tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"new"
    put(tmp_path / name, b"newer")
    assert (tmp_path / name).read_bytes() == b"newer"


@pytest.mark.parametrize("there", [0o600, 0o640, 0o644, 0o666, 0o400, 0o755, 0o4755, 0o2755, 0o1644, 0o000])
def test_what_is_there_keeps_its_mode_but_for_what_a_program_would_be_given(kind: str, there: int, path: Path) -> None:
    path.touch()
    path.chmod(there)
    put(path)
    assert mode(path) == there & 0o777


def test_while_it_is_written_only_its_owner_may_read_it(kind: str, path: Path) -> None:
    path.touch()
    path.chmod(0o666)
    with OutputFile(path) as file:
        file.write(b"new")
        assert stat.S_IMODE(os.fstat(file._descriptor).st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_root_leaves_it_to_whose_it_was(kind: str, path: Path) -> None:
    path.touch()
    os.chown(path, 12345, 54321)
    path.chmod(0o640)
    put(path)
    state = path.stat()
    assert (state.st_uid, state.st_gid, stat.S_IMODE(state.st_mode)) == (12345, 54321, 0o640)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_group_that_could_not_be_kept_gets_nothing(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    path = tmp_path / "out"
    path.touch()
    os.chown(path, 54321, 777)
    path.chmod(0o664)
    program = (
        "import os, sys; from pathlib import Path; from kms.host.output import OutputFile\n"
        "os.setgroups([]); os.setgid(54321); os.setuid(54321); os.umask(0o777)\n"
        "with OutputFile(Path(sys.argv[1])) as file: file.write(b'new'); file.commit()\n"
    )
    # Not below a directory of root alone, which another user could not enter.
    subprocess.run([sys.executable, "-c", program, _reachable(path)], check=True)
    state = path.stat()
    assert (state.st_uid, state.st_gid, stat.S_IMODE(state.st_mode)) == (54321, 54321, 0o604)


def _reachable(path: Path) -> str:
    for parent in path.parents:
        if str(parent) not in ("/", "/tmp"):
            parent.chmod(parent.stat().st_mode | 0o711)
    return str(path)


def test_attributes_are_kept_but_for_those_that_say_what_a_program_may_do(kind: str, path: Path) -> None:
    path.touch()
    try:
        os.setxattr(path, "user.note", b"kept")
        if os.geteuid() == 0:
            os.setxattr(path, "trusted.note", b"not")
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        pytest.skip("this file system has no attributes")
    put(path)
    assert os.listxattr(path) == ["user.note"]
    assert os.getxattr(path, "user.note") == b"kept"


def test_what_a_writer_that_was_killed_has_left_is_taken_away_and_a_live_ones_is_not(path: Path) -> None:
    left = path.with_name(_usual(path))
    left.write_bytes(b"left")
    put(path)
    assert list(path.parent.iterdir()) == [path]
    left.write_bytes(b"live")
    with left.open("rb") as live:
        fcntl.flock(live, fcntl.LOCK_EX)
        put(path)
        assert left.read_bytes() == b"live"
    assert sorted(path.parent.iterdir()) == sorted([path, left])


def _usual(path: Path) -> str:
    with OutputFile(path) as file:
        return file._temp_names()[0]


def test_two_writers_of_one_file_do_not_disturb_each_other(kind: str, path: Path) -> None:
    with OutputFile(path) as one, OutputFile(path) as other:
        one.write(b"one")
        other.write(b"other")
        one.commit()
        assert path.read_bytes() == b"one"
        other.commit()
    assert path.read_bytes() == b"other"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV, errno.EROFS, errno.EPERM, errno.EIO])
def test_a_rename_that_fails_leaves_what_was_there(
    kind: str, number: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_bytes(b"old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        with pytest.raises(OSError, match=re.escape(os.strerror(number))) as caught:
            put(path)
    assert isinstance(caught.value, RenameError) == (number == errno.EIO)
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_a_directory_that_cannot_be_synced_is_no_failure(kind: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    put(path)
    assert path.read_bytes() == b"new"


def test_no_descriptor_is_left(kind: str, path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    put(path)
    put(path)
    with pytest.raises(FileNotFoundError):
        OutputFile(path.parent / "none" / "out")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# What is written to as it is.


def test_a_regular_file_or_none_yet_is_no_stream(path: Path, tmp_path: Path) -> None:
    assert open_stream(path) is None
    path.touch()
    assert open_stream(path) is None
    (tmp_path / "link").symlink_to(path)
    assert open_stream(tmp_path / "link") is None


def test_a_descriptor_is_the_open_file_itself(path: Path, tmp_path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"before ")
        file.flush()
        number = os.dup(file.fileno())
        os.set_inheritable(number, True)
        (tmp_path / "link").symlink_to(f"/dev/fd/{number}")
        for name in (f"/dev/fd/{number}", f"/proc/self/fd/{number}", str(tmp_path / "link")):
            stream = open_stream(Path(name))
            assert stream is not None
            with stream:
                stream.write(b"after ")
        os.close(number)
    assert path.read_bytes() == b"before after after after "


def test_a_descriptor_of_our_own_is_not_written_to(path: Path) -> None:
    with path.open("wb") as ours, pytest.raises(InputError, match="no descriptor that this command was started with"):
        open_stream(Path(f"/dev/fd/{ours.fileno()}"))
    with pytest.raises(InputError, match="no descriptor"):
        open_stream(Path("/dev/fd/987654"))


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a file that can be written"):
        open_stream(tmp_path)


def test_a_device_is_written_to() -> None:
    stream = open_stream(Path("/dev/null"))
    assert stream is not None
    with stream:
        assert stream.write(b"gone") == 4
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)

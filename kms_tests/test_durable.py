"""A file that is there whole or not at all, and stays there."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kms.host import durable
from kms.host.durable import DurableFile, RenameError, write_file


@pytest.fixture
def path(data: Path) -> Path:
    made = data / "keystore.json"
    made.write_bytes(b"old")
    return made


def _fail(*_: object, **__: object) -> Any:
    raise OSError(28, "No space left on device")


def _names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def _nothing_happened(path: Path) -> bool:
    return path.read_bytes() == b"old" and _names(path.parent) == [path.name]


def test_the_system_calls_come_in_the_order_that_a_power_cut_needs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    names: dict[int, str] = {}

    def record(name: str, real: Callable[..., Any], about: Callable[..., str]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            calls.append(f"{name} {about(*arguments)}")
            return real(*arguments, **keywords)

        return call

    real_open = os.open

    def opened(target: Any, flags: int, mode: int = 0o777, **keywords: Any) -> int:
        descriptor = real_open(target, flags, mode, **keywords)
        names[descriptor] = "directory" if flags & os.O_DIRECTORY else "temp"
        calls.append(f"open {names[descriptor]}")
        return descriptor

    monkeypatch.setattr(os, "open", opened)
    for name in ("write", "fsync", "close"):
        monkeypatch.setattr(os, name, record(name, getattr(os, name), lambda descriptor, *_: names[descriptor]))
    monkeypatch.setattr(os, "rename", record("rename", os.rename, lambda _, to: Path(to).name))
    write_file(path, b"new")
    monkeypatch.undo()
    assert calls == [
        "open temp",
        "write temp",
        "fsync temp",
        "close temp",
        "open directory",
        "rename keystore.json",
        "fsync directory",
        "close directory",
    ]


def test_the_temp_file_is_made_privately_and_never_through_a_link(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[int, int]] = []
    real_open = os.open

    def spy(target: Any, flags: int, mode: int = 0o777, **keywords: Any) -> int:
        opened.append((flags, mode))
        return real_open(target, flags, mode, **keywords)

    monkeypatch.setattr(os, "open", spy)
    write_file(path, b"new")
    flags, mode = opened[0]
    assert flags & os.O_EXCL
    assert flags & os.O_CREAT
    assert flags & os.O_NOFOLLOW
    assert flags & os.O_CLOEXEC
    assert mode == 0o600


def test_the_temp_file_is_beside_the_file(path: Path) -> None:
    with DurableFile(path):
        assert len(_names(path.parent)) == 2
    assert _nothing_happened(path)


@pytest.mark.parametrize("content", [b"", b"new", bytearray(b"new"), memoryview(b"new"), b"x" * 1_000_000])
def test_what_is_written_is_what_is_there(path: Path, content: bytes | bytearray | memoryview) -> None:
    write_file(path, content)
    assert path.read_bytes() == bytes(content)
    assert _names(path.parent) == [path.name]


def test_the_file_has_mode_0600_even_where_the_old_one_had_another(path: Path) -> None:
    path.chmod(0o644)
    write_file(path, b"new")
    assert path.stat().st_mode & 0o777 == 0o600


def test_all_is_written_where_the_system_takes_one_byte_at_a_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real_write(descriptor, data[:1]))
    write_file(path, b"many bytes")
    monkeypatch.undo()
    assert path.read_bytes() == b"many bytes"


@pytest.mark.parametrize("call", ["open", "write", "fsync"])
def test_a_failure_before_the_rename_leaves_the_old_file_and_no_temp_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(os, call, _fail)
    with pytest.raises(OSError) as caught:
        write_file(path, b"new")
    monkeypatch.undo()
    assert not isinstance(caught.value, RenameError)
    assert _nothing_happened(path)


def test_a_failure_to_close_leaves_the_old_file_and_no_temp_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_close = os.close

    def close(descriptor: int) -> None:
        real_close(descriptor)
        _fail()

    monkeypatch.setattr(os, "close", close)
    with pytest.raises(OSError) as caught:
        write_file(path, b"new")
    monkeypatch.undo()
    assert not isinstance(caught.value, RenameError)
    assert _nothing_happened(path)


def test_a_failure_to_write_and_then_to_close_leaves_no_temp_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_close = os.close

    def close(descriptor: int) -> None:
        real_close(descriptor)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "write", _fail)
    monkeypatch.setattr(os, "close", close)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, b"new")
    monkeypatch.undo()
    assert _nothing_happened(path)


def _failing(number: int, *, first: Callable[..., None] = lambda *_: None) -> Callable[..., None]:
    """A rename that fails, once `first` is done."""

    def rename(*names: Path) -> None:
        first(*names)
        raise OSError(number, os.strerror(number))

    return rename


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EINTR])
def test_a_failure_of_the_rename_is_a_rename_error(path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "rename", _failing(number))
    with pytest.raises(RenameError, match=os.strerror(number)):
        write_file(path, b"new")
    monkeypatch.undo()
    assert _nothing_happened(path)


@pytest.mark.parametrize("number", sorted(durable.REFUSED_AT_ONCE))
def test_a_rename_that_is_refused_is_a_failure_before_it(path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "rename", _failing(number))
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        write_file(path, b"new")
    assert not isinstance(caught.value, RenameError)
    monkeypatch.undo()
    assert _nothing_happened(path)


@pytest.mark.parametrize("number", sorted(durable.REFUSED_AT_ONCE))
def test_a_rename_that_was_made_all_the_same_is_none_that_was_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    # A server that is asked twice, as its first answer was lost, finds nothing to rename.
    monkeypatch.setattr(os, "rename", _failing(number, first=os.rename))
    with pytest.raises(RenameError, match=os.strerror(number)):
        write_file(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_failure_after_the_rename_is_a_rename_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "fsync_directory", _fail)
    with pytest.raises(RenameError, match="No space left"):
        write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert _names(path.parent) == [path.name]


def test_a_writer_that_is_interrupted_leaves_the_old_file(path: Path) -> None:
    def write() -> None:
        with DurableFile(path) as file:
            file.write(b"ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert _nothing_happened(path)


def test_a_directory_that_does_not_exist_is_an_error(data: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_file(data / "absent" / "file", b"new")


def test_what_killed_writers_left_is_removed_and_nothing_else(path: Path) -> None:
    for name in (".keystore.json.tmp-1", ".keystore.json.tmp-0123456789abcdef"):
        (path.parent / name).touch()
    kept = {"keystore.json", "keystore.json.lock", ".other.json.tmp-1", "keystore.json.tmp-1", ".keystore.json"}
    for name in kept - {path.name}:
        (path.parent / name).touch()
    durable.remove_stale_temp_files(path)
    assert set(_names(path.parent)) == kept


def test_without_a_free_descriptor_nothing_has_happened(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = data / "keystore.json"
    path.write_bytes(b"old")
    real_open = os.open

    def no_directory(target: Any, flags: int, mode: int = 0o777, **keywords: Any) -> int:
        if flags & os.O_DIRECTORY:
            raise OSError(24, "Too many open files")
        return real_open(target, flags, mode, **keywords)

    monkeypatch.setattr(os, "open", no_directory)
    with pytest.raises(OSError, match="Too many open files") as failure:
        write_file(path, b"new")
    assert not isinstance(failure.value, RenameError), "its outcome is known"
    assert [entry.name for entry in data.iterdir()] == ["keystore.json"]
    assert path.read_bytes() == b"old"


def test_a_directory_that_cannot_be_synced_is_no_failure_but_a_disk_that_fails_is(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def failing(number: int) -> Callable[[int], None]:
        def fsync(descriptor: int) -> None:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(number, os.strerror(number))
            real(descriptor)

        return fsync

    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    durable.write_file(path, b"whole")
    durable.sync_names(path.parent)
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(durable.RenameError):
        durable.write_file(path, b"new")
    with pytest.raises(OSError, match="Input/output"):
        durable.sync_names(path.parent)


def test_the_last_look_comes_right_before_the_rename_and_can_end_it(path: Path) -> None:
    path.write_bytes(b"old")

    def look() -> None:
        assert path.read_bytes() == b"old"
        assert [other.read_bytes() for other in durable.temp_files(path)] == [b"new"]
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        durable.write_file(path, b"new", look)
    assert path.read_bytes() == b"old"
    assert not durable.temp_files(path)

"""Write a file so that it is there whole or not at all, and stays there.

    temp file in the same directory (O_EXCL, O_NOFOLLOW, 0600) -> write all -> fsync -> close -> rename
    -> fsync the directory

Without the first fsync a power cut can leave the new name on an empty file; without the second, the old file. Before
the rename nothing has happened to what was there; at and after it the outcome of a failure is unknown, which is why
the two are told apart.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from kms.errors import InputError

TEMP_MARK: Final = ".tmp-"


class RenameError(OSError):
    """The rename, or the fsync of the directory after it, failed: either file may be the one that stays."""


class DurableFile:
    """A private temp file beside `path` that `commit` puts in its place. Left without `commit`, it is removed."""

    def __init__(self, path: Path) -> None:
        """Raises `OSError` when the temp file cannot be made."""
        self._path = path
        self._temp = path.with_name(f".{path.name}{TEMP_MARK}{secrets.token_hex(8)}")
        self._descriptor = os.open(self._temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self._committed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of `data`."""
        with memoryview(data) as rest:
            written = 0
            while written < len(rest):
                # Let go even when it fails: what still refers to a buffer keeps it from being filled anew.
                with rest[written:] as unwritten:
                    written += os.write(self._descriptor, unwritten)

    def commit(self) -> None:
        """Make it durable under its name. `OSError` when it failed before the rename, `RenameError` at or after it."""
        os.fsync(self._descriptor)
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)
        # Opened before the rename: where no descriptor is free, nothing has happened yet.
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._temp.rename(self._path)
            self._committed = True
            fsync_directory(directory)
        except OSError as error:
            raise RenameError(error.errno, error.strerror, str(self._path)) from error
        finally:
            with contextlib.suppress(OSError):
                os.close(directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._descriptor >= 0:
            # Whatever ended this early is the error that counts, not that closing failed after it.
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
        if not self._committed:
            with contextlib.suppress(OSError):
                self._temp.unlink()


def replaceable(path: Path) -> Path:
    """The file to write when `path` is named as an output: behind any symbolic links, so that they stay.

    A rename would put a regular file in the place of a device or a pipe, hence `InputError` for what is neither a
    regular file nor absent; `OSError` when it cannot be looked at.
    """
    try:
        # The path as given: behind /dev/stdout is a pipe that has no other name.
        state = path.stat()
    except FileNotFoundError:
        pass
    else:
        if not stat.S_ISREG(state.st_mode):
            raise InputError(f"{path} is not a regular file; name another, or use - for standard output")
    return Path(os.path.realpath(path))


def write_file(path: Path, data: bytes | bytearray | memoryview) -> None:
    """`data` durably under `path`, replacing what is there; errors as for `DurableFile.commit`."""
    with DurableFile(path) as file:
        file.write(data)
        file.commit()


def remove_stale_temp_files(path: Path) -> None:
    """Remove what writers of `path` that were killed have left. Call it only under a lock that excludes live ones."""
    for leftover in path.parent.iterdir():
        if leftover.name.startswith(f".{path.name}{TEMP_MARK}"):
            leftover.unlink(missing_ok=True)


def fsync_directory(descriptor: int) -> None:
    """Make the names in an open directory durable."""
    os.fsync(descriptor)


def sync_names(path: Path) -> None:
    """Make the names in the directory `path` durable; for files that were made in it without `DurableFile`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fsync_directory(descriptor)
    finally:
        os.close(descriptor)

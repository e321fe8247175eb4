"""Write a file so that it is there whole or not at all, and stays there.

    temp file in the same directory (O_EXCL, O_NOFOLLOW, 0600) -> write all -> fsync -> close -> rename
    -> fsync the directory

Without the first fsync a power cut can leave the new name on an empty file; without the second, the old file. Before
the rename nothing has happened to what was there, nor has it when the system refuses to rename at all; after it, and
when the disk fails in the middle, the outcome is unknown, which is why the two are told apart.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from kms.host.streams import write_all

TEMP_MARK: Final = ".tmp-"


class RenameError(OSError):
    """The rename, or the fsync of the directory after it, failed: either file may be the one that stays."""


REFUSED_AT_ONCE: Final = {
    *(errno.EPERM, errno.EACCES, errno.EBUSY, errno.EROFS, errno.EXDEV, errno.EINVAL),
    *(errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.ENOSPC, errno.EDQUOT, errno.EMLINK, errno.ENOMEM),
}
"""What rename(2) says before it has done anything: a file that may not be changed, a mount point, no room for the name.

Not EIO, nor what a network file system says. Even of these it is looked whether the file still has its old name: a server
that gets a rename twice, as its answer was lost, says ENOENT the second time.
"""


class DurableFile:
    """A private temp file beside `path` that `commit` puts in its place. Left without `commit`, it is removed."""

    def __init__(self, path: Path) -> None:
        """Raises `OSError` when the temp file cannot be made."""
        self._path = path
        self._temp = path.with_name(f".{path.name}{TEMP_MARK}{secrets.token_hex(8)}")
        self._descriptor = os.open(self._temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self._committed = False
        self.state: os.stat_result | None = None
        """Of the file that was committed, before it had its name: the rename may change its ctime, and nothing else."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of `data`."""
        write_all(self._descriptor, data)

    def sync(self) -> None:
        """Make durable what was written, so that little is left that could fail in `commit`."""
        os.fsync(self._descriptor)

    def commit(self, last_look: Callable[[], None] = lambda: None) -> None:
        """Make it durable under its name. `OSError` when it failed before the rename, `RenameError` at or after it.

        `last_look` is called right before the rename, and ends it by whatever it raises.
        """
        os.fsync(self._descriptor)
        self.state = os.fstat(self._descriptor)
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)
        # Opened before the rename: where no descriptor is free, nothing has happened yet.
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            last_look()
            self._rename()
            try:
                fsync_directory(directory)
            except OSError as error:
                raise RenameError(error.errno, error.strerror, str(self._path)) from error
        finally:
            with contextlib.suppress(OSError):
                os.close(directory)

    def _rename(self) -> None:
        try:
            self._temp.rename(self._path)
        except OSError as error:
            if error.errno in REFUSED_AT_ONCE and self._has_its_old_name():
                raise
            raise RenameError(error.errno, error.strerror, str(self._path)) from error
        self._committed = True

    def _has_its_old_name(self) -> bool:
        try:
            return self.state is not None and os.path.samestat(self._temp.lstat(), self.state)
        except OSError:
            return False

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


def write_file(
    path: Path, data: bytes | bytearray | memoryview, last_look: Callable[[], None] = lambda: None
) -> os.stat_result | None:
    """`data` durably under `path`, replacing what is there; `last_look` and errors as for `DurableFile.commit`.

    Returns `DurableFile.state`.
    """
    with DurableFile(path) as file:
        file.write(data)
        file.commit(last_look)
        return file.state


def remove_stale_temp_files(path: Path) -> None:
    """Remove what writers of `path` that were killed have left. Call it only under a lock that excludes live ones."""
    for leftover in temp_files(path):
        leftover.unlink(missing_ok=True)


def temp_files(path: Path) -> list[Path]:
    """What writers of `path` have under way, or have left when they were killed. Raises `OSError`."""
    return [other for other in path.parent.iterdir() if other.name.startswith(f".{path.name}{TEMP_MARK}")]


def fsync_directory(descriptor: int) -> None:
    """Make the names in an open directory durable, where its file system can."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems know no fsync of a directory: there the names are as durable as the server makes them.
        if error.errno != errno.EINVAL:
            raise


def sync_names(path: Path) -> None:
    """Make the names in the directory `path` durable; for files that were made in it without `DurableFile`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fsync_directory(descriptor)
    finally:
        os.close(descriptor)

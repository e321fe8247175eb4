"""Where a command writes what somebody asked for: a file that appears whole, or what is open already.

    O_TMPFILE in the target's directory (0600) -> write all -> owner, xattrs and mode of what is there -> fsync
    -> link to a temporary name -> rename -> fsync the directory

Until it is linked the file has no name: a process that is killed leaves nothing of what it had not verified yet. Where a
file system has no such files it has the temporary name from the start. That name depends on the target alone, and is as
short for a long one: whoever writes there next finds what was left, and takes it away if nobody holds its lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

from kms.errors import InputError
from kms.host import durable
from kms.host.descriptors import descriptor_named, duplicate
from kms.host.streams import write_all

_NO_UNNAMED_FILES: Final = {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL}
"""What open(2) says to O_TMPFILE: the file system has none; the kernel is older; the C library's emulation."""
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NEVER_COPIED: Final = ("security.", "trusted.")
"""Attributes that say what a program may do, such as capabilities; they were given to the old content."""
_ACL: Final = "system.posix_acl_access"


class OutputFile:
    """A private file that `commit` puts in the place of `path`. Left without `commit`, nothing of it stays."""

    def __init__(self, path: Path) -> None:
        """Raises `OSError` when it cannot be made."""
        self._name = path.name
        self._path = path
        self._temp = ""
        self._committed = False
        self._descriptor = -1
        self._directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._descriptor = self._unnamed()
            if self._descriptor < 0:
                self._temp, self._descriptor = self._named()
            # Whatever the umask.
            os.fchmod(self._descriptor, 0o600)
            # Says to whoever finds its temporary name that somebody writes it; a file system may have no locks.
            with contextlib.suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            self._discard()
            raise

    def _unnamed(self) -> int:
        try:
            descriptor = os.open(".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=self._directory)
        except OSError as error:
            if error.errno in _NO_UNNAMED_FILES:
                return -1
            raise
        if Path(_own(descriptor)).exists():
            return descriptor
        # Without /proc it could never get a name.
        os.close(descriptor)
        return -1

    def _named(self) -> tuple[str, int]:
        self._remove_leftover()
        for name in self._temp_names():
            with contextlib.suppress(FileExistsError):
                return name, os.open(name, _NEW, 0o600, dir_fd=self._directory)
        raise AssertionError("random names do not end")

    def _temp_names(self) -> tuple[str, str]:
        usual = f".kms-{sha256(os.fsencode(self._name)).hexdigest()[:16]}.tmp"
        return usual, f"{usual[:-4]}-{secrets.token_hex(8)}.tmp"

    def _remove_leftover(self) -> None:
        """Take away what a writer that was killed has left under the usual name."""
        usual, _ = self._temp_names()
        with contextlib.suppress(OSError):
            descriptor = os.open(usual, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=self._directory)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                there = os.stat(usual, dir_fd=self._directory, follow_symlinks=False)
                if os.path.samestat(there, os.fstat(descriptor)):
                    os.unlink(usual, dir_fd=self._directory)
            finally:
                os.close(descriptor)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of `data`."""
        write_all(self._descriptor, data)

    def commit(self) -> None:
        """Make it durable under its name. `OSError` when it failed before the rename, `durable.RenameError` after it."""
        with contextlib.suppress(FileNotFoundError):
            flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
            _take_over(self._descriptor, os.open(self._name, flags, dir_fd=self._directory))
        os.fsync(self._descriptor)
        if not self._temp:
            self._temp = self._linked()
        try:
            os.rename(self._temp, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            self._committed = True
            durable.fsync_directory(self._directory)
        except OSError as error:
            if not self._committed and error.errno in durable.REFUSED_AT_ONCE:
                raise
            raise durable.RenameError(error.errno, error.strerror, str(self._path)) from error

    def _linked(self) -> str:
        self._remove_leftover()
        for name in self._temp_names():
            with contextlib.suppress(FileExistsError):
                # With a directory named, Python calls linkat() and follows /proc's link; else link(), which does not.
                os.link(_own(self._descriptor), name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
                return name
        raise AssertionError("random names do not end")

    def _discard(self) -> None:
        if self._temp and not self._committed:
            with contextlib.suppress(OSError):
                os.unlink(self._temp, dir_fd=self._directory)
        for descriptor in (self._descriptor, self._directory):
            if descriptor >= 0:
                # Whatever ended this early is the error that counts, not that closing failed after it.
                with contextlib.suppress(OSError):
                    os.close(descriptor)
        self._descriptor = self._directory = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._discard()


def _own(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"


def _take_over(descriptor: int, there: int) -> None:
    """Give the file at `descriptor` owner, group, attributes and mode of `there`, which is closed, as far as that can be.

    Nobody may read the new file who could not read the old one, at any time: so the mode comes last, and a group that
    could not be kept gets nothing.
    """
    try:
        state = os.fstat(there)
        if not stat.S_ISREG(state.st_mode):
            return
        kept = _give(descriptor, state.st_uid, state.st_gid)
        mode = stat.S_IMODE(state.st_mode) & 0o777
        if not kept:
            mode &= ~stat.S_IRWXG
        for name in _attributes(there):
            if name.startswith(_NEVER_COPIED) or (name == _ACL and not kept):
                continue
            with contextlib.suppress(OSError):
                os.setxattr(descriptor, name, os.getxattr(_own(there), name))
        os.fchmod(descriptor, mode)
    finally:
        os.close(there)


def _give(descriptor: int, uid: int, gid: int) -> bool:
    """Whether the group could be kept; the owner can be by root alone."""
    for owner in (uid, -1):
        with contextlib.suppress(OSError):
            os.fchown(descriptor, owner, gid)
            return True
    return False


def _attributes(there: int) -> list[str]:
    try:
        return os.listxattr(_own(there))
    except OSError:
        return []


def open_stream(path: Path) -> BinaryIO | None:
    """What `path` names, where it is to be written to as it is and not replaced; None for a regular file, or none yet.

    That is a descriptor this process was started with (`/dev/stdout`, `/dev/fd/3`), a pipe, a terminal or another character
    device. Raises `InputError` for what can be neither, `OSError`.
    """
    number = descriptor_named(path)
    if number is not None:
        return os.fdopen(duplicate(number, path), "wb", buffering=0)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISREG(mode):
        return None
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY), "wb", buffering=0)
    raise InputError(f"{path} is not a file that can be written; name another, or use - for standard output")

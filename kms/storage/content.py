"""The files of a keystore as they are on disk: read with suspicion, and looked at again before they are written."""

from __future__ import annotations

import contextlib
import errno
import os
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from kms.errors import FileAccessError, InputMissingError, KeystoreError, KeystoreReplacedError, KmsError
from kms.host.private import open_private
from kms.limits import MAX_JOURNAL_BYTES, MAX_KEYSTORE_BYTES
from kms.storage.lock import KeystoreLock, journal_path

_TRIES = 10
"""To read a keystore and its journal between two moments in which they are exchanged."""


class Content(NamedTuple):
    """A file as it was read."""

    raw: bytes
    state: os.stat_result
    """From before it was read: what is written to it meanwhile shows."""


class Pair(NamedTuple):
    """A keystore file, and the journal beside it if there is one."""

    file: Content
    journal: Content | None

    @property
    def journal_raw(self) -> bytes | None:
        return None if self.journal is None else self.journal.raw


def read(path: Path) -> bytes:
    """The raw file, if it is private and of a size a keystore may have."""
    return read_file(path).raw


def read_file(path: Path) -> Content:
    """Raises `InputMissingError`, `SecretFileError` where it is not private, `KeystoreError`, or `FileAccessError`."""
    try:
        return _content(path, MAX_KEYSTORE_BYTES)
    except InputMissingError:
        raise InputMissingError(f"there is no keystore at {path}; make one with: kms-admin init") from None


def read_pair(path: Path, *, durably: bool = False) -> Pair:
    """Both files of one moment; raises what `read_file` raises.

    Under the lock nobody exchanges them; without it, they are read again if somebody did. `durably` is for who goes on
    from what is read: it may have been written by a server that was killed before it had made it durable.
    """
    for _ in range(_TRIES):
        file = read_file(path)
        journal = None
        with contextlib.suppress(InputMissingError):
            journal = _content(journal_path(path), MAX_JOURNAL_BYTES, durably=durably)
        if identity(path) == identified(file.state):
            return Pair(file, journal)
    raise FileAccessError(f"cannot read {path}: it is written without pause; try again")


def _content(path: Path, most: int, *, durably: bool = False) -> Content:
    with os.fdopen(open_private(path), "rb") as file:
        state = os.fstat(file.fileno())
        if state.st_size > most:
            raise KeystoreError(f"{path} is larger than any keystore; name the right file")
        try:
            if durably:
                os.fsync(file.fileno())
            return Content(file.read(), state)
        except OSError as error:
            raise FileAccessError(f"cannot read {path}: {error.strerror}") from error


class LastLook:
    """What was at a keystore's path when it was last read or written, to be looked at again before the next save.

    A lock holds only those who ask for it, and only for as long as its file has its name. Who removes it, or puts
    another keystore in the place of this one, has a second server's keys there, or a backup's: saved over, they are lost.
    """

    def __init__(self, lock: KeystoreLock, there: Content | None) -> None:
        """`there` is what was read; None where there has to be nothing."""
        self._lock = lock
        self._digest = None if there is None else sha256(there.raw).digest()
        # That of the file which was read: by now, behind a key derivation, there may be another.
        self._identity = None if there is None else identified(there.state)

    def was_saved(self, content: bytes | bytearray, written: os.stat_result | None) -> None:
        """From now on this is what has to be there. `written` is the state of the file before it had its name."""
        self._digest, self._identity = sha256(content).digest(), None
        # Where it cannot be told now, or is another's already, the content decides the next time.
        with contextlib.suppress(OSError):
            found = identity(self._lock.keystore)
            if written is not None and found is not None and found[:4] == identified(written)[:4]:
                self._identity = found

    def __call__(self) -> None:
        """Raises `KeystoreReplacedError` when it is not there any more, `OSError` when that cannot be told."""
        path = self._lock.keystore
        if not self._lock.is_held():
            raise KeystoreReplacedError(
                f"the lock of {path} was removed or exchanged, and another server may use that keystore; nothing was "
                "saved. Stop all but one, look which keystore is the right one, and start again"
            )
        found = identity(path)
        if found is None and self._digest is None:
            return
        if found is not None and found == self._identity:
            return
        # A backup that makes a hard link, or a chown, changes what is told of a file, but not what is in it.
        if found is not None and self._holds_the_same(path):
            self._identity = found
            return
        raise exchanged(path, "removed" if found is None else "exchanged")

    def _holds_the_same(self, path: Path) -> bool:
        try:
            return sha256(read(path)).digest() == self._digest
        except FileAccessError as error:
            raise OSError(errno.EIO, str(error)) from error
        except KmsError:
            # Missing by now, larger than any keystore, or not private: none of ours.
            return False


def exchanged(path: Path, what: str) -> KeystoreReplacedError:
    """The refusal to save where somebody has `what` the file at `path`."""
    return KeystoreReplacedError(
        f"{path} is not the keystore that was saved here last: somebody has {what} it. "
        "Nothing was saved; look which is the right one, and start again"
    )


def identity(path: Path) -> tuple[int, ...] | None:
    """Which file is at `path` now, and when it was changed last; None where there is none. Raises `OSError`."""
    try:
        return identified(os.lstat(path))
    except FileNotFoundError:
        return None


def identified(state: os.stat_result) -> tuple[int, ...]:
    """Which file this is, and when it was changed last."""
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns

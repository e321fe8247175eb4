"""Who may use a keystore: one process at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from kms.errors import FileAccessError, KeystoreLockedError
from kms.host import durable, locking
from kms.host.private import make_private_directory
from kms.limits import MAX_KEPT_KEYSTORES
from kms.storage import format2, format3, usage_file


class KeystoreLock:
    """An exclusive `flock` beside the keystore, held for as long as this is open.

    Whoever holds the lock removes the temp files that killed writers left.
    """

    def __init__(self, keystore: Path) -> None:
        """Raises `KeystoreLockedError` with the holder's pid, `FileAccessError`, or `SecretFileError`."""
        self.keystore: Final = keystore
        make_private_directory(keystore.parent)
        path = keystore.with_name(keystore.name + ".lock")
        self._path = path
        try:
            self._descriptor = locking.hold(path)
        except locking.LockHeldError as error:
            raise KeystoreLockedError(
                f"the keystore {keystore} is in use by process {error.holder}; stop it first"
            ) from None
        except OSError as error:
            raise FileAccessError(f"cannot lock {path}: {error.strerror}") from error
        try:
            for written in (keystore, *paths_beside(keystore)):
                durable.remove_stale_temp_files(written)
        except OSError as error:
            os.close(self._descriptor)
            raise FileAccessError(f"cannot write to the directory {keystore.parent}: {error.strerror}") from error

    def is_held(self) -> bool:
        """Whether it is still the lock that others would have to take."""
        return locking.is_held(self._path, self._descriptor)

    def close(self) -> None:
        # It is released all the same, and must not make a failure of what was done under it.
        with contextlib.suppress(OSError):
            os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def journal_path(keystore: Path) -> Path:
    """Where the journal of a keystore is, when it has one."""
    return keystore.with_name(keystore.name + ".journal")


def kept_paths(keystore: Path, version: int) -> Iterator[Path]:
    """Where a file of the format `version` is kept when it is migrated: under the first name that no other file has.

    A kept file may be of another keystore, when a backup was put in this one's place. It is somebody's only copy, so it
    is never replaced, and it is no reason to refuse a rotation until a person comes to move it.
    """
    yield keystore.with_name(f"{keystore.name}.v{version}")
    for number in range(1, MAX_KEPT_KEYSTORES):
        yield keystore.with_name(f"{keystore.name}.v{version}.{number}")


def earlier_files(keystore: Path) -> Iterator[Path]:
    """Where files of any earlier format are kept."""
    for version in (format2.FORMAT, format3.FORMAT):
        yield from kept_paths(keystore, version)


def paths_beside(keystore: Path) -> Iterator[Path]:
    """What may be written beside a keystore."""
    yield usage_file.path_of(keystore)
    yield journal_path(keystore)
    yield from earlier_files(keystore)

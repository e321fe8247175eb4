"""The keystore file: one owner at a time, loaded with suspicion, saved durably."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Final, NamedTuple, Self

from kms.core.audit import AuditKeys
from kms.core.derive import KdfParameters
from kms.core.kek import Kek
from kms.core.keyring import EMPTY, CreateGroup, Keyring, NewKek, apply
from kms.core.secret import Secret
from kms.errors import (
    FileAccessError,
    InputMissingError,
    KeystoreError,
    KeystoreLockedError,
    KeystoreReplacedError,
    KmsError,
    SaveFailedError,
    SaveOutcomeUnknownError,
)
from kms.host import durable, locking
from kms.host.entropy import random_key
from kms.host.private import make_private_directory, open_private
from kms.limits import DEFAULT_KEY_GROUP, KDF_SALT_BYTES, MAX_KEPT_KEYSTORES, MAX_KEYSTORE_BYTES
from kms.storage import document, legacy, usage_file
from kms.storage.audit_head import head_path
from kms.storage.audit_log import handing_over
from kms.storage.document import KdfHeader, RootKeys

KeyFactory = Callable[[], Secret]


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
            for written in (keystore, usage_file.path_of(keystore), *_kept_paths(keystore)):
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


class _Content(NamedTuple):
    """A keystore's file as it was read."""

    raw: bytes
    state: os.stat_result
    """From before it was read: what is written to it meanwhile shows."""


class _LastLook:
    """What was at a keystore's path when it was last read or written, to be looked at again before the next save.

    A lock holds only those who ask for it, and only for as long as its file has its name. Who removes it, or puts
    another keystore in the place of this one, has a second server's keys there, or a backup's: saved over, they are lost.
    """

    def __init__(self, lock: KeystoreLock, there: _Content | None) -> None:
        """`there` is what was read; None where there has to be nothing."""
        self._lock = lock
        self._digest = None if there is None else sha256(there.raw).digest()
        # That of the file which was read: by now, behind a key derivation, there may be another.
        self._identity = None if there is None else _identified(there.state)

    def was_saved(self, content: bytes | bytearray, written: os.stat_result | None) -> None:
        """From now on this is what has to be there. `written` is the state of the file before it had its name."""
        self._digest, self._identity = sha256(content).digest(), None
        # Where it cannot be told now, or is another's already, the content decides the next time.
        with contextlib.suppress(OSError):
            found = _identity(self._lock.keystore)
            if written is not None and found is not None and found[:4] == _identified(written)[:4]:
                self._identity = found

    def __call__(self) -> None:
        """Raises `KeystoreReplacedError` when it is not there any more, `OSError` when that cannot be told."""
        path = self._lock.keystore
        if not self._lock.is_held():
            raise KeystoreReplacedError(
                f"the lock of {path} was removed or exchanged, and another server may use that keystore; nothing was "
                "saved. Stop all but one, look which keystore is the right one, and start again"
            )
        found = _identity(path)
        if found is None and self._digest is None:
            return
        if found is not None and found == self._identity:
            return
        # A backup that makes a hard link, or a chown, changes what is told of a file, but not what is in it.
        if found is not None and self._holds_the_same(path):
            self._identity = found
            return
        what = "removed" if found is None else "exchanged"
        raise KeystoreReplacedError(
            f"{path} is not the keystore that was saved here last: somebody has {what} it. "
            "Nothing was saved; look which is the right one, and start again"
        )

    def _holds_the_same(self, path: Path) -> bool:
        try:
            return sha256(read(path)).digest() == self._digest
        except FileAccessError as error:
            raise OSError(errno.EIO, str(error)) from error
        except KmsError:
            # Missing by now, larger than any keystore, or not private: none of ours.
            return False


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        return _identified(os.lstat(path))
    except FileNotFoundError:
        return None


def _identified(state: os.stat_result) -> tuple[int, ...]:
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


class Keystore:
    """An unlocked keystore: makes KEKs for it and saves keyrings into it. Blocking; one thread at a time."""

    def __init__(
        self,
        lock: KeystoreLock,
        there: _Content | None,
        header: KdfHeader,
        keys: RootKeys,
        *,
        root_check: bytes | None = None,
        replaces: bytes | None = None,
        notes: Sequence[str] = (),
        new_key: KeyFactory = random_key,
    ) -> None:
        """`there` is what the file holds, None where there is none yet.

        `replaces` is a format 2 file that is kept, whole, before the first save puts another in its place; `notes` is
        what its reader has to say of it.
        """
        self.notes: Final = tuple(notes)
        """What could not be kept as it was when it was opened, for people."""
        self.path = lock.keystore
        self._last_look = _LastLook(lock, there)
        self._looking = Lock()
        self._header = header
        self._keys = keys
        self._root_check = keys.seal_check() if root_check is None else root_check
        self._replaces = replaces
        self._new_key = new_key
        self._encoder = document.Encoder()

    def mint(self, group: str, version: int) -> NewKek:
        """A fresh KEK, wrapped for its slot."""
        with self._new_key() as kek:
            return NewKek(Kek(kek), self._keys.wrap_kek(group, version, kek))

    def save(self, keyring: Keyring) -> None:
        """Put `keyring` on disk; when this returns it is durable.

        Raises `SaveFailedError` when nothing has happened to the file, `SaveOutcomeUnknownError` when it may have, and
        `KeystoreReplacedError` when it is another's by now.
        """
        with self._looking:
            self._save(keyring)

    def look(self) -> None:
        """Raise `KeystoreReplacedError` when what is there is not what was saved here last, `OSError` when nobody knows.

        May be called from any thread; it waits for a save that is under way.
        """
        with self._looking:
            self._last_look()

    def _save(self, keyring: Keyring) -> None:
        content = self._encoder.encode(keyring, self._header, self._root_check, self._keys)
        if len(content) > MAX_KEYSTORE_BYTES:
            raise SaveFailedError(f"cannot save {self.path}: it would be larger than any keystore; nothing was changed")
        try:
            if self._replaces is not None:
                self._keep_replaced(self._replaces)
            written = durable.write_file(self.path, content, self._last_look)
        except durable.RenameError as error:
            raise SaveOutcomeUnknownError(
                f"saving {self.path} failed at its last step ({error.strerror}); check the disk, then start again"
            ) from error
        except OSError as error:
            remedy = _REMEDIES.get(error.errno or 0, "")
            raise SaveFailedError(f"cannot save {self.path}: {error.strerror}; nothing was changed{remedy}") from error
        self._last_look.was_saved(content, written)
        self._replaces = None

    def _keep_replaced(self, raw: bytes) -> None:
        for kept in _kept_paths(self.path):
            if not os.path.lexists(kept):
                break
            if _holds(kept, raw):
                # Kept by a save that went no further, perhaps not even as far as making this name durable.
                durable.sync_names(kept.parent)
                return
        else:
            raise SaveFailedError(
                f"cannot keep the format 2 file of {self.path}: {kept} and those before it hold others; move them away"
            )
        try:
            durable.write_file(kept, raw)
        except durable.RenameError as error:
            # The keystore itself is untouched, so this is a failure whose outcome is known.
            raise OSError(error.errno, error.strerror) from error

    @property
    def audit_keys(self) -> AuditKeys:
        """What the audit log of this keystore is under; they are wiped with it."""
        return self._keys.audit

    def wipe(self) -> None:
        """Wipe the sub-keys of the root key. The keystore cannot be used afterwards."""
        self._keys.wipe()


_REMEDIES: Final = {
    errno.EBUSY: ". It is a mount point of its own, which nothing can replace: mount its directory instead",
    errno.EXDEV: ". It is a mount point of its own, which nothing can replace: mount its directory instead",
    errno.EROFS: ". Mount its file system to be written to",
    errno.EPERM: ". It may be immutable: chattr -i",
}


def _kept_paths(keystore: Path) -> Iterator[Path]:
    """Where a format 2 file is kept when it is migrated: under the first of these names that no other file has.

    A kept file may be of another keystore, when a backup was put in this one's place. It is somebody's only copy, so it
    is never replaced, and it is no reason to refuse a rotation until a person comes to move it.
    """
    yield keystore.with_name(f"{keystore.name}.v2")
    for number in range(1, MAX_KEPT_KEYSTORES):
        yield keystore.with_name(f"{keystore.name}.v2.{number}")


def _holds(path: Path, raw: bytes) -> bool:
    try:
        return read(path) == raw
    except KmsError:
        # What cannot be read as a keystore is not this one.
        return False


def trace_of_another(keystore: Path, audit_log: Path | None) -> Path | None:
    """What shows that there was a keystore at this path, if anything does: it is missing then, not yet to be made.

    Its lock is none. Whoever tries to start a server leaves that.
    """
    logs = () if audit_log is None else (audit_log, head_path(audit_log))
    beside = (usage_file.path_of(keystore), *_kept_paths(keystore), *logs)
    found = next((path for path in beside if os.path.lexists(path)), None)
    if found is None and keystore.parent.is_dir():
        found = next(iter(sorted(durable.temp_files(keystore))), None)
    return found


def initialise(
    lock: KeystoreLock,
    passphrase: Secret,
    *,
    now: int,
    parameters: KdfParameters,
    new_key: KeyFactory = random_key,
) -> tuple[Keystore, Keyring]:
    """Make a keystore whose keyring has the group `default`; raises `KeystoreError` when there is one already."""
    path = lock.keystore
    if os.path.lexists(path):
        raise KeystoreError(f"there is a keystore at {path} already; it is not touched")
    header = KdfHeader(parameters, os.urandom(KDF_SALT_BYTES))
    with header.derive(passphrase) as root:
        keystore = Keystore(lock, None, header, RootKeys(root), new_key=new_key)
    keyring = apply(EMPTY, CreateGroup(DEFAULT_KEY_GROUP), now=now, mint=keystore.mint).next_generation()
    keystore.save(keyring)
    return keystore, keyring


def load(lock: KeystoreLock, passphrase: Secret, *, new_key: KeyFactory = random_key) -> tuple[Keystore, Keyring]:
    """Unlock the keystore; format 2 is migrated in memory and on disk at its first save.

    Its name is made durable first. A save that was killed between its rename and the fsync of the directory has left a
    keystore that a power cut could still take back, and with it the key of whatever is encrypted from now on.

    Raises `InputMissingError`, `SecretFileError` for a file that is not private, `WrongPassphraseError`,
    `KeystoreError` when it was altered, or `FileAccessError`. Whatever it raises, the file was not touched.
    """
    try:
        durable.sync_names(lock.keystore.parent)
    except OSError as error:
        raise FileAccessError(f"cannot make {lock.keystore} durable: {error.strerror}; check the disk") from error
    there = _read(lock.keystore)
    raw = there.raw
    with _naming(lock.keystore), contextlib.ExitStack() as unless_opened:
        if document.format_version(raw) == legacy.FORMAT:
            old = legacy.Sealed(raw)
            with old.header.derive(passphrase) as root:
                keys = RootKeys(root)
                unless_opened.callback(keys.wipe)
                keyring = old.open(root, keys.wrap_kek)
            keystore = Keystore(lock, there, old.header, keys, replaces=raw, notes=old.notes, new_key=new_key)
        else:
            sealed = document.Sealed(raw)
            with sealed.header.derive(passphrase) as root:
                keys = RootKeys(root)
            unless_opened.callback(keys.wipe)
            keyring = sealed.open(keys)
            keystore = Keystore(lock, there, sealed.header, keys, root_check=sealed.root_check, new_key=new_key)
        unless_opened.pop_all()
    return keystore, keyring


def change_passphrase(
    lock: KeystoreLock, old: Secret, new: Secret, *, parameters: KdfParameters, audit_log: Path | None = None
) -> Sequence[str]:
    """Wrap every KEK under a new root key, from `new` and a new salt. Groups, versions and states stay as they are.

    The `audit_log`, if there is one, goes on under the new key, and says so. Returns what could not be kept as it was, for
    people.

    Raises what `load`, `Keystore.save` and opening an `AuditLog` raise. The KDF's costs become `parameters`.
    """
    header = KdfHeader(parameters, os.urandom(KDF_SALT_BYTES))
    there = _read(lock.keystore)
    raw = there.raw
    with _naming(lock.keystore), contextlib.ExitStack() as wipes:
        with header.derive(new) as new_root:
            new_keys = RootKeys(new_root)
        wipes.callback(new_keys.wipe)
        replaces: bytes | None = None
        notes: Sequence[str] = ()
        if document.format_version(raw) == legacy.FORMAT:
            replaces = raw
            sealed_v2 = legacy.Sealed(raw)
            with sealed_v2.header.derive(old) as root:
                old_keys = RootKeys(root)
                wipes.callback(old_keys.wipe)
                keyring = sealed_v2.open(root, new_keys.wrap_kek)
            notes = sealed_v2.notes
        else:
            sealed = document.Sealed(raw)
            with sealed.header.derive(old) as root:
                old_keys = RootKeys(root)
            wipes.callback(old_keys.wipe)
            keyring = sealed.open(old_keys, new_keys.wrap_kek)
        for key in keyring.live_keys():
            wipes.callback(key.wipe)
        if audit_log is not None:
            wipes.enter_context(handing_over(audit_log, old_keys.audit, new_keys.audit, generation=keyring.generation))
        Keystore(lock, there, header, new_keys, replaces=replaces).save(keyring.next_generation())
        return notes


def raise_costs(
    lock: KeystoreLock, passphrase: Secret, *, parameters: KdfParameters, audit_log: Path | None = None
) -> Sequence[str]:
    """Migrate a keystore of format 2 whose KDF costs less than `parameters`, to what costs at least that.

    Whoever took a copy of it guesses passphrases at what it cost then; who takes one of this has to pay what is usual
    today. Nothing is done to format 3, whose costs somebody here has chosen. Returns what was done, for people. Raises
    what `load` raises; a save that fails leaves all as it is.
    """
    raw = read(lock.keystore)
    with _naming(lock.keystore):
        if document.format_version(raw) != legacy.FORMAT:
            return ()
        found = legacy.Sealed(raw).header.parameters
    raised = KdfParameters(
        max(found.memory_kib, parameters.memory_kib), max(found.iterations, parameters.iterations), parameters.parallelism
    )
    if (found.memory_kib, found.iterations) == (raised.memory_kib, raised.iterations):
        return ()
    weak = f"each guess at its passphrase costs only {found.memory_kib} KiB of memory and {found.iterations} passes"
    try:
        notes = change_passphrase(lock, passphrase, passphrase, parameters=raised, audit_log=audit_log)
    except SaveFailedError as error:
        return [f"{weak}; that could not be raised: {error}"]
    strong = f"{raised.memory_kib} KiB and {raised.iterations} passes from now on"
    return [*notes, f"{weak}: it is {strong}, and as before for the file that is kept as {lock.keystore.name}.v2"]


class AuditReader:
    """What verifying an audit log needs of a keystore: its keys and its generation. Needs no lock, and opens no KEK."""

    def __init__(self, path: Path, passphrase: Secret) -> None:
        """Raises what `load` raises."""
        self.path: Final = path
        raw = read(path)
        with _naming(path):
            sealed = legacy.Sealed(raw) if document.format_version(raw) == legacy.FORMAT else document.Sealed(raw)
            with sealed.header.derive(passphrase) as root:
                self._keys = RootKeys(root)
                try:
                    if isinstance(sealed, legacy.Sealed):
                        sealed.authenticate(root)
                    else:
                        sealed.authenticate(self._keys)
                except BaseException:
                    self._keys.wipe()
                    raise

    @property
    def keys(self) -> AuditKeys:
        """They are wiped with this."""
        return self._keys.audit

    def generation(self) -> int:
        """The generation on disk now, which is that of a server that is running; raises what `load` raises."""
        raw = read(self.path)
        with _naming(self.path):
            # A keystore of format 2 has none; its first one comes with format 3.
            return 0 if document.format_version(raw) == legacy.FORMAT else document.Sealed(raw).authenticate(self._keys)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._keys.wipe()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Tell, of what is wrong with a keystore's content, in which file."""
    try:
        yield
    except KeystoreError as error:
        raise KeystoreError(f"{path}: {error}") from None


def read(path: Path) -> bytes:
    """The raw file, if it is private and of a size a keystore may have."""
    return _read(path).raw


def _read(path: Path) -> _Content:
    try:
        descriptor = open_private(path)
    except InputMissingError:
        raise InputMissingError(f"there is no keystore at {path}; make one with: kms-admin init") from None
    with os.fdopen(descriptor, "rb") as file:
        state = os.fstat(file.fileno())
        if state.st_size > MAX_KEYSTORE_BYTES:
            raise KeystoreError(f"{path} is larger than any keystore; name the right file")
        try:
            return _Content(file.read(), state)
        except OSError as error:
            raise FileAccessError(f"cannot read {path}: {error.strerror}") from error

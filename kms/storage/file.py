"""The keystore on disk: loaded with suspicion, changed durably, in a file that is written whole and perhaps a journal."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Final, NamedTuple
from uuid import uuid4

from kms.core.audit import AuditKeys
from kms.core.derive import KdfParameters
from kms.core.keyring import EMPTY, CreateGroup, KeyGroup, Keyring, KeySlot, NewKey, apply
from kms.core.secret import Secret
from kms.core.specs import RandomSecret
from kms.errors import FileAccessError, KeystoreError, KmsError, SaveFailedError, SaveOutcomeUnknownError
from kms.host import durable
from kms.host.durable import DurableFile
from kms.host.entropy import random_secret
from kms.limits import DEFAULT_KEY_GROUP, JOURNAL_FROM_BYTES, KDF_SALT_BYTES, MAX_KEYSTORE_BYTES, MIN_FOLD_BYTES
from kms.storage import format2, format4, formats, journal
from kms.storage.audit_head import head_path
from kms.storage.audit_log import handing_over
from kms.storage.content import Content, LastLook, Pair, exchanged, read, read_pair
from kms.storage.format4 import Front
from kms.storage.journal_file import JournalFile, SyncError
from kms.storage.lock import KeystoreLock, journal_path, kept_paths, paths_beside
from kms.storage.root_keys import RootKeys
from kms.storage.stored import KdfHeader, Opener

log: Final = logging.getLogger(__name__)


class Replaced(NamedTuple):
    """A file of an earlier format, to be kept before another is put in its place."""

    version: int
    raw: bytes


class Keystore:
    """An unlocked keystore: makes keys for it and commits changes to it. Blocking; one thread at a time.

    What is smaller than JOURNAL_FROM_BYTES is written whole for each change, which costs no more than a journal, and leaves
    one file, of which any copy is a backup. What is larger gets a journal. A change that destroys a key is always written
    whole, and the journal begun anew, so that none of the two has that key any more.
    """

    def __init__(
        self,
        lock: KeystoreLock,
        there: Content | None,
        front: Front,
        keys: RootKeys,
        keyring: Keyring,
        *,
        journal_file: JournalFile | None = None,
        former_journal: str | None = None,
        replaces: Replaced | None = None,
        notes: Sequence[str] = (),
        trouble: KeystoreError | None = None,
        random: RandomSecret = random_secret,
    ) -> None:
        """`there` is what the file holds, None where there is none yet, and `keyring` what is in it and in its journal.

        `former_journal` is what a journal may be called that is still there, and that all is in the file of; `notes` is
        what the reader of the file has to say.
        """
        self.notes: Final = tuple(notes)
        """What could not be kept as it was when it was opened, for people."""
        self.trouble: Final = trouble
        """Why its journal could not be read, of one that was opened without."""
        self.path = lock.keystore
        self._last_look = LastLook(lock, there)
        self._looking = Lock()
        self._front = front
        self._keys = keys
        self._generation = keyring.generation
        self._groups = dict(keyring.groups)
        self._journal = journal_file
        self._former_journal = former_journal
        self._replaces = replaces
        self._random = random
        self._encoder = format4.Encoder()
        self._file_bytes = 0 if there is None else len(there.raw)

    @property
    def replaces(self) -> int | None:
        """The format of the file that is there, if that is an earlier one: the first commit keeps it, whole."""
        return None if self._replaces is None else self._replaces.version

    def mint(self, slot: KeySlot) -> NewKey:
        """A fresh key, wrapped for its slot."""
        with slot.spec.make(self._random) as material:
            return NewKey(slot.spec.load(material), self._keys.wrap(slot, material))

    def commit(self, expected_generation: int, changed: Sequence[KeyGroup]) -> None:
        """Put `changed` in the place of what there is of these groups; when this returns it is durable.

        Raises `SaveFailedError` when nothing has happened, `SaveOutcomeUnknownError` when it may have, and
        `KeystoreReplacedError` when it is another's by now.
        """
        with self._looking:
            if expected_generation != self._generation:
                raise SaveFailedError(
                    f"cannot save {self.path}: it has generation {self._generation}, not {expected_generation}"
                )
            generation = expected_generation + 1
            if not self._append(generation, changed):
                groups = {**self._groups, **{group.key_id: group for group in changed}}
                self._write(Keyring(generation, groups), with_journal=self._file_bytes >= JOURNAL_FROM_BYTES)
            # In place: to copy a map of 10,000 takes a quarter of what a commit takes.
            self._groups.update((group.key_id, group) for group in changed)
            self._generation = generation

    def settle(self) -> None:
        """Fold the journal, so that what is left behind is one file. What fails is told in the log, and no failure."""
        with self._looking:
            if self._journal is None:
                return
            try:
                self._write(Keyring(self._generation, self._groups), with_journal=False)
            except KmsError as error:
                log.warning("the journal of the keystore stays beside it: %s", error)

    def write_whole(self) -> None:
        """Write all of it anew, in one file, as the next generation; raises as `commit`."""
        with self._looking:
            self._write(Keyring(self._generation + 1, self._groups), with_journal=False)
            self._generation += 1

    def migrate(self) -> Keyring:
        """Write what was of an earlier format in the present one; the keyring as it is then. Raises as `commit`."""
        self.commit(self._generation, ())
        return Keyring(self._generation, dict(self._groups))

    def look(self) -> None:
        """Raise `KeystoreReplacedError` when what is there is not what was saved here last, `OSError` when nobody knows.

        May be called from any thread; it waits for a save that is under way.
        """
        with self._looking:
            self._last_look()

    @property
    def audit_keys(self) -> AuditKeys:
        """What the audit log of this keystore is under; they are wiped with it."""
        return self._keys.audit

    def wipe(self) -> None:
        """Wipe the sub-keys of the root key. The keystore cannot be used afterwards."""
        self._keys.wipe()
        if self._journal is not None:
            self._journal.close()

    def _append(self, generation: int, changed: Sequence[KeyGroup]) -> bool:
        """Write `changed`, as of `generation`, into the journal; whether it is to be written so."""
        file = self._journal
        if file is None or any(self._loses_a_key(group) for group in changed):
            return False
        line = journal.record(generation, file.last, list(map(self._encoder.group, changed)), self._keys.journal_mac)
        if file.length + len(line) > max(MIN_FOLD_BYTES, self._file_bytes):
            return False
        with self._translated():
            self._last_look()
            file.append(line)
        return True

    def _loses_a_key(self, group: KeyGroup) -> bool:
        before = self._groups.get(group.key_id)
        if before is None or before.versions is group.versions:
            return False
        return any(v.wrapped is not None and group.versions[v.version].wrapped is None for v in before.versions.values())

    def _write(self, keyring: Keyring, *, with_journal: bool) -> None:
        """Put all of `keyring` on disk in one file, and begin its journal anew or have none."""
        place = journal_path(self.path)
        former = self._former_journal if self._journal is None else self._front.journal
        named = str(uuid4()) if with_journal else None
        front = replace(self._front, journal=named, former_journal=former)
        content = self._encoder.encode(keyring, front, self._keys)
        if len(content) > MAX_KEYSTORE_BYTES:
            raise SaveFailedError(f"cannot save {self.path}: it would be larger than any keystore; nothing was changed")
        with self._translated(), contextlib.ExitStack() as files:
            if self._replaces is not None:
                self._keep_replaced(self._replaces)
            begun: DurableFile | None = None
            start = b""
            if named is not None:
                # As much as can fail does so before the keystore is touched.
                begun = files.enter_context(DurableFile(place))
                start = journal.header(named, keyring.generation, self._keys.journal_mac)
                begun.write(start)
                begun.sync()
                if former is None:
                    self._put_first(begun, place)
                    self._former_journal = named
            written = durable.write_file(self.path, content, self._last_look)
            self._last_look.was_saved(content, written)
            self._file_bytes = len(content)
            try:
                if former is not None and begun is not None:
                    begun.commit()
                elif former is not None:
                    place.unlink(missing_ok=True)
                    durable.sync_names(place.parent)
            except OSError as error:
                raise durable.RenameError(error.errno, error.strerror, str(place)) from error
        if self._journal is not None:
            self._journal.close()
        self._front = front
        self._journal = None if named is None else JournalFile(place, len(start), journal.mac_of(start))
        self._former_journal = None
        self._replaces = None

    def _put_first(self, begun: DurableFile, place: Path) -> None:
        """Have a journal where there was none, before the keystore says that there is: nothing is in it yet."""
        self._last_look()
        if os.path.lexists(place):
            raise exchanged(place, "made")
        try:
            begun.commit()
        except durable.RenameError as error:
            raise OSError(error.errno, error.strerror) from error

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (durable.RenameError, SyncError) as error:
            raise SaveOutcomeUnknownError(
                f"saving {self.path} failed at its last step ({error.strerror}); check the disk, then start again"
            ) from error
        except OSError as error:
            remedy = _REMEDIES.get(error.errno or 0, "")
            raise SaveFailedError(f"cannot save {self.path}: {error.strerror}; nothing was changed{remedy}") from error

    def _keep_replaced(self, replaced: Replaced) -> None:
        for kept in kept_paths(self.path, replaced.version):
            if not os.path.lexists(kept):
                break
            if _holds(kept, replaced.raw):
                # Kept by a save that went no further, perhaps not even as far as making this name durable.
                durable.sync_names(kept.parent)
                return
        else:
            raise SaveFailedError(
                f"cannot keep the format {replaced.version} file of {self.path}: {kept} and those before it hold others; "
                "move them away"
            )
        try:
            durable.write_file(kept, replaced.raw)
        except durable.RenameError as error:
            # The keystore itself is untouched, so this is a failure whose outcome is known.
            raise OSError(error.errno, error.strerror) from error


_REMEDIES: Final = {
    errno.EBUSY: ". It is a mount point of its own, which nothing can replace: mount its directory instead",
    errno.EXDEV: ". It is a mount point of its own, which nothing can replace: mount its directory instead",
    errno.EROFS: ". Mount its file system to be written to",
    errno.EPERM: ". It may be immutable: chattr -i",
}


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
    found = next((path for path in (*paths_beside(keystore), *logs) if os.path.lexists(path)), None)
    if found is None and keystore.parent.is_dir():
        found = next(iter(sorted(durable.temp_files(keystore))), None)
    return found


def initialise(
    lock: KeystoreLock,
    passphrase: Secret,
    *,
    now: int,
    parameters: KdfParameters,
    random: RandomSecret = random_secret,
) -> tuple[Keystore, Keyring]:
    """Make a keystore whose keyring has the group `default`; raises `KeystoreError` when there is one already."""
    path = lock.keystore
    if os.path.lexists(path):
        raise KeystoreError(f"there is a keystore at {path} already; it is not touched")
    header = KdfHeader(parameters, os.urandom(KDF_SALT_BYTES))
    with header.derive(passphrase) as root:
        keys = RootKeys(root)
    keystore = Keystore(lock, None, Front(header, keys.seal_check()), keys, EMPTY, random=random)
    keyring = apply(EMPTY, CreateGroup(DEFAULT_KEY_GROUP), now=now, mint=keystore.mint).next_generation()
    keystore.commit(EMPTY.generation, tuple(keyring.groups.values()))
    return keystore, keyring


def load(
    lock: KeystoreLock, passphrase: Secret, *, random: RandomSecret = random_secret, salvages: bool = False
) -> tuple[Keystore, Keyring]:
    """Unlock the keystore; what is of an earlier format is migrated in memory, and on disk at its first commit.

    Its names and its journal are made durable first. A save that was killed between its rename and the fsync of the
    directory has left a keystore that a power cut could still take back, and with it the key of whatever is encrypted from
    now on. Who `salvages` gets what is left where the journal is missing or damaged.

    Raises `InputMissingError`, `SecretFileError` for a file that is not private, `WrongPassphraseError`,
    `KeystoreError` when it was altered, or `FileAccessError`. Whatever it raises, the files were not touched.
    """
    try:
        durable.sync_names(lock.keystore.parent)
    except OSError as error:
        raise FileAccessError(f"cannot make {lock.keystore} durable: {error.strerror}; check the disk") from error
    pair = read_pair(lock.keystore, durably=True)
    with naming(lock.keystore), contextlib.ExitStack() as unless_opened:
        opener = formats.opener(pair, salvages=salvages)
        with opener.header.derive(passphrase) as root:
            keys = RootKeys(root)
            unless_opened.callback(keys.wipe)
            keyring = formats.opened(opener, root, keys)
        keystore = _opened(lock, pair, opener, keys, keyring, random)
        unless_opened.pop_all()
    return keystore, keyring


def _opened(
    lock: KeystoreLock, pair: Pair, opener: Opener, keys: RootKeys, keyring: Keyring, random: RandomSecret
) -> Keystore:
    journal_file: JournalFile | None = None
    trouble: KeystoreError | None = None
    if isinstance(opener, format4.Sealed):
        front, found, trouble = opener.front, opener.journal, opener.trouble
        if found is not None:
            journal_file = JournalFile(journal_path(lock.keystore), found.length, found.last, torn=found.torn)
    else:
        front = Front(opener.header, keys.seal_check())
    return Keystore(
        lock,
        pair.file,
        front,
        keys,
        keyring,
        journal_file=journal_file,
        former_journal=_left_behind(pair),
        replaces=_to_be_replaced(pair, opener),
        notes=opener.notes,
        trouble=trouble,
        random=random,
    )


def _to_be_replaced(pair: Pair, opener: Opener) -> Replaced | None:
    """The file that is there, if it is of an earlier format."""
    return None if opener.version == format4.FORMAT else Replaced(opener.version, pair.file.raw)


def _left_behind(pair: Pair) -> str | None:
    """What the journal is called that is there, which is written over by the next one, or taken away."""
    return None if pair.journal is None else journal.claimed(pair.journal.raw) or "none that can be read"


def change_passphrase(
    lock: KeystoreLock, old: Secret, new: Secret, *, parameters: KdfParameters, audit_log: Path | None = None
) -> Sequence[str]:
    """Wrap every key under a new root key, from `new` and a new salt. Groups, versions and states stay as they are.

    The `audit_log`, if there is one, goes on under the new key, and says so. Returns what could not be kept as it was, for
    people.

    Raises what `load`, `Keystore.commit` and opening an `AuditLog` raise. The KDF's costs become `parameters`.
    """
    header = KdfHeader(parameters, os.urandom(KDF_SALT_BYTES))
    pair = read_pair(lock.keystore)
    with naming(lock.keystore), contextlib.ExitStack() as wipes:
        opener = formats.opener(pair)
        with header.derive(new) as new_root:
            keys = RootKeys(new_root)
        wipes.callback(keys.wipe)
        with opener.header.derive(old) as root:
            old_keys = wipes.enter_context(RootKeys(root))
            keyring = opener.open(root, keys.wrap)
        for key in keyring.live_keys():
            wipes.callback(key.wipe)
        if audit_log is not None:
            wipes.enter_context(handing_over(audit_log, old_keys.audit, keys.audit, generation=keyring.generation))
        front = Front(header, keys.seal_check())
        replaces = _to_be_replaced(pair, opener)
        # All of a journal goes into the file, whatever becomes of it: its MACs are under the old key.
        former = _left_behind(pair)
        Keystore(lock, pair.file, front, keys, keyring, former_journal=former, replaces=replaces).write_whole()
        return opener.notes


def raise_costs(
    lock: KeystoreLock, passphrase: Secret, *, parameters: KdfParameters, audit_log: Path | None = None
) -> Sequence[str]:
    """Migrate a keystore of format 2 whose KDF costs less than `parameters`, to what costs at least that.

    Whoever took a copy of it guesses passphrases at what it cost then; who takes one of this has to pay what is usual
    today. Nothing is done to later formats, whose costs somebody here has chosen. Returns what was done, for people. Raises
    what `load` raises; a save that fails leaves all as it is.
    """
    raw = read(lock.keystore)
    with naming(lock.keystore):
        if formats.version_of(raw) != format2.FORMAT:
            return ()
        found = format2.Sealed(raw).header.parameters
    raised = KdfParameters(
        max(found.memory_kib, parameters.memory_kib), max(found.iterations, parameters.iterations), parameters.parallelism
    )
    if (found.memory_kib, found.iterations) == (raised.memory_kib, raised.iterations):
        return ()
    costs = f"{found.memory_kib} KiB of memory and {found.iterations} passes"
    weak = f"keystore of the Java server: each guess at its passphrase costs only {costs}"
    try:
        notes = change_passphrase(lock, passphrase, passphrase, parameters=raised, audit_log=audit_log)
    except SaveFailedError as error:
        return [f"{weak}; that could not be raised: {error}"]
    strong = f"{raised.memory_kib} KiB and {raised.iterations} passes from now on"
    return [*notes, f"{weak}: it is {strong}, and as before for the file that is kept as {lock.keystore.name}.v2"]


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Tell, of what is wrong with a keystore's content, in which file."""
    try:
        yield
    except KeystoreError as error:
        raise KeystoreError(f"{path}: {error}") from None

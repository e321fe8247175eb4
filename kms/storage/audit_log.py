"""The audit log's file: appended to, made durable, rotated; and what becomes of it when it cannot be written.

    audit.log        the records, one line each (`kms.core.audit`); only ever appended to
    audit.log.head   the last record that is known to be durable, under the same key (`kms.storage.audit_head`)
    audit.log.lock   held for as long as the log is open: two keystores may name the same log

**Appending.** `write` appends all records of a batch by one system call, in the event loop's thread, and has taken
nothing over until that has succeeded. `sync` makes durable what was written, from any thread, and only then writes the
head. So the log never ends before the record that the head names, unless somebody has cut it short.

**Space.** Some is kept behind the end of the file before it is used, so that a disk which others have filled takes what
is recorded for a while longer. The head is written in place, and needs none.

**Trouble.** A log is in trouble from when it could not be written, could not be made durable, or is no longer the file
at its path. `write` raises `UnavailableError` then. It comes out of it by a Recover record, which goes before all others
and says how many requests were not recorded. What a failed write has left is cut off again. Where that is impossible,
as in a file that nobody may shorten (chattr +a), it stays and the Recover record names it, once there is room for that;
whole records among it count as written. So a record may stand for a request that was answered `Unavailable`, but never
the other way round.

After an fsync that failed nothing is known of what it was to write: Linux marks those pages clean, and the next fsync
succeeds without having written them. So the Recover record names those records, and the trouble has ended only when an
fsync *behind it* has succeeded. To write them again was rejected: they would stand twice in a file in which they may
well stand once.

**Starting.** Nothing in a log is changed by a start. A torn line that a crash has left stays, gets a line end, and the
Start record names it. Anything else behind the last record was written by somebody else, and refuses the start: named
like a torn line, it would be excused for good. A log that was renamed while no server ran goes on in a new file, from
the head.

`write`, `check` and `reopen` belong to one thread. `sync` may run in others at the same time: what they share is
`_position`, which is exchanged whole, and the files that were rotated away, which are closed by `sync` alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Final, NoReturn, Self

from msgspec import Struct
from msgspec.structs import replace

from kms.core.audit import (
    NEW_CHAIN,
    AuditKeys,
    Chain,
    Event,
    EventRecord,
    Head,
    Record,
    Tail,
    Torn,
    decode_head,
    is_torn,
    read_tail,
    seal,
    to_text,
)
from kms.errors import (
    AuditLogError,
    DecryptionFailedError,
    FileAccessError,
    InputMissingError,
    KeystoreLockedError,
    UnavailableError,
)
from kms.host import durable, locking, space
from kms.host.private import make_private_directory, open_private
from kms.limits import (
    AUDIT_HEAD_INTERVAL,
    AUDIT_RESERVE_BYTES,
    AUDIT_RETRY_INTERVAL,
    AUDIT_ROTATION_TIME,
    AUDIT_TAIL_BYTES,
    MAX_KEPT_RECORDS,
)
from kms.storage.audit_head import HeadFile, head_path, is_at, read_at, read_head

Clock = Callable[[], float]

_APPEND: Final = os.O_RDWR | os.O_APPEND
_MAKE: Final = _APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Position(Struct, frozen=True, gc=False):
    """Where the log ends: in which file, behind how many bytes, with which record."""

    descriptor: int
    length: int
    chain: Chain
    generation: int


class AuditLog:
    """An audit log that is open for appending. `generation` is the keystore's in force: whoever changes it says so here."""

    def __init__(
        self,
        path: Path,
        keys: AuditKeys,
        *,
        generation: int,
        accept_rollback: bool = False,
        successor: AuditKeys | None = None,
        clock: Clock = time.time,
        monotonic: Clock = time.monotonic,
    ) -> None:
        """Open the log at `path`, or begin it. `keys` are not wiped here.

        When this returns its first record is durable: Start; or ChangePassphrase, which hands over to `successor`.

        Raises `AuditLogError` when the log is not one to go on with, `KeystoreLockedError`, `SecretFileError` when it or
        its directory is not private, or `FileAccessError`.
        """
        self.path: Final = path
        self.generation = generation
        self._keys = keys
        self._clock = clock
        self._monotonic = monotonic
        self._second, self._second_text = -1, ""
        self._syncing: Final = Lock()
        self._retired: Final[deque[int]] = deque()
        self._names_are_durable = False
        self._torn: Torn | None = None
        self._needs_newline = False
        self._unrecorded = 0
        self._kept: list[Record] = []
        self._write_trouble = self._place_trouble = self._sync_trouble = ""
        self._behind: int | None = None
        """The Recover record that an fsync has to succeed behind."""
        self._retry_at = self._head_due = float("-inf")
        self._misplaced_since: float | None = None
        self._dirty_since = monotonic()
        self._reserved_to = 0
        self._can_reserve = True
        self.is_scarce = False
        """Whether no more space can be kept for it: what there is, is for who is authenticated."""
        self._head: Final = HeadFile(head_path(path))
        self._lock = _hold(path)
        self._position = Position(-1, 0, NEW_CHAIN, 0)
        self.remarks: Final[list[str]] = []
        """What the start found that whoever runs the server should know."""
        try:
            first = self._open(accept_rollback=accept_rollback)
            if successor is not None:
                first.event, first.sealed_key = "ChangePassphrase", keys.sealed_for(successor)
            self._reserve()
            if not self._can_reserve:
                self.remarks.append("its file system cannot keep space for it: on a full disk nothing is answered")
            self._append([first])
            self._settled()
            self.sync(force=True)
        except BaseException as error:
            self._let_go()
            if isinstance(error, UnavailableError):
                raise FileAccessError(f"{error}; look after the disk that {path} is on") from error
            if isinstance(error, OSError):
                raise FileAccessError(f"cannot use the audit log {path}: {error.strerror}") from error
            raise

    def _open(self, *, accept_rollback: bool) -> EventRecord:
        """Find where the log ends, and refuse one that should not end there; returns the event to go on with."""
        durable.remove_stale_temp_files(head_path(self.path))
        try:
            descriptor = open_private(self.path, _APPEND)
        except InputMissingError:
            descriptor = os.open(self.path, _MAKE, 0o600)
        self._position = Position(descriptor, os.fstat(descriptor).st_size, NEW_CHAIN, 0)
        tail, rest = self._read_end()
        self._torn = Torn.of(rest) if rest else None
        self._needs_newline = self._torn is not None or (tail is not None and not tail.is_closed)
        head = self._read_head(tail.predecessor if tail is not None else None)
        first = self._event("Start")
        if tail is not None:
            chain, generation = tail.chain, tail.generation
            self._check_against_head(chain, head)
        else:
            chain, generation = (head.chain, head.generation) if head is not None else (NEW_CHAIN, 0)
            first.previous = to_text(chain.mac).decode() if chain.seq else ""
            if chain.seq:
                self.remarks.append(f"its file was not there; it goes on in a new one, with record {chain.seq + 1}")
        if rest and not is_torn(rest, chain.seq + 1):
            if tail is None:
                # A keystore, perhaps, that was named by mistake: not to be appended to.
                self._refuse("is another file: it does not even begin like an audit log")
            self._refuse(
                f"has {len(rest)} bytes behind record {chain.seq} that a crash cannot have left: somebody else wrote them"
            )
        if self._torn is not None:
            self.remarks.append(
                f"its last write was cut short; {self._torn.length} bytes of it are left, and are on record"
            )
        if self.generation < generation:
            if not accept_rollback:
                raise AuditLogError(
                    f"the keystore is older than the audit log {self.path}: its generation is {self.generation}, and "
                    f"record {chain.seq} was written at {generation}. An older copy was put back: versions made since "
                    "are missing, and those disabled or destroyed since work again. Put the newer keystore back; or, to "
                    "go on with this one, start with --accept-rollback"
                )
            first.accepted_rollback = True
            self.remarks.append(f"the keystore is older: its generation is {self.generation}, after {generation}")
        self._position = replace(self._position, chain=chain, generation=generation)
        self._synced = self._head_seq = chain.seq
        if chain.seq and head is None:
            # Killed before it had a head. It gets one before its next record, since with two it would be refused.
            os.fsync(descriptor)
            self._write_head(self._position, self._keys)
        return first

    def _read_end(self) -> tuple[Tail | None, bytes]:
        """The file's last record, if it has one, and what stands behind it that is none; raises `AuditLogError`."""
        descriptor, length = self._position.descriptor, self._position.length
        start = max(0, length - AUDIT_TAIL_BYTES)
        raw = read_at(descriptor, length - start, start)
        if start:
            # From the middle of a line.
            raw = raw[raw.find(b"\n") + 1 :]
        try:
            tail = read_tail(raw, self._keys)
        except DecryptionFailedError:
            self._refuse(
                "does not end with a record that the key of this keystore verifies: it was altered, or belongs to another "
                "keystore, or the passphrase was changed while --audit-log named another log"
            )
        if tail is not None:
            return tail, tail.rest
        if start:
            self._refuse("ends with more bytes that are no records than a crash leaves")
        return None, raw

    def _read_head(self, predecessor: AuditKeys | None) -> Head | None:
        """The head; `predecessor` is what it may be under, where the passphrase has just been changed."""
        try:
            raw = read_head(self.path)
            if raw is None:
                return None
            head = decode_head(raw, self._keys)
            if head is None and predecessor is not None:
                head = decode_head(raw, predecessor)
        finally:
            if predecessor is not None:
                predecessor.wipe()
        if head is None:
            self._refuse(f"has a head file, {head_path(self.path).name}, that the key of this keystore does not verify")
        return head

    def _check_against_head(self, chain: Chain, head: Head | None) -> None:
        if head is None:
            if chain.seq > 1:
                self._refuse(f"has lost its head file, {head_path(self.path).name}, which tells whether it was cut short")
        elif chain.seq < head.seq:
            self._refuse(f"was cut short: it ends with record {chain.seq}, and record {head.seq} was in it")
        elif chain.seq == head.seq and chain != head.chain:
            self._refuse(f"ends with another record {chain.seq} than its head file names")

    def _refuse(self, what: str) -> NoReturn:
        raise AuditLogError(
            f"the audit log {self.path} {what}. Look into it with kms-admin verify-audit; to begin a new log, move "
            f"{self.path.name} and {head_path(self.path).name} away together"
        )

    @property
    def trouble(self) -> str:
        """Why it cannot be written, for a person; empty while it can."""
        return self._write_trouble or self._place_trouble or self._sync_trouble

    @property
    def is_failing(self) -> bool:
        """Whether `write` would raise."""
        # Asked for each request: `trouble`, a second property, would double the 0.1 us.
        return bool(self._write_trouble or self._place_trouble or self._sync_trouble)

    @property
    def written(self) -> int:
        """The number of the last record."""
        return self._position.chain.seq

    @property
    def unsynced(self) -> int:
        """How many records may not be durable yet."""
        return self._position.chain.seq - self._synced

    @property
    def unsynced_age(self) -> float:
        """Seconds since the oldest of them was written, at the most; 0 when there is none."""
        return self._monotonic() - self._dirty_since if self.unsynced else 0.0

    def write(self, records: Sequence[Record], *, keep: bool = False) -> None:
        """Append `records`, which get their number, time and generation here. Not durable before `sync`.

        Raises `UnavailableError` when the log is in trouble. Then they are counted as not recorded; or with `keep`, for
        what cannot be undone any more, kept and written once it has come out of it. With no records, it only tries that.
        """
        now = self._now()
        for record in records:
            record.time = now
        try:
            if self._write_trouble or self._place_trouble or self._sync_trouble or self._unrecorded or self._kept:
                self._recover()
            if records:
                self._append(records)
        except UnavailableError:
            room = MAX_KEPT_RECORDS - len(self._kept) if keep else 0
            self._kept += records[:room]
            self._unrecorded += len(records[room:])
            raise

    def _now(self) -> str:
        now = self._clock()
        second = int(now)
        if second != self._second:
            self._second, self._second_text = second, datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        return f"{self._second_text}.{int((now - second) * 1e6):06}Z"

    def _append(self, records: Sequence[Record]) -> None:
        position = self._position
        generation = self.generation
        for record in records:
            record.generation = generation
        data, chain = seal(records, position.chain, self._keys)
        if self._needs_newline:
            data = b"\n" + data
        if self._torn is not None:
            self._need_room(len(data))
        try:
            written = os.write(position.descriptor, data)
        except OSError as error:
            self._fail_to_write(_reason(error))
        if written < len(data):
            # A write of the rest would tell why; so does the next try.
            self._fail_to_write("only a part of a record was taken")
        if position.chain.seq == self._synced:
            self._dirty_since = self._monotonic()
        self._position = Position(position.descriptor, position.length + written, chain, generation)
        self._needs_newline = False

    def _need_room(self, length: int) -> None:
        """Raise `UnavailableError` where the disk has no room for `length` bytes more.

        Behind a torn line that has to stay no second one may come: a start would take it for somebody else's.
        """
        try:
            space.reserve(self._position.descriptor, self._position.length, length)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self._write_trouble = _reason(error)
                raise self._unavailable() from None

    def _fail_to_write(self, why: str) -> NoReturn:
        self._write_trouble = why
        with contextlib.suppress(OSError):
            os.ftruncate(self._position.descriptor, self._position.length)
            self._reserved_to = 0
        raise self._unavailable()

    def _unavailable(self) -> UnavailableError:
        return UnavailableError(f"the audit log cannot be written: {self.trouble or 'it was not, a moment ago'}")

    def _recover(self) -> None:
        """Come out of trouble with a Recover record and what was kept, or raise `UnavailableError`."""
        now = self._monotonic()
        # What a Recover record stands for already is up to `sync`, and a file in the wrong place to `check` and `reopen`.
        if self._place_trouble or self._behind is not None or now < self._retry_at:
            raise self._unavailable()
        self._retry_at = now + AUDIT_RETRY_INTERVAL
        # One that is under way may find, or end, the trouble that the record is about.
        if not self._syncing.acquire(blocking=False):
            raise self._unavailable()
        try:
            self._cut_back()
            self._append([self._event("Recover"), *self._kept])
            self._settled()
            if self._sync_trouble:
                self._behind = self._position.chain.seq
                raise self._unavailable()
        finally:
            self._syncing.release()

    def _event(self, event: Event) -> EventRecord:
        """What there is to say of the trouble so far."""
        record = EventRecord(event=event, time=self._now(), unrecorded=self._unrecorded)
        if self._torn is not None:
            record.torn, record.torn_sha256 = self._torn
        if self._sync_trouble and self.unsynced:
            record.unsynced_from, record.unsynced_to = self._synced + 1, self.written
        return record

    def _settled(self) -> None:
        self._write_trouble = ""
        self._torn = None
        self._unrecorded = 0
        self._kept.clear()

    def _cut_back(self) -> None:
        """Take away what a write has left that failed; where it has to stay, go on behind it."""
        position = self._position
        length = os.fstat(position.descriptor).st_size
        # What is there without a write of ours is not ours to take away.
        if length == position.length or not self._write_trouble:
            return
        if length > position.length:
            with contextlib.suppress(OSError):
                os.ftruncate(position.descriptor, position.length)
                # And with it what was kept behind its end.
                self._reserved_to = 0
                return
        self._position = replace(position, length=length)
        try:
            tail, rest = self._read_end()
            self._torn = Torn.of(rest) if rest else None
            if tail is None or tail.chain.seq < position.chain.seq:
                self._refuse("was cut short")
        except (AuditLogError, OSError):
            self._position, self._torn = position, None
            self._write_trouble = "what stands at its end is not what was written; move it away and send SIGHUP"
            raise self._unavailable() from None
        self._position = Position(position.descriptor, length, tail.chain, tail.generation)
        self._needs_newline = self._torn is not None or not tail.is_closed

    def check(self) -> None:
        """Look whether the file is still the one at its path and as long as it was made; in trouble, try to come out of it.

        Meant to be called once a second. What it finds is in `trouble`.
        """
        self._place_trouble = self._misplaced()
        self._reserve()
        if self.trouble or self._unrecorded or self._kept:
            with contextlib.suppress(UnavailableError):
                self._recover()

    def _reserve(self) -> None:
        """Keep space on the disk for what comes next, where a part of what was kept is used."""
        position = self._position
        if not self._can_reserve or position.length + AUDIT_RESERVE_BYTES // 2 <= self._reserved_to:
            return
        try:
            space.reserve(position.descriptor, position.length, AUDIT_RESERVE_BYTES)
        except OSError as error:
            self._can_reserve = error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
            self.is_scarce = self._can_reserve
        else:
            self._reserved_to = position.length + AUDIT_RESERVE_BYTES
            self.is_scarce = False

    def _misplaced(self) -> str:
        try:
            state = os.fstat(self._position.descriptor)
            if state.st_nlink == 0:
                return "its file was removed; send SIGHUP to begin another"
            if state.st_size < self._position.length:
                return "its file was cut short; move it away and send SIGHUP"
            if state.st_size > self._position.length and not self._write_trouble:
                return "somebody else has written to its file; move it away and send SIGHUP"
            is_there = os.path.samestat(state, os.lstat(self.path))
        except FileNotFoundError:
            is_there = False
        except OSError as error:
            return _reason(error)
        now = self._monotonic()
        if is_there:
            self._misplaced_since = None
        elif self._misplaced_since is None:
            self._misplaced_since = now
        elif now - self._misplaced_since >= AUDIT_ROTATION_TIME:
            return "its file was moved, and no SIGHUP has come"
        return ""

    def reopen(self) -> bool:
        """Go on in a new file where the old one was renamed; False when it was not.

        Raises `AuditLogError` when the file that is there now is another and not empty, `SecretFileError` when it is not
        private, or `FileAccessError`. Whatever it raises, the log goes on in the old file.
        """
        try:
            if is_at(self.path, self._position.descriptor):
                self._misplaced_since = None
                return False
            try:
                descriptor = open_private(self.path, _APPEND)
            except InputMissingError:
                descriptor = os.open(self.path, _MAKE, 0o600)
            try:
                if os.fstat(descriptor).st_size:
                    raise AuditLogError(
                        f"{self.path} is another file and not empty; the audit log goes on in the old one. Move it away "
                        "and send SIGHUP again"
                    )
                self._continue_in(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
        except OSError as error:
            raise FileAccessError(f"cannot begin {self.path}: {error.strerror}") from error
        return True

    def _continue_in(self, descriptor: int) -> None:
        # First, so that the head names the old file's last record: the new one has none yet, should it come to a crash.
        with contextlib.suppress(UnavailableError):
            self.sync(force=True)
        with self._syncing:
            with contextlib.suppress(UnavailableError):
                self._cut_back()
            old, newline = self._position, self._needs_newline
            first = self._event("Continue")
            first.previous = to_text(old.chain.mac).decode()
            trouble = self._write_trouble
            self._position, self._needs_newline = replace(old, descriptor=descriptor, length=0), False
            try:
                self._append([first, *self._kept])
            except UnavailableError as error:
                self._position, self._needs_newline, self._write_trouble = old, newline, trouble
                raise FileAccessError(f"cannot begin {self.path}; {error}") from error
            self._settled()
            self._reserved_to = 0
            self._reserve()
            _give_back(old)
            self._place_trouble, self._misplaced_since = "", None
            self._names_are_durable = False
            self._retired.append(old.descriptor)
            if self._sync_trouble:
                self._behind = self.written

    def sync(self, *, force: bool = False) -> None:
        """Make durable what was written before this was called; the head too, at most once a second unless `force`.

        Raises `UnavailableError` when that cannot be promised. May be called from any thread.
        """
        with self._syncing:
            position = self._position
            seq = position.chain.seq
            if seq == self._head_seq and not (self._retired or self._sync_trouble):
                return
            now = self._monotonic()
            try:
                # Before those that were rotated away, since it may be one of them by now.
                os.fsync(position.descriptor)
                while self._retired:
                    os.fsync(self._retired[0])
                    os.close(self._retired.popleft())
                if not self._names_are_durable:
                    durable.sync_names(self.path.parent)
                    self._names_are_durable = True
            except OSError as error:
                self._sync_trouble, self._behind = _reason(error), None
                raise self._unavailable() from error
            if self._sync_trouble and (self._behind is None or seq < self._behind):
                raise self._unavailable()
            self._synced, self._dirty_since = seq, now
            if force or self._sync_trouble or now >= self._head_due:
                self._head_due = now + AUDIT_HEAD_INTERVAL
                try:
                    self._write_head(position, self._keys)
                except OSError as error:
                    self._sync_trouble = f"{head_path(self.path).name}: {_reason(error)}"
                    raise self._unavailable() from error
            self._sync_trouble, self._behind = "", None

    def _write_head(self, position: Position, keys: AuditKeys) -> None:
        chain = position.chain
        self._head.write(Head(chain.seq, position.generation, to_text(chain.mac).decode()).encode(keys))
        self._head_seq = chain.seq

    def hand_over(self, successor: AuditKeys) -> None:
        """Put the head under `successor`, which the log is under from here on, and close. For `change_passphrase`."""
        # Where that fails the old one is as good: the log ends with the record that hands over.
        with contextlib.suppress(OSError):
            self._write_head(self._position, successor)
        self._let_go()

    def close(self) -> None:
        """Write the Stop record, make all durable and let go of the file. What failed is in `trouble` then."""
        if self._lock < 0:
            return
        self._retry_at = float("-inf")
        try:
            with contextlib.suppress(UnavailableError):
                self.write([EventRecord(event="Stop")])
            with contextlib.suppress(UnavailableError):
                self.sync(force=True)
            _give_back(self._position)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        if self._lock < 0:
            return
        with self._syncing:
            for descriptor in (self._position.descriptor, *self._retired, self._lock):
                # It is synced, or said not to be.
                with contextlib.suppress(OSError):
                    os.close(descriptor)
            self._retired.clear()
            self._head.close()
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


@contextlib.contextmanager
def handing_over(path: Path, keys: AuditKeys, successor: AuditKeys, *, generation: int) -> Iterator[None]:
    """While this is open, the log at `path`, under `keys` so far, may go on under `successor`; if it ends well, it does.

    Raises what opening an `AuditLog` raises, before anything is changed.
    """
    log = AuditLog(path, keys, generation=generation, successor=successor)
    try:
        yield
        log.hand_over(successor)
    finally:
        log._let_go()


def is_kept(path: Path) -> bool:
    """Whether a log was begun at `path`: it is there, or its head is."""
    return os.path.lexists(path) or os.path.lexists(head_path(path))


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__


def _give_back(position: Position) -> None:
    """Let go of the space that was kept behind the end of a file which is not written any more."""
    with contextlib.suppress(OSError):
        # What others have put there is not ours to take away.
        if os.fstat(position.descriptor).st_size == position.length:
            os.ftruncate(position.descriptor, position.length)


def _hold(path: Path) -> int:
    """The lock of the log at `path`, in a directory that is private."""
    make_private_directory(path.parent)
    lock = path.with_name(f"{path.name}.lock")
    try:
        return locking.hold(lock)
    except locking.LockHeldError as error:
        raise KeystoreLockedError(f"the audit log {path} is in use by process {error.holder}; stop it first") from None
    except OSError as error:
        raise FileAccessError(f"cannot lock {lock}: {error.strerror}") from error

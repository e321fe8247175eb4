"""How keys are used: for each version how often, when last and by whom, and who was refused it while it is disabled.

A request pays for little more than to find its version in a table: by the id in its ciphertext, as that is there
already. Only what succeeded is counted, which proves that the version exists: the table
is as large as the keyring at the most. A destroyed version keeps its figures, as it keeps its number.

What has changed is written to the usage file every minute and at the end. Not at each request: what a server that is
killed has counted since, up to USAGE_FLUSH_SECONDS, is lost, and no answer waits for the file. Nor is a request held up
by it: what has changed is encoded by the event loop, a slice at a time, since a thread that computes would keep the
interpreter from it for 5 ms at a stretch; the thread only writes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import trio

from kms.core import ciphertext
from kms.core.ciphertext import kek_id_of
from kms.core.keyring import Keyring, KeyVersion, VersionStatus
from kms.core.policy import Principal
from kms.core.usage import OTHERS, Operations, Refusals, TimedDisable, VersionUsage
from kms.errors import DecryptionFailedError, InputMissingError, KeystoreReplacedError, KmsError, MemoryShortError
from kms.limits import MAX_REFUSED_NAMES, USAGE_FLUSH_SECONDS, USAGE_SLICE
from kms.service.bugs import log_bug
from kms.service.served import Served
from kms.service.threads import in_thread
from kms.storage import usage_file
from kms.storage.usage_file import Document, Record
from kms.wire.messages import Decrypt, Encrypt, GenerateDataKey, GenerateDataKeyWithoutPlaintext, ReEncrypt, Request

log: Final = logging.getLogger(__name__)

Clock = Callable[[], float]
"""Seconds since 1970."""

VersionName = tuple[str, int]
"""Group and number."""

_CLOCK_SECONDS: Final = 0.25
"""The clock is looked at no more often than this: what it says is kept in whole seconds, and a look takes 0.1 us."""


class _Tally:
    """One version. Not the struct that is written: to set a field of that takes 0.04 us, of this a tenth."""

    __slots__ = (
        "decrypted",
        "encrypted",
        "generated",
        "is_changed",
        "last_used",
        "last_used_by",
        "name",
        "reencrypted_from",
        "reencrypted_to",
        "trial",
    )

    def __init__(self, name: VersionName, operations: Operations) -> None:
        self.name = name
        self.encrypted = operations.encrypt
        self.decrypted = operations.decrypt
        self.generated = operations.generate_data_key
        self.reencrypted_from = operations.re_encrypt_from
        self.reencrypted_to = operations.re_encrypt_to
        self.last_used: int | None = None
        self.last_used_by: str | None = None
        self.trial: TimedDisable | None = None
        self.is_changed = False

    def operations(self) -> Operations:
        return Operations(self.encrypted, self.decrypted, self.generated, self.reencrypted_from, self.reencrypted_to)

    def record(self) -> Record:
        return Record(*self.name, self.operations(), self.last_used, self.last_used_by, self.trial)


class Usage:
    """The table of all versions that were used, and its file."""

    def __init__(
        self,
        keyring: Keyring,
        saved: Document | None,
        path: Path,
        clock: Clock,
        *,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        """What `saved` knows of versions that `keyring` has is gone on with; without it, all is counted from now.

        `look` is called before each write, in its thread, and ends it by what it raises: the file belongs to a keystore,
        which may be another server's by now.
        """
        self._look = look
        self.clock = clock
        self.running: Final[dict[VersionName, TimedDisable]] = {}
        """Versions that are disabled for a time."""
        self.on_disk: set[VersionName] = set()
        """Versions of which the file may say that they are."""
        self._path = path
        self._since = int(clock()) if saved is None else saved.since_epoch_sec
        self._now = 0
        self._look_again_at = -math.inf
        self._table: dict[bytes, _Tally] = {}
        self._changed: list[_Tally] = []
        self._encoded: dict[VersionName, bytes] = {}
        # Since when it is counted is worth knowing after a restart, too.
        self._is_unsaved = saved is None
        self.trouble = ""
        """Why the file could not be written the last time; empty when it could."""
        self._saving = trio.Lock()
        for record in () if saved is None else saved.versions:
            self._take_up(record, keyring)

    def _take_up(self, record: Record, keyring: Keyring) -> None:
        group = keyring.groups.get(record.key_id)
        version = None if group is None else group.versions.get(record.version)
        if version is None:
            self._is_unsaved = True
            return
        name = (record.key_id, record.version)
        self._table[version.kek_id] = tally = _Tally(name, record.operations)
        tally.last_used = record.last_used_epoch_sec
        tally.last_used_by = record.last_used_by
        tally.trial = record.timed_disable
        self._encoded[name] = usage_file.encode_record(record)
        if tally.trial is not None and tally.trial.ended_epoch_sec is None:
            self.on_disk.add(name)
            if version.status is VersionStatus.DISABLED:
                self.running[name] = tally.trial
            else:
                # It was never disabled, or was enabled again: as nobody knows which, it says nothing about who needs it.
                tally.trial = None
                self._mark(tally)

    def count(self, kind: type[Request], request: Any, reply: Any, principal: Principal, began: float) -> None:
        """As `UsageCounter` has it. Spelled out for what is asked most: a method for each part would double its 0.25 us."""
        if kind is Encrypt:
            blob = reply.ciphertext
            start = blob[0] - 1
            kek = blob[start : start + blob[start] + 9]
            tally = self._table.get(kek) or self._new(kek)
            tally.encrypted += 1
        elif kind is Decrypt:
            blob = request.ciphertext
            start = blob[0] - 1
            kek = blob[start : start + blob[start] + 9]
            tally = self._table.get(kek) or self._new(kek)
            tally.decrypted += 1
        elif kind is GenerateDataKey or kind is GenerateDataKeyWithoutPlaintext:
            for other in reply.wrapped_data_keys or ():
                self._used_too(kek_id_of(other), principal).generated += 1
            kek = kek_id_of(reply.wrapped_data_key)
            tally = self._table.get(kek) or self._new(kek)
            tally.generated += 1
        elif kind is ReEncrypt:
            self._used_too(kek_id_of(request.ciphertext), principal).reencrypted_from += 1
            kek = kek_id_of(reply.ciphertext)
            tally = self._table.get(kek) or self._new(kek)
            tally.reencrypted_to += 1
        else:
            return
        if began >= self._look_again_at:
            self._now = int(self.clock())
            self._look_again_at = began + _CLOCK_SECONDS
        tally.last_used = self._now
        tally.last_used_by = principal.name
        if not tally.is_changed:
            self._mark(tally)

    def refused(self, served: Served) -> None:
        """As `UsageCounter` has it: counts who was refused a version that is disabled for a time."""
        if self.running and served.principal is not None and isinstance(served.error, DecryptionFailedError):
            request: Any = served.request
            self._count_refusal(request.ciphertext, served.principal.name)

    def _new(self, kek: bytes) -> _Tally:
        self._table[kek] = tally = _Tally((kek[1:-8].decode(), int.from_bytes(kek[-8:], "big")), Operations())
        return tally

    def _used_too(self, kek: bytes, principal: Principal) -> _Tally:
        """A version that a request uses besides another."""
        tally = self._table.get(kek) or self._new(kek)
        tally.last_used, tally.last_used_by = int(self.clock()), principal.name
        self._mark(tally)
        return tally

    def _mark(self, tally: _Tally) -> None:
        if not tally.is_changed:
            tally.is_changed = True
            self._changed.append(tally)

    def _of(self, name: VersionName) -> _Tally:
        kek = ciphertext.kek_id(*name)
        return self._table.get(kek) or self._new(kek)

    def _count_refusal(self, blob: bytes, principal: str) -> None:
        try:
            named = ciphertext.parse(blob)
        except DecryptionFailedError:
            # It names no version; the policy was not asked about one either.
            return
        name = (named.group, named.version)
        trial = self.running.get(name)
        if trial is None:
            return
        if principal not in trial.refused and len(trial.refused) >= MAX_REFUSED_NAMES:
            principal = OTHERS
        refusals = trial.refused.setdefault(principal, Refusals(0, 0))
        refusals.requests += 1
        refusals.last_epoch_sec = int(self.clock())
        self._mark(self._of(name))

    def of(self, version: KeyVersion) -> VersionUsage:
        """How `version` was used since it was counted, or since it was made if that is later."""
        usage = VersionUsage(since_epoch_sec=max(self._since, version.created_at), operations=Operations())
        tally = self._table.get(version.kek_id)
        if tally is not None:
            usage.operations = tally.operations()
            usage.last_used_epoch_sec = tally.last_used
            usage.last_used_by = tally.last_used_by
            usage.timed_disable = tally.trial
        return usage

    def begin(self, name: VersionName, trial: TimedDisable) -> Callable[[], None]:
        """From now on a version, which exists, is disabled for a time; returns what takes that back."""
        tally = self._of(name)
        before = tally.trial

        def take_back() -> None:
            del self.running[name]
            tally.trial = before
            self._mark(tally)

        self.running[name] = tally.trial = trial
        self._mark(tally)
        return take_back

    def move_end(self, name: VersionName, until: int) -> None:
        """What was begun ends then."""
        self.running[name].until_epoch_sec = until
        self._mark(self._of(name))

    def end(self, name: VersionName) -> TimedDisable:
        """What was begun is over; how it went. Raises `KeyError` when nothing was."""
        trial = self.running.pop(name)
        trial.ended_epoch_sec = int(self.clock())
        self._mark(self._of(name))
        return trial

    def resume(self, name: VersionName, trial: TimedDisable) -> None:
        """It is not over after all."""
        self.running[name] = trial
        trial.ended_epoch_sec = None
        self._mark(self._of(name))

    async def run(self) -> None:
        """Write the file whenever something has changed, until cancelled."""
        while True:
            await trio.sleep(USAGE_FLUSH_SECONDS)
            await self.flush()

    async def flush(self) -> None:
        """`save` if there is something to save. What fails is tried again next time, and said in the log once."""
        if not self._changed and not self._is_unsaved:
            return
        try:
            await self.save()
        except (OSError, MemoryShortError, KeystoreReplacedError) as error:
            # Not even where the keystore is another's by now: whoever has the newest keys in memory does not stop for this.
            why = str(error.strerror if isinstance(error, OSError) else error)
            if not self.trouble:
                log.warning("usage not saved to %s: %s; it goes on counting, and tries again", self._path, why)
            self.trouble = why
        except Exception as error:  # a bug, or no thread to be had: it must cost the figures, not the server
            log_bug("usage not saved", error)
        else:
            if self.trouble:
                log.info("usage is saved again")
            self.trouble = ""

    async def save(self) -> None:
        """Put all that is known on disk; durable when this returns.

        Raises `OSError`, `MemoryShortError`, and `KeystoreReplacedError`.
        """
        async with self._saving:
            running = set(self.running)
            await self._encode()
            # What has begun or ended while it was encoded may stand there either way.
            running |= self.running.keys()
            self.on_disk |= running
            records = tuple(self._encoded.values())
            # Until it is there, it has to be tried again, even if nothing changes any more.
            self._is_unsaved = True
            await in_thread(usage_file.write, self._path, self._since, records, self._look, limiter=_one_at_a_time)
            self._is_unsaved = False
            self.on_disk = running

    async def _encode(self) -> None:
        """All that has changed until now; what changes meanwhile is for the next time."""
        changed, self._changed = self._changed, []
        try:
            while changed:
                tally = changed.pop()
                tally.is_changed = False
                self._encoded[tally.name] = usage_file.encode_record(tally.record())
                if len(changed) % USAGE_SLICE == 0:
                    await trio.lowlevel.checkpoint()
        finally:
            self._changed += changed


_one_at_a_time: Final = trio.CapacityLimiter(math.inf)
"""Saving never waits for a thread that something else occupies; the table saves one at a time by itself."""


def load(path: Path) -> Document | None:
    """What the file at `path` says, or None when there is none that can be used. Blocking."""
    try:
        return usage_file.read(path)
    except InputMissingError:
        return None
    except KmsError as error:
        log.warning("usage is counted anew, and what was disabled for a time stays disabled: %s", error)
        return None

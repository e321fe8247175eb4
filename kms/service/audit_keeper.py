"""The audit log in a server: opened when one is to be kept, made durable, looked after, rotated and closed.

Records of the data plane are written before their replies are sent, and made durable within AUDIT_SYNC_INTERVAL: a power
cut may take those of the last second. A change of keys waits for the disk: nothing is saved before it is durably on record
as begun.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Final

import trio

from kms.core.audit import AuditKeys
from kms.core.keyring import KeyGroup, Mint
from kms.errors import KmsError, MemoryShortError, UnavailableError
from kms.limits import AUDIT_SYNC_INTERVAL
from kms.service.actor import KeyringStore
from kms.service.audit_settings import AuditSettings
from kms.service.audit_trail import AuditTrail
from kms.service.threads import in_thread
from kms.storage.audit_log import AuditLog

log: Final = logging.getLogger(__name__)


class AuditKeeper:
    """Keeps the audit log that `settings` ask for; `log` and `trail` are None as long as none is kept."""

    def __init__(self, settings: AuditSettings, keys: AuditKeys) -> None:
        """`keys` are not wiped here."""
        self.log: AuditLog | None = None
        self.trail: AuditTrail | None = None
        self._settings = settings
        self._keys = keys
        self._trouble = ""

    def open(self, generation: int, *, has_principals: bool) -> None:
        """Open the log if one is to be kept and is not open yet. Blocking; raises what `AuditLog` raises.

        `generation` is the keystore's.
        """
        settings = self._settings
        if self.log is not None or not settings.keeps(has_principals=has_principals):
            return
        self.log = AuditLog(settings.path, self._keys, generation=generation, accept_rollback=settings.accept_rollback)
        self.trail = AuditTrail(self.log, settings.data)
        for remark in self.log.remarks:
            log.warning("the audit log %s: %s", self.log.path, remark)

    async def run(self) -> None:
        """Make durable what was written, and look after the file, until cancelled."""
        while True:
            await trio.sleep(AUDIT_SYNC_INTERVAL)
            if self.log is not None:
                await self._look_after(self.log)

    def admitted(self, principals_sha256: str) -> None:
        """Put on record, durably, which file of principals decides from here on. Blocking.

        Where that cannot be done now it is as soon as it can: a right that was taken away must not come back for it.
        """
        if self.log is not None and self.trail is not None:
            self.trail.write_principals(principals_sha256)
            with contextlib.suppress(UnavailableError):
                self.log.sync()

    async def _look_after(self, audit_log: AuditLog) -> None:
        audit_log.check()
        self._write_repeats()
        # What it raises is in `trouble` then.
        with contextlib.suppress(UnavailableError):
            await _synced(audit_log)
        trouble = audit_log.trouble
        if trouble and not self._trouble:
            log.error("the audit log %s cannot be written: %s. Nothing is answered until it can", audit_log.path, trouble)
        elif self._trouble and not trouble:
            log.warning("the audit log %s can be written again", audit_log.path)
        self._trouble = trouble

    def _write_repeats(self) -> None:
        if self.trail is not None:
            self.trail.write_repeats()

    async def sync(self) -> None:
        """Make durable what is on record by now; raises `UnavailableError`."""
        if self.log is not None:
            await _synced(self.log)

    def reopen(self) -> str:
        """Go on in a new file if the log was renamed. Blocks for as long as the disk takes to finish the old one.

        Returns why that could not be done; empty when there is nothing to say.
        """
        if self.log is None:
            return ""
        self._write_repeats()
        try:
            if self.log.reopen():
                log.info("the audit log goes on in a new file %s", self.log.path)
        except KmsError as error:
            trouble = f"the audit log was not reopened: {error}"
            log.error("%s", trouble)  # noqa: TRY400 - the message says it all
            return trouble
        return ""

    def close(self) -> None:
        """Put on record that the server stops, and let go of the file."""
        if self.log is not None:
            if self.trail is not None:
                self.trail.write_repeats(is_last=True)
            self.log.close()
            if self.log.trouble:
                log.error("the audit log %s does not say that the server stopped: %s", self.log.path, self.log.trouble)


class AuditedStore:
    """A keyring store that saves nothing before what was begun is durably on record."""

    def __init__(self, store: KeyringStore, keeper: AuditKeeper) -> None:
        self._store = store
        self._keeper = keeper

    @property
    def mint(self) -> Mint:
        return self._store.mint

    def commit(self, expected_generation: int, changed: Sequence[KeyGroup]) -> None:
        """Raises `UnavailableError`, after which nothing was changed, or what the store raises."""
        audit_log = self._keeper.log
        if audit_log is not None:
            audit_log.sync()
        self._store.commit(expected_generation, changed)
        if audit_log is not None:
            audit_log.generation = expected_generation + 1

    def settle(self) -> None:
        self._store.settle()


async def _synced(audit_log: AuditLog) -> None:
    try:
        await in_thread(audit_log.sync)
    except MemoryShortError:
        # That everybody waits for the disk is better than a record that is not durable.
        audit_log.sync()

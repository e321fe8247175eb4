"""All that serves requests, put together: who connects gets a session of `pipeline`, and needs to know no more."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Final, Protocol

import trio

from kms.core.policy import AllowAll
from kms.core.provider import KeyringHolder, KeyringManager
from kms.limits import MAX_FRAME_BYTES, REFUSALS_INTERVAL
from kms.service.audit_keeper import AuditKeeper
from kms.service.handlers import Handlers
from kms.service.local_provider import LocalMasterKeyProvider
from kms.service.operator import Operator
from kms.service.pipeline import RequestPipeline
from kms.service.served import Observer
from kms.service.team import Access
from kms.service.threads import in_thread
from kms.service.trials import ScheduleAuthenticator, Trials
from kms.service.usage import Usage


class ServedKeyring(KeyringManager, KeyringHolder, Protocol):
    """What has the keyring and changes it: see `KeyringActor`."""

    async def run(self) -> None:
        """Make the changes that are asked for, until `close`."""
        ...

    def close(self) -> None:
        """Take no more of them. What was taken up is still finished."""
        ...


class Service:
    """The keyring, what is counted and recorded of its use, its schedule, and the pipelines in front of them.

    Made, it decides as `access` says and keeps no record; `admit` puts what is needed for that in force.
    """

    def __init__(
        self,
        keyring: ServedKeyring,
        keeper: AuditKeeper,
        usage: Usage,
        access: Access,
        *,
        observers: Sequence[Observer] = (),
        max_frame_bytes: int = MAX_FRAME_BYTES,
        version: str = "",
    ) -> None:
        """`observers` are told of every request; `max_frame_bytes` is what a request line may have."""
        self.operator: Final = Operator(version)
        """What is told of the server itself and how it reloads, to be put in."""
        self.keyring = keyring
        self.keeper = keeper
        self.access = access
        self._usage = usage
        self._trials = Trials(keyring, usage, keeper.sync)
        handlers = Handlers(
            LocalMasterKeyProvider(keyring),
            self._trials,
            self._trials,
            # A data key leaves in a reply, which is immutable: a buffer that can be wiped would only add a copy, and 13 us.
            random=os.urandom,
            max_frame_bytes=max_frame_bytes,
            operator=self.operator,
        )
        self.pipeline = RequestPipeline(
            handlers, access.authenticator, access.policy, observers, usage=usage, limits=access.limits
        )
        self.schedule = RequestPipeline(handlers, ScheduleAuthenticator(), AllowAll(), observers)
        """What the server asks of itself: it goes on record, too."""

    async def admit(self, access: Access) -> None:
        """From now on let `access` decide, and keep the audit log that is to be kept with it.

        Raises what `AuditKeeper.open` raises, after which all is as it was.
        """
        opening = partial(self.keeper.open, self.keyring.current.generation, has_principals=access.is_from_file)
        await in_thread(opening)
        self.keeper.admitted(access.sha256)
        self.access = access
        self.pipeline.admit(access.authenticator, access.policy, self.keeper.trail, access.limits)
        self.schedule.admit(self.schedule.authenticator, self.schedule.policy, self.keeper.trail)

    def start_core(self, nursery: trio.Nursery) -> None:
        """Start what every request rests on, which has to outlive the last of them: the keyring and the audit log."""
        nursery.start_soon(self.keyring.run)
        nursery.start_soon(self.keeper.run)

    def start_background(self, nursery: trio.Nursery) -> None:
        """Start what is done besides requests: usage and what was counted go to their files, and what is due is done."""
        nursery.start_soon(self._usage.run)
        nursery.start_soon(self._trials.run, self.schedule)
        nursery.start_soon(self._tell_repeats)

    async def _tell_repeats(self) -> None:
        while True:
            await trio.sleep(REFUSALS_INTERVAL)
            self.pipeline.tell_repeats()

    @property
    def usage_trouble(self) -> str:
        """Why what was counted cannot be written down; empty when it can."""
        return self._usage.trouble

    async def save_usage(self) -> None:
        """Write down what was counted until now."""
        await self._usage.flush()

    def take_no_more_changes(self) -> None:
        """Let the keyring end; a change that was taken up is still finished. Everything else goes on."""
        self.keyring.close()

    def close(self) -> None:
        """Put on record that the server stops, and wipe the keys of the keyring."""
        self.pipeline.tell_repeats()
        try:
            self.keeper.close()
        finally:
            self._wipe()

    def _wipe(self) -> None:
        for key in self.keyring.current.live_keys():
            key.wipe()

"""All that serves requests, put together: who connects gets a session of `pipeline`, and needs to know no more."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import trio

from kms.core.policy import AllowAll
from kms.core.provider import KeyringManager
from kms.limits import KEY_BYTES, MAX_FRAME_BYTES
from kms.service.audit_keeper import AuditKeeper
from kms.service.handlers import Handlers
from kms.service.local_provider import KeyringHolder, LocalMasterKeyProvider
from kms.service.pipeline import RequestPipeline
from kms.service.served import Observer
from kms.service.team import Access
from kms.service.trials import ScheduleAuthenticator, Trials
from kms.service.usage import Usage


class ServedKeyring(KeyringManager, KeyringHolder, Protocol):
    """What has the keyring and changes it: the actor, or what stands in its place for a keyring that several share."""

    async def run(self) -> None:
        """Make the changes that are asked for, until `close`."""
        ...

    def close(self) -> None:
        """Take no more of them."""
        ...


class Service:
    """The keyring, what is counted and recorded of its use, its schedule, and the pipelines in front of them."""

    def __init__(
        self,
        keyring: ServedKeyring,
        keeper: AuditKeeper,
        usage: Usage,
        access: Access,
        *,
        observers: Sequence[Observer] = (),
        max_frame_bytes: int = MAX_FRAME_BYTES,
    ) -> None:
        """`observers` are told of every request; `max_frame_bytes` is what a request line may have."""
        self.keyring = keyring
        self.keeper = keeper
        self.access = access
        self._usage = usage
        self._trials = Trials(keyring, usage, keeper.sync)
        # A data key leaves in a reply, which is immutable: a buffer that can be wiped would only add a copy, and 13 us.
        new_data_key = partial(os.urandom, KEY_BYTES)
        handlers = Handlers(
            LocalMasterKeyProvider(keyring),
            self._trials,
            self._trials,
            new_data_key=new_data_key,
            max_frame_bytes=max_frame_bytes,
        )
        self.pipeline = RequestPipeline(handlers, access.authenticator, access.policy, observers, keeper.trail, usage)
        self.schedule = RequestPipeline(handlers, ScheduleAuthenticator(), AllowAll(), observers, keeper.trail)
        """What the server asks of itself: it goes on record, too."""

    def open_audit_log(self, access: Access) -> None:
        """Open the audit log if one is to be kept with `access` and is not open yet. Blocking; raises what it raises."""
        self.keeper.open(self.keyring.current.generation, has_principals=access.is_from_file)

    def admit(self, access: Access) -> None:
        """From now on let `access` decide, and keep the record that is open."""
        self.access = access
        self.pipeline.admit(access.authenticator, access.policy, self.keeper.trail)
        self.schedule.admit(self.schedule.authenticator, self.schedule.policy, self.keeper.trail)

    def start_keeping(self, nursery: trio.Nursery) -> None:
        """Start what every request rests on: it has to outlive the last of them."""
        nursery.start_soon(self.keyring.run)
        nursery.start_soon(self.keeper.run)

    def start_upkeep(self, nursery: trio.Nursery) -> None:
        """Start what is done besides requests: usage goes to its file, and what is due is done."""
        nursery.start_soon(self._usage.run)
        nursery.start_soon(self._trials.run, self.schedule)

    async def flush(self) -> None:
        """Write down what was counted until now."""
        await self._usage.flush()

    def stop(self) -> None:
        """Take no more changes of keys; those that wait are still made."""
        self.keyring.close()

    def close(self) -> None:
        """Put on record that the server stops, and wipe every key."""
        self.keeper.close()
        for key in self.keyring.current.live_keys():
            key.wipe()

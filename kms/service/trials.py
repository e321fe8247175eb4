"""Versions that are disabled for a time: the safe way to find out who still needs a key.

`Trials` stands between the handlers and whatever manages the keyring. The rules:

- a version is disabled for a time only from ENABLED: whoever may disable may also take back what that did, and nothing
  else. One that is DISABLED already was disabled by somebody who did not say for how long;
- its end is durable before it is disabled. A crash in between leaves an end for a version that is enabled, which is
  dropped at the next start; a crash after it, a version that is enabled when its time has come, or at the start when
  that has passed;
- whoever enables, disables or destroys it before its time ends that. That it was disabled for good is answered only
  once the file no longer says otherwise;
- its end is an EnableVersion like any other, asked for by the principal `(schedule)`: it is authorized, logged and
  recorded on the same way. One that fails is tried again every TIMED_DISABLE_RETRY_SECONDS;
- meanwhile each Decrypt and ReEncrypt is counted that names the version, was allowed to its principal, and failed.

Only versions with such an end pass through its lock; all others share saves as if it were not there.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NoReturn

import msgspec
import trio

from kms.core.keyring import DisableVersion, KeyGroup, Keyring, KeySlot, KeyVersion, transition
from kms.core.policy import Plane, Principal
from kms.core.provider import KeyringManager, Permit
from kms.core.usage import TimedDisable, VersionUsage
from kms.errors import (
    InternalError,
    InvalidRequestError,
    KeystoreReplacedError,
    KmsError,
    LimitExceededError,
    MemoryShortError,
    WireError,
)
from kms.limits import MAX_TIMED_DISABLES, TIMED_DISABLE_RETRY_SECONDS
from kms.service.authentication import Authenticator
from kms.service.pipeline import RequestPipeline, Session
from kms.service.served import Peer
from kms.service.usage import Usage, VersionName
from kms.wire.messages import DetailReply, EnableVersion, ErrorReply, encode

log: Final = logging.getLogger(__name__)

SCHEDULE: Final = Principal("(schedule)")
"""Who asks for the end of a timed disable. No principal of a file can have this name."""

_LONGEST_SLEEP: Final = 60.0
"""The wall clock may be set while it sleeps."""


class Trials:
    """The `KeyringManager` of the handlers, over another one, and their `UsageKeeper`."""

    def __init__(self, manager: KeyringManager, usage: Usage, sync_record: Callable[[], Awaitable[None]]) -> None:
        """`sync_record` makes durable what is on record, and raises `UnavailableError` when that cannot be done."""
        self._manager = manager
        self._usage = usage
        self._sync_record = sync_record
        self._lock = trio.Lock()
        self._changed = trio.Event()

    async def create_group(self, group: str, permit: Permit) -> KeyGroup:
        return await self._manager.create_group(group, permit)

    async def rotate_group(self, group: str, permit: Permit) -> KeyGroup:
        return await self._manager.rotate_group(group, permit)

    async def disable_version(self, group: str, version: int, permit: Permit, *, for_a_time: bool = False) -> KeyGroup:
        name = (group, version)
        if for_a_time or not self._is_tied(name):
            return await self._manager.disable_version(group, version, permit, for_a_time=for_a_time)
        async with self._lock:
            disabled = await self._manager.disable_version(group, version, permit)
            trial = self._usage.end(name) if name in self._usage.running else None
            try:
                await self._save()
            except WireError as error:
                if trial is None:
                    raise error.of_unknown_outcome() from None
                self._usage.resume(name, trial)
                self._changed.set()
                raise
            if trial is not None:
                _report(name, trial, "stays disabled")
            return disabled

    async def enable_version(self, group: str, version: int, permit: Permit) -> KeyGroup:
        name = (group, version)
        if not self._is_tied(name):
            return await self._manager.enable_version(group, version, permit)
        async with self._lock:
            enabled = await self._manager.enable_version(group, version, permit)
            await self._end(name, "is enabled again")
            return enabled

    async def destroy_version(self, group: str, version: int, permit: Permit) -> KeyGroup:
        name = (group, version)
        if not self._is_tied(name):
            return await self._manager.destroy_version(group, version, permit)
        async with self._lock:
            destroyed = await self._manager.destroy_version(group, version, permit)
            await self._end(name, "is destroyed")
            return destroyed

    def list_groups(self) -> Sequence[KeyGroup]:
        return self._manager.list_groups()

    def find_group(self, group: str) -> KeyGroup | None:
        return self._manager.find_group(group)

    def usage_of(self, version: KeyVersion) -> VersionUsage:
        return self._usage.of(version)

    async def disable_version_for(
        self, group: str, version: int, seconds: int, permit: Permit, *, by: str, most: int | None = None
    ) -> int:
        name = (group, version)
        async with self._lock:
            now = self._usage.clock()
            until = math.ceil(now) + seconds
            if name in self._usage.running:
                await self._move_end(name, until, permit)
            else:
                self._check_room(by, most)
                await self._begin(name, TimedDisable(by, int(now), until), permit)
        self._changed.set()
        return until

    async def _move_end(self, name: VersionName, until: int, permit: Permit) -> None:
        permit()
        before = self._usage.running[name].until_epoch_sec
        self._usage.move_end(name, until)
        try:
            await self._save()
        except WireError:
            self._usage.move_end(name, before)
            raise

    def _check_room(self, by: str, most: int | None) -> None:
        running = self._usage.running
        if len(running) >= MAX_TIMED_DISABLES:
            raise InvalidRequestError(f"forSeconds: there are {MAX_TIMED_DISABLES} versions disabled for a time already")
        if most is not None and sum(trial.by == by for trial in running.values()) >= most:
            raise LimitExceededError(f"{most} versions disabled for a time at once: the limit timed_disables of {by}")

    async def _begin(self, name: VersionName, trial: TimedDisable, permit: Permit) -> None:
        group, number = name
        found = self._manager.find_group(group)
        # What the rules refuse needs no write; they are asked again when it is taken up.
        known = Keyring(0, {} if found is None else {group: found})
        transition(known, DisableVersion(group, number, for_a_time=True), now=trial.since_epoch_sec, mint=_no_key)
        take_back = self._usage.begin(name, trial)
        try:
            await self._save()
            await self._manager.disable_version(group, number, permit, for_a_time=True)
        except KmsError:
            # Not when it is cancelled: it may be disabled all the same, and then has to have its end.
            take_back()
            raise

    async def _end(self, name: VersionName, how: str) -> None:
        if name in self._usage.running:
            _report(name, self._usage.end(name), how)
        # If it fails, the version stays tied, and whoever disables it for good waits for the next try.
        await self._usage.flush()

    async def _save(self) -> None:
        # An end that is moved or dropped is a change like one of the keyring: on record before it is made.
        await self._sync_record()
        try:
            await self._usage.save()
        except (OSError, MemoryShortError, KeystoreReplacedError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            log.error("the end of a timed disable could not be saved: %s", why)  # noqa: TRY400 - it says it all
            raise InternalError("the end of a timed disable could not be saved; nothing was changed") from None

    def _is_tied(self, name: VersionName) -> bool:
        """Whether a version has an end, or has one by what the file says."""
        return name in self._usage.running or name in self._usage.on_disk

    async def run(self, pipeline: RequestPipeline) -> None:
        """End each timed disable when its time has come, through `pipeline`, until cancelled."""
        session = pipeline.session(Peer(0, "internal"))
        retry_at: dict[VersionName, float] = {}
        while True:
            self._changed = trio.Event()
            running = self._usage.running
            retry_at = {name: at for name, at in retry_at.items() if name in running}
            now = self._usage.clock()
            due = [name for name, trial in running.items() if max(trial.until_epoch_sec, retry_at.get(name, 0)) <= now]
            for name in due:
                # Shielded: it is not known to be over otherwise, though the actor finishes what it has taken up.
                with trio.CancelScope(shield=True):
                    error = await _enable(session, name)
                if error is not None:
                    if name not in retry_at:
                        log.error(
                            "%r v%d cannot be enabled again yet, its time is over: %s; it is tried again", *name, error
                        )
                    retry_at[name] = self._usage.clock() + TIMED_DISABLE_RETRY_SECONDS
            if due:
                continue
            if not running:
                await self._changed.wait()
                continue
            next_end = min(max(trial.until_epoch_sec, retry_at.get(name, 0)) for name, trial in running.items())
            with trio.move_on_after(min(next_end - now, _LONGEST_SLEEP)):
                await self._changed.wait()


async def _enable(session: Session, name: VersionName) -> str | None:
    """Ask for it as a client would; why it was refused, or None."""
    group, version = name
    later = session.serve(encode(EnableVersion(key_id=group, version=version)))
    answer = later if isinstance(later, bytes) else await later()
    if not isinstance(answer, bytes):
        raise TypeError("to enable a version is not answered at length")
    instead = session.commit()
    reply = _replies.decode(answer if instead is None else instead)
    return reply.message if isinstance(reply, ErrorReply) else None


_replies: Final = msgspec.json.Decoder(DetailReply | ErrorReply)


class ScheduleAuthenticator(Authenticator):
    """Who asks through the pipeline of the schedule is the schedule. No socket leads there."""

    def __init__(self) -> None:
        pass

    def authenticate(self, plane: Plane, token: str, peer: Peer) -> Principal:
        return SCHEDULE


def _no_key(slot: KeySlot) -> NoReturn:
    raise AssertionError("to disable a version makes no key")


def _report(name: VersionName, trial: TimedDisable, how: str) -> None:
    who = ", ".join(f"{principal} ({refusals.requests} requests)" for principal, refusals in trial.refused.items())
    lasted = int(trial.ended_epoch_sec or 0) - trial.since_epoch_sec
    level = logging.WARNING if trial.refused else logging.INFO
    log.log(level, "%r v%d %s after %d s; refused meanwhile: %s", *name, how, lasted, who or "nobody")

"""The keyring actor: the only writer.

Mutations arrive on a zero-capacity channel, are applied to the current keyring as pure functions, and are saved by
one thread call; `current` changes only after the save is durable, with no checkpoint in between. Capacity 0 makes
cancellation exact: cancelled while it is being sent, a command never ran; cancelled while it waits for its answer, it
completes all the same.

Commands that arrive while a save runs share the next one (group commit). Each still gets its own answer: one that the
rules refuse does not spoil its neighbours.

Whoever asked may have lost the right to while the command waited, so its `permit` is called when the command is taken
up. From there to the save nothing waits: a right taken away later comes too late for this one change.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Final, Protocol

import trio

from kms.core.keyring import (
    Command,
    CreateGroup,
    DestroyVersion,
    DisableVersion,
    EnableVersion,
    KeyGroup,
    Keyring,
    Mint,
    RotateGroup,
    transition,
)
from kms.core.provider import Permit
from kms.errors import (
    InternalError,
    KeystoreReplacedError,
    KmsError,
    MemoryShortError,
    SaveFailedError,
    SaveOutcomeUnknownError,
    UnavailableError,
)
from kms.limits import GROUP_COMMIT_MAX
from kms.service.threads import in_thread

log: Final = logging.getLogger(__name__)


class KeyringStore(Protocol):
    """Where the actor saves, and what makes its keys."""

    @property
    def mint(self) -> Mint: ...

    def commit(self, expected_generation: int, changed: Sequence[KeyGroup]) -> None:
        """Put the groups that differ in the place of what the generation before had; blocking and durable.

        `changed` are whole groups, new ones at the end; the generation is `expected_generation + 1` afterwards. Raises
        `SaveFailedError` or `UnavailableError` when nothing was changed, `SaveOutcomeUnknownError` when it may have been,
        `KeystoreReplacedError` when what is there is not this server's any more.
        """
        ...

    def settle(self) -> None:
        """Nothing more is committed: leave what there is as it is best kept. Blocking; what fails is no failure."""
        ...


class _Submission:
    """A command under way, and in the end its answer."""

    __slots__ = ("answer", "command", "done", "permit")

    def __init__(self, command: Command, permit: Permit) -> None:
        self.command = command
        self.permit = permit
        self.done = trio.Event()
        self.answer: KeyGroup | KmsError = InternalError("the server stopped before this was done")


class KeyringActor:
    """Serializes all mutations. It is the `KeyringManager` of the handlers, and `current` is what readers read."""

    def __init__(self, keyring: Keyring, store: KeyringStore, *, clock: Callable[[], int]) -> None:
        """`clock` returns whole seconds since 1970."""
        self.current = keyring
        self._store = store
        self._clock = clock
        self._send, self._receive = trio.open_memory_channel[_Submission](0)

    async def create_group(self, group: str, permit: Permit) -> KeyGroup:
        return await self._submit(CreateGroup(group), permit)

    async def rotate_group(self, group: str, permit: Permit) -> KeyGroup:
        return await self._submit(RotateGroup(group), permit)

    async def disable_version(self, group: str, version: int, permit: Permit, *, for_a_time: bool = False) -> KeyGroup:
        return await self._submit(DisableVersion(group, version, for_a_time), permit)

    async def enable_version(self, group: str, version: int, permit: Permit) -> KeyGroup:
        return await self._submit(EnableVersion(group, version), permit)

    async def destroy_version(self, group: str, version: int, permit: Permit) -> KeyGroup:
        return await self._submit(DestroyVersion(group, version), permit)

    def list_groups(self) -> Sequence[KeyGroup]:
        return tuple(self.current.groups.values())

    def find_group(self, group: str) -> KeyGroup | None:
        return self.current.groups.get(group)

    def close(self) -> None:
        """Take no more commands. What was taken is still finished; `run` returns after it."""
        self._send.close()

    async def run(self) -> None:
        """Serve until `close`.

        Raises `SaveOutcomeUnknownError` or `KeystoreReplacedError`, after which nothing may be answered any more.

        Shielded: a cancelled server must not cancel a save whose client was promised an answer.
        """
        with trio.CancelScope(shield=True):
            async with self._receive:
                async for first in self._receive:
                    await self._commit(self._batch(first))
            with contextlib.suppress(MemoryShortError):
                await in_thread(self._store.settle, limiter=_one_at_a_time)

    async def _submit(self, command: Command, permit: Permit) -> KeyGroup:
        submission = _Submission(command, permit)
        try:
            await self._send.send(submission)
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            raise InternalError("the server is stopping") from None
        await submission.done.wait()
        if isinstance(submission.answer, KmsError):
            raise submission.answer
        return submission.answer

    def _batch(self, first: _Submission) -> list[_Submission]:
        batch = [first]
        while len(batch) < GROUP_COMMIT_MAX:
            try:
                batch.append(self._receive.receive_nowait())
            except (trio.WouldBlock, trio.EndOfChannel):
                break
        return batch

    async def _commit(self, batch: list[_Submission]) -> None:
        try:
            await self._apply_and_save(batch)
        finally:
            for submission in batch:
                submission.done.set()

    async def _apply_and_save(self, batch: list[_Submission]) -> None:
        # One copy for the whole batch, not one for each command: of 10,000 groups it takes 0.3 ms of the event loop.
        groups = dict(self.current.groups)
        draft = Keyring(self.current.generation, groups)
        applied: list[_Submission] = []
        now = self._clock()
        for submission in batch:
            try:
                submission.permit()
                group = transition(draft, submission.command, now=now, mint=self._store.mint)
            except KmsError as error:
                submission.answer = error
            else:
                submission.answer = groups[group.key_id] = group
                applied.append(submission)
        # In the order in which they were asked for, which is the one of new groups.
        touched = dict.fromkeys(submission.command.group for submission in applied)
        changed = [groups[name] for name in touched if groups[name] is not self.current.groups.get(name)]
        if not changed:
            return
        saved = draft.next_generation()
        try:
            await in_thread(self._store.commit, self.current.generation, changed, limiter=_one_at_a_time)
        except KmsError as error:
            for submission in applied:
                submission.answer = _answer_to_all(error)
            log.error("%s", error)  # noqa: TRY400 - the message says it all; a traceback belongs to a bug
            _wipe_dropped(touched.keys(), saved, self.current)
            if isinstance(error, (SaveOutcomeUnknownError, KeystoreReplacedError)):
                raise
            return
        except BaseException:
            for submission in applied:
                submission.answer = InternalError("internal error").of_unknown_outcome()
            raise
        previous, self.current = self.current, saved
        # Nothing but a destroyed version drops a key; to look through all others took 60 us for each rotation.
        destroyed = {done.command.group for done in applied if isinstance(done.command, DestroyVersion)}
        _wipe_dropped(destroyed, previous, saved)


def _answer_to_all(error: KmsError) -> KmsError:
    """What each client is told whose command was to be in the save that raised `error`."""
    if isinstance(error, UnavailableError):
        return error
    if isinstance(error, (SaveFailedError, MemoryShortError)):
        return InternalError("the keystore could not be saved; nothing was changed")
    if isinstance(error, KeystoreReplacedError):
        return InternalError("the keystore is not this server's any more; nothing was changed, and it stops")
    return InternalError("the outcome of the save is unknown; the server stops").of_unknown_outcome()


_one_at_a_time: Final = trio.CapacityLimiter(math.inf)
"""Saving never waits for a thread that something else occupies; the actor itself runs one at a time."""


def _wipe_dropped(groups: AbstractSet[str], before: Keyring, after: Keyring) -> None:
    """Wipe each key that `before` had and `after` has not: of destroyed versions, or of mutations that were not saved.

    `groups` are the names of those that may differ.
    """
    for name in groups & before.groups.keys():
        kept = after.groups.get(name)
        for number, version in before.groups[name].versions.items():
            other = None if kept is None else kept.versions.get(number)
            if version.key is not None and (other is None or other.key is not version.key):
                version.key.wipe()

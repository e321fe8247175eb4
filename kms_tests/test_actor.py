"""The keyring actor: what is answered is durable, what is not saved did not happen."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from kms.core.kek import Kek
from kms.core.keyring import EMPTY, KeyGroup, Keyring, KeySlot, NewKey, VersionStatus
from kms.core.secret import Secret
from kms.errors import (
    DecryptionFailedError,
    InternalError,
    InvalidRequestError,
    SaveFailedError,
    SaveOutcomeUnknownError,
    UnavailableError,
)
from kms.service.actor import KeyringActor
from kms_tests.keks import opened, sealed


class Store:
    """A store in memory that can be told to fail, and that can be held in the middle of a save."""

    def __init__(self) -> None:
        self.saved: list[Keyring] = []
        self.minted: list[Kek] = []
        self.failure: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.saving = threading.Event()
        self.is_settled = False

    def mint(self, slot: KeySlot) -> NewKey:
        key = Kek(Secret(bytearray(32)))
        self.minted.append(key)
        return NewKey(key, b"wrapped")

    def commit(self, expected_generation: int, changed: Sequence[KeyGroup]) -> None:
        self.saving.set()
        assert self.gate.wait(10)
        if self.failure is not None:
            raise self.failure
        before = self.saved[-1] if self.saved else EMPTY
        assert before.generation == expected_generation
        groups = {**before.groups, **{group.key_id: group for group in changed}}
        self.saved.append(Keyring(expected_generation + 1, groups))

    def settle(self) -> None:
        self.is_settled = True


def permitted() -> None:
    """A permit that is never withdrawn."""


@asynccontextmanager
async def running(store: Store, clock: Callable[[], int] = lambda: 7) -> AsyncIterator[KeyringActor]:
    actor = KeyringActor(EMPTY, store, clock=clock)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(actor.run)
        yield actor
        actor.close()


async def in_the_middle_of_a_save(store: Store) -> None:
    await trio.to_thread.run_sync(store.saving.wait)


async def test_a_mutation_is_published_and_answered_after_its_save() -> None:
    store = Store()
    async with running(store) as actor:
        group = await actor.create_group("a", permitted)
        assert actor.current == store.saved[-1]
        assert actor.current.groups["a"] is group
        assert (group.created_at, actor.current.generation) == (7, 1)


async def test_nothing_is_published_while_the_save_runs() -> None:
    store = Store()
    async with running(store) as actor, trio.open_nursery() as nursery:
        store.gate.clear()
        nursery.start_soon(actor.create_group, "a", permitted)
        await in_the_middle_of_a_save(store)
        assert actor.current is EMPTY
        store.gate.set()


async def test_mutations_that_wait_share_one_save() -> None:
    store = Store()
    async with running(store) as actor:
        async with trio.open_nursery() as nursery:
            store.gate.clear()
            nursery.start_soon(actor.create_group, "first", permitted)
            await in_the_middle_of_a_save(store)
            for number in range(20):
                nursery.start_soon(actor.create_group, f"g{number}", permitted)
            await trio.testing.wait_all_tasks_blocked()
            store.gate.set()
        assert len(store.saved) == 2
        assert len(actor.current.groups) == 21


async def test_a_refused_mutation_does_not_spoil_its_neighbours() -> None:
    store = Store()
    refused: list[str] = []

    async with running(store) as actor:

        async def create(name: str) -> None:
            try:
                await actor.create_group(name, permitted)
            except InvalidRequestError:
                refused.append(name)

        async with trio.open_nursery() as nursery:
            for name in ("a", "!", "b", "a"):
                nursery.start_soon(create, name)
        assert sorted(refused) == ["!", "a"]
        assert set(actor.current.groups) == {"a", "b"}


async def test_a_mutation_that_changes_nothing_saves_nothing() -> None:
    store = Store()
    async with running(store) as actor:
        await actor.create_group("a", permitted)
        await actor.enable_version("a", 1, permitted)
        assert len(store.saved) == 1


async def test_a_failed_save_leaves_the_old_keyring_and_the_next_mutation_tries_afresh() -> None:
    store = Store()
    async with running(store) as actor:
        await actor.create_group("a", permitted)
        before = actor.current
        store.failure = SaveFailedError("no space")
        with pytest.raises(InternalError, match="nothing was changed"):
            await actor.rotate_group("a", permitted)
        assert actor.current is before
        with pytest.raises(DecryptionFailedError):  # the key of the mutation that did not happen is wiped
            sealed(store.minted[-1])
        store.failure = None
        assert (await actor.rotate_group("a", permitted)).active.version == 2


async def test_what_cannot_be_put_on_record_is_not_saved_and_says_so() -> None:
    store = Store()
    async with running(store) as actor:
        store.failure = UnavailableError("the audit log cannot be written")
        with pytest.raises(UnavailableError, match="the audit log cannot be written"):
            await actor.create_group("a", permitted)
        assert actor.current is EMPTY
        store.failure = None
        await actor.create_group("a", permitted)


async def test_a_save_of_unknown_outcome_stops_the_actor_and_answers_no_ok() -> None:
    store = Store()
    answers: list[BaseException] = []

    async def create(actor: KeyringActor) -> None:
        try:
            await actor.create_group("a", permitted)
        except InternalError as error:
            answers.append(error)

    store.failure = SaveOutcomeUnknownError("directory not synced")
    actor = KeyringActor(EMPTY, store, clock=lambda: 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(create, actor)
        with pytest.raises(SaveOutcomeUnknownError):
            await actor.run()
    assert "unknown" in str(answers[0])
    assert actor.current is EMPTY


async def test_a_bug_in_a_save_is_not_answered_with_ok() -> None:
    store = Store()
    store.failure = RuntimeError("a bug")
    actor = KeyringActor(EMPTY, store, clock=lambda: 0)
    async with trio.open_nursery() as nursery:

        async def create() -> None:
            with pytest.raises(InternalError):
                await actor.create_group("a", permitted)

        nursery.start_soon(create)
        with pytest.raises(RuntimeError):
            await actor.run()


async def test_a_client_that_dies_while_its_mutation_is_saved_neither_cancels_nor_tears_it() -> None:
    store = Store()
    async with running(store) as actor:
        store.gate.clear()
        async with trio.open_nursery() as client:
            client.start_soon(actor.create_group, "a", permitted)
            await in_the_middle_of_a_save(store)
            client.cancel_scope.cancel()
        store.gate.set()
        await actor.create_group("b", permitted)
        assert set(store.saved[-1].groups) == {"a", "b"}


async def test_a_mutation_cancelled_while_it_is_being_sent_never_ran() -> None:
    store = Store()
    async with running(store) as actor:
        store.gate.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(actor.create_group, "a", permitted)
            await in_the_middle_of_a_save(store)
            with trio.move_on_after(0.01):
                await actor.create_group("never", permitted)
            store.gate.set()
        await actor.create_group("b", permitted)
        assert set(actor.current.groups) == {"a", "b"}


async def test_what_was_taken_is_finished_after_the_server_is_cancelled() -> None:
    store = Store()
    actor = KeyringActor(EMPTY, store, clock=lambda: 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(actor.run)
        nursery.start_soon(actor.create_group, "a", permitted)
        store.gate.clear()
        await in_the_middle_of_a_save(store)
        nursery.cancel_scope.cancel()
        store.gate.set()
        actor.close()
    assert set(actor.current.groups) == {"a"}


async def test_after_close_a_mutation_is_refused() -> None:
    async with running(Store()) as actor:
        actor.close()
        with pytest.raises(InternalError, match="stopping"):
            await actor.create_group("a", permitted)


async def test_a_destroyed_key_is_wiped_only_after_the_save() -> None:
    store = Store()
    async with running(store) as actor:
        await actor.create_group("a", permitted)
        await actor.rotate_group("a", permitted)
        key = actor.current.groups["a"].versions[1].key
        assert key is not None
        blob = sealed(key)
        store.failure = SaveFailedError("no space")
        with pytest.raises(InternalError):
            await actor.destroy_version("a", 1, permitted)
        assert opened(key, blob) == b"x", "the destruction did not happen, so the key must still be there"
        store.failure = None
        await actor.destroy_version("a", 1, permitted)
        assert actor.list_groups()[0].versions[1].status is VersionStatus.DESTROYED
        with pytest.raises(DecryptionFailedError):
            opened(key, blob)


async def test_a_version_disabled_and_enabled_keeps_its_key() -> None:
    store = Store()
    async with running(store) as actor:
        await actor.create_group("a", permitted)
        await actor.rotate_group("a", permitted)
        key = actor.current.groups["a"].versions[1].key
        await actor.disable_version("a", 1, permitted)
        await actor.enable_version("a", 1, permitted)
        assert actor.current.groups["a"].versions[1].key is key
        assert key is not None
        sealed(key)

"""Versions that are disabled for a time: their end comes, survives, is durable first, and never undoes what was asked."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from kms.core.keyring import VersionStatus
from kms.core.policy import AllowAll, Operation
from kms.core.usage import TimedDisable
from kms.errors import InternalError, SaveFailedError, UnavailableError
from kms.limits import MAX_TIMED_DISABLE_SECONDS, TIMED_DISABLE_RETRY_SECONDS
from kms.service import trials as trials_module
from kms.service.audit_settings import DataAudit
from kms.service.audit_trail import AuditTrail
from kms.service.handlers import Handlers
from kms.service.local_provider import LocalMasterKeyProvider
from kms.service.pipeline import RequestPipeline
from kms.service.trials import ScheduleAuthenticator, Trials
from kms.service.usage import Usage
from kms_tests.in_memory import ADMIN, API, PEER, Only, Server, answered
from kms_tests.test_audit_trail import Log

START = 1_800_000_000
NAME = ("default", 1)


class World(Server):
    """A server with a version 1 that is ENABLED, and a clock that the test moves. What happens, in order, is `events`."""

    def __init__(self) -> None:
        super().__init__()
        self.set_back = trio.current_time()
        self.events: list[str] = []
        self.disk_fails = False
        self.record_fails = False
        self.log = Log()
        self.usage = Usage(self.manager.current, None, Path("/nowhere/usage"), self.clock)
        self.usage.save = self.save  # type: ignore[method-assign]
        self.trials = Trials(self.manager, self.usage, self.sync_record)
        provider = LocalMasterKeyProvider(self.manager)
        handlers = Handlers(provider, self.trials, self.trials, random=bytes)
        trail = AuditTrail(self.log, DataAudit.ALL)
        authenticator = self.pipeline.authenticator
        self.pipeline = RequestPipeline(handlers, authenticator, AllowAll(), trail=trail, usage=self.usage)
        self.schedule = RequestPipeline(handlers, ScheduleAuthenticator(), AllowAll(), trail=trail)
        apply = self.manager._apply

        def applied(command: Any) -> Any:
            group = apply(command)
            self.events.append(type(command).__name__)
            return group

        self.manager._apply = applied  # type: ignore[method-assign]

    def clock(self) -> float:
        return START + round(trio.current_time() - self.set_back, 3)

    async def save(self) -> None:
        # Twice: so that all others have had their turn meanwhile, in whatever order.
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        if self.disk_fails:
            raise OSError(28, "No space left on device")
        self.events.append("usage saved")
        self.usage.on_disk = set(self.usage.running)

    async def sync_record(self) -> None:
        if self.record_fails:
            raise UnavailableError("the audit log cannot be written: no space left")

    async def wire(self, kind: str, token: str = ADMIN, **fields: Any) -> dict[str, Any]:
        session = self.pipeline.session(PEER)
        answer = session.serve(json.dumps({"type": kind, "token": token, **fields}).encode())
        reply = await answered(answer)
        instead = session.commit()
        return dict(json.loads(reply if instead is None else instead))

    async def change(self, kind: str, version: int = 1, **fields: Any) -> dict[str, Any]:
        return await self.wire(kind, keyId="default", version=version, **fields)

    async def disable_for(self, seconds: int, version: int = 1) -> dict[str, Any]:
        return await self.change("DisableVersion", version, forSeconds=seconds)

    async def refused(self, sealed: str) -> bool:
        return (await self.wire("Decrypt", API, ciphertext=sealed)).get("errorCode") == "DecryptionFailed"

    def status(self, version: int = 1) -> VersionStatus:
        return self.manager.current.groups["default"].versions[version].status

    def trial(self, version: int = 1) -> TimedDisable | None:
        return self.usage.of(self.manager.current.groups["default"].versions[version]).timed_disable


@pytest.fixture
async def world() -> World:
    world = World()
    await world.wire("RotateKeyGroup", keyId="default")
    world.events.clear()
    world.log.records.clear()
    return world


@pytest.fixture
async def running(world: World, nursery: trio.Nursery) -> World:
    """With its schedule at work."""
    nursery.start_soon(world.trials.run, world.schedule)
    await wait_all_tasks_blocked()
    return world


async def test_a_version_is_disabled_until_its_time_is_over_and_then_enabled_again(
    running: World, autojump_clock: MockClock
) -> None:
    reply = await running.disable_for(60)
    assert reply["untilEpochSec"] == START + 60
    assert running.status() is VersionStatus.DISABLED
    await trio.sleep(59.5)
    assert running.status() is VersionStatus.DISABLED
    await trio.sleep(1.5)
    assert running.status() is VersionStatus.ENABLED
    assert running.usage.running == {}
    trial = running.trial()
    assert trial is not None
    assert (trial.by, trial.since_epoch_sec, trial.ended_epoch_sec) == ("admin", START, START + 60)


async def test_its_end_is_durable_before_it_is_disabled(world: World, autojump_clock: MockClock) -> None:
    await world.disable_for(60)
    assert world.events == ["usage saved", "DisableVersion"]


async def test_one_whose_end_cannot_be_saved_is_not_disabled(
    world: World, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    world.disk_fails = True
    assert (await world.disable_for(60))["errorCode"] == "InternalError"
    assert world.status() is VersionStatus.ENABLED
    assert world.usage.running == {}
    assert world.trial() is None
    assert "No space left on device" in caplog.text


async def test_one_that_could_not_be_disabled_has_no_end(world: World, autojump_clock: MockClock) -> None:
    world.manager.fault = InternalError("the keystore could not be saved; nothing was changed")
    assert (await world.disable_for(60))["errorCode"] == "InternalError"
    assert world.usage.running == {}
    assert world.trial() is None


async def test_an_end_that_comes_sooner_than_those_known_is_not_slept_through(
    running: World, autojump_clock: MockClock
) -> None:
    await running.wire("RotateKeyGroup", keyId="default")
    await running.disable_for(3600, version=2)
    await trio.sleep(1)
    await running.disable_for(10)
    await trio.sleep(11)
    assert (running.status(1), running.status(2)) == (VersionStatus.ENABLED, VersionStatus.DISABLED)


async def test_asked_again_it_moves_the_end(running: World, autojump_clock: MockClock) -> None:
    await running.disable_for(60)
    await trio.sleep(30)
    assert (await running.disable_for(60))["untilEpochSec"] == START + 90
    await trio.sleep(31)
    assert running.status() is VersionStatus.DISABLED
    await trio.sleep(30)
    assert running.status() is VersionStatus.ENABLED


@pytest.mark.parametrize("failing", ["disk_fails", "record_fails"])
async def test_an_end_that_cannot_be_moved_stays(running: World, autojump_clock: MockClock, failing: str) -> None:
    await running.disable_for(60)
    setattr(running, failing, True)
    assert "errorCode" in await running.disable_for(3600)
    setattr(running, failing, False)
    await trio.sleep(61)
    assert running.status() is VersionStatus.ENABLED


async def test_one_that_is_disabled_for_good_is_not_disabled_for_a_time(world: World, autojump_clock: MockClock) -> None:
    await world.change("DisableVersion")
    reply = await world.disable_for(60)
    assert (reply["errorCode"], reply["message"]) == (
        "InvalidRequest",
        "version: it is DISABLED already, and not for a time; enable it first",
    )
    assert world.usage.running == {}
    assert "usage saved" not in world.events, "what the rules refuse writes nothing"


@pytest.mark.parametrize("version", [2, 9])
async def test_the_active_version_and_one_that_is_none_are_refused(
    world: World, autojump_clock: MockClock, version: int
) -> None:
    assert (await world.disable_for(60, version))["errorCode"] == "InvalidRequest"
    assert world.events == []


@pytest.mark.parametrize("seconds", [0, -1, MAX_TIMED_DISABLE_SECONDS + 1, 1.5, "60"])
async def test_a_time_out_of_bounds_is_refused(world: World, autojump_clock: MockClock, seconds: Any) -> None:
    reply = await world.disable_for(seconds)
    assert reply["errorCode"] == "InvalidRequest"
    assert reply["message"].startswith("forSeconds: ")


async def test_there_is_a_bound_to_how_many(
    world: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials_module, "MAX_TIMED_DISABLES", 1)
    await world.wire("RotateKeyGroup", keyId="default")
    await world.disable_for(60)
    assert "1 versions disabled for a time already" in (await world.disable_for(60, version=2))["message"]
    assert world.status(2) is VersionStatus.ENABLED


@pytest.mark.parametrize(
    ("kind", "after"),
    [
        ("EnableVersion", VersionStatus.ENABLED),
        ("DisableVersion", VersionStatus.DISABLED),
        ("DestroyVersion", VersionStatus.DESTROYED),
    ],
)
async def test_what_is_asked_for_before_its_end_ends_it_and_stays(
    running: World, autojump_clock: MockClock, kind: str, after: VersionStatus
) -> None:
    await running.disable_for(60)
    await trio.sleep(10)
    assert (await running.change(kind))["status"] == "ok"
    trial = running.trial()
    assert trial is not None
    assert trial.ended_epoch_sec == START + 10
    assert running.usage.on_disk == set(), "the file does not say otherwise either"
    await trio.sleep(3600)
    assert running.status() is after


async def test_for_good_is_answered_only_when_the_file_no_longer_says_otherwise(
    running: World, autojump_clock: MockClock
) -> None:
    await running.disable_for(60)
    running.disk_fails = True
    assert (await running.change("DisableVersion"))["errorCode"] == "InternalError"
    assert running.usage.running, "a restart would have enabled it, and so will this server"
    running.disk_fails = False
    await trio.sleep(61)
    assert running.status() is VersionStatus.ENABLED


async def test_for_good_is_on_record_before_the_end_is_dropped(running: World, autojump_clock: MockClock) -> None:
    await running.disable_for(60)
    running.record_fails = True
    assert (await running.change("DisableVersion"))["errorCode"] == "Unavailable"
    assert NAME in running.usage.running


async def test_enabled_by_hand_it_may_be_disabled_for_good_even_while_the_file_says_otherwise(
    running: World, autojump_clock: MockClock
) -> None:
    await running.disable_for(60)
    running.disk_fails = True
    assert (await running.change("EnableVersion"))["status"] == "ok"
    assert (await running.change("DisableVersion"))["errorCode"] == "InternalError", "the file would enable it at a start"
    running.disk_fails = False
    assert (await running.change("DisableVersion"))["status"] == "ok"
    assert running.usage.on_disk == set()


async def test_who_may_not_any_more_neither_begins_nor_moves_it(world: World, autojump_clock: MockClock) -> None:
    await world.disable_for(60)
    may_not = Only((Operation.LIST_KEY_GROUPS, "default"))
    permitted = world.pipeline.policy
    world.pipeline.admit(world.pipeline.authenticator, may_not)
    assert (await world.disable_for(3600))["errorCode"] == "Unauthorized"
    assert world.usage.running[NAME].until_epoch_sec == START + 60

    class Revoked(AllowAll):
        """Allows it when it is asked for, and no more when it is taken up."""

        def __init__(self) -> None:
            self.calls = iter([permitted, may_not])

        def allows(self, *arguments: Any) -> bool:
            return next(self.calls).allows(*arguments)

    world.pipeline.admit(world.pipeline.authenticator, Revoked())
    assert (await world.disable_for(3600))["errorCode"] == "Unauthorized"
    assert world.usage.running[NAME].until_epoch_sec == START + 60
    world.pipeline.admit(world.pipeline.authenticator, permitted)
    await world.change("EnableVersion")
    world.pipeline.admit(world.pipeline.authenticator, Revoked())
    assert (await world.disable_for(60))["errorCode"] == "Unauthorized"
    assert world.status() is VersionStatus.ENABLED
    assert world.usage.running == {}


async def test_one_that_cannot_be_enabled_again_is_tried_again_and_told_of_once(
    running: World, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    await running.disable_for(60)
    running.manager.fault = SaveFailedError("the disk is full")
    await trio.sleep(60 + 2.5 * TIMED_DISABLE_RETRY_SECONDS)
    assert running.status() is VersionStatus.DISABLED
    assert caplog.text.count("cannot be enabled again yet") == 1
    running.manager.fault = None
    await trio.sleep(TIMED_DISABLE_RETRY_SECONDS)
    assert running.status() is VersionStatus.ENABLED


async def test_one_that_fails_holds_up_no_other(running: World, autojump_clock: MockClock) -> None:
    await running.wire("RotateKeyGroup", keyId="default")
    await running.disable_for(60)
    await running.disable_for(61, version=2)
    enable = running.manager.enable_version

    async def failing(group: str, version: int, permit: Any) -> Any:
        if version == 1:
            raise InternalError("no")
        return await enable(group, version, permit)

    running.manager.enable_version = failing  # type: ignore[method-assign]
    await trio.sleep(63)
    assert (running.status(1), running.status(2)) == (VersionStatus.DISABLED, VersionStatus.ENABLED)
    assert ("(schedule)", "EnableVersion", 1, "refused") in [
        (r.principal, r.operation, r.version, r.outcome) for r in running.log.records
    ]


async def test_one_whose_time_was_over_before_the_start_is_enabled_at_the_start(
    world: World, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    await world.disable_for(60)
    await trio.sleep(3600)
    nursery.start_soon(world.trials.run, world.schedule)
    await trio.sleep(1)
    assert world.status() is VersionStatus.ENABLED


async def test_a_clock_that_is_set_makes_it_later_and_never_stuck(running: World, autojump_clock: MockClock) -> None:
    await running.disable_for(60)
    running.set_back += 1000
    await trio.sleep(100)
    assert running.status() is VersionStatus.DISABLED
    running.set_back -= 6000
    await trio.sleep(61)
    assert running.status() is VersionStatus.ENABLED


async def test_its_end_is_on_record_as_a_change_that_the_schedule_asked_for(
    running: World, autojump_clock: MockClock
) -> None:
    await running.disable_for(60)
    await trio.sleep(61)
    assert [(r.principal, r.operation, r.version, r.outcome, r.connection) for r in running.log.records] == [
        ("admin", "DisableVersion", 1, "begun", PEER.connection),
        ("admin", "DisableVersion", 1, "ok", PEER.connection),
        ("(schedule)", "EnableVersion", 1, "begun", 0),
        ("(schedule)", "EnableVersion", 1, "ok", 0),
    ]


async def test_it_does_not_end_while_that_cannot_be_put_on_record(running: World, autojump_clock: MockClock) -> None:
    await running.disable_for(60)
    running.log.is_failing = True
    await trio.sleep(120)
    assert running.status() is VersionStatus.DISABLED
    running.log.is_failing = False
    await trio.sleep(TIMED_DISABLE_RETRY_SECONDS)
    assert running.status() is VersionStatus.ENABLED


@pytest.mark.parametrize(("asks", "level"), [(True, "WARNING"), (False, "INFO")])
async def test_in_the_end_the_log_tells_who_was_refused(
    running: World, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture, asks: bool, level: str
) -> None:
    caplog.set_level(logging.INFO)
    sealed = (await running.wire("Encrypt", API, plaintext=""))["ciphertext"]
    await running.change("EnableVersion", version=2)
    old = running.manager.current.groups["default"].versions[1]
    assert old.status is VersionStatus.ENABLED
    running.usage.running.clear()
    await running.wire("RotateKeyGroup", keyId="default")
    await running.disable_for(60, version=2)
    if asks:
        assert await running.refused(sealed)
        assert await running.refused(sealed)
    await trio.sleep(61)
    told = [record for record in caplog.records if "refused meanwhile" in record.getMessage()]
    assert [record.levelname for record in told] == [level]
    assert told[0].getMessage() == (
        f"'default' v2 is enabled again after 60 s; refused meanwhile: {'api (2 requests)' if asks else 'nobody'}"
    )

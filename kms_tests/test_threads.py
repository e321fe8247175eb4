"""What becomes of work for a thread where the system has none: it is refused or done here, and never an accident."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from kms.cli.lines import BackgroundLines
from kms.core.keyring import EMPTY
from kms.errors import InternalError, MemoryShortError
from kms.server.metrics_listener import Exposition
from kms.service.actor import KeyringActor
from kms.service.audit_keeper import AuditKeeper
from kms.service.threads import in_thread, start
from kms.service.usage import Usage
from kms_tests.audit_logs import audit_keys
from kms_tests.in_memory import NO_AUDIT
from kms_tests.test_actor import Store


async def no_thread(*_: object, **__: object) -> Any:
    raise RuntimeError("can't start new thread")


@pytest.fixture
def without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio.to_thread.run_sync", no_thread)


async def test_without_a_thread_it_is_memory_that_is_short(without_threads: None) -> None:
    with pytest.raises(MemoryShortError, match="no thread for it, and nothing was changed") as caught:
        await in_thread(lambda: None)
    assert caught.value.exit_code == 71


async def test_what_the_work_itself_raises_is_as_it_was() -> None:
    def work() -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match=r"^mine$"):
        await in_thread(work)


def test_a_thread_of_our_own_that_cannot_be_started_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(MemoryShortError):
        start(threading.Thread())
    with pytest.raises(MemoryShortError), BackgroundLines(2, str):
        pytest.fail("no lines are taken")


async def test_a_change_that_cannot_be_saved_is_not_made_and_the_next_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    actor = KeyringActor(EMPTY, Store(), clock=lambda: 1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(actor.run)
        try:
            with monkeypatch.context() as patch:
                patch.setattr("trio.to_thread.run_sync", no_thread)
                with pytest.raises(InternalError, match="nothing was changed"):
                    await actor.create_group("a", lambda: None)
            assert not actor.current.groups
            await actor.create_group("b", lambda: None)
        finally:
            actor.close()
    assert list(actor.current.groups) == ["b"]


async def test_usage_is_saved_once_there_is_a_thread_again(
    data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    usage = Usage(EMPTY, None, data / "usage", lambda: 1000.0)
    with monkeypatch.context() as patch:
        patch.setattr("trio.to_thread.run_sync", no_thread)
        await usage.flush()
    assert "usage not saved" in caplog.text
    assert "no thread for it" in caplog.text
    await usage.flush()
    assert (data / "usage").exists()


async def test_the_audit_log_is_made_durable_here(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(NO_AUDIT, path=data / "audit.log", is_off=False, is_always_kept=True)
    keeper = AuditKeeper(settings, audit_keys())
    keeper.open(0, has_principals=True)
    keeper.admitted("ab" * 32)
    assert keeper.log is not None
    keeper.log.write([], keep=True)
    monkeypatch.setattr("trio.to_thread.run_sync", no_thread)
    await keeper.sync()
    assert not keeper.log.unsynced
    keeper.close()


async def test_metrics_are_made_here(without_threads: None) -> None:
    class Nothing:
        def collect(self) -> list[Any]:
            return []

    assert b"# EOF" in (await Exposition(Nothing()).page("application/openmetrics-text")).body

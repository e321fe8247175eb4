"""The audit log in a server: when there is one, how soon it is durable, and what is said when it cannot be written."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from kms.core.audit import AuditKeys, OperationRecord
from kms.core.keyring import KeyGroup, Mint
from kms.core.secret import Secret
from kms.errors import FileAccessError, UnavailableError
from kms.server.config import resolve
from kms.service.audit_keeper import AuditedStore, AuditKeeper
from kms.service.audit_settings import AuditSettings
from kms_tests.in_memory import mint


def settings_of(data: Path, **flags: object) -> AuditSettings:
    return resolve(flags, {"XDG_DATA_HOME": str(data.parent), "MINIKMS_KEYSTORE": str(data / "keystore.json")}).audit


def keeper_of(data: Path, **flags: object) -> AuditKeeper:
    return AuditKeeper(settings_of(data, audit_log=str(data / "audit.log"), **flags), AuditKeys(Secret(bytearray(64))))


@pytest.fixture
def keeper(data: Path) -> Iterator[AuditKeeper]:
    keeper = keeper_of(data)
    keeper.open(1, has_principals=False)
    yield keeper
    keeper.close()


def write(keeper: AuditKeeper) -> None:
    assert keeper.log is not None
    keeper.log.write([OperationRecord(connection=1, request=1, operation="Encrypt", outcome="ok")])


@contextlib.asynccontextmanager
async def running(keeper: AuditKeeper) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keeper.run)
        yield
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a thread, while the clock stands still: it jumps when all tasks sleep, whatever the threads are at."""
    while not condition():
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize(
    ("flags", "has_principals", "is_kept"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"audit_log": "audit.log"}, False, True),
        ({"no_audit": True}, True, False),
    ],
)
def test_a_log_is_kept_when_it_is_always_kept_or_there_are_principals(
    tmp_path: Path, flags: dict[str, object], has_principals: bool, is_kept: bool
) -> None:
    data = tmp_path / "mini-kms"
    data.mkdir(mode=0o700)
    if "audit_log" in flags:
        flags = {"audit_log": str(data / "audit.log")}
    keeper = AuditKeeper(settings_of(data, **flags), AuditKeys(Secret(bytearray(64))))
    keeper.open(1, has_principals=has_principals)
    assert (keeper.trail is not None) == (keeper.log is not None) == is_kept
    assert (data / "audit.log").exists() == is_kept
    keeper.reopen()
    keeper.close()


def test_a_log_that_is_open_is_not_opened_again(keeper: AuditKeeper) -> None:
    log, trail = keeper.log, keeper.trail
    keeper.open(2, has_principals=True)
    assert (keeper.log, keeper.trail) == (log, trail)


def test_what_the_start_found_is_said(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    keeper = keeper_of(data)
    keeper.open(5, has_principals=False)
    keeper.close()
    assert caplog.messages == []
    (data / "audit.log").write_bytes(b"{")
    keeper = keeper_of(data, accept_rollback=True)
    keeper.open(4, has_principals=False)
    keeper.close()
    name = f"the audit log {data / 'audit.log'}: "
    assert caplog.messages == [
        f"{name}its file was not there; it goes on in a new one, with record 3",
        f"{name}its last write was cut short; 1 bytes of it are left, and are on record",
        f"{name}the keystore is older: its generation is 4, after 5",
    ]


async def test_what_was_written_is_durable_within_a_second(keeper: AuditKeeper, autojump_clock: MockClock) -> None:
    assert keeper.log is not None
    write(keeper)
    assert keeper.log.unsynced == 1
    async with running(keeper):
        await trio.sleep(1.01)
        await until(lambda: keeper.log is not None and not keeper.log.unsynced)
        assert trio.current_time() < 2


async def test_trouble_and_its_end_are_said_once_each(
    keeper: AuditKeeper, data: Path, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    caplog.set_level(logging.INFO)
    kept = data / "kept"
    os.link(data / "audit.log", kept)
    async with running(keeper):
        (data / "audit.log").unlink()
        kept.unlink()
        await trio.sleep(1.01)
        await until(lambda: bool(caplog.records))
        for _ in range(3):
            await trio.sleep(1.01)
        (told,) = caplog.records
        assert told.levelno == logging.ERROR
        assert "cannot be written: its file was removed" in told.getMessage()
        with pytest.raises(UnavailableError):
            write(keeper)
        keeper.reopen()
        await trio.sleep(1.01)
        await until(lambda: len(caplog.records) == 3)
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO", "WARNING"]
    assert "can be written again" in caplog.text


def test_a_log_that_was_renamed_goes_on_in_a_new_file(keeper: AuditKeeper, data: Path) -> None:
    keeper.reopen()
    assert not (data / "audit.log.1").exists()
    (data / "audit.log").rename(data / "audit.log.1")
    keeper.reopen()
    write(keeper)
    assert b'"Continue"' in (data / "audit.log").read_bytes()


def test_a_file_that_is_not_ours_is_left_alone_and_said(
    keeper: AuditKeeper, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (data / "audit.log").rename(data / "audit.log.1")
    (data / "audit.log").touch(mode=0o600)
    (data / "audit.log").write_bytes(b"mine")
    keeper.reopen()
    assert "not reopened" in caplog.text
    write(keeper)
    assert (data / "audit.log").read_bytes() == b"mine"


class Store:
    """Notes what is saved, and what the log knew then."""

    def __init__(self, keeper: AuditKeeper) -> None:
        self.keeper = keeper
        self.saved: list[tuple[int, int | None]] = []
        self.fault: Exception | None = None
        self.is_settled = False

    @property
    def mint(self) -> Mint:
        return mint

    def commit(self, expected_generation: int, changed: Sequence[KeyGroup]) -> None:
        if self.fault is not None:
            raise self.fault
        log = self.keeper.log
        self.saved.append((expected_generation, None if log is None else log.unsynced))

    def settle(self) -> None:
        self.is_settled = True


def test_nothing_is_saved_before_what_was_begun_is_durable(keeper: AuditKeeper) -> None:
    store = Store(keeper)
    write(keeper)
    AuditedStore(store, keeper).commit(1, ())
    assert store.saved == [(1, 0)]


def test_nothing_is_saved_when_the_record_cannot_be_made_durable(
    keeper: AuditKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    store = Store(keeper)
    write(keeper)
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fail)
        with pytest.raises(UnavailableError):
            AuditedStore(store, keeper).commit(1, ())
    assert store.saved == []


def test_records_name_the_generation_that_is_on_disk(keeper: AuditKeeper) -> None:
    assert keeper.log is not None
    store = Store(keeper)
    audited = AuditedStore(store, keeper)
    assert audited.mint is mint
    store.fault = FileAccessError("no")
    with pytest.raises(FileAccessError):
        audited.commit(1, ())
    assert keeper.log.generation == 1
    store.fault = None
    audited.commit(1, ())
    assert keeper.log.generation == 2


def test_without_a_log_a_store_is_just_a_store(data: Path) -> None:
    keeper = AuditKeeper(settings_of(data), AuditKeys(Secret(bytearray(64))))
    store = Store(keeper)
    AuditedStore(store, keeper).commit(0, ())
    assert store.saved == [(0, None)]
    AuditedStore(store, keeper).settle()
    assert store.is_settled

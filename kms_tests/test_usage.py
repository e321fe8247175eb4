"""How the use of keys is counted, kept and forgotten. The clock is the test's; the requests are real ones."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from kms.core.keyring import EMPTY, EnableVersion
from kms.core.policy import AllowAll, Operation
from kms.core.usage import OTHERS, Operations, TimedDisable
from kms.errors import KeystoreReplacedError
from kms.limits import MAX_REFUSED_NAMES, USAGE_FLUSH_SECONDS
from kms.service import usage as usage_module
from kms.service.handlers import Handlers
from kms.service.local_provider import LocalMasterKeyProvider
from kms.service.pipeline import RequestPipeline
from kms.service.trials import Trials
from kms.service.usage import Usage, load
from kms.storage import usage_file
from kms_tests.in_memory import Only, Server, text, unrecorded
from kms_tests.keks import forged

NOW = 1_800_000_000
NAME = ("default", 1)


class Counted(Server):
    """A pipeline whose requests are counted, in a file at `path`."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.now = float(NOW)
        self.path = path
        self.restart()

    def restart(self) -> None:
        """As after a stop: all that is known is what the file says."""
        self.usage = Usage(self.manager.current, load(self.path), self.path, lambda: self.now)
        trials = Trials(self.manager, self.usage, unrecorded)
        handlers = Handlers(LocalMasterKeyProvider(self.manager), trials, trials, random=bytes)
        self.pipeline = RequestPipeline(handlers, self.pipeline.authenticator, AllowAll(), usage=self.usage)

    def later(self, seconds: float) -> None:
        self.now += seconds
        self.usage._look_again_at = 0

    def counted(self, group: str = "default", version: int = 1) -> Operations:
        return self.usage.of(self.manager.current.groups[group].versions[version]).operations

    def last_used(self, version: int = 1) -> tuple[int | None, str | None]:
        usage = self.usage.of(self.manager.current.groups["default"].versions[version])
        return usage.last_used_epoch_sec, usage.last_used_by

    def encrypt(self) -> str:
        return str(self.ask("Encrypt", plaintext="")["ciphertext"])


@pytest.fixture
def path(data: Path) -> Path:
    return data / "keystore.json.usage"


@pytest.fixture
def server(path: Path) -> Counted:
    return Counted(path)


def test_each_kind_of_operation_is_counted_for_the_version_that_did_it(server: Counted) -> None:
    sealed = server.encrypt()
    wrapped = server.ask("GenerateDataKey")["wrappedDataKey"]
    server.admin("RotateKeyGroup", keyId="default")
    for _ in range(3):
        server.ask("Decrypt", ciphertext=sealed)
    server.ask("Decrypt", ciphertext=wrapped)
    server.ask("ReEncrypt", ciphertext=sealed)
    assert server.counted(version=1) == Operations(encrypt=1, generate_data_key=1, decrypt=4, re_encrypt_from=1)
    assert server.counted(version=2) == Operations(re_encrypt_to=1)


def test_what_was_refused_is_not_counted_and_makes_no_entry(server: Counted) -> None:
    blob = forged("billing", 3)
    server.ask("Encrypt", "wrong", plaintext="")
    server.ask("Encrypt", plaintext="", keyId="nobody")
    server.ask("Decrypt", ciphertext=text(blob))
    server.ask("ReEncrypt", ciphertext=text(blob))
    server.ask("Health")
    server.line(b"nonsense")
    assert server.usage._table == {}


def test_it_is_known_when_a_version_was_last_used_and_by_whom(server: Counted) -> None:
    assert server.last_used() == (None, None)
    sealed = server.encrypt()
    assert server.last_used() == (NOW, "api")
    server.later(3600)
    server.ask("Decrypt", ciphertext=sealed)
    assert server.last_used() == (NOW + 3600, "api")
    server.admin("RotateKeyGroup", keyId="default")
    server.later(60)
    server.ask("ReEncrypt", ciphertext=sealed)
    assert (server.last_used(1), server.last_used(2)) == ((NOW + 3660, "api"), (NOW + 3660, "api"))


def test_it_is_counted_since_the_first_start_or_since_the_version_was_made(server: Counted, path: Path) -> None:
    versions = server.manager.current.groups["default"].versions
    assert server.usage.of(versions[1]).since_epoch_sec == NOW, "it is older than that"
    server.later(-10 * NOW)
    server.restart()
    assert server.usage.of(versions[1]).since_epoch_sec == versions[1].created_at


async def test_what_was_counted_is_known_after_a_restart(server: Counted, path: Path) -> None:
    server.encrypt()
    await server.usage.flush()
    server.later(100)
    server.restart()
    assert server.counted() == Operations(encrypt=1)
    assert server.last_used() == (NOW, "api")
    assert server.usage.of(server.manager.current.groups["default"].active).since_epoch_sec == NOW
    server.encrypt()
    assert server.counted() == Operations(encrypt=2)


async def test_since_when_it_is_counted_is_kept_even_if_nothing_was_used(server: Counted, path: Path) -> None:
    await server.usage.flush()
    assert usage_file.read(path).since_epoch_sec == NOW


async def test_a_destroyed_version_keeps_its_figures(server: Counted) -> None:
    server.encrypt()
    server.admin("RotateKeyGroup", keyId="default")
    server.admin("DestroyVersion", keyId="default", version=1)
    await server.usage.flush()
    server.restart()
    assert server.counted() == Operations(encrypt=1)


async def test_versions_that_the_keyring_does_not_have_are_forgotten(server: Counted, path: Path) -> None:
    records = [usage_file.Record(*name, Operations(encrypt=1)) for name in (NAME, ("default", 2), ("gone", 1))]
    usage_file.write(path, NOW, map(usage_file.encode_record, records))
    server.restart()
    await server.usage.flush()
    assert [(record.key_id, record.version) for record in usage_file.read(path).versions] == [NAME]


@pytest.mark.parametrize("content", [b"", b"not JSON", b"{}"])
def test_a_file_that_cannot_be_used_is_a_warning_and_all_is_counted_anew(
    server: Counted, path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_bytes(content)
    path.chmod(0o600)
    server.restart()
    assert "counted anew" in caplog.text
    server.encrypt()
    assert server.counted() == Operations(encrypt=1)


def test_a_file_that_others_may_read_is_a_warning_too(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.write_bytes(b"{}")
    path.chmod(0o644)
    assert load(path) is None
    assert "counted anew" in caplog.text


async def test_it_is_written_every_minute_when_something_has_changed(
    server: Counted, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[float] = []

    async def noted() -> None:
        # Without the thread that writes: the clock would jump on while it is at work.
        written.append(trio.current_time())
        server.usage._is_unsaved = False
        await server.usage._encode()

    monkeypatch.setattr(server.usage, "save", noted)
    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.usage.run)
        await trio.sleep(USAGE_FLUSH_SECONDS * 3.5)
        server.encrypt()
        assert len(written) == 1, "the first says since when it is counted"
        await trio.sleep(USAGE_FLUSH_SECONDS * 3)
        nursery.cancel_scope.cancel()
    assert [round(at - start) for at in written] == [USAGE_FLUSH_SECONDS, 4 * USAGE_FLUSH_SECONDS]


async def test_a_disk_that_fails_is_told_once_and_nothing_is_lost_when_it_works_again(
    server: Counted, path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    write = usage_file.write

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    await server.usage.flush()
    monkeypatch.setattr(usage_file, "write", full)
    server.encrypt()
    for _ in range(3):
        await server.usage.flush()
    assert caplog.text.count("No space left on device") == 1
    monkeypatch.setattr(usage_file, "write", write)
    await server.usage.flush()
    assert "saved again" in caplog.text
    assert usage_file.read(path).versions[0].operations == Operations(encrypt=1)


async def test_a_bug_in_saving_costs_the_figures_and_not_the_server(
    server: Counted, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    text_of_it = "canary"

    def broken(*_: object) -> None:
        raise RuntimeError(text_of_it)

    monkeypatch.setattr(usage_file, "write", broken)
    server.encrypt()
    await server.usage.flush()
    assert "RuntimeError" in caplog.text
    assert "canary" not in caplog.text


async def test_only_what_has_changed_is_encoded_anew(server: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    server.admin("CreateKeyGroup", keyId="billing")
    server.encrypt()
    server.ask("Encrypt", plaintext="", keyId="billing")
    await server.usage.flush()
    encoded: list[str] = []
    encode = usage_file.encode_record

    def noted(record: usage_file.Record) -> bytes:
        encoded.append(record.key_id)
        return encode(record)

    monkeypatch.setattr(usage_file, "encode_record", noted)
    server.encrypt()
    server.encrypt()
    await server.usage.flush()
    await server.usage.flush()
    assert encoded == ["default"]


async def test_what_is_counted_while_it_is_written_is_for_the_next_time(
    server: Counted, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = usage_file.write

    def late(*arguments: Any) -> None:
        trio.from_thread.run_sync(server.encrypt)
        write(*arguments)

    server.encrypt()
    monkeypatch.setattr(usage_file, "write", late)
    await server.usage.flush()
    assert usage_file.read(path).versions[0].operations == Operations(encrypt=1)
    monkeypatch.setattr(usage_file, "write", write)
    await server.usage.flush()
    assert usage_file.read(path).versions[0].operations == Operations(encrypt=2)


async def test_a_large_table_is_encoded_in_slices(server: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage_module, "USAGE_SLICE", 1)
    for name in "abcdef":
        server.admin("CreateKeyGroup", keyId=name)
        server.ask("Encrypt", plaintext="", keyId=name)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(others)
        await server.usage._encode()
        nursery.cancel_scope.cancel()
    assert turns >= 3


async def test_one_cancelled_between_two_slices_has_forgotten_nothing(
    server: Counted, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage_module, "USAGE_SLICE", 1)
    for name in ("a", "b", "c"):
        server.admin("CreateKeyGroup", keyId=name)
        server.ask("Encrypt", plaintext="", keyId=name)
    with trio.CancelScope() as scope:
        scope.cancel()
        await server.usage._encode()
    assert scope.cancelled_caught
    await server.usage.flush()
    assert sorted(record.key_id for record in usage_file.read(path).versions) == ["a", "b", "c"]


def disabled(server: Counted) -> str:
    """A ciphertext under version 1, which is disabled for a time."""
    sealed = server.encrypt()
    server.admin("RotateKeyGroup", keyId="default")
    server.admin("DisableVersion", keyId="default", version=1)
    server.usage.begin(NAME, TimedDisable("admin", NOW, NOW + 60))
    return sealed


def test_who_is_refused_a_version_that_is_disabled_for_a_time_is_counted(server: Counted) -> None:
    sealed = disabled(server)
    server.later(5)
    server.ask("Decrypt", ciphertext=sealed)
    server.ask("ReEncrypt", ciphertext=sealed)
    server.ask("Decrypt", "wrong", ciphertext=sealed)
    server.ask("Decrypt", ciphertext="AAAA")
    server.ask("Decrypt", ciphertext=text(forged("default", 2)))
    refused = server.usage.running[NAME].refused
    assert {name: (who.requests, who.last_epoch_sec) for name, who in refused.items()} == {"api": (2, NOW + 5)}


def test_who_may_not_use_the_group_anyway_is_not_counted(server: Counted) -> None:
    sealed = disabled(server)
    server.pipeline.admit(server.pipeline.authenticator, Only())
    assert server.ask("Decrypt", ciphertext=sealed)["errorCode"] == "Unauthorized"
    assert server.usage.running[NAME].refused == {}


def test_a_crowd_of_principals_is_told_apart_up_to_a_bound(server: Counted) -> None:
    sealed = disabled(server)
    for number in range(MAX_REFUSED_NAMES + 3):
        server.usage._count_refusal(forged(*NAME), f"p{number}")
    server.ask("Decrypt", ciphertext=sealed)
    server.usage._count_refusal(forged(*NAME), "p0")
    refused = server.usage.running[NAME].refused
    assert len(refused) == MAX_REFUSED_NAMES + 1
    assert (refused[OTHERS].requests, refused["p0"].requests) == (4, 2)


async def test_who_was_refused_is_known_after_a_restart(server: Counted) -> None:
    sealed = disabled(server)
    server.ask("Decrypt", ciphertext=sealed)
    await server.usage.flush()
    server.restart()
    assert server.usage.running[NAME].until_epoch_sec == NOW + 60
    server.ask("Decrypt", ciphertext=sealed)
    assert server.usage.running[NAME].refused["api"].requests == 2


async def test_an_end_that_a_crash_has_left_for_a_version_that_is_enabled_is_dropped(server: Counted, path: Path) -> None:
    disabled(server)
    await server.usage.flush()
    server.manager._apply(EnableVersion("default", 1))
    server.restart()
    assert server.usage.running == {}
    await server.usage.flush()
    assert usage_file.read(path).versions[0].timed_disable is None


def test_a_group_is_described_with_the_use_of_each_version(server: Counted) -> None:
    server.encrypt()
    server.admin("RotateKeyGroup", keyId="default")
    group = server.admin("DescribeKeyGroup", keyId="default")["keyGroup"]
    assert [version["usage"] for version in group["versions"]] == [
        {"sinceEpochSec": NOW, "operations": {"Encrypt": 1}, "lastUsedEpochSec": NOW, "lastUsedBy": "api"},
        {"sinceEpochSec": NOW, "operations": {}},
    ]
    assert server.admin("DescribeKeyGroup", keyId="nobody")["message"] == "keyId: no such key group"
    assert server.ask("DescribeKeyGroup", keyId="default")["errorCode"] == "AuthFailed", "it is of the control plane"


def test_a_list_tells_of_use_only_when_asked_and_only_where_that_may_be_known(server: Counted) -> None:
    server.admin("CreateKeyGroup", keyId="billing")

    def told(**fields: Any) -> dict[str, bool]:
        groups = server.admin("ListKeyGroups", **fields)["keyGroups"]
        return {group["keyId"]: "usage" in group["versions"][0] for group in groups}

    assert told() == {"default": False, "billing": False}
    assert told(usage=True) == {"default": True, "billing": True}
    listing = [(Operation.LIST_KEY_GROUPS, name) for name in (None, "default", "billing")]
    policy = Only(*listing, (Operation.DESCRIBE_KEY_GROUP, "billing"))
    server.pipeline.admit(server.pipeline.authenticator, policy)
    assert told(usage=True) == {"default": False, "billing": True}
    assert server.admin("DescribeKeyGroup", keyId="default")["errorCode"] == "Unauthorized"


async def test_it_is_not_written_beside_a_keystore_that_is_anothers_by_now_and_goes_on_counting(
    data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = data / "keystore.json.usage"
    path.write_bytes(b"another's")

    def look() -> None:
        raise KeystoreReplacedError("the lock was removed")

    usage = Usage(EMPTY, None, path, lambda: NOW, look=look)
    for _ in range(2):
        await usage.flush()
    assert path.read_bytes() == b"another's"
    assert caplog.text.count("usage not saved") == 1
    assert "the lock was removed; it goes on counting" in caplog.text

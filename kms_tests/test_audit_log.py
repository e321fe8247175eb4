"""The audit log's file: what is appended, what a crash or a full disk leaves, and how it goes on from there."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms.core.audit import AuditKeys, decode_head
from kms.core.audit_verifier import Verifier
from kms.errors import (
    AuditLogError,
    FileAccessError,
    KeystoreLockedError,
    SecretFileError,
    UnavailableError,
)
from kms.host import durable, space
from kms.limits import AUDIT_RESERVE_BYTES, AUDIT_ROTATION_TIME, AUDIT_TAIL_BYTES, MAX_AUDIT_HEAD_BYTES, MAX_KEPT_RECORDS
from kms.storage import audit_log
from kms.storage.audit_head import head_path, read_head
from kms.storage.audit_log import AuditLog, handing_over, is_kept
from kms_tests.audit_logs import audit_keys, lines, operation, told, verified

NOW = 1_769_860_800.25


class Clock:
    """Monotonic seconds that pass when they are told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Disk:
    """The system calls of the module under test, of which each may be made to fail."""

    def __init__(self) -> None:
        self.takes: int | None = None
        """Of the writes to come, how many bytes are written; None: all."""
        self.may_shorten = True
        self.fsyncs: list[int] = []
        self.writes = 0
        self.fsync_error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, descriptor: int, data: bytes) -> int:
        self.writes += 1
        if self.takes is None:
            return os.write(descriptor, data)
        taken = min(self.takes, len(data))
        self.takes -= taken
        if not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.write(descriptor, data[:taken])

    def ftruncate(self, descriptor: int, length: int) -> None:
        if not self.may_shorten:
            raise OSError(errno.EPERM, "Operation not permitted")
        os.ftruncate(descriptor, length)

    def fsync(self, descriptor: int) -> None:
        if self.fsync_error is not None:
            raise self.fsync_error
        self.fsyncs.append(descriptor)
        os.fsync(descriptor)


@pytest.fixture
def path(data: Path) -> Path:
    return data / "audit.log"


@pytest.fixture
def keys() -> AuditKeys:
    return audit_keys()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(audit_log, "os", disk)
    return disk


Open = Callable[..., AuditLog]


@pytest.fixture
def open_log(path: Path, keys: AuditKeys, clock: Clock) -> Iterator[Open]:
    """Opens the log; whatever is still open at the end is let go of, as a crash would."""
    opened: list[AuditLog] = []

    def open_log(*, generation: int = 5, **more: Any) -> AuditLog:
        log = AuditLog(path, more.pop("keys", keys), generation=generation, clock=lambda: NOW, monotonic=clock, **more)
        opened.append(log)
        return log

    yield open_log
    for log in opened:
        log._let_go()


@pytest.fixture
def log(open_log: Open) -> AuditLog:
    return open_log()


def _crash(log: AuditLog) -> None:
    """End without a word, as a process that is killed does."""
    log._let_go()


def _head_seq(path: Path) -> int:
    head = decode_head(head_path(path).read_bytes(), audit_keys())
    assert head is not None
    return head.seq


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines() if line.endswith(b'"}')]


def _events(path: Path) -> list[str]:
    return [record.get("event") or record["operation"] for record in _records(path)]


def _verified(*paths: Path, keys: list[AuditKeys] | None = None) -> Verifier:
    raw = read_head(paths[-1].with_name("audit.log"))
    newest = (keys or [audit_keys()])[-1]
    return verified([path.read_bytes() for path in paths], keys, None if raw is None else decode_head(raw, newest))


def _is_sound(*paths: Path, keys: list[AuditKeys] | None = None) -> bool:
    report = _verified(*paths, keys=keys)
    assert report.count == 0, told(report)
    return True


# Appending


def test_a_new_log_begins_a_chain_with_a_durable_start(log: AuditLog, path: Path) -> None:
    (first,) = _records(path)
    del first["mac"]
    assert first == {"seq": 1, "time": "2026-01-31T12:00:00.250000Z", "event": "Start", "generation": 5, "previous": ""}
    assert (log.written, log.unsynced, log.is_failing) == (1, 0, False)
    head = read_head(path)
    assert head is not None
    assert json.loads(head)["seq"] == 1


def test_the_files_are_private(log: AuditLog, path: Path) -> None:
    for file in (path, head_path(path), path.with_name("audit.log.lock")):
        assert file.stat().st_mode & 0o777 == 0o600


def test_a_batch_is_one_write_and_gets_number_time_and_generation(open_log: Open, path: Path, disk: Disk) -> None:
    log = open_log()
    disk.writes = 0
    log.generation = 6
    log.write([operation(1), operation(2)])
    assert disk.writes == 1
    assert [(one["seq"], one["request"], one["generation"]) for one in _records(path)[1:]] == [(2, 1, 6), (3, 2, 6)]
    assert {one["time"] for one in _records(path)} == {"2026-01-31T12:00:00.250000Z"}
    assert _is_sound(path)


def test_what_is_written_is_durable_after_sync_and_has_an_age_until_then(
    open_log: Open, path: Path, clock: Clock, disk: Disk
) -> None:
    log = open_log()
    disk.fsyncs.clear()
    log.write([operation()])
    clock.now += 0.5
    log.write([operation()])
    clock.now += 0.25
    assert (log.unsynced, log.unsynced_age) == (2, 0.75)
    assert disk.fsyncs == []
    log.sync()
    assert (log.unsynced, log.unsynced_age) == (0, 0)
    assert len(disk.fsyncs) == 1


def test_the_head_follows_the_log_once_a_second_or_when_it_has_to(log: AuditLog, path: Path, clock: Clock) -> None:
    def head() -> int:
        return _head_seq(path)

    log.write([operation()])
    log.sync()
    assert head() == 1
    clock.now += 1
    log.sync()
    assert head() == 2
    log.write([operation()])
    log.sync()
    assert head() == 2
    log.sync(force=True)
    assert head() == 3


def test_the_head_never_names_what_is_not_durable(open_log: Open, path: Path, disk: Disk) -> None:
    log = open_log()
    log.write([operation()])
    disk.fsync_error = OSError(errno.EIO, "Input/output error")
    with pytest.raises(UnavailableError):
        log.sync(force=True)
    assert _head_seq(path) == 1


def test_the_names_of_new_files_are_made_durable(open_log: Open, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(durable, "sync_names", synced.append)
    log = open_log()
    assert synced == [path.parent]
    log.write([operation()])
    log.sync()
    assert synced == [path.parent]
    _rotated(path)
    log.reopen()
    log.sync()
    assert synced == [path.parent] * 2


def test_letting_go_twice_closes_nothing_of_others(log: AuditLog, path: Path) -> None:
    log.close()
    others = [os.open(path, os.O_RDONLY) for _ in range(5)]
    log._let_go()
    for descriptor in others:
        os.close(descriptor)


def test_closing_says_stop_and_is_durable(log: AuditLog, path: Path) -> None:
    log.write([operation()])
    log.close()
    log.close()
    assert _events(path) == ["Start", "Encrypt", "Stop"]
    assert _head_seq(path) == 3
    assert log.trouble == ""
    assert _is_sound(path)


def test_two_servers_do_not_write_one_log(log: AuditLog, open_log: Open, path: Path) -> None:
    with pytest.raises(KeystoreLockedError, match=f"in use by process {os.getpid()}; stop it first"):
        open_log()
    log.close()
    open_log()


def test_syncing_in_a_thread_while_writing_loses_nothing(log: AuditLog, path: Path) -> None:
    stop = threading.Event()
    failures: list[BaseException] = []

    def sync() -> None:
        while not stop.is_set():
            try:
                log.sync(force=True)
            except BaseException as error:
                failures.append(error)

    thread = threading.Thread(target=sync)
    thread.start()
    paths = []
    for number in range(300):
        log.write([operation(number)])
        if number % 60 == 59:
            paths.append(path.with_name(f"audit.log.{number}"))
            path.rename(paths[-1])
            assert log.reopen()
    stop.set()
    thread.join()
    log.close()
    assert failures == []
    assert _is_sound(*paths, path)
    assert len(log._retired) == 0


# Starting again


def test_a_log_goes_on_where_it_ended(log: AuditLog, open_log: Open, path: Path) -> None:
    log.write([operation()])
    log.close()
    open_log().write([operation()])
    assert _events(path) == ["Start", "Encrypt", "Stop", "Start", "Encrypt"]
    assert _is_sound(path)


def test_it_goes_on_after_a_crash_at_any_byte_of_a_write(open_log: Open, path: Path) -> None:
    log = open_log()
    log.sync(force=True)
    before = path.read_bytes()
    head = head_path(path).read_bytes()
    log.write([operation(1), operation(2)])
    written = path.read_bytes()[len(before) :]
    _crash(log)
    for length in range(len(written) + 1):
        path.write_bytes(before + written[:length])
        head_path(path).write_bytes(head)
        again = open_log()
        again.write([operation(3)])
        _crash(again)
        content = path.read_bytes()
        assert content.startswith(before + written[:length])
        report = _verified(path)
        assert report.count == 0, (length, told(report))
        whole = written[:length].count(b"\n") + (length + 1 in (len(lines(written)[0]), len(written)))
        assert report.seq == 1 + whole + 2


@given(st.data())
def test_it_goes_on_after_a_power_cut_that_left_zeros_or_a_part_of_what_was_not_durable(
    open_log: Open, path: Path, data: st.DataObject
) -> None:
    for file in (path, head_path(path)):
        file.unlink(missing_ok=True)
    log = open_log()
    log.write([operation(1)])
    log.sync(force=True)
    durable_bytes, head = path.read_bytes(), head_path(path).read_bytes()
    log.write([operation(number) for number in range(4)])
    rest = path.read_bytes()[len(durable_bytes) :]
    _crash(log)
    cut = data.draw(st.integers(0, len(rest)))
    left = rest[:cut] + b"\0" * data.draw(st.integers(0, 9000))
    path.write_bytes(durable_bytes + left)
    head_path(path).write_bytes(head)
    again = open_log()
    again.write([operation(9)])
    _crash(again)
    assert path.read_bytes().startswith(durable_bytes + left)
    assert _is_sound(path)


def test_a_torn_line_stays_and_is_named(open_log: Open, path: Path) -> None:
    _crash(open_log())
    with path.open("ab") as file:
        file.write(b'{"seq":2,"ti')
    open_log()
    assert b'{"seq":2,"ti\n{"seq":2,' in path.read_bytes()
    assert _records(path)[-1]["torn"] == 12
    assert _is_sound(path)


def test_a_torn_line_is_named_once(open_log: Open, path: Path, disk: Disk, clock: Clock) -> None:
    _crash(open_log())
    with path.open("ab") as file:
        file.write(b'{"seq":2,"ti')
    log = open_log()
    disk.takes = 0
    with pytest.raises(UnavailableError):
        log.write([operation()])
    disk.takes = None
    clock.now += 1
    log.check()
    assert ["torn" in one for one in _records(path)] == [False, True, False]
    assert _is_sound(path)


def test_it_goes_on_after_a_crash_in_its_very_first_write(open_log: Open, path: Path) -> None:
    _crash(open_log())
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        head_path(path).unlink()
        _crash(open_log())
        assert _is_sound(path), length


def test_killed_again_and_again_before_it_has_a_head_it_still_starts(open_log: Open, path: Path) -> None:
    _crash(open_log())
    head_path(path).unlink()

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for _ in range(3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AuditLog, "sync", fail)
            with pytest.raises(KeyboardInterrupt):
                open_log()
    _crash(open_log())
    assert _is_sound(path)


def test_a_log_that_was_renamed_while_nobody_wrote_goes_on_in_a_new_file(open_log: Open, path: Path) -> None:
    log = open_log()
    log.write([operation()])
    log.close()
    old = path.with_name("audit.log.1")
    path.rename(old)
    assert is_kept(path)
    open_log().close()
    assert _records(path)[0]["seq"] == 4
    assert _is_sound(old, path)


def test_so_does_one_whose_new_file_is_there_already(open_log: Open, path: Path) -> None:
    open_log().close()
    path.rename(path.with_name("audit.log.1"))
    path.touch(0o600)
    open_log().close()
    assert _is_sound(path.with_name("audit.log.1"), path)


def _refusal(open_log: Open, **more: Any) -> str:
    with pytest.raises(AuditLogError) as caught:
        open_log(**more)
    message = str(caught.value)
    assert "; " in message or ". " in message
    return message


def test_a_log_that_was_cut_short_is_refused_and_not_touched(open_log: Open, path: Path) -> None:
    log = open_log()
    log.write([operation()])
    log.close()
    kept = b"".join(lines(path.read_bytes())[:-1])
    path.write_bytes(kept)
    message = _refusal(open_log)
    assert "was cut short: it ends with record 2, and record 3 was in it" in message
    assert "move audit.log and audit.log.head away together" in message
    assert path.read_bytes() == kept


def test_a_log_whose_end_was_altered_is_refused(open_log: Open, path: Path) -> None:
    log = open_log()
    log.write([operation()])
    _crash(log)
    path.write_bytes(path.read_bytes().replace(b"billing", b"payroll"))
    assert "it was altered, or belongs to another keystore" in _refusal(open_log)


def test_a_log_of_another_keystore_is_refused(open_log: Open) -> None:
    open_log(keys=audit_keys(2)).close()
    assert "belongs to another keystore" in _refusal(open_log)


def test_a_log_without_its_head_is_refused(open_log: Open, path: Path) -> None:
    open_log().close()
    head_path(path).unlink()
    assert "has lost its head file, audit.log.head" in _refusal(open_log)


@pytest.mark.parametrize("head", [b"", b"{}", b"x" * 5000])
def test_a_head_that_is_none_is_refused(open_log: Open, path: Path, head: bytes) -> None:
    open_log().close()
    head_path(path).write_bytes(head)
    assert "has a head file, audit.log.head, that the key of this keystore does not verify" in _refusal(open_log)


def test_a_head_of_another_log_is_refused(open_log: Open, path: Path) -> None:
    log = open_log()
    log.close()
    head = head_path(path).read_bytes()
    path.unlink()
    head_path(path).unlink()
    other = open_log()
    other.write([operation(7)])
    _crash(other)
    head_path(path).write_bytes(head)
    assert "ends with another record 2 than its head file names" in _refusal(open_log)


def test_more_debris_than_a_crash_leaves_is_refused(open_log: Open, path: Path) -> None:
    open_log().close()
    with path.open("ab") as file:
        file.write(b"\0" * AUDIT_TAIL_BYTES)
    assert "ends with more bytes that are no records than a crash leaves" in _refusal(open_log)


@pytest.mark.parametrize("content", [b'{"formatVersion":3}', b"[principals.billing]\n", b"secret", b"\n", b"\0{"])
def test_a_file_that_is_no_log_is_not_appended_to(open_log: Open, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(0o600)
    assert "is another file: it does not even begin like an audit log" in _refusal(open_log)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"{", b'{"seq":', b'{"seq":1,"ti', b"\0" * 4096])
def test_what_a_crash_leaves_of_the_first_write_is(open_log: Open, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(0o600)
    open_log().close()
    assert path.read_bytes().startswith(content + b"\n")
    assert _is_sound(path)


def test_of_a_long_log_only_the_end_is_read(open_log: Open, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "AUDIT_TAIL_BYTES", 2000)
    log = open_log()
    for number in range(100):
        log.write([operation(number)])
    _crash(log)
    read: list[int] = []

    def record(descriptor: int, length: int, offset: int) -> bytes:
        read.append(length)
        return os.pread(descriptor, length, offset)

    monkeypatch.setattr(audit_log, "read_at", record)
    open_log()
    assert max(read) <= 2000
    assert _is_sound(path)


def test_an_older_keystore_is_refused_with_both_generations(open_log: Open, path: Path) -> None:
    open_log(generation=9).close()
    message = _refusal(open_log, generation=8)
    assert "its generation is 8, and record 2 was written at 9" in message
    assert "--accept-rollback" in message
    assert _events(path) == ["Start", "Stop"]


def test_an_older_keystore_is_refused_too_when_the_log_was_moved_away(open_log: Open, path: Path) -> None:
    open_log(generation=9).close()
    path.unlink()
    assert "was written at 9" in _refusal(open_log, generation=8)


def test_a_rollback_that_is_accepted_is_recorded_and_the_generation_counts_from_there(open_log: Open, path: Path) -> None:
    open_log(generation=9).close()
    open_log(generation=4, accept_rollback=True).close()
    assert _records(path)[2]["acceptedRollback"] is True
    open_log(generation=4, accept_rollback=True).close()
    assert "acceptedRollback" not in _records(path)[4]
    assert _is_sound(path)
    assert "was written at 4" in _refusal(open_log, generation=3)


def test_a_log_that_others_may_read_or_that_is_none_is_refused(open_log: Open, path: Path, data: Path) -> None:
    open_log().close()
    path.chmod(0o640)
    with pytest.raises(SecretFileError, match="chmod 600"):
        open_log()
    path.unlink()
    path.symlink_to(data / "elsewhere")
    with pytest.raises(SecretFileError, match="symbolic link"):
        open_log()
    path.unlink()
    path.mkdir()
    with pytest.raises((SecretFileError, FileAccessError)):
        open_log()
    path.rmdir()
    data.chmod(0o755)
    with pytest.raises(SecretFileError, match="chmod 700"):
        open_log()
    data.chmod(0o700)
    open_log()


def test_a_start_on_a_full_disk_is_an_error_that_names_the_log(open_log: Open, path: Path, disk: Disk) -> None:
    disk.takes = 10
    with pytest.raises(
        FileAccessError, match=r"audit log cannot be written: only a part.*look after the disk that .*audit\.log is on"
    ):
        open_log()
    disk.takes = 0
    with pytest.raises(FileAccessError, match="No space left on device"):
        open_log()
    assert path.read_bytes() == b""
    disk.takes = None
    open_log()


# A log that cannot be written


@pytest.mark.parametrize("takes", [0, 1, 40, 300])
def test_what_a_full_disk_took_of_a_batch_is_cut_off_again(open_log: Open, path: Path, disk: Disk, takes: int) -> None:
    log = open_log()
    before = path.read_bytes()
    disk.takes = takes
    with pytest.raises(UnavailableError, match="the audit log cannot be written: "):
        log.write([operation(1), operation(2)])
    assert path.read_bytes() == before
    assert log.is_failing
    assert log.written == 1


def test_it_recovers_with_a_record_of_how_many_were_not_recorded(
    open_log: Open, path: Path, disk: Disk, clock: Clock
) -> None:
    log = open_log()
    disk.takes = 0
    for number in range(3):
        with pytest.raises(UnavailableError):
            log.write([operation(number), operation(number)])
    disk.takes = None
    clock.now += 1
    log.write([operation(9)])
    assert not log.is_failing
    assert [one.get("event", one.get("request")) for one in _records(path)] == ["Start", "Recover", 9]
    assert _records(path)[1]["unrecorded"] == 6
    assert _is_sound(path)


def test_it_does_not_wait_for_a_sync_to_recover(open_log: Open, disk: Disk, clock: Clock) -> None:
    log = open_log()
    disk.takes = 0
    with pytest.raises(UnavailableError):
        log.write([operation()])
    disk.takes = None
    raised: list[BaseException] = []

    def write() -> None:
        try:
            log.write([operation()])
        except UnavailableError as error:
            raised.append(error)

    with log._syncing:
        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
    assert len(raised) == 1
    clock.now += 1
    log.write([operation()])


def test_a_file_that_was_cut_short_while_it_could_not_be_written_does_not_recover(
    open_log: Open, path: Path, disk: Disk, clock: Clock
) -> None:
    log = open_log()
    first = path.stat().st_size
    log.write([operation()])
    disk.takes = 0
    with pytest.raises(UnavailableError):
        log.write([operation()])
    disk.takes = None
    os.truncate(path, first)
    clock.now += 1
    with pytest.raises(UnavailableError, match="what stands at its end is not what was written; move it away"):
        log.write([operation()])
    assert path.stat().st_size == first


def test_it_tries_to_recover_ten_times_a_second_at_the_most(open_log: Open, disk: Disk, clock: Clock) -> None:
    log = open_log()
    disk.takes = 0
    for _ in range(2):
        with pytest.raises(UnavailableError):
            log.write([operation()])
    tried = disk.writes
    for _ in range(50):
        with pytest.raises(UnavailableError, match="No space left"):
            log.write([operation()])
    assert disk.writes == tried
    clock.now += 0.11
    with pytest.raises(UnavailableError):
        log.write([operation()])
    assert disk.writes == tried + 1


def test_it_recovers_without_a_request_when_it_is_checked(open_log: Open, path: Path, disk: Disk, clock: Clock) -> None:
    log = open_log()
    disk.takes = 0
    with pytest.raises(UnavailableError):
        log.write([operation()])
    log.check()
    assert log.is_failing
    disk.takes = None
    clock.now += 1
    log.check()
    assert not log.is_failing
    assert _events(path) == ["Start", "Recover"]


def test_it_recovers_when_nothing_is_written(open_log: Open, path: Path, disk: Disk, clock: Clock) -> None:
    log = open_log()
    log.write(())
    disk.takes = 0
    with pytest.raises(UnavailableError):
        log.write([operation()])
    disk.takes = None
    clock.now += 1
    log.write(())
    assert _events(path) == ["Start", "Recover"]


def test_what_was_done_already_is_kept_and_written_at_the_recovery(
    open_log: Open, path: Path, disk: Disk, clock: Clock
) -> None:
    log = open_log()
    disk.takes = 0
    with pytest.raises(UnavailableError):
        log.write([operation(1, "RotateKeyGroup")], keep=True)
    with pytest.raises(UnavailableError):
        log.write([operation(2)])
    disk.takes = None
    clock.now += 1
    log.write([operation(3)])
    assert _events(path) == ["Start", "Recover", "RotateKeyGroup", "Encrypt"]
    assert _records(path)[1]["unrecorded"] == 1
    assert _is_sound(path)
    clock.now += 1
    log.write([operation(4)])
    assert _events(path) == ["Start", "Recover", "RotateKeyGroup", "Encrypt", "Encrypt"]


def test_what_is_kept_is_bounded_and_the_rest_is_counted(
    open_log: Open, path: Path, disk: Disk, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MAX_KEPT_RECORDS >= 1
    monkeypatch.setattr(audit_log, "MAX_KEPT_RECORDS", 2)
    log = open_log()
    disk.takes = 0
    for number in range(5):
        with pytest.raises(UnavailableError):
            log.write([operation(number)], keep=True)
    disk.takes = None
    clock.now += 1
    log.check()
    assert _records(path)[1]["unrecorded"] == 3
    assert len(_records(path)) == 4


@pytest.mark.parametrize("again", [None, 0, 1, 7, 120])
def test_where_nothing_can_be_cut_off_the_torn_write_is_named(
    open_log: Open, path: Path, disk: Disk, clock: Clock, again: int | None
) -> None:
    probe = open_log()
    probe.write([operation(1), operation(2)])
    whole = lines(path.read_bytes())
    _crash(probe)
    ends = len(whole[1]), len(whole[1] + whole[2])
    for takes in (1, 100, *(end + step for end in ends for step in (-60, -2, -1, 0, 1)))[:-2]:
        for file in (path, head_path(path)):
            file.unlink()
        disk.may_shorten, disk.takes = True, None
        log = open_log()
        disk.may_shorten, disk.takes = False, takes
        with pytest.raises(UnavailableError):
            log.write([operation(1), operation(2)])
        clock.now += 1
        if again is not None:
            disk.takes = again
            log.check()
            assert log.is_failing
            clock.now += 1
        disk.takes = None
        log.write([operation(3)])
        assert not log.is_failing
        _crash(log)
        assert _is_sound(path), takes
        disk.may_shorten = True
        _crash(open_log())
        assert _is_sound(path), takes


def test_what_could_not_be_cut_off_at_once_is_before_the_recovery(
    open_log: Open, path: Path, disk: Disk, clock: Clock
) -> None:
    log = open_log()
    disk.may_shorten, disk.takes = False, 50
    with pytest.raises(UnavailableError):
        log.write([operation()])
    disk.may_shorten, disk.takes = True, None
    clock.now += 1
    log.check()
    assert ["torn" in one for one in _records(path)] == [False, False]
    assert _is_sound(path)


def test_behind_a_torn_line_that_has_to_stay_nothing_is_written_before_there_is_room_for_it(
    open_log: Open, path: Path, disk: Disk, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log()
    disk.may_shorten, disk.takes = False, 50
    with pytest.raises(UnavailableError):
        log.write([operation()])
    left = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    disk.takes = 40
    with monkeypatch.context() as patch:
        patch.setattr("kms.host.space.reserve", full)
        for _ in range(3):
            clock.now += 1
            log.check()
            assert log.trouble == "No space left on device"
        _crash(log)
        with pytest.raises(FileAccessError, match="No space left on device"):
            open_log()
        assert path.read_bytes() == left, "a second torn line would refuse the start"
    disk.takes = None
    _crash(open_log())
    assert _records(path)[-1]["torn"] == 50
    assert _is_sound(path)


def test_it_starts_after_a_crash_where_nothing_could_be_cut_off(open_log: Open, path: Path, disk: Disk) -> None:
    log = open_log()
    disk.may_shorten, disk.takes = False, 50
    with pytest.raises(UnavailableError):
        log.write([operation()])
    _crash(log)
    disk.takes = None
    _crash(open_log())
    assert _records(path)[-1]["torn"] == 50
    assert _is_sound(path)


def test_a_log_whose_disk_fails_at_the_end_says_so_and_lets_go(open_log: Open, disk: Disk, path: Path) -> None:
    log = open_log()
    disk.takes = 0
    log.close()
    assert log.trouble == "No space left on device"
    disk.takes = None
    open_log()
    assert _is_sound(path)


# A log that cannot be made durable


def test_after_a_failed_fsync_a_record_names_what_may_be_lost_and_has_to_be_durable_itself(
    open_log: Open, path: Path, disk: Disk, clock: Clock
) -> None:
    log = open_log()
    log.write([operation(1), operation(2)])
    disk.fsync_error = OSError(errno.EIO, "Input/output error")
    with pytest.raises(UnavailableError, match="Input/output error"):
        log.sync()
    disk.fsync_error = None
    # It succeeds now, and proves nothing.
    with pytest.raises(UnavailableError):
        log.sync()
    assert log.is_failing
    with pytest.raises(UnavailableError):
        log.write([operation(3)])
    recovered = _records(path)[-1]
    assert (recovered["event"], recovered["unsyncedFrom"], recovered["unsyncedTo"]) == ("Recover", 2, 3)
    assert log.is_failing
    log.sync()
    assert not log.is_failing
    clock.now += 1
    log.write([operation(4)])
    assert [one.get("event", one.get("request")) for one in _records(path)] == ["Start", 1, 2, "Recover", "Recover", 4]
    assert _records(path)[4]["unrecorded"] == 1
    assert _is_sound(path)


def test_an_fsync_that_fails_behind_the_recovery_needs_another(
    open_log: Open, path: Path, disk: Disk, clock: Clock
) -> None:
    log = open_log()
    log.write([operation()])
    disk.fsync_error = OSError(errno.EIO, "Input/output error")
    for _ in range(2):
        with pytest.raises(UnavailableError):
            log.sync()
        clock.now += 1
        log.check()
    disk.fsync_error = None
    log.sync()
    assert not log.is_failing
    assert [(one["unsyncedFrom"], one["unsyncedTo"]) for one in _records(path)[2:]] == [(2, 2), (2, 3)]


def test_a_head_that_cannot_be_written_is_trouble_too(
    log: AuditLog, path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    log.write([operation()])
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(UnavailableError, match=r"audit\.log\.head: No space left"):
            log.sync(force=True)
        log.check()
        for _ in range(3):
            with pytest.raises(UnavailableError):
                log.sync()
            clock.now += 1
            log.check()
        assert _events(path) == ["Start", "Encrypt", "Recover"]
    log.sync()
    assert not log.is_failing
    assert _is_sound(path)


# Rotation


def _rotated(path: Path, number: int = 1) -> Path:
    old = path.with_name(f"audit.log.{number}")
    path.rename(old)
    return old


def test_a_renamed_log_goes_on_in_a_new_file_and_the_chain_with_it(log: AuditLog, path: Path) -> None:
    log.write([operation(1)])
    old = _rotated(path)
    log.write([operation(2)])
    assert log.reopen()
    log.write([operation(3)])
    log.close()
    assert _events(old) == ["Start", "Encrypt", "Encrypt"]
    assert _events(path) == ["Continue", "Encrypt", "Stop"]
    assert path.stat().st_mode & 0o777 == 0o600
    assert _is_sound(old, path)


def test_without_a_rename_there_is_nothing_to_do(log: AuditLog, path: Path) -> None:
    assert not log.reopen()
    assert _events(path) == ["Start"]


def test_an_empty_private_file_is_taken_for_the_new_one(log: AuditLog, path: Path) -> None:
    old = _rotated(path)
    path.touch(0o600)
    assert log.reopen()
    assert _is_sound(old, path)


def test_another_file_or_one_that_others_may_read_is_refused_and_the_old_one_goes_on(log: AuditLog, path: Path) -> None:
    old = _rotated(path)
    path.write_bytes(b"x")
    path.chmod(0o600)
    with pytest.raises(AuditLogError, match="is another file and not empty; the audit log goes on in the old one"):
        log.reopen()
    path.write_bytes(b"")
    path.chmod(0o644)
    with pytest.raises(SecretFileError, match="chmod 600"):
        log.reopen()
    log.write([operation()])
    assert _events(old) == ["Start", "Encrypt"]
    assert path.read_bytes() == b""


def test_a_new_file_that_cannot_be_written_is_refused_and_the_old_one_goes_on(
    open_log: Open, path: Path, disk: Disk
) -> None:
    log = open_log()
    old = _rotated(path)
    disk.takes = 30
    with pytest.raises(FileAccessError, match="cannot begin"):
        log.reopen()
    disk.takes = None
    assert not log.is_failing
    log.write([operation()])
    assert log.reopen()
    assert _is_sound(old, path)


def test_it_goes_on_after_a_crash_in_the_first_write_of_a_new_file(open_log: Open, path: Path) -> None:
    log = open_log()
    log.write([operation()])
    old = _rotated(path)
    log.reopen()
    whole = path.read_bytes()
    _crash(log)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        # As it was at that moment.
        head = head_path(path)
        kept = head.read_bytes()
        _crash(open_log())
        assert _is_sound(old, path), length
        head.write_bytes(kept)


def test_the_old_file_is_made_durable_and_closed_by_the_next_sync(open_log: Open, path: Path, disk: Disk) -> None:
    log = open_log()
    log.write([operation()])
    old = log._position.descriptor
    _rotated(path)
    log.reopen()
    disk.fsyncs.clear()
    log.sync()
    assert old in disk.fsyncs
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(old)


def test_a_torn_write_at_the_end_of_a_full_disk_is_named_in_the_new_file(open_log: Open, path: Path, disk: Disk) -> None:
    log = open_log()
    disk.may_shorten, disk.takes = False, 50
    with pytest.raises(UnavailableError):
        log.write([operation(1)])
    with pytest.raises(UnavailableError):
        log.write([operation(2)], keep=True)
    old = _rotated(path)
    disk.takes = None
    assert log.reopen()
    assert not log.is_failing
    first = _records(path)[0]
    assert (first["event"], first["torn"], first["unrecorded"]) == ("Continue", 50, 1)
    assert _events(path) == ["Continue", "Encrypt"]
    assert _is_sound(old, path)


def test_what_a_failed_fsync_may_have_lost_is_named_in_the_new_file(open_log: Open, path: Path, disk: Disk) -> None:
    log = open_log()
    log.write([operation(1)])
    disk.fsync_error = OSError(errno.EIO, "Input/output error")
    with pytest.raises(UnavailableError):
        log.sync()
    old = _rotated(path)
    assert log.reopen()
    assert (_records(path)[0]["unsyncedFrom"], _records(path)[0]["unsyncedTo"]) == (2, 2)
    assert log.is_failing
    disk.fsync_error = None
    log.sync()
    assert not log.is_failing
    assert _is_sound(old, path)


def test_a_new_file_that_cannot_be_made_is_refused_and_the_old_one_goes_on(
    log: AuditLog, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    old = _rotated(path)
    monkeypatch.setattr(audit_log, "open_private", refuse)
    with pytest.raises(FileAccessError, match=r"cannot begin .*audit\.log: Too many open files"):
        log.reopen()
    log.write([operation()])
    assert _events(old) == ["Start", "Encrypt"]


# A file that is not what it should be


def test_a_directory_that_cannot_be_looked_at_is_trouble(
    log: AuditLog, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> os.stat_result:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(disk, "lstat", refuse, raising=False)
    log.check()
    assert log.trouble == "Permission denied"


def test_a_lock_or_a_file_that_cannot_be_made_is_an_error(
    open_log: Open, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(audit_log, "open_private", refuse)
        with pytest.raises(FileAccessError, match=r"cannot use the audit log .*: No space left on device"):
            open_log()
    path.with_name("audit.log.lock").unlink()
    path.with_name("audit.log.lock").mkdir()
    with pytest.raises(FileAccessError, match="cannot lock"):
        open_log()


def test_a_rename_is_tolerated_for_a_while(log: AuditLog, path: Path, clock: Clock) -> None:
    old = _rotated(path)
    log.check()
    clock.now += AUDIT_ROTATION_TIME - 0.1
    log.check()
    assert not log.is_failing
    clock.now += 0.1
    log.check()
    assert log.trouble == "its file was moved, and no SIGHUP has come"
    with pytest.raises(UnavailableError):
        log.write([operation()])
    assert log.reopen()
    log.write([operation()])
    assert _records(path)[0]["unrecorded"] == 1
    assert _is_sound(old, path)


def test_so_is_another_file_in_its_place_and_it_may_come_back(log: AuditLog, path: Path, clock: Clock) -> None:
    old = _rotated(path)
    path.touch()
    log.check()
    clock.now += AUDIT_ROTATION_TIME
    log.check()
    assert log.is_failing
    old.rename(path)
    log.check()
    assert not log.is_failing
    _rotated(path)
    log.check()
    clock.now += AUDIT_ROTATION_TIME - 1
    log.check()
    assert not log.is_failing


def test_a_file_that_was_removed_is_trouble_at_once(log: AuditLog, path: Path) -> None:
    path.unlink()
    log.check()
    assert log.trouble == "its file was removed; send SIGHUP to begin another"
    assert log.reopen()
    log.check()
    assert not log.is_failing
    assert _records(path)[0]["event"] == "Continue"


@pytest.mark.parametrize("length", [0, 100])
def test_a_file_that_was_cut_short_is_trouble_at_once(log: AuditLog, path: Path, clock: Clock, length: int) -> None:
    log.write([operation()])
    os.truncate(path, length)
    log.check()
    assert log.trouble == "its file was cut short; move it away and send SIGHUP"
    clock.now += 1
    with pytest.raises(UnavailableError):
        log.write([operation()])
    old = _rotated(path)
    assert log.reopen()
    log.check()
    assert not log.is_failing
    # What was cut off is missed all the same.
    assert _verified(old, path).count >= 1


def test_a_file_that_somebody_else_wrote_to_is_trouble_at_once(log: AuditLog, path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"{}\n")
    log.check()
    assert log.trouble == "somebody else has written to its file; move it away and send SIGHUP"
    old = _rotated(path)
    assert log.reopen()
    assert _verified(old, path).count == 1


# Changes of the passphrase


def test_a_log_is_handed_over_and_goes_on_under_the_new_keys(open_log: Open, path: Path, keys: AuditKeys) -> None:
    chain = [keys, audit_keys(2), audit_keys(3)]
    open_log().close()
    for old, new in ((chain[0], chain[1]), (chain[1], chain[2])):
        with handing_over(path, old, new, generation=5):
            pass
        log = open_log(keys=new)
        log.write([operation()])
        log.close()
    assert _events(path) == [
        *("Start", "Stop", "ChangePassphrase", "Start", "Encrypt", "Stop"),
        *("ChangePassphrase", "Start", "Encrypt", "Stop"),
    ]
    assert _is_sound(path, keys=chain)
    assert "belongs to another keystore" in _refusal(open_log, keys=chain[1])


class SaveError(Exception):
    pass


def test_where_the_save_failed_the_log_goes_on_under_the_old_keys(open_log: Open, path: Path, keys: AuditKeys) -> None:
    open_log().close()
    with pytest.raises(SaveError), handing_over(path, keys, audit_keys(2), generation=5):
        raise SaveError
    open_log().close()
    assert _events(path) == ["Start", "Stop", "ChangePassphrase", "Start", "Stop"]
    assert _is_sound(path)


def test_after_a_crash_between_save_and_head_either_keys_open_the_log(open_log: Open, path: Path, keys: AuditKeys) -> None:
    open_log().close()
    with pytest.raises(SaveError), handing_over(path, keys, audit_keys(2), generation=5):
        raise SaveError
    state = path.read_bytes(), head_path(path).read_bytes()
    for survivor, chain in ((keys, [keys]), (audit_keys(2), [keys, audit_keys(2)])):
        path.write_bytes(state[0])
        head_path(path).write_bytes(state[1])
        open_log(keys=survivor).close()
        assert _is_sound(path, keys=chain)


def test_a_log_that_was_moved_away_is_handed_over_by_its_head(open_log: Open, path: Path, keys: AuditKeys) -> None:
    open_log().close()
    with handing_over(path, keys, audit_keys(2), generation=5):
        pass
    old = _rotated(path)
    open_log(keys=audit_keys(2)).close()
    assert _is_sound(old, path, keys=[keys, audit_keys(2)])


def test_a_log_under_other_keys_is_not_handed_over(open_log: Open, path: Path) -> None:
    open_log().close()
    before = path.read_bytes()
    with pytest.raises(AuditLogError), handing_over(path, audit_keys(3), audit_keys(2), generation=5):
        raise AssertionError("it must not come to the save")
    assert path.read_bytes() == before


def test_the_head_is_written_in_place_and_takes_no_space(
    log: AuditLog, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inode = head_path(path).stat().st_ino

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(durable, "write_file", full)
    for number in range(2, 6):
        log.write([operation(number)])
        log.sync(force=True)
        assert (_head_seq(path), head_path(path).stat().st_ino) == (number, inode)
    assert head_path(path).stat().st_size == MAX_AUDIT_HEAD_BYTES


def test_a_head_that_was_exchanged_is_made_anew(log: AuditLog, path: Path) -> None:
    head_path(path).unlink()
    log.write([operation()])
    log.sync(force=True)
    assert _head_seq(path) == 2


def test_space_is_kept_behind_the_end_of_the_log_and_given_back(open_log: Open, path: Path) -> None:
    log = open_log()
    if not log._can_reserve:
        pytest.skip("this file system keeps no space")
    assert path.stat().st_blocks * 512 >= AUDIT_RESERVE_BYTES
    assert path.stat().st_size < 1000
    log.close()
    assert path.stat().st_blocks * 512 < AUDIT_RESERVE_BYTES
    assert _verified(path).count == 0


def test_what_was_used_of_the_space_is_renewed(open_log: Open, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(space, "reserve", lambda _, offset, length: asked.append((offset, length)))
    monkeypatch.setattr(audit_log, "AUDIT_RESERVE_BYTES", 1000)
    log = open_log()
    log.check()
    assert asked == [(0, 1000)]
    while log._position.length < 600:
        log.write([operation()])
    log.check()
    assert asked == [(0, 1000), (log._position.length, 1000)]
    _rotated(path)
    log.reopen()
    assert asked[-1][0] < 500, "in the new file, too"


def test_where_no_space_can_be_kept_that_is_said_and_a_full_disk_is_told_apart(
    open_log: Open, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = errno.EOPNOTSUPP

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(space, "reserve", fail)
    log = open_log()
    assert not log.is_scarce
    assert any("cannot keep space" in remark for remark in log.remarks)
    log.close()
    number = errno.ENOSPC
    log = open_log()
    assert log.is_scarce
    assert log.remarks == []
    monkeypatch.setattr(space, "reserve", lambda *_: None)
    log.check()
    assert not log.is_scarce

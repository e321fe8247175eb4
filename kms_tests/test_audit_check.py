"""Verifying an audit log's files: their keys, their head, and the keystore that they belong to."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.exceptions import AlreadyFinalized

from kms.core.audit_verifier import Verifier
from kms.core.derive import KdfParameters
from kms.core.keyring import RotateGroup, apply
from kms.core.secret import Secret
from kms.errors import InputError, InputMissingError, KeystoreError, SaveFailedError, WrongPassphraseError
from kms.host import durable
from kms.limits import MAX_AUDIT_LINE_BYTES
from kms.storage import file
from kms.storage.audit_check import verify
from kms.storage.audit_head import head_path
from kms.storage.audit_log import AuditLog
from kms.storage.audit_reader import AuditReader
from kms.storage.lock import KeystoreLock
from kms_tests import java_keystore
from kms_tests.audit_logs import lines, operation, told
from kms_tests.commits import commit
from kms_tests.java_keystore import Group, Version

NOW = 1_700_000_000


def _secret(passphrase: bytes) -> Secret:
    return Secret(bytearray(passphrase))


class Install:
    """A keystore and its audit log, and what a server and `kms-admin` do to them."""

    def __init__(self, data: Path, tiny: KdfParameters) -> None:
        self.keystore = data / "keystore.json"
        self.log = data / "audit.log"
        self.passphrase = b"one"
        self.tiny = tiny
        with KeystoreLock(self.keystore) as lock:
            file.initialise(lock, _secret(self.passphrase), now=NOW, parameters=tiny)

    def serve(self, requests: int = 3, *, rotations: int = 0, accept_rollback: bool = False) -> None:
        """Start, answer so many requests and make so many versions, and stop."""
        with KeystoreLock(self.keystore) as lock:
            keystore, keyring = file.load(lock, _secret(self.passphrase))
            keys = keystore.audit_keys
            with AuditLog(self.log, keys, generation=keyring.generation, accept_rollback=accept_rollback) as log:
                log.write([operation(number) for number in range(requests)])
                for _ in range(rotations):
                    keyring = apply(keyring, RotateGroup("default"), now=NOW, mint=keystore.mint).next_generation()
                    commit(keystore, keyring)
                    log.generation = keyring.generation
                    log.write([operation(9, "RotateKeyGroup")])

    def change_passphrase(self, new: bytes) -> None:
        with KeystoreLock(self.keystore) as lock:
            file.change_passphrase(lock, _secret(self.passphrase), _secret(new), parameters=self.tiny, audit_log=self.log)
        self.passphrase = new

    def rotate(self, number: int) -> Path:
        old = self.log.with_name(f"audit.log.{number}")
        self.log.rename(old)
        return old

    def verify(self, *files: Path, needs_head: bool = True) -> Verifier:
        with AuditReader(self.keystore, _secret(self.passphrase)) as reader:
            return verify(files or (self.log,), reader, needs_head=needs_head)


@pytest.fixture
def install(data: Path, tiny: KdfParameters) -> Install:
    return Install(data, tiny)


def _finding(report: Verifier) -> str:
    assert report.count == 1, told(report)
    return told(report)[0]


def test_a_log_is_authentic_over_restarts_and_rotations(install: Install) -> None:
    install.serve()
    files = [install.rotate(2)]
    install.serve(rotations=2)
    files.append(install.rotate(1))
    install.serve()
    report = install.verify(*files, install.log)
    assert (report.count, told(report), report.generation, len(report.spans)) == (0, [], 3, 3)


def test_two_changes_of_the_passphrase_leave_it_authentic_under_the_last(install: Install) -> None:
    install.serve()
    files = [install.rotate(1)]
    install.serve()
    for passphrase in (b"two", b"three"):
        install.change_passphrase(passphrase)
        install.serve()
    report = install.verify(*files, install.log)
    assert (report.count, told(report)) == (0, [])
    assert report.seq == 5 + 5 + 2 * 6
    install.passphrase = b"two"
    with pytest.raises(WrongPassphraseError):
        install.verify()


def test_right_after_a_change_it_is_authentic_too(install: Install) -> None:
    install.serve()
    install.change_passphrase(b"two")
    assert install.verify().count == 0


def test_killed_before_the_head_was_handed_over_it_still_is(install: Install) -> None:
    install.serve()
    old = install.log.read_bytes()
    install.change_passphrase(b"two")
    head = head_path(install.log).read_bytes()
    assert install.log.read_bytes().startswith(old)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AuditLog, "hand_over", lambda self, successor: self._let_go())
        install.change_passphrase(b"three")
    assert head_path(install.log).read_bytes() != head
    assert install.verify().count == 0
    install.serve()
    assert install.verify().count == 0


def test_the_old_passphrase_makes_no_head_for_what_follows(install: Install) -> None:
    install.serve()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AuditLog, "hand_over", lambda self, successor: self._let_go())
        install.change_passphrase(b"two")
    old_head = head_path(install.log).read_bytes()
    install.serve()
    head_path(install.log).write_bytes(old_head)
    assert _finding(install.verify()).endswith("audit.log.head:0: was altered, or belongs to another log")


def test_a_change_that_failed_leaves_it_authentic_under_the_old_one(install: Install) -> None:
    install.serve()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "write_file", _only_for(head_path(install.log), fail))
        with pytest.raises(SaveFailedError):
            install.change_passphrase(b"two")
    assert install.verify().count == 0
    install.serve()
    install.change_passphrase(b"two")
    assert install.verify().count == 0


def _only_for(path: Path, otherwise: Callable[..., None]) -> Callable[..., object]:
    real = durable.write_file
    return lambda target, data, *_: real(target, data) if target == path else otherwise()


def test_an_older_keystore_is_named_with_both_generations(install: Install) -> None:
    install.serve()
    old = install.keystore.read_bytes()
    install.serve(rotations=3)
    assert install.verify().count == 0
    install.keystore.write_bytes(old)
    assert "is older than the log: its generation is 1, and the log ends at 4" in _finding(install.verify())
    install.serve(accept_rollback=True)
    assert install.verify().count == 0


def test_a_server_that_is_running_may_save_meanwhile(install: Install) -> None:
    install.serve()
    with AuditReader(install.keystore, _secret(b"one")) as reader:
        install.serve(rotations=2)
        assert verify([install.log], reader, needs_head=True).count == 0


def test_records_that_come_while_it_is_read_are_no_finding(install: Install) -> None:
    with KeystoreLock(install.keystore) as lock:
        keystore, keyring = file.load(lock, _secret(b"one"))
        with AuditLog(install.log, keystore.audit_keys, generation=keyring.generation) as log:
            log.write([operation()])
            assert install.verify().count == 0
            log.sync(force=True)
            log.write([operation()])
            assert install.verify().count == 0


@pytest.mark.parametrize("needs_head", [True, False])
def test_a_log_that_was_cut_short_is_found_by_its_head(install: Install, needs_head: bool) -> None:
    install.serve()
    install.log.write_bytes(b"".join(lines(install.log.read_bytes())[:-2]))
    assert _finding(install.verify(needs_head=needs_head)).endswith(
        "audit.log:0: was cut short: it ends with record 3, and record 5 was in it"
    )


def test_the_log_that_is_written_needs_its_head_and_a_rotated_one_has_none(install: Install) -> None:
    install.serve()
    head_path(install.log).unlink()
    assert _finding(install.verify()).endswith("audit.log.head:0: is missing: it tells whether the log was cut short")
    report = install.verify(install.rotate(1), needs_head=False)
    assert report.count == 0
    assert "whether it was cut short at its end cannot be told" in told(report)[0]


@pytest.mark.parametrize("head", [b"", b"{}", b"x" * 2000])
def test_a_head_that_is_none_is_a_finding(install: Install, head: bytes) -> None:
    install.serve()
    head_path(install.log).write_bytes(head)
    assert "audit.log.head:0: was altered" in _finding(install.verify())


def test_an_empty_log_is_a_finding(install: Install) -> None:
    install.log.touch(0o600)
    assert "audit.log:0: holds no record" in _finding(install.verify())


def test_a_line_without_an_end_is_read_in_pieces(install: Install) -> None:
    install.serve()
    content = lines(install.log.read_bytes())
    install.log.write_bytes(b"".join([*content[:2], b"x" * (3 * MAX_AUDIT_LINE_BYTES) + b"\n", *content[2:]]))
    assert _finding(install.verify()).endswith("audit.log:3: is not a record")


def test_a_log_of_another_keystore_is_not_authentic(install: Install, tmp_path: Path, tiny: KdfParameters) -> None:
    install.serve()
    other = tmp_path / "other"
    other.mkdir(0o700)
    stranger = Install(other, tiny)
    stranger.serve(rotations=2)
    report = install.verify(stranger.log)
    assert report.count == 1 + 7
    assert report.spans[0].records == 0


def test_only_files_that_can_be_read_twice_are_verified(install: Install, data: Path) -> None:
    install.serve()
    with pytest.raises(InputMissingError, match=r"there is no audit log .*; name its files, the oldest first"):
        install.verify(data / "none")
    os.mkfifo(data / "pipe")
    for path in (data, data / "pipe"):
        with pytest.raises(InputError, match="is not a regular file"):
            install.verify(path)


def test_a_keystore_of_format_2_has_an_audit_log_too(data: Path, tiny: KdfParameters) -> None:
    install = Install(data, tiny)
    install.keystore.write_bytes(java_keystore.write([Group("default", 1, [Version(1, "ACTIVE")])], "one"))
    install.serve()
    assert (install.verify().count, install.verify().generation) == (0, 0)
    install.change_passphrase(b"two")
    install.serve()
    assert told(install.verify()) == []


def _peak(install: Install) -> int:
    tracemalloc.start()
    try:
        install.verify()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_long_log_or_line_takes_no_more_memory_than_a_short_one(install: Install) -> None:
    install.serve(100)
    short = _peak(install)
    install.serve(10_000)
    assert _peak(install) < short + 100_000
    with install.log.open("ab") as log:
        log.write(b"x" * 3_000_000)
    assert _peak(install) < short + 100_000


def test_the_keystore_has_to_be_authentic_before_its_keys_are_used(data: Path, tiny: KdfParameters) -> None:
    install = Install(data, tiny)
    for keystore in (
        install.keystore.read_bytes(),
        java_keystore.write([Group("default", 1, [Version(1, "ACTIVE")])], "one"),
    ):
        install.keystore.write_bytes(keystore)
        AuditReader(install.keystore, _secret(b"one"))
        with pytest.raises(WrongPassphraseError):
            AuditReader(install.keystore, _secret(b"two"))
        install.keystore.write_bytes(keystore.replace(b"1700000000", b"1700000001"))
        with pytest.raises(KeystoreError):
            AuditReader(install.keystore, _secret(b"one"))


def test_the_keys_are_wiped_with_the_keystore(install: Install) -> None:
    with AuditReader(install.keystore, _secret(b"one")) as reader:
        keys = reader.keys
    with KeystoreLock(install.keystore) as lock:
        keystore, _ = file.load(lock, _secret(b"one"))
    keystore.wipe()
    for wiped in (keys, keystore.audit_keys):
        with pytest.raises(AlreadyFinalized):
            wiped.mac(b"")

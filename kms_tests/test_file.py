"""The keystore file: one owner at a time, loaded with suspicion, saved durably."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from kms.core.derive import KdfParameters
from kms.core.keyring import EMPTY, CreateGroup, DestroyVersion, Keyring, RotateGroup, apply
from kms.core.secret import Secret
from kms.errors import (
    FileAccessError,
    InputMissingError,
    KeystoreError,
    KeystoreLockedError,
    KeystoreReplacedError,
    SaveFailedError,
    SaveOutcomeUnknownError,
    SecretFileError,
    WrongPassphraseError,
)
from kms.host import durable
from kms.storage import content, file
from kms.storage.file import Keystore
from kms.storage.lock import KeystoreLock
from kms.storage.stored import KdfHeader
from kms_tests.commits import commit
from kms_tests.keks import opened, sealed, slot

NOW = 1_700_000_000


def _secret(passphrase: bytes = b"correct horse") -> Secret:
    return Secret(bytearray(passphrase))


@pytest.fixture
def path(data: Path) -> Path:
    return data / "keystore.json"


@pytest.fixture
def made(path: Path, tiny: KdfParameters) -> Path:
    """A keystore that was initialised and released."""
    with KeystoreLock(path) as lock:
        file.initialise(lock, _secret(), now=NOW, parameters=tiny)
    return path


class _Held:
    """In the place of a lock that is held for as long as a keystore is used."""

    def __init__(self, keystore: Path) -> None:
        self.keystore = keystore

    def is_held(self) -> bool:
        return True


def _load(path: Path, passphrase: bytes = b"correct horse") -> tuple[Keystore, Keyring]:
    return file.load(cast(KeystoreLock, _Held(path)), _secret(passphrase))


def _locked(path: Path) -> None:
    with KeystoreLock(path) as lock:
        file.load(lock, _secret())


def _rotated(keystore: Keystore, keyring: Keyring) -> Keyring:
    return apply(keyring, RotateGroup("default"), now=NOW, mint=keystore.mint).next_generation()


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def _fail(*_: object, **__: object) -> Any:
    raise OSError(28, "No space left on device")


def _fail_to_rename(*_: object, **__: object) -> Any:
    raise OSError(5, "Input/output error")


# the lock


def test_a_second_lock_is_refused_with_the_pid_of_the_holder(path: Path) -> None:
    with KeystoreLock(path), pytest.raises(KeystoreLockedError, match=f"in use by process {os.getpid()}; stop it first"):
        KeystoreLock(path)


def test_the_lock_of_another_process_names_that_process(path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom kms.storage.lock import KeystoreLock\n"
        "with KeystoreLock(Path(sys.argv[1])):\n    print(flush=True)\n    sys.stdin.read()"
    )
    root = Path(__file__).parent.parent
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(KeystoreLockedError, match=f"in use by process {holder.pid};"):
            KeystoreLock(path)
        holder.communicate(timeout=30)
    KeystoreLock(path).close()


def test_a_lock_file_that_names_nobody_is_said_to_be_of_an_unknown_process(path: Path) -> None:
    with KeystoreLock(path) as lock:
        os.truncate(lock.keystore.with_name("keystore.json.lock"), 0)
        with pytest.raises(KeystoreLockedError, match="process unknown"):
            KeystoreLock(path)


def test_a_failure_to_close_the_lock_is_no_failure_of_what_was_done_under_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_close = os.close

    def close(descriptor: int) -> None:
        real_close(descriptor)
        raise OSError(5, "Input/output error")

    with KeystoreLock(path):
        monkeypatch.setattr(os, "close", close)
    monkeypatch.undo()
    KeystoreLock(path).close()


def test_a_lock_that_was_released_can_be_taken_again(path: Path) -> None:
    KeystoreLock(path).close()
    KeystoreLock(path).close()


def test_the_lock_file_is_never_unlinked(path: Path) -> None:
    with KeystoreLock(path):
        before = path.with_name("keystore.json.lock").stat().st_ino
    with KeystoreLock(path):
        pass
    assert path.with_name("keystore.json.lock").stat().st_ino == before


def test_the_lock_file_is_private(path: Path) -> None:
    KeystoreLock(path).close()
    assert _mode(path.with_name("keystore.json.lock")) == 0o600


def test_a_refused_lock_leaves_the_pid_of_the_holder_in_place(path: Path) -> None:
    with KeystoreLock(path):
        for _ in range(2):
            with pytest.raises(KeystoreLockedError, match=str(os.getpid())):
                KeystoreLock(path)


def test_the_lock_makes_the_directory_private(tmp_path: Path) -> None:
    KeystoreLock(tmp_path / "new" / "keystore.json").close()
    assert _mode(tmp_path / "new") == 0o700


def test_the_lock_refuses_a_directory_that_others_may_enter(path: Path) -> None:
    path.parent.chmod(0o755)
    with pytest.raises(SecretFileError, match="chmod 700"):
        KeystoreLock(path)


def test_the_lock_file_is_not_followed_through_a_link(path: Path) -> None:
    path.with_name("keystore.json.lock").symlink_to(path.with_name("elsewhere"))
    with pytest.raises(FileAccessError, match="cannot lock"):
        KeystoreLock(path)
    assert not path.with_name("elsewhere").exists()


@pytest.mark.parametrize("name", [".keystore.json.tmp-0011", ".keystore.json.usage.tmp-0011", ".keystore.json.v2.tmp-0011"])
def test_a_stale_temp_file_is_removed_under_the_lock(path: Path, name: str) -> None:
    path.with_name(name).touch()
    KeystoreLock(path).close()
    assert not path.with_name(name).exists()


def test_a_refused_lock_removes_no_temp_file(path: Path) -> None:
    with KeystoreLock(path):
        path.with_name(".keystore.json.tmp-0011").touch()
        with pytest.raises(KeystoreLockedError):
            KeystoreLock(path)
        assert path.with_name(".keystore.json.tmp-0011").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EINTR, errno.EIO, errno.ENOSYS])
def test_a_lock_that_fails_is_not_taken_for_one_that_is_held(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(FileAccessError, match=f"cannot lock {path}.lock: {os.strerror(number)}"):
        KeystoreLock(path)


def test_a_full_disk_is_an_io_error_and_releases_the_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", _fail)
    with pytest.raises(FileAccessError, match="No space left"):
        KeystoreLock(path)
    monkeypatch.undo()
    KeystoreLock(path).close()


# initialise


def test_a_new_keystore_has_the_group_default_alone(path: Path, tiny: KdfParameters) -> None:
    with KeystoreLock(path) as lock:
        _, keyring = file.initialise(lock, _secret(), now=NOW, parameters=tiny)
    assert list(keyring.groups) == ["default"]
    assert (keyring.generation, keyring.groups["default"].active.version) == (1, 1)
    assert keyring.groups["default"].created_at == NOW


def test_a_new_keystore_is_on_disk_privately(made: Path) -> None:
    assert _mode(made) == 0o600
    assert _mode(made.parent) == 0o700
    assert sorted(entry.name for entry in made.parent.iterdir()) == ["keystore.json", "keystore.json.lock"]


def test_a_new_keystore_loads(made: Path) -> None:
    assert list(_load(made)[1].groups) == ["default"]


@pytest.mark.parametrize("there", ["file", "dangling link"])
def test_what_is_there_already_is_not_initialised_over(path: Path, tiny: KdfParameters, there: str) -> None:
    if there == "file":
        path.write_bytes(b"precious")
    else:
        path.symlink_to("nowhere")
    with KeystoreLock(path) as lock, pytest.raises(KeystoreError, match="already; it is not touched"):
        file.initialise(lock, _secret(), now=NOW, parameters=tiny)
    assert path.is_symlink() or path.read_bytes() == b"precious"


def test_two_keystores_of_one_passphrase_have_two_salts(path: Path, made: Path, tiny: KdfParameters) -> None:
    first = json.loads(made.read_bytes())["kdf"]["salt"]
    made.unlink()
    with KeystoreLock(path) as lock:
        file.initialise(lock, _secret(), now=NOW, parameters=tiny)
    assert json.loads(path.read_bytes())["kdf"]["salt"] != first


def test_the_kdf_costs_are_stored_with_the_keystore(path: Path) -> None:
    with KeystoreLock(path) as lock:
        file.initialise(lock, _secret(), now=NOW, parameters=KdfParameters(16, 2, 2))
    kdf = json.loads(path.read_bytes())["kdf"]
    assert (kdf["memoryKiB"], kdf["iterations"], kdf["parallelism"]) == (16, 2, 2)


# load


def test_a_missing_keystore_is_named_with_what_makes_one(path: Path) -> None:
    with pytest.raises(InputMissingError, match=f"no keystore at {path}; make one with: kms-admin init"):
        _load(path)


def test_a_wrong_passphrase_leaves_the_file_as_it_is_and_exits_with_2(made: Path) -> None:
    before = made.read_bytes()
    with pytest.raises(WrongPassphraseError) as caught:
        _load(made, b"incorrect horse")
    assert caught.value.exit_code == 2
    assert made.read_bytes() == before


def test_an_altered_keystore_is_left_as_it_is_and_exits_with_65(made: Path) -> None:
    altered = made.read_bytes().replace(b"default", b"defaulT")
    made.write_bytes(altered)
    with pytest.raises(KeystoreError) as caught:
        _load(made)
    assert caught.value.exit_code == 65
    assert made.read_bytes() == altered


def test_a_keystore_that_others_may_read_is_refused(made: Path) -> None:
    made.chmod(0o644)
    with pytest.raises(SecretFileError, match="chmod 600"):
        _load(made)


def test_a_keystore_behind_a_link_is_refused(made: Path) -> None:
    made.rename(made.with_name("real"))
    made.symlink_to("real")
    with pytest.raises(SecretFileError, match="symbolic link"):
        _load(made)


def test_a_file_larger_than_any_keystore_is_refused_unread(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "MAX_KEYSTORE_BYTES", 10)
    with pytest.raises(KeystoreError, match="larger than any keystore"):
        _load(made)


def test_a_read_that_fails_names_the_file(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def __enter__(self) -> Failing:
            return self

        def __exit__(self, *_: object) -> None:
            os.close(self.descriptor)

        def __init__(self, descriptor: int, _mode: str) -> None:
            self.descriptor = descriptor

        def fileno(self) -> int:
            return self.descriptor

        read = _fail

    monkeypatch.setattr(os, "fdopen", Failing)
    with pytest.raises(FileAccessError, match="cannot read"):
        content.read(made)


def test_a_keystore_of_a_format_to_come_is_refused(made: Path) -> None:
    made.write_bytes(made.read_bytes().replace(b'"formatVersion":4', b'"formatVersion":5'))
    with pytest.raises(KeystoreError, match="format 5, of a later release"):
        _load(made)


def test_what_is_loaded_was_made_durable_before_it_was_read(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    real_read = content.read_file

    def read(path: Path) -> Any:
        steps.append("read")
        return real_read(path)

    monkeypatch.setattr(durable, "sync_names", lambda path: steps.append(f"sync {path.name}"))
    monkeypatch.setattr(content, "read_file", read)
    _load(made)
    assert steps == [f"sync {made.parent.name}", "read"]


def test_a_keystore_that_cannot_be_made_durable_is_not_used(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "sync_names", _fail)
    with pytest.raises(FileAccessError, match=r"cannot make .* durable: No space left on device; check the disk"):
        _load(made)


# save


def test_what_is_saved_is_what_loads(made: Path) -> None:
    keystore, keyring = _load(made)
    saved = _rotated(keystore, keyring)
    commit(keystore, saved)
    assert _load(made)[1] == saved
    assert saved.generation == keyring.generation + 1


def test_a_save_leaves_the_file_private(made: Path) -> None:
    keystore, keyring = _load(made)
    commit(keystore, _rotated(keystore, keyring))
    assert _mode(made) == 0o600
    assert sorted(entry.name for entry in made.parent.iterdir()) == ["keystore.json", "keystore.json.lock"]


def test_a_destroyed_kek_is_not_in_the_file_any_more(made: Path) -> None:
    keystore, keyring = _load(made)
    wrapped = json.loads(made.read_bytes())["keyGroups"][0]["versions"][0]["wrappedKey"]
    rotated = _rotated(keystore, keyring)
    commit(keystore, rotated)
    assert wrapped.encode() in made.read_bytes()
    commit(keystore, apply(rotated, DestroyVersion("default", 1), now=NOW, mint=keystore.mint).next_generation())
    assert wrapped.encode() not in made.read_bytes()


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_save_that_fails_before_the_rename_changes_nothing_and_the_next_one_works(
    made: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    keystore, keyring = _load(made)
    before = made.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, _fail)
        with pytest.raises(SaveFailedError, match="No space left on device; nothing was changed") as caught:
            commit(keystore, _rotated(keystore, keyring))
    assert caught.value.exit_code == 74
    assert made.read_bytes() == before
    assert _load(made)[1] == keyring
    saved = _rotated(keystore, keyring)
    commit(keystore, saved)
    assert _load(made)[1] == saved


def test_what_fails_at_each_size_that_a_load_refuses_is_refused_by_a_save(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keystore, keyring = _load(made)
    before = made.read_bytes()
    rotated = _rotated(keystore, keyring)
    monkeypatch.setattr(file, "MAX_KEYSTORE_BYTES", len(before))
    with pytest.raises(SaveFailedError, match="larger than any keystore; nothing was changed"):
        commit(keystore, rotated)
    assert made.read_bytes() == before
    assert _load(made)[1] == keyring


@pytest.mark.parametrize("number", [errno.EPERM, errno.EBUSY, errno.EROFS, errno.EXDEV, errno.ENOSPC])
def test_a_rename_that_is_refused_at_once_has_changed_nothing_and_the_next_save_works(
    number: int, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keystore, keyring = _load(made)
    before = made.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        with pytest.raises(SaveFailedError, match="nothing was changed") as caught:
            commit(keystore, _rotated(keystore, keyring))
    assert ("mount its directory instead" in str(caught.value)) == (number in (errno.EBUSY, errno.EXDEV))
    assert made.read_bytes() == before
    assert not durable.temp_files(made)
    commit(keystore, _rotated(keystore, keyring))


def test_what_is_beside_it_is_not_written_either_where_it_is_anothers(made: Path) -> None:
    keystore, keyring = _load(made)
    keystore.look()
    commit(keystore, _rotated(keystore, keyring))
    keystore.look()
    made.write_bytes(made.read_bytes().replace(b'"generation":', b'"generation":1'))
    with pytest.raises(KeystoreReplacedError, match="exchanged"):
        keystore.look()


def test_a_look_waits_for_a_save_that_is_under_way(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keystore, keyring = _load(made)
    looks: list[threading.Thread] = []
    failures: list[Exception] = []

    def look() -> None:
        try:
            keystore.look()
        except Exception as error:
            failures.append(error)

    real = durable.write_file

    def saved(*arguments: Any) -> Any:
        state = real(*arguments)
        # Between the rename and the moment in which it is known that it was ours.
        looks.append(threading.Thread(target=look))
        looks[0].start()
        looks[0].join(0.05)
        assert looks[0].is_alive()
        return state

    monkeypatch.setattr(durable, "write_file", saved)
    commit(keystore, _rotated(keystore, keyring))
    looks[0].join()
    assert failures == []


def test_nothing_is_saved_over_what_another_has_put_there(made: Path) -> None:
    keystore, keyring = _load(made)
    ours = made.read_bytes()
    others = ours.replace(b'"generation":1', b'"generation":2')
    for put in (
        lambda: made.write_bytes(others),
        lambda: (made.with_name("other").write_bytes(others), made.with_name("other").replace(made)),
        lambda: made.write_bytes(ours[:-1]),
    ):
        made.write_bytes(ours)
        made.chmod(0o600)
        keystore, keyring = _load(made)
        put()
        made.chmod(0o600)
        there = made.read_bytes()
        with pytest.raises(KeystoreReplacedError, match=r"exchanged it\. Nothing was saved") as caught:
            commit(keystore, _rotated(keystore, keyring))
        assert caught.value.exit_code == 75
        assert made.read_bytes() == there
        assert not durable.temp_files(made)


def test_nothing_is_saved_where_the_keystore_was_removed(made: Path) -> None:
    keystore, keyring = _load(made)
    made.unlink()
    with pytest.raises(KeystoreReplacedError, match="removed it"):
        commit(keystore, _rotated(keystore, keyring))
    assert not made.exists()


def test_a_backup_that_leaves_the_content_as_it_is_is_no_reason_to_stop(made: Path) -> None:
    keystore, keyring = _load(made)
    os.link(made, made.with_name("backup"))
    first = _rotated(keystore, keyring)
    commit(keystore, first)
    os.utime(made, (1, 1))
    copy = made.with_name("copy")
    copy.write_bytes(made.read_bytes())
    copy.chmod(0o600)
    copy.replace(made)
    commit(keystore, _rotated(keystore, first))
    assert _load(made)[1].generation == first.generation + 1


def test_nothing_is_saved_without_the_lock_that_others_would_have_to_take(made: Path, tiny: KdfParameters) -> None:
    lock_file = made.with_name("keystore.json.lock")
    with KeystoreLock(made) as lock:
        keystore, keyring = file.load(lock, _secret())
        lock_file.unlink()
        with pytest.raises(KeystoreReplacedError, match=r"lock of .* was removed or exchanged"):
            commit(keystore, _rotated(keystore, keyring))
        with KeystoreLock(made) as another:
            second, theirs = file.load(another, _secret())
            commit(second, _rotated(second, theirs))
            with pytest.raises(KeystoreReplacedError):
                commit(keystore, _rotated(keystore, keyring))
            saved = _load(made)[1]
            assert saved.generation == keyring.generation + 1


def test_what_is_put_there_while_the_passphrase_is_derived_is_not_saved_over(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = made.read_bytes() + b"\n"
    real = KdfHeader.derive

    def derive(self: KdfHeader, passphrase: Secret) -> Secret:
        made.write_bytes(others)
        return real(self, passphrase)

    monkeypatch.setattr(KdfHeader, "derive", derive)
    keystore, keyring = _load(made)
    with pytest.raises(KeystoreReplacedError):
        commit(keystore, _rotated(keystore, keyring))
    assert made.read_bytes() == others


def test_nor_is_what_is_put_there_right_after_a_save(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keystore, keyring = _load(made)
    real = durable.write_file

    def raced(*arguments: Any) -> Any:
        written = real(*arguments)
        made.with_name("other").write_bytes(b"another's")
        made.with_name("other").replace(made)
        made.chmod(0o600)
        return written

    with monkeypatch.context() as patch:
        patch.setattr(durable, "write_file", raced)
        saved = _rotated(keystore, keyring)
        commit(keystore, saved)
    with pytest.raises(KeystoreReplacedError):
        commit(keystore, _rotated(keystore, saved))
    assert made.read_bytes() == b"another's"


def test_a_new_keystore_is_not_put_over_one_that_came_meanwhile(path: Path, tiny: KdfParameters) -> None:
    real = durable.write_file

    def raced(*arguments: Any) -> None:
        path.write_bytes(b"another")
        real(*arguments)

    with KeystoreLock(path) as lock, pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "write_file", raced)
        with pytest.raises(KeystoreReplacedError):
            file.initialise(lock, _secret(), now=NOW, parameters=tiny)
    assert path.read_bytes() == b"another"


@pytest.mark.parametrize(
    "name",
    [
        "keystore.json.usage",
        "keystore.json.v2",
        "keystore.json.v2.3",
        "audit.log",
        "audit.log.head",
        ".keystore.json.tmp-0011",
    ],
)
def test_what_an_earlier_keystore_has_left_is_a_trace_of_it(name: str, path: Path) -> None:
    audit_log = path.with_name("audit.log")
    path.with_name("keystore.json.lock").touch()
    assert file.trace_of_another(path, audit_log) is None
    path.with_name(name).touch()
    assert file.trace_of_another(path, audit_log) == path.with_name(name)
    assert file.trace_of_another(path.parent / "no" / "such" / "directory", path.parent / "no" / "audit.log") is None


def test_the_outcome_of_a_save_that_fails_at_the_rename_is_unknown(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keystore, keyring = _load(made)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", _fail_to_rename)
        with pytest.raises(SaveOutcomeUnknownError) as caught:
            commit(keystore, _rotated(keystore, keyring))
    assert caught.value.exit_code == 70


def test_the_outcome_of_a_save_that_fails_after_the_rename_is_unknown(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keystore, keyring = _load(made)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "fsync_directory", _fail)
        with pytest.raises(SaveOutcomeUnknownError, match="check the disk"):
            commit(keystore, _rotated(keystore, keyring))


def test_each_kek_is_fresh(made: Path) -> None:
    keystore, _ = _load(made)
    keys = [keystore.mint(slot()).key for _ in range(2)]
    blob = sealed(keys[0])
    assert opened(keys[0], blob) == b"x"
    with pytest.raises(Exception, match="decryption failed"):
        opened(keys[1], blob)


def test_the_buffer_of_a_kek_is_wiped_once_it_is_wrapped(made: Path) -> None:
    buffer = bytearray(b"k" * 32)
    with KeystoreLock(made) as lock:
        keystore, _ = file.load(lock, _secret(), random=lambda _: Secret(buffer))
    keystore.mint(slot(version=2))
    assert buffer == bytes(32)


def test_a_wiped_keystore_makes_no_more_keks(made: Path) -> None:
    keystore, _ = _load(made)
    keystore.wipe()
    with pytest.raises(Exception, match="decryption failed"):
        keystore.mint(slot(version=2))


# change_passphrase


def _change(path: Path, old: bytes, new: bytes, parameters: KdfParameters) -> None:
    with KeystoreLock(path) as lock:
        file.change_passphrase(lock, _secret(old), _secret(new), parameters=parameters)


def test_after_a_change_of_passphrase_only_the_new_one_opens(made: Path, tiny: KdfParameters) -> None:
    _change(made, b"correct horse", b"new", tiny)
    assert list(_load(made, b"new")[1].groups) == ["default"]
    with pytest.raises(WrongPassphraseError):
        _load(made)


def test_after_a_change_of_passphrase_every_ciphertext_still_opens(made: Path, tiny: KdfParameters) -> None:
    key = _load(made)[1].groups["default"].active.key
    assert key is not None
    blob = sealed(key, b"x", b"aad")
    _change(made, b"correct horse", b"new", tiny)
    changed = _load(made, b"new")[1].groups["default"].active.key
    assert changed is not None
    assert opened(changed, blob, b"aad") == b"x"


def test_a_change_of_passphrase_leaves_names_versions_and_states_as_they_are(made: Path, tiny: KdfParameters) -> None:
    keystore, keyring = _load(made)
    keyring = _rotated(keystore, _rotated(keystore, keyring))
    for command in (DestroyVersion("default", 1), CreateGroup("billing")):
        keyring = apply(keyring, command, now=NOW, mint=keystore.mint)
    keyring = replace(keyring, generation=2)
    commit(keystore, keyring)

    def table(of: Keyring) -> object:
        return [
            (g.key_id, g.created_at, [(v.version, v.status, v.created_at) for v in g.versions.values()])
            for g in of.groups.values()
        ]

    _change(made, b"correct horse", b"new", tiny)
    changed = _load(made, b"new")[1]
    assert table(changed) == table(keyring)
    assert changed.generation == keyring.generation + 1


def test_a_change_of_passphrase_makes_a_new_salt_and_wraps_every_kek_anew(made: Path) -> None:
    before = json.loads(made.read_bytes())
    _change(made, b"correct horse", b"correct horse", KdfParameters(16, 2, 1))
    after = json.loads(made.read_bytes())
    assert after["kdf"]["salt"] != before["kdf"]["salt"]
    assert (after["kdf"]["memoryKiB"], after["kdf"]["iterations"]) == (16, 2)
    assert after["keyGroups"][0]["versions"][0]["wrappedKey"] != before["keyGroups"][0]["versions"][0]["wrappedKey"]


def test_a_change_with_a_wrong_old_passphrase_changes_nothing(made: Path, tiny: KdfParameters) -> None:
    before = made.read_bytes()
    with pytest.raises(WrongPassphraseError):
        _change(made, b"wrong", b"new", tiny)
    assert made.read_bytes() == before


def test_a_change_on_an_altered_keystore_changes_nothing(made: Path, tiny: KdfParameters) -> None:
    altered = made.read_bytes().replace(b"default", b"defaulT")
    made.write_bytes(altered)
    with pytest.raises(KeystoreError):
        _change(made, b"correct horse", b"new", tiny)
    assert made.read_bytes() == altered


@pytest.mark.parametrize(
    "attempt",
    [lambda p, t: _locked(p), lambda p, t: _change(p, b"correct horse", b"new", t)],
    ids=["load", "change_passphrase"],
)
def test_nothing_is_done_to_a_keystore_that_is_locked(
    made: Path, tiny: KdfParameters, attempt: Callable[[Path, KdfParameters], object]
) -> None:
    before = made.read_bytes()
    with KeystoreLock(made), pytest.raises(KeystoreLockedError) as caught:
        attempt(made, tiny)
    assert caught.value.exit_code == 75
    assert made.read_bytes() == before


def test_the_next_generation_counts_one_save() -> None:
    assert EMPTY.next_generation().generation == 1

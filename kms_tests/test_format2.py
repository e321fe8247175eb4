"""Keystore format 2, the file of the Java mini-kms, as an independent writer makes it."""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kms.core import ciphertext
from kms.core.derive import KdfParameters
from kms.core.keyring import Keyring, RotateGroup, apply
from kms.core.secret import Secret
from kms.errors import KeystoreError, KmsError, SaveFailedError, WrongPassphraseError
from kms.host import durable
from kms.limits import MAX_KEPT_KEYSTORES
from kms.storage import file, format2, formats
from kms.storage.lock import KeystoreLock
from kms_tests import java_keystore
from kms_tests.commits import commit
from kms_tests.java_keystore import Group, Version

PASSPHRASE = "correct horse, Übung 日本"
SALT = bytes(range(16))
ROOT = java_keystore.root_key(PASSPHRASE, SALT)

Tree = dict[str, Any]


def _groups() -> list[Group]:
    return [
        Group("default", 1, [Version(1, "ACTIVE")]),
        Group(
            "billing",
            4,
            [
                Version(1, "DESTROYED", 1_600_000_001),
                Version(2, "DISABLED", 1_600_000_002),
                Version(3, "ENABLED", 1_600_000_003),
                Version(4, "ACTIVE", 1_600_000_004),
            ],
        ),
        Group("Schlüssel / einer mit Leerzeichen", 1 << 40, [Version(1 << 40, "ACTIVE")]),
        Group("x" * 255, 7, [Version(7, "ACTIVE"), Version(2, "ENABLED")]),
    ]


def _secret(passphrase: str = PASSPHRASE) -> Secret:
    return Secret(bytearray(passphrase.encode("utf-8")))


@pytest.fixture
def groups() -> list[Group]:
    return _groups()


@pytest.fixture
def path(data: Path, groups: list[Group]) -> Path:
    made = data / "keystore.json"
    made.write_bytes(java_keystore.write(groups, PASSPHRASE))
    made.chmod(0o600)
    return made


def _load(path: Path, passphrase: str = PASSPHRASE) -> Keyring:
    with KeystoreLock(path) as lock:
        return file.load(lock, _secret(passphrase))[1]


def _table(keyring: Keyring) -> dict[str, list[tuple[int, str, int]]]:
    return {
        name: [(v.version, v.status.value, v.created_at) for v in group.versions.values()]
        for name, group in keyring.groups.items()
    }


def _expected(groups: list[Group]) -> dict[str, list[tuple[int, str, int]]]:
    return {
        group.id: [(v.number, v.status, v.created_at) for v in sorted(group.versions, key=lambda v: v.number)]
        for group in groups
    }


def _opens(keyring: Keyring, blob: bytes, aad: bytes) -> bytes:
    parsed = ciphertext.parse(blob)
    key = keyring.groups[parsed.group].versions[parsed.version].key
    assert key is not None
    return key.open(parsed, aad)


def test_groups_and_versions_of_all_states_load(path: Path, groups: list[Group]) -> None:
    keyring = _load(path)
    assert _table(keyring) == _expected(groups)
    assert {name: group.active.version for name, group in keyring.groups.items()} == {g.id: g.active for g in groups}


def test_a_group_is_as_old_as_its_oldest_version(path: Path) -> None:
    assert _load(path).groups["billing"].created_at == 1_600_000_001


def test_it_loads_at_generation_0(path: Path) -> None:
    assert _load(path).generation == 0


def test_ciphertexts_made_elsewhere_under_its_keks_decrypt(path: Path, groups: list[Group]) -> None:
    keyring = _load(path)
    for group in groups:
        for version in group.versions:
            if version.status != "DESTROYED":
                blob = java_keystore.ciphertext(group, version, b"plaintext", b"aad")
                assert _opens(keyring, blob, b"aad") == b"plaintext"


def test_what_is_destroyed_has_no_key(path: Path) -> None:
    tombstone = _load(path).groups["billing"].versions[1]
    assert (tombstone.key, tombstone.wrapped) == (None, None)


def test_the_root_key_is_not_copied_to_verify_the_MAC(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[object] = []
    digest = hmac.digest

    def watched(key: Any, message: bytes, name: str) -> bytes:
        keys.append(key)
        return digest(key, message, name)

    monkeypatch.setattr(hmac, "digest", watched)
    _load(path)
    assert isinstance(keys[0], memoryview), "a `bytes` cannot be wiped"


def test_loading_writes_nothing(path: Path) -> None:
    before = path.read_bytes()
    _load(path)
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["keystore.json", "keystore.json.lock"]


def _migrate(path: Path) -> Keyring:
    with KeystoreLock(path) as lock:
        keystore, keyring = file.load(lock, _secret())
        keyring = apply(keyring, RotateGroup("billing"), now=1_800_000_000, mint=keystore.mint).next_generation()
        commit(keystore, keyring)
        return keyring


def test_the_first_save_writes_format_4(path: Path) -> None:
    saved = _migrate(path)
    assert json.loads(path.read_bytes())["formatVersion"] == 4
    assert _load(path) == saved
    assert saved.generation == 1


def test_the_first_save_keeps_the_old_file_privately_and_byte_for_byte(path: Path) -> None:
    before = path.read_bytes()
    _migrate(path)
    kept = path.with_name("keystore.json.v2")
    assert kept.read_bytes() == before
    assert kept.stat().st_mode & 0o777 == 0o600


def test_the_old_file_is_kept_once(path: Path) -> None:
    _migrate(path)
    kept = path.with_name("keystore.json.v2")
    kept.write_bytes(b"the user's own now")
    with KeystoreLock(path) as lock:
        keystore, keyring = file.load(lock, _secret())
        commit(keystore, keyring.next_generation())
    assert kept.read_bytes() == b"the user's own now"


def test_an_old_file_that_was_kept_before_is_never_overwritten(path: Path) -> None:
    kept = path.with_name("keystore.json.v2")
    kept.write_bytes(b"an earlier one")
    _migrate(path)
    assert kept.read_bytes() == b"an earlier one"


def test_an_old_file_goes_under_the_next_name_when_another_is_kept(path: Path) -> None:
    before = path.read_bytes()
    path.with_name("keystore.json.v2").write_bytes(b"of another keystore")
    path.with_name("keystore.json.v2.1").symlink_to("nowhere")
    _migrate(path)
    kept = path.with_name("keystore.json.v2.2")
    assert kept.read_bytes() == before
    assert kept.stat().st_mode & 0o777 == 0o600


def test_an_old_file_that_is_kept_already_is_not_kept_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()
    _migrate(path)
    path.write_bytes(before)
    synced: list[Path] = []
    monkeypatch.setattr(durable, "sync_names", synced.append)
    _migrate(path)
    assert not path.with_name("keystore.json.v2.1").exists()
    assert synced.count(path.parent) >= 1, "whoever kept it may not have come to make its name durable"


def test_where_too_many_others_are_kept_nothing_is_changed(path: Path) -> None:
    before = path.read_bytes()
    for name in ("v2", *(f"v2.{number}" for number in range(1, MAX_KEPT_KEYSTORES))):
        path.with_name(f"keystore.json.{name}").write_bytes(b"of another keystore")
    with pytest.raises(SaveFailedError, match=r"cannot keep .*v2\.9 and those before it hold others; move them away"):
        _migrate(path)
    assert path.read_bytes() == before


def test_stale_temp_files_of_kept_files_are_removed_under_the_lock(path: Path) -> None:
    stale = path.with_name(".keystore.json.v2.9.tmp-0011")
    stale.touch()
    KeystoreLock(path).close()
    assert not stale.exists()


def test_a_second_save_of_the_same_process_keeps_nothing_more(path: Path) -> None:
    with KeystoreLock(path) as lock:
        keystore, keyring = file.load(lock, _secret())
        commit(keystore, keyring.next_generation())
        path.with_name("keystore.json.v2").unlink()
        commit(keystore, keyring.next_generation().next_generation())
    assert not path.with_name("keystore.json.v2").exists()


def test_ciphertexts_of_before_open_after_the_migration(path: Path, groups: list[Group]) -> None:
    blobs = [
        java_keystore.ciphertext(group, version, b"plaintext", b"aad")
        for group in groups
        for version in group.versions
        if version.status != "DESTROYED"
    ]
    _migrate(path)
    keyring = _load(path)
    assert [_opens(keyring, blob, b"aad") for blob in blobs] == [b"plaintext"] * len(blobs)


@pytest.mark.parametrize("step", ["write_file", "fsync_directory"])
def test_when_the_old_file_cannot_be_kept_nothing_is_changed(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with KeystoreLock(path) as lock:
        keystore, keyring = file.load(lock, _secret())
    monkeypatch.setattr(durable, step, fail)
    with pytest.raises(SaveFailedError, match="No space left on device; nothing was changed"):
        commit(keystore, keyring.next_generation())
    assert path.read_bytes() == before


def test_changing_the_passphrase_migrates_too(path: Path, groups: list[Group], tiny: KdfParameters) -> None:
    before = path.read_bytes()
    with KeystoreLock(path) as lock:
        file.change_passphrase(lock, _secret(), _secret("new"), parameters=tiny)
    assert path.with_name("keystore.json.v2").read_bytes() == before
    assert _table(_load(path, "new")) == _expected(groups)


def test_another_passphrase_is_told_from_an_altered_file(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(WrongPassphraseError):
        _load(path, "incorrect horse")
    assert path.read_bytes() == before


def _open(raw: bytes) -> Keyring:
    """Open it, except that an Argon2 cost a flip has made great (yet in its bounds) is not paid."""
    assert formats.version_of(raw) == format2.FORMAT
    sealed = format2.Sealed(raw)
    if (sealed.header.salt, sealed.header.parameters) == (SALT, KdfParameters(8, 1, 1)):
        root = Secret(bytearray(ROOT))
    elif sealed.header.parameters.memory_kib <= 1024:
        root = sealed.header.derive(_secret())
    else:
        raise WrongPassphraseError
    return sealed.open(root, lambda _slot, _key: b"rewrapped")


SMALL = java_keystore.write([Group("default", 2, [Version(1, "DESTROYED"), Version(2, "ACTIVE")])], PASSPHRASE, SALT)


def test_the_small_file_loads_as_it_is() -> None:
    assert list(_open(SMALL).groups["default"].versions) == [1, 2]


@pytest.mark.parametrize("flip", [1, 2, 4, 8, 16, 32, 64, 128])
def test_a_file_with_any_one_bit_flipped_is_refused(flip: int) -> None:
    for at in range(len(SMALL)):
        raw = bytearray(SMALL)
        raw[at] ^= flip
        try:
            if formats.version_of(bytes(raw)) != format2.FORMAT:
                continue  # another format's reader refuses it
            _open(bytes(raw))
        except KmsError as error:
            assert isinstance(error, KeystoreError | WrongPassphraseError), at  # noqa: PT017 - one assertion for all bytes
        else:
            pytest.fail(f"byte {at} was flipped and the file loads")


def _changed(*path: str | int, value: object) -> Callable[[Tree], None]:
    def change(tree: Tree) -> None:
        at: Any = tree
        for step in path[:-1]:
            at = at[step]
        at[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _changed("keyGroups", 0, "activeVersion", value=2),
        _changed("keyGroups", 0, "versions", 0, "status", value="ENABLED"),
        _changed("keyGroups", 0, "versions", 0, "wrappedKekBase64", value=None),
        _changed("keyGroups", 0, "versions", 0, "version", value=0),
        _changed("keyGroups", 0, "id", value="  "),
        _changed("keyGroups", 1, "id", value="default"),
        _changed("keyGroups", 0, "versions", value=[]),
        _changed("keyGroups", 0, "versions", 0, "wrappedKekBase64", value="AAAA"),
    ],
)
def test_a_keyring_against_the_rules_is_refused_even_with_a_right_mac(change: Callable[[Tree], None]) -> None:
    tree = java_keystore.tree(_groups(), ROOT, SALT)
    change(tree)
    tree["macBase64"] = java_keystore.mac(ROOT, tree)
    with pytest.raises(KeystoreError, match="altered or damaged"):
        _open(java_keystore.encode(tree))


@pytest.mark.parametrize(
    "change",
    [
        _changed("macBase64", value=""),
        _changed("keyGroups", 0, "versions", 0, "version", value=1 << 63),
        _changed("keyGroups", 0, "versions", 0, "createdAtEpochSec", value=-(1 << 70)),
        _changed("keyGroups", 0, "versions", 0, "createdAtEpochSec", value=1),
        _changed("keyGroups", value=[]),
        _changed("note", value="x"),
        _changed("kdf", value="argon2i"),
        _changed("argonMemoryKiB", value=7),
        _changed("argonIterations", value=65),
        _changed("argonParallelism", value=0),
        _changed("saltBase64", value="%"),
        _changed("rootVerificationTokenBase64", value="%"),
    ],
)
def test_an_altered_field_is_refused(change: Callable[[Tree], None]) -> None:
    tree = java_keystore.tree(_groups(), ROOT, SALT)
    change(tree)
    with pytest.raises(KeystoreError):
        _open(java_keystore.encode(tree))


@pytest.mark.parametrize("field", ["argonMemoryKiB", "argonIterations", "argonParallelism"])
@pytest.mark.parametrize("value", [-1, 0, 1 << 30])
def test_kdf_costs_outside_their_bounds_are_refused_before_they_are_paid(field: str, value: int) -> None:
    tree = java_keystore.tree(_groups(), ROOT, SALT)
    tree[field] = value
    with pytest.raises(KeystoreError, match=f"is {value}, outside"):
        format2.Sealed(java_keystore.encode(tree))


@pytest.mark.parametrize("field", ["macBase64", "rootVerificationTokenBase64", "saltBase64", "keyGroups", "kdf"])
def test_a_missing_field_is_refused(field: str) -> None:
    tree = java_keystore.tree(_groups(), ROOT, SALT)
    del tree[field]
    with pytest.raises(KeystoreError):
        _open(java_keystore.encode(tree))


def test_a_file_that_was_pretty_printed_loads() -> None:
    tree = java_keystore.tree(_groups(), ROOT, SALT)
    assert _table(_open(json.dumps(tree, indent=2).encode())) == _expected(_groups())

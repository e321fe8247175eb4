"""What the Java server wrote opens, also where a keyring here cannot hold it as it was; and it is told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms.core.derive import KdfParameters
from kms.core.keyring import Keyring, VersionStatus
from kms.core.secret import Secret
from kms.errors import KeystoreError, SaveFailedError, WrongPassphraseError
from kms.limits import KDF_ITERATIONS, KDF_MEMORY_KIB, MAX_FINDINGS_SHOWN
from kms.storage import file, format2, format4
from kms.storage.audit_log import AuditLog
from kms.storage.lock import KeystoreLock
from kms.storage.root_keys import RootKeys
from kms.wire.messages import Encrypt, group_of
from kms_tests import java_keystore
from kms_tests.in_memory import Server, text
from kms_tests.java_keystore import Group, Version

PASSPHRASE = "correct horse"
SALT = bytes(range(16))
ROOT = java_keystore.root_key(PASSPHRASE, SALT)
LONG = "x" * 256


def secret() -> Secret:
    return Secret(bytearray(PASSPHRASE.encode()))


def opened(groups: list[Group]) -> tuple[Keyring, Sequence[str]]:
    sealed = format2.Sealed(java_keystore.encode(java_keystore.tree(groups, ROOT, SALT)))
    with Secret(bytearray(ROOT)) as root:
        keyring = sealed.open(root, lambda _slot, _key: b"rewrapped")
    return keyring, [note.removeprefix("keystore of the Java server: ") for note in sealed.notes]


def write(path: Path, groups: list[Group]) -> None:
    path.write_bytes(java_keystore.encode(java_keystore.tree(groups, ROOT, SALT)))
    path.chmod(0o600)


def one(name: str = "default") -> Group:
    return Group(name, 1, [Version(1, "ACTIVE")])


@pytest.mark.parametrize("status", ["ENABLED", "DISABLED"])
def test_a_version_that_was_destroyed_and_then_switched_is_destroyed(status: str) -> None:
    keyring, notes = opened([Group("billing", 2, [Version(1, status, is_keyless=True), Version(2, "ACTIVE")])])
    version = keyring.groups["billing"].versions[1]
    assert (version.status, version.key, version.wrapped) == (VersionStatus.DESTROYED, None, None)
    assert notes == [f"billing v1 is {status} and has no key: it was destroyed"]


def test_an_active_version_without_a_key_is_an_error() -> None:
    # That server did not destroy an active version, nor made a destroyed one active.
    with pytest.raises(KeystoreError, match="altered or damaged"):
        opened([Group("billing", 1, [Version(1, "ACTIVE", is_keyless=True)])])


@pytest.mark.parametrize("name", [LONG, "\u00e9" * 128, "y" * 70_000])
def test_a_group_whose_name_no_ciphertext_can_hold_is_kept_and_told(name: str) -> None:
    keyring, notes = opened([one(), one(name)])
    assert list(keyring.groups) == ["default", name]
    assert len(notes) == 1
    assert "has a name of more than 255 bytes, which no ciphertext can hold" in notes[0]
    assert len(notes[0]) < 500


@pytest.mark.parametrize("name", ["\u00a0", "\u0085", "\u2007", "\u202f", "\u00a0\u0085"])
def test_a_name_that_only_python_calls_blank_is_a_name(name: str) -> None:
    keyring, notes = opened([one(name)])
    assert list(keyring.groups) == [name]
    assert notes == []
    assert group_of(name) == name


@pytest.mark.parametrize("name", ["", " ", "\t\n\v\f\r", "\x1c\x1d\x1e\x1f"])
def test_what_is_blank_in_ascii_is_default(name: str) -> None:
    assert group_of(name) == "default"
    assert group_of(Encrypt(plaintext=b"", key_id=name).key_id) == "default"


def test_a_name_with_half_a_character_keeps_it_escaped() -> None:
    keyring, notes = opened([one(), one("a\ud800b"), one("\udfff")])
    assert list(keyring.groups) == ["default", "a\\ud800b", "\\udfff"]
    assert notes == [
        f"the name of a key group holds half a character: it is called {name} from now on"
        for name in ("a\\ud800b", "\\udfff")
    ]


def test_a_whole_character_beside_a_half_one_is_itself_when_both_are_escaped() -> None:
    sealed = format2.Sealed(json.dumps(java_keystore.tree([one("\N{GRINNING FACE}"), one("\ud83d")], ROOT, SALT)).encode())
    with Secret(bytearray(ROOT)) as root:
        keyring = sealed.open(root, lambda _slot, _key: b"")
    assert list(keyring.groups) == ["\N{GRINNING FACE}", "\\ud83d"]


def test_an_escaped_name_is_no_other_groups() -> None:
    keyring, _ = opened([one("\\ud800"), one("\ud800"), one("\\ud800-2")])
    assert list(keyring.groups) == ["\\ud800", "\\ud800-3", "\\ud800-2"]
    keyring, _ = opened([one("\\ud800\ud800"), one("\ud800\\ud800"), one("\ud800\ud800")])
    assert list(keyring.groups) == ["\\ud800\\ud800", "\\ud800\\ud800-2", "\\ud800\\ud800-3"]


@pytest.mark.parametrize(
    "raw",
    [
        b'{"formatVersion":2,"x":"\\ud800"}',
        b'{"formatVersion":2,"x":NaN,"y":"\\ud800"}',
        b'["\\ud800"]',
        b'"\\ud800',
        b"\\ud800",
        b"[" * 100_000 + b'"\\ud800"',
        b'{"formatVersion":' + b"9" * 10_000 + b',"x":"\\ud800"}',
    ],
)
def test_what_is_no_keystore_is_refused_on_this_way_too(raw: bytes) -> None:
    with pytest.raises(KeystoreError, match="altered or damaged"):
        format2.Sealed(raw)


@pytest.mark.parametrize("change", [("salt", 5), ("note", "x"), ("keyGroups", None)])
def test_a_keystore_with_half_a_character_is_read_as_strictly_as_others(change: tuple[str, Any]) -> None:
    tree = java_keystore.tree([one("\ud800")], ROOT, SALT)
    tree[change[0]] = change[1]
    with pytest.raises(KeystoreError, match="altered or damaged"):
        format2.Sealed(java_keystore.encode(tree))


def test_a_keystore_with_half_a_character_has_a_MAC_like_others() -> None:
    tree = java_keystore.tree([one("\ud800"), one("b")], ROOT, SALT)
    tree["keyGroups"][1]["id"] = "c"
    sealed = format2.Sealed(java_keystore.encode(tree))
    with Secret(bytearray(ROOT)) as root, pytest.raises(KeystoreError, match="altered or damaged"):
        sealed.open(root, lambda _slot, _key: b"")


def test_what_cannot_be_kept_is_told_up_to_a_bound() -> None:
    versions = [Version(number, "DISABLED", is_keyless=True) for number in range(1, 101)]
    _, notes = opened([Group("billing", 101, [*versions, Version(101, "ACTIVE")])])
    assert len(notes) == MAX_FINDINGS_SHOWN + 1
    assert notes[-1] == "and 80 more"


NAMES = st.text(st.characters(), min_size=1, max_size=300).filter(lambda name: not (name.isascii() and name.isspace()))


@st.composite
def java_groups(draw: st.DrawFn) -> list[Group]:
    made: list[Group] = []
    for name in draw(st.lists(NAMES, min_size=1, max_size=4, unique=True)):
        states = draw(st.lists(st.sampled_from(["ENABLED", "DISABLED", "DESTROYED"]), max_size=4))
        versions = [Version(number, state, is_keyless=draw(st.booleans())) for number, state in enumerate(states, 1)]
        made.append(Group(name, len(versions) + 1, [*versions, Version(len(versions) + 1, "ACTIVE")]))
    return made


@given(java_groups())
def test_whatever_is_authentic_opens_and_is_the_same_once_it_is_saved(groups: list[Group]) -> None:
    sealed = format2.Sealed(java_keystore.encode(java_keystore.tree(groups, ROOT, SALT)))
    with Secret(bytearray(ROOT)) as root:
        keys = RootKeys(root)
        keyring = sealed.open(root, keys.wrap)
    assert [len(group.versions) for group in keyring.groups.values()] == [len(group.versions) for group in groups]
    saved = format4.Encoder().encode(keyring, format4.Front(sealed.header, keys.seal_check()), keys)
    assert format4.Sealed(bytes(saved), None).open(Secret(bytearray(ROOT))) == keyring
    for group, made in zip(keyring.groups.values(), groups, strict=True):
        for version, before in zip(group.versions.values(), made.versions, strict=True):
            is_kept = before.status != "DESTROYED" and not before.is_keyless
            assert version.status == (before.status if is_kept else "DESTROYED")
            assert (version.key is not None) == is_kept


def test_nothing_is_encrypted_under_a_name_that_no_ciphertext_can_hold() -> None:
    server = Server()
    server.manager.current = opened([one(), one(LONG)])[0]
    for kind, fields in (("Encrypt", {"plaintext": ""}), ("GenerateDataKey", {})):
        reply = server.ask(kind, keyId=LONG, **fields)
        assert reply["errorCode"] == "InvalidRequest"
        assert reply["message"] == "keyId: no ciphertext can hold a name of more than 255 bytes; use another key group"
    sealed = server.ask("Encrypt", plaintext=text(b"x"))["ciphertext"]
    assert server.ask("ReEncrypt", keyId=LONG, ciphertext=sealed)["errorCode"] == "InvalidRequest"
    for kind in ("RotateKeyGroup", "DescribeKeyGroup"):
        assert server.admin(kind, keyId=LONG)["keyGroup"]["keyId"] == LONG
    assert server.admin("DestroyVersion", keyId=LONG, version=1)["status"] == "ok"
    assert [group["keyId"] for group in server.admin("ListKeyGroups", usage=True)["keyGroups"]] == ["default", LONG]


WEAK = KdfParameters(8, 1, 1)
STRONGER = KdfParameters(16, 2, 1)


def costs(path: Path) -> tuple[int, int, int]:
    kdf = json.loads(path.read_bytes())["kdf"]
    return kdf["memoryKiB"], kdf["iterations"], kdf["parallelism"]


def test_weak_costs_of_a_migrated_keystore_are_raised_and_told(data: Path) -> None:
    path = data / "keystore.json"
    write(path, [one(), Group("b", 2, [Version(1, "ENABLED", is_keyless=True), Version(2, "ACTIVE")])])
    before = path.read_bytes()
    with KeystoreLock(path) as lock:
        notes = file.raise_costs(lock, secret(), parameters=STRONGER)
        keystore, keyring = file.load(lock, secret())
    assert costs(path) == (16, 2, 1)
    assert list(keyring.groups) == ["default", "b"]
    assert notes == [
        "keystore of the Java server: b v1 is ENABLED and has no key: it was destroyed",
        "keystore of the Java server: each guess at its passphrase costs only 8 KiB of memory and 1 passes: it is 16 KiB "
        "and 2 passes from now on, and as before for the file that is kept as keystore.json.v2",
    ]
    assert keystore.notes == ()
    assert path.with_name("keystore.json.v2").read_bytes() == before


@pytest.mark.parametrize(("wanted", "became"), [(KdfParameters(64, 1, 1), (64, 2)), (KdfParameters(8, 3, 1), (32, 3))])
def test_neither_cost_is_lowered(
    data: Path, monkeypatch: pytest.MonkeyPatch, wanted: KdfParameters, became: tuple[int, int]
) -> None:
    path = data / "keystore.json"
    monkeypatch.setattr(java_keystore, "MEMORY_KIB", 32)
    monkeypatch.setattr(java_keystore, "ITERATIONS", 2)
    path.write_bytes(java_keystore.write([one()], PASSPHRASE))
    path.chmod(0o600)
    with KeystoreLock(path) as lock:
        file.raise_costs(lock, secret(), parameters=wanted)
    assert costs(path)[:2] == became


def test_costs_that_are_high_enough_wait_for_the_first_save(data: Path) -> None:
    path = data / "keystore.json"
    write(path, [one()])
    before = path.read_bytes()
    with KeystoreLock(path) as lock:
        assert file.raise_costs(lock, secret(), parameters=WEAK) == ()
    assert path.read_bytes() == before


def test_costs_that_somebody_here_has_chosen_are_left_alone(data: Path, tiny: KdfParameters) -> None:
    path = data / "keystore.json"
    with KeystoreLock(path) as lock:
        file.initialise(lock, secret(), now=1, parameters=tiny)
        before = path.read_bytes()
        assert file.raise_costs(lock, secret(), parameters=STRONGER) == ()
    assert path.read_bytes() == before


def test_the_audit_log_goes_on_under_the_raised_costs(data: Path) -> None:
    path, log = data / "keystore.json", data / "audit.log"
    write(path, [one()])
    with KeystoreLock(path) as lock:
        keystore, keyring = file.load(lock, secret())
        AuditLog(log, keystore.audit_keys, generation=keyring.generation).close()
        file.raise_costs(lock, secret(), parameters=STRONGER, audit_log=log)
        keystore, keyring = file.load(lock, secret())
        AuditLog(log, keystore.audit_keys, generation=keyring.generation).close()


def test_a_wrong_passphrase_raises_nothing(data: Path) -> None:
    path = data / "keystore.json"
    write(path, [one()])
    before = path.read_bytes()
    with KeystoreLock(path) as lock, pytest.raises(WrongPassphraseError):
        file.raise_costs(lock, Secret(bytearray(b"wrong")), parameters=STRONGER)
    assert path.read_bytes() == before


def test_where_they_cannot_be_raised_it_is_told_and_the_keystore_opens(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = data / "keystore.json"
    write(path, [one()])

    def fail(*_: object, **__: object) -> None:
        raise SaveFailedError("cannot save keystore.json: No space left on device; nothing was changed")

    with KeystoreLock(path) as lock:
        monkeypatch.setattr(file, "change_passphrase", fail)
        (note,) = file.raise_costs(lock, secret(), parameters=STRONGER)
        assert note.endswith(
            "that could not be raised: cannot save keystore.json: No space left on device; nothing was changed"
        )
        file.load(lock, secret())


def test_what_is_usual_today_is_what_is_raised_to() -> None:
    assert KdfParameters() == KdfParameters(KDF_MEMORY_KIB, KDF_ITERATIONS)

"""Keystore format 4."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms.core.derive import KdfParameters
from kms.core.kek import Kek
from kms.core.keyring import CreateGroup, KeyGroup, Keyring, KeySlot, KeyVersion, NewKey, RotateGroup, VersionStatus, apply
from kms.core.secret import Secret
from kms.core.specs import AES_256
from kms.errors import DecryptionFailedError, KeystoreError, KmsError, WrongPassphraseError
from kms.storage import format4, formats
from kms.storage.format4 import Sealed
from kms.storage.root_keys import RootKeys
from kms.storage.stored import KdfHeader
from kms_tests import keks
from kms_tests.strategies import stored_names

SALT = bytes(range(16))
HEADER = KdfHeader(KdfParameters(8, 1, 1), SALT)
PASSPHRASE = b"correct horse"
ACTIVE, ENABLED, DISABLED, DESTROYED = VersionStatus

Tree = dict[str, Any]


def _keys(passphrase: bytes = PASSPHRASE, header: KdfHeader = HEADER) -> RootKeys:
    with header.derive(Secret(bytearray(passphrase))) as root:
        return RootKeys(root)


KEYS = _keys()
ROOT = HEADER.derive(Secret(bytearray(PASSPHRASE)))
UUIDS = {"default": bytes(range(16)), "billing": bytes(range(16, 32))}


def _slot(group: str, version: int) -> KeySlot:
    return KeySlot(group, UUIDS.get(group) or sha256(group.encode()).digest()[:16], AES_256, version)


def _version(group: str, number: int, status: VersionStatus) -> KeyVersion:
    if status is DESTROYED:
        return KeyVersion.build(group, number, status, 1_700_000_000 + number, None, None)
    kek = bytes((number % 256,)) * 32
    wrapped = KEYS.wrap(_slot(group, number), Secret(bytearray(kek)))
    return KeyVersion.build(group, number, status, 1_700_000_000 + number, wrapped, Kek(Secret(bytearray(kek))))


def _group(name: str, *statuses: VersionStatus) -> KeyGroup:
    made = {number: _version(name, number, status) for number, status in enumerate(statuses, 1)}
    return keks.group_of(name, made, created_at=1_600_000_000, uuid=_slot(name, 1).uuid)


def _keyring(*groups: KeyGroup, generation: int = 3) -> Keyring:
    return Keyring(generation, {group.key_id: group for group in groups})


KEYRING = _keyring(_group("default", ACTIVE), _group("billing", DESTROYED, DISABLED, ENABLED, ACTIVE))
FRONT = format4.Front(HEADER, KEYS.seal_check())
RAW = bytes(format4.Encoder().encode(KEYRING, FRONT, KEYS))


def _open(raw: bytes, passphrase: bytes = PASSPHRASE) -> Keyring:
    sealed = Sealed(raw, None)
    return sealed.open(sealed.header.derive(Secret(bytearray(passphrase))))


def _resealed(tree: Tree) -> bytes:
    """The tree as a file with a right MAC, as only someone who knows the passphrase could make it."""
    body = {name: value for name, value in tree.items() if name != "mac"}
    message = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    return json.dumps({**body, "mac": b64encode(KEYS.mac(message)).decode()}, ensure_ascii=False).encode()


def _tree() -> Tree:
    made: Tree = json.loads(RAW)
    return made


def test_the_fields_are_those_of_the_contract() -> None:
    tree = _tree()
    assert list(tree) == ["formatVersion", "generation", "kdf", "rootCheck", "journal", "formerJournal", "keyGroups", "mac"]
    assert (tree["formatVersion"], tree["generation"]) == (4, 3)
    assert tree["kdf"] == {
        "name": "argon2id",
        "version": 19,
        "memoryKiB": 8,
        "iterations": 1,
        "parallelism": 1,
        "salt": b64encode(SALT).decode(),
    }
    billing = tree["keyGroups"][1]
    assert list(billing) == ["keyId", "keyUuid", "spec", "use", "createdAtEpochSec", "activeVersion", "versions"]
    assert (billing["keyUuid"], billing["spec"], billing["use"]) == (
        "10111213-1415-1617-1819-1a1b1c1d1e1f",
        "AES_256",
        "encrypt",
    )
    assert (billing["keyId"], billing["createdAtEpochSec"], billing["activeVersion"]) == ("billing", 1_600_000_000, 4)
    assert billing["versions"][0] == {
        "version": 1,
        "status": "DESTROYED",
        "createdAtEpochSec": 1_700_000_001,
        "wrappedKey": None,
    }
    assert [v["status"] for v in billing["versions"]] == ["DESTROYED", "DISABLED", "ENABLED", "ACTIVE"]


def test_it_is_one_line() -> None:
    assert RAW.count(b"\n") == 1
    assert RAW.endswith(b"}\n")


def test_what_is_written_is_read_back() -> None:
    opened = _open(RAW)
    assert opened == KEYRING
    assert list(opened.groups) == list(KEYRING.groups)


@given(
    st.lists(stored_names, unique=True, max_size=4),
    st.lists(st.sampled_from([ENABLED, DISABLED, DESTROYED]), max_size=4),
    st.integers(0, 1 << 62),
)
def test_every_keyring_that_is_written_is_read_back(names: list[str], older: list[VersionStatus], generation: int) -> None:
    keyring = _keyring(*(_group(name, *older, ACTIVE) for name in names), generation=generation)
    opened = _open(bytes(format4.Encoder().encode(keyring, FRONT, KEYS)))
    assert opened == keyring


def test_a_key_that_was_read_back_opens_what_the_key_before_sealed() -> None:
    sealed = KEYRING.groups["billing"].active.key
    opened = _open(RAW).groups["billing"].active.key
    assert sealed is not None
    assert opened is not None
    assert keks.opened(opened, keks.sealed(sealed, b"x", b"aad"), b"aad") == b"x"


def test_no_key_is_in_the_file_in_the_clear() -> None:
    decoded = [b64decode(v["wrappedKey"] or "") for g in _tree()["keyGroups"] for v in g["versions"]]
    for number in range(1, 5):
        kek = bytes((number,)) * 32
        assert not any(kek in wrapped for wrapped in decoded)
        assert b64encode(kek) not in RAW


@pytest.mark.parametrize("bit", range(8))
def test_a_file_with_any_one_bit_flipped_is_refused(bit: int) -> None:
    for at in range(bit, len(RAW), 2):
        raw = bytearray(RAW)
        raw[at] ^= 1 << bit
        with pytest.raises(KmsError) as caught:
            _refuse(bytes(raw))
        assert isinstance(caught.value, KeystoreError | WrongPassphraseError), at


def _refuse(raw: bytes) -> None:
    """Open it, except that a memory cost or count a flip has made enormous (yet in its bounds) is not paid."""
    sealed = Sealed(raw, None)
    if sealed.header == HEADER:
        sealed.open(ROOT)
    elif sealed.header.parameters.memory_kib <= 1024:
        sealed.open(sealed.header.derive(Secret(bytearray(PASSPHRASE))))
    else:
        raise WrongPassphraseError


@pytest.mark.parametrize("length", range(0, len(RAW) - 1, 7))
def test_a_file_cut_short_is_refused(length: int) -> None:
    with pytest.raises(KeystoreError):
        _open(RAW[:length])


def test_a_file_that_was_pretty_printed_still_loads() -> None:
    assert _open(json.dumps(_tree(), indent=4).encode()) == KEYRING


def test_a_file_whose_fields_are_in_another_order_still_loads() -> None:
    assert _open(json.dumps(dict(reversed(_tree().items()))).encode()) == KEYRING


def test_another_passphrase_is_told_from_an_altered_file() -> None:
    with pytest.raises(WrongPassphraseError, match="wrong passphrase"):
        _open(RAW, b"incorrect horse")


@pytest.mark.parametrize("mac", ["", "AAAA", b64encode(bytes(32)).decode(), "é", "not base64!"])
def test_a_wrong_mac_is_refused(mac: str) -> None:
    with pytest.raises(KeystoreError, match="altered or damaged"):
        _open(json.dumps({**_tree(), "mac": mac}).encode())


def test_a_missing_mac_is_refused() -> None:
    tree = _tree()
    del tree["mac"]
    with pytest.raises(KeystoreError, match="altered or damaged"):
        _open(json.dumps(tree).encode())


@pytest.mark.parametrize("field", [name for name in json.loads(RAW) if name != "mac"])
def test_a_missing_field_is_refused(field: str) -> None:
    tree = _tree()
    del tree[field]
    with pytest.raises(KeystoreError):
        _open(_resealed(tree))


def test_an_unknown_field_is_refused_since_the_mac_does_not_cover_it() -> None:
    with pytest.raises(KeystoreError):
        _open(json.dumps({**_tree(), "note": "x"}).encode())


def test_a_resealed_tree_that_was_not_changed_loads() -> None:
    assert _open(_resealed(_tree())) == KEYRING


def _swap_versions(tree: Tree) -> None:
    versions = tree["keyGroups"][1]["versions"]
    versions[2]["wrappedKey"], versions[3]["wrappedKey"] = versions[3]["wrappedKey"], versions[2]["wrappedKey"]


def _swap_groups(tree: Tree) -> None:
    one, other = tree["keyGroups"][0]["versions"][0], tree["keyGroups"][1]["versions"][3]
    one["wrappedKey"], other["wrappedKey"] = other["wrappedKey"], one["wrappedKey"]


def _rename(tree: Tree) -> None:
    tree["keyGroups"][0]["keyId"] = "other"


def _renumber(tree: Tree) -> None:
    tree["keyGroups"][0]["versions"][0]["version"] = tree["keyGroups"][0]["activeVersion"] = 2


def _root_check_as_kek(tree: Tree) -> None:
    tree["keyGroups"][0]["versions"][0]["wrappedKey"] = tree["rootCheck"]


@pytest.mark.parametrize("change", [_swap_versions, _swap_groups, _rename, _renumber, _root_check_as_kek])
def test_an_entry_moved_to_another_slot_is_refused_even_with_a_right_mac(change: Callable[[Tree], None]) -> None:
    tree = _tree()
    change(tree)
    with pytest.raises(KeystoreError, match="altered or damaged"):
        _open(_resealed(tree))


def _set(path: list[str | int], value: object) -> Callable[[Tree], None]:
    def change(tree: Tree) -> None:
        at: Any = tree
        for step in path[:-1]:
            at = at[step]
        at[path[-1]] = value

    return change


VERSION_1: list[str | int] = ["keyGroups", 0, "versions", 0]


@pytest.mark.parametrize(
    "change",
    [
        _set([*VERSION_1, "status"], "ENABLED"),
        _set([*VERSION_1, "status"], "active"),
        _set([*VERSION_1, "status"], "DESTROYED"),
        _set([*VERSION_1, "wrappedKey"], None),
        _set([*VERSION_1, "wrappedKey"], "%"),
        _set([*VERSION_1, "wrappedKey"], ""),
        _set([*VERSION_1, "version"], 0),
        _set([*VERSION_1, "version"], 1 << 63),
        _set(["keyGroups", 0, "activeVersion"], 2),
        _set(["keyGroups", 0, "versions"], []),
        _set(["keyGroups", 0, "keyId"], ""),
        _set(["keyGroups", 0, "keyId"], "x" * 256),
        _set(["keyGroups", 1, "keyId"], "default"),
        _set(["keyGroups", 0, "keyUuid"], "10111213-1415-1617-1819-1a1b1c1d1e1f"),
        _set(["keyGroups", 0, "keyUuid"], "00010203-0405-0607-0809-0A0B0C0D0E0F"),
        _set(["keyGroups", 0, "keyUuid"], "{00010203-0405-0607-0809-0a0b0c0d0e0f}"),
        _set(["keyGroups", 0, "keyUuid"], ""),
        _set(["keyGroups", 0, "spec"], "AES_128"),
        _set(["keyGroups", 0, "spec"], "aes_256"),
        _set(["keyGroups", 0, "use"], "ENCRYPT"),
        _set(["keyGroups", 0, "use"], "sign"),
        _set(["generation"], -1),
        _set(["keyGroups", 1, "versions", 1, "status"], "ACTIVE"),
        _set(["keyGroups", 1, "versions", 1, "version"], 1),
        _set(["keyGroups", 1, "versions", 0, "status"], "ENABLED"),
    ],
)
def test_a_keyring_against_the_rules_is_refused_even_with_a_right_mac(change: Callable[[Tree], None]) -> None:
    tree = _tree()
    change(tree)
    with pytest.raises(KeystoreError, match="altered or damaged"):
        _open(_resealed(tree))


def test_a_kek_of_another_length_is_refused_even_with_a_right_mac() -> None:
    tree = _tree()
    short = KEYS.wrap(_slot("default", 1), Secret(bytearray(16)))
    tree["keyGroups"][0]["versions"][0]["wrappedKey"] = b64encode(short).decode()
    with pytest.raises(KeystoreError, match="altered or damaged"):
        _open(_resealed(tree))


def test_versions_in_another_order_are_sorted() -> None:
    tree = _tree()
    tree["keyGroups"][1]["versions"].reverse()
    assert list(_open(_resealed(tree)).groups["billing"].versions) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("memoryKiB", 7),
        ("memoryKiB", 4 * 1024 * 1024 + 1),
        ("memoryKiB", 1 << 40),
        ("memoryKiB", -1),
        ("iterations", 0),
        ("iterations", 65),
        ("parallelism", 0),
        ("parallelism", 65),
    ],
)
def test_kdf_costs_outside_their_bounds_are_refused_before_they_are_paid(field: str, value: int) -> None:
    tree = _tree()
    tree["kdf"][field] = value
    with pytest.raises(KeystoreError, match=f"Argon2id .* is {value}, outside"):
        Sealed(json.dumps(tree).encode(), None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "argon2i"),
        ("name", "scrypt"),
        ("version", 16),
        ("salt", "%"),
        ("salt", 1),
        ("iterations", 1.5),
        ("iterations", True),
    ],
)
def test_another_kdf_is_refused(field: str, value: object) -> None:
    tree = _tree()
    tree["kdf"][field] = value
    with pytest.raises(KeystoreError):
        Sealed(json.dumps(tree).encode(), None)


def test_a_salt_that_is_too_short_is_refused() -> None:
    tree = _tree()
    tree["kdf"]["salt"] = "AAAA"
    with pytest.raises(KeystoreError, match="salt is too short"):
        _open(json.dumps(tree).encode())


@pytest.mark.parametrize(
    "raw", [b"", b"\n", b"{}", b"[]", b"null", b"\xff", RAW + b"x", b"[" * 100_000, b'{"formatVersion":"3"}']
)
def test_what_is_no_keystore_is_refused(raw: bytes) -> None:
    with pytest.raises(KeystoreError):
        Sealed(raw, None)


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"formatVersion":"3"}'])
def test_what_names_no_format_is_no_keystore(raw: bytes) -> None:
    with pytest.raises(KeystoreError):
        formats.version_of(raw)


@pytest.mark.parametrize("version", [0, 1, 2, 3, 5, -3])
def test_a_file_of_another_format_is_refused(version: int) -> None:
    raw = json.dumps({**_tree(), "formatVersion": version}).encode()
    assert formats.version_of(raw) == version
    with pytest.raises(KeystoreError):
        Sealed(raw, None)


def test_a_kek_opens_in_its_slot_alone() -> None:
    own = keks.slot("a", 1)
    wrapped = KEYS.wrap(own, Secret(bytearray(32)))
    assert len(KEYS.unwrap(own, wrapped)) == 32
    other_kind = own.spec._replace(name="AES_257")
    for other in (
        own._replace(version=2),
        own._replace(group="b"),
        own._replace(group="aa"),
        own._replace(uuid=bytes(15) + b"x"),
        own._replace(spec=other_kind),
    ):
        with pytest.raises(DecryptionFailedError):
            KEYS.unwrap(other, wrapped)


def test_the_sub_keys_can_be_wiped() -> None:
    keys = _keys()
    before = keys.mac(b"x")
    keys.wipe()
    assert keys.mac(b"x") != before
    assert not keys.is_right(KEYS.seal_check())


def test_an_encoder_writes_what_a_fresh_one_would_after_any_change() -> None:
    def mint(slot: KeySlot) -> NewKey:
        kek = Secret(bytearray(32))
        return NewKey(Kek(kek), KEYS.wrap(slot, kek))

    encoder = format4.Encoder()
    keyring = KEYRING
    name = next(iter(KEYRING.groups))
    for command in (RotateGroup(name), CreateGroup("another"), RotateGroup(name), RotateGroup("another")):
        encoder.encode(keyring, FRONT, KEYS)
        keyring = apply(keyring, command, now=5, mint=mint)
        assert encoder.encode(keyring, FRONT, KEYS) == format4.Encoder().encode(keyring, FRONT, KEYS)

"""Every format in both directions against an independent reader and writer (`independent`).

What the program writes, the other reads; what the other writes, the program reads, and where nonces are given both
write the same bytes. Format 2 has no writer here, so it is read only.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kms.client import files
from kms.client.protocol import DataKey
from kms.core import ciphertext
from kms.core.ciphertext import Purpose
from kms.core.derive import KdfParameters
from kms.core.envelope import CommittingKey, EnvelopeKey
from kms.core.kek import Kek
from kms.core.keyring import KeyGroup, Keyring, KeySlot, KeyVersion, VersionStatus
from kms.core.secret import Secret
from kms.core.specs import AES_256
from kms.errors import DecryptionFailedError, KeystoreError, WrongPassphraseError
from kms.storage import format2, format3, format4, journal
from kms.storage.root_keys import RootKeys
from kms.storage.stored import KdfHeader
from kms_tests import keks
from kms_tests.keks import group_of
from kms_tests.strategies import aads, plaintexts, stored_names, versions
from kms_tests.vectors import independent
from kms_tests.vectors.independent import Group, Version

COSTS = KdfParameters(independent.MEMORY_KIB, independent.ITERATIONS, independent.PARALLELISM)
PASSPHRASE = "correct horse, Übung 日本".encode()
OLDER = ["ENABLED", "DISABLED", "DESTROYED"]

keys = st.binary(min_size=32, max_size=32)
nonces = st.binary(min_size=12, max_size=12)
salts = st.binary(min_size=16, max_size=16)
seconds = st.integers(0, 1 << 40)


@st.composite
def groups(draw: st.DrawFn) -> list[Group]:
    """Groups as a keystore may hold them."""
    made = []
    for name in draw(st.lists(stored_names, max_size=3, unique=True)):
        numbers = sorted(draw(st.sets(versions, min_size=1, max_size=4)))
        active = draw(st.sampled_from(numbers))
        stored = []
        for number in numbers:
            status = "ACTIVE" if number == active else draw(st.sampled_from(OLDER))
            stored.append(Version(number, status, draw(seconds), None if status == "DESTROYED" else draw(keys)))
        made.append(Group(name, draw(seconds), active, tuple(stored)))
    return made


def _secret(data: bytes) -> Secret:
    return Secret(bytearray(data))


def _key(key: bytes) -> EnvelopeKey:
    return EnvelopeKey(_secret(key))


def _counted() -> Iterator[bytes]:
    return (number.to_bytes(12, "big") for number in range(1 << 20))


def test_the_independent_side_imports_nothing_of_the_program() -> None:
    tree = ast.parse(Path(independent.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name.partition(".")[0] for name in imported} & {"kms", "kms_tests", "cryptography", "argon2", "msgspec"}


@given(keys, nonces, plaintexts, aads)
def test_both_seal_the_same_envelope_and_open_each_others(key: bytes, nonce: bytes, plaintext: bytes, aad: bytes) -> None:
    theirs = independent.seal(key, nonce, plaintext, aad)
    assert _key(key).seal_with_nonce(nonce, plaintext, aad) == theirs
    assert _key(key).open(theirs, aad) == plaintext
    assert independent.unseal(key, _key(key).seal(plaintext, aad), aad) == plaintext


@given(keys, nonces, plaintexts, aads, st.data())
def test_both_refuse_the_same_altered_envelopes(
    key: bytes, nonce: bytes, plaintext: bytes, aad: bytes, data: st.DataObject
) -> None:
    altered = bytearray(independent.seal(key, nonce, plaintext, aad))
    altered[data.draw(st.integers(0, len(altered) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ValueError):
        independent.unseal(key, bytes(altered), aad)
    with pytest.raises(DecryptionFailedError):
        _key(key).open(altered, aad)


@given(stored_names, versions, keys, nonces, plaintexts, aads)
def test_both_make_the_same_ciphertext_and_take_each_others_apart(
    group: str, version: int, key: bytes, nonce: bytes, plaintext: bytes, aad: bytes
) -> None:
    theirs = independent.ciphertext(group, version, independent.seal(key, nonce, plaintext, aad))
    ours = keks.earlier_header(ciphertext.kek_id(group, version)) + _key(key).seal_with_nonce(nonce, plaintext, aad)
    assert ours == theirs
    assert ciphertext.parse(theirs)[:3] == independent.take_apart(ours)


wide_nonces = st.binary(min_size=24, max_size=24)
purposes = st.sampled_from(Purpose)


@given(keys, wide_nonces, plaintexts, aads)
def test_both_seal_the_same_committing_envelope_and_open_each_others(
    key: bytes, nonce: bytes, plaintext: bytes, aad: bytes
) -> None:
    theirs = independent.committing_seal(key, nonce, plaintext, aad)
    ours = CommittingKey(_secret(key))
    assert ours.seal_with_nonce(nonce, plaintext, aad) == theirs
    assert ours.open(theirs, aad) == plaintext
    assert independent.committing_unseal(key, ours.seal(plaintext, aad), aad) == plaintext


@given(keys, wide_nonces, plaintexts, aads, st.data())
def test_both_refuse_the_same_altered_committing_envelopes(
    key: bytes, nonce: bytes, plaintext: bytes, aad: bytes, data: st.DataObject
) -> None:
    altered = bytearray(independent.committing_seal(key, nonce, plaintext, aad))
    altered[data.draw(st.integers(0, len(altered) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ValueError):
        independent.committing_unseal(key, bytes(altered), aad)
    with pytest.raises(DecryptionFailedError):
        CommittingKey(_secret(key)).open(bytes(altered), aad)


@given(purposes, stored_names, versions, keys, wide_nonces, plaintexts, aads)
def test_both_open_each_others_ciphertexts_of_today(
    purpose: Purpose, group: str, version: int, kek: bytes, nonce: bytes, plaintext: bytes, aad: bytes
) -> None:
    theirs = independent.bound_ciphertext(purpose, group, version, kek, nonce, plaintext, aad)
    assert ciphertext.parse(theirs)[:2] == (group, version)
    assert keks.opened(Kek(_secret(kek)), theirs, aad) == plaintext
    ours = keks.sealed(Kek(_secret(kek)), plaintext, aad, group=group, version=version, purpose=purpose)
    assert independent.open_bound_ciphertext(ours, kek, aad) == (purpose, group, version, plaintext)


class _Client:
    """What the file functions need, over the independent side alone."""

    def __init__(self, kek: bytes, data_key: bytes, nonce: bytes) -> None:
        self._kek = kek
        self._data_key = data_key
        self._nonce = nonce

    def generate_data_key(
        self, key_id: str | None = None, aad: bytes = b"", *, also_key_ids: Sequence[str] = ()
    ) -> DataKey:
        return DataKey(self._data_key, self.wrap(aad))

    def wrap(self, aad: bytes) -> bytes:
        return independent.ciphertext("default", 1, independent.seal(self._kek, self._nonce, self._data_key, aad))

    def decrypt(self, ciphertext: bytes, aad: bytes = b"", *, source_key_id: str | None = None) -> bytes:
        group, version, envelope = independent.take_apart(ciphertext)
        assert (group, version) == ("default", 1)
        return independent.unseal(self._kek, envelope, aad)

    def reencrypt(self, ciphertext: bytes, key_id: str, aad: bytes = b"", *, source_key_id: str | None = None) -> bytes:
        raise NotImplementedError


@given(keys, keys, nonces, st.binary(max_size=3000), aads)
def test_both_read_each_others_containers(kek: bytes, data_key: bytes, nonce: bytes, content: bytes, aad: bytes) -> None:
    client = _Client(kek, data_key, nonce)
    ours = BytesIO()
    files.encrypt_file(client, BytesIO(content), ours, aad=aad, file_format=files.FileFormat.MKE1)
    wrapped, envelope = independent.open_container(ours.getvalue())
    assert independent.unseal(client.decrypt(wrapped, aad), envelope, aad) == content
    theirs = independent.container(client.wrap(aad), independent.seal(data_key, nonce, content, aad))
    read = BytesIO()
    files.decrypt_file(client, BytesIO(theirs), read, aad=aad)
    assert read.getvalue() == content


class _StreamClient(_Client):
    """The same, with the ciphertexts of today."""

    def wrap(self, aad: bytes) -> bytes:
        nonce = self._nonce * 2
        return independent.bound_ciphertext(2, "default", 1, self._kek, nonce, self._data_key, aad)

    def decrypt(self, ciphertext: bytes, aad: bytes = b"", *, source_key_id: str | None = None) -> bytes:
        purpose, group, version, plaintext = independent.open_bound_ciphertext(ciphertext, self._kek, aad)
        assert (purpose, group, version) == (2, source_key_id, 1)
        return plaintext


sizes = st.integers(0, 3000) | st.sampled_from([65_535, 65_536, 65_537, 2 * 65_536, 17 * 65_536])


@given(keys, keys, nonces, st.binary(min_size=32, max_size=32), sizes, aads)
@settings(max_examples=30, deadline=None)
def test_both_read_each_others_streams(
    kek: bytes, data_key: bytes, nonce: bytes, salt: bytes, size: int, aad: bytes
) -> None:
    content = bytes(range(256)) * (size // 256 + 1)
    content = content[:size]
    client = _StreamClient(kek, data_key, nonce)
    ours = BytesIO()
    files.encrypt_file(client, BytesIO(content), ours, aad=aad)
    assert independent.read_stream(ours.getvalue(), data_key, aad) == ([client.wrap(aad)], content)
    read = BytesIO()
    files.decrypt_file(
        client, BytesIO(independent.write_stream([client.wrap(aad)], data_key, salt, content, aad)), read, aad=aad
    )
    assert read.getvalue() == content


def _matches(keyring: Keyring, expected: list[Group], *, created_at_is_stored: bool = True) -> None:
    """The keyring is `expected`, and its keys open what the expected KEKs seal."""
    assert list(keyring.groups) == [group.name for group in expected]
    for group in expected:
        loaded = keyring.groups[group.name]
        assert loaded.active.version == group.active
        assert not created_at_is_stored or loaded.created_at == group.created_at
        for version, stored in zip(group.versions, loaded.versions.values(), strict=True):
            assert (stored.version, stored.status.value, stored.created_at) == (
                version.number,
                version.status,
                version.created_at,
            )
            if version.kek is None:
                assert stored.key is None
            else:
                assert stored.key is not None
                earlier = independent.ciphertext("g", 1, independent.seal(version.kek, bytes(12), b"x", b"aad"))
                assert keks.opened(stored.key, earlier, b"aad") == b"x"
                bound = independent.bound_ciphertext(1, "g", 1, version.kek, bytes(24), b"y", b"aad")
                assert keks.opened(stored.key, bound, b"aad") == b"y"


def _load3(raw: bytes) -> Keyring:
    sealed = format3.Sealed(raw)
    with sealed.header.derive(_secret(PASSPHRASE)) as root:
        return sealed.open(root, lambda _slot, _key: b"rewrapped")


@given(groups(), st.integers(0, 1 << 62), salts)
@settings(max_examples=25)
def test_a_format_3_keystore_that_the_other_wrote_loads(expected: list[Group], generation: int, salt: bytes) -> None:
    keyring = _load3(independent.write_format3(expected, generation, PASSPHRASE, salt, _counted()))
    assert keyring.generation == generation
    _matches(keyring, expected)


@given(groups(), st.integers(0, 1 << 62), salts, st.lists(groups(), max_size=3))
@settings(max_examples=25)
def test_a_format_4_keystore_and_journal_that_the_other_wrote_load(
    expected: list[Group], generation: int, salt: bytes, later: list[list[Group]]
) -> None:
    raw, beside = independent.write_format4(expected, generation, PASSPHRASE, salt, _counted(), later)
    sealed = format4.Sealed(raw, beside)
    with sealed.header.derive(_secret(PASSPHRASE)) as root:
        keyring = sealed.open(root)
    assert keyring.generation == generation + len(later)
    _matches(keyring, _merged(expected, *later))


def _merged(*commits: list[Group]) -> list[Group]:
    merged: dict[str, Group] = {}
    for commit in commits:
        merged.update((group.name, group) for group in commit)
    return list(merged.values())


@given(groups(), st.integers(0, 1 << 62), salts, st.lists(groups(), max_size=3))
@settings(max_examples=25)
def test_a_format_4_keystore_and_journal_that_we_write_are_read_by_the_other(
    expected: list[Group], generation: int, salt: bytes, later: list[list[Group]]
) -> None:
    header = KdfHeader(COSTS, salt)
    with header.derive(_secret(PASSPHRASE)) as root:
        keys = RootKeys(root)
    identity = str(uuid4()) if later else None
    front, encoder = format4.Front(header, keys.seal_check(), identity), format4.Encoder()
    raw = bytes(encoder.encode(Keyring(generation, {group.name: _built(group, keys) for group in expected}), front, keys))
    lines = [] if identity is None else [journal.header(identity, generation, keys.journal_mac)]
    for number, changed in enumerate(later, generation + 1):
        encoded = [encoder.group(_built(group, keys)) for group in changed]
        lines.append(journal.record(number, journal.mac_of(lines[-1]), encoded, keys.journal_mac))
    read = independent.read_format4(raw, b"".join(lines) if lines else None, PASSPHRASE)
    assert read == (generation + len(later), _merged(expected, *later))


def _built(group: Group, keys: RootKeys) -> KeyGroup:
    built = {}
    for version in group.versions:
        slot = KeySlot(group.name, group.uuid, AES_256, version.number)
        wrapped = None if version.kek is None else keys.wrap(slot, _secret(version.kek))
        key = None if version.kek is None else Kek(_secret(version.kek))
        status = VersionStatus[version.status]
        built[version.number] = KeyVersion.build(group.name, version.number, status, version.created_at, wrapped, key)
    return group_of(group.name, built, created_at=group.created_at, uuid=group.uuid)


@given(groups(), salts)
@settings(max_examples=25)
def test_a_format_2_keystore_that_the_other_wrote_loads(expected: list[Group], salt: bytes) -> None:
    sealed = format2.Sealed(independent.write_format2(expected, PASSPHRASE, salt, _counted()))
    with sealed.header.derive(_secret(PASSPHRASE)) as root:
        keyring = sealed.open(root, lambda _slot, _key: b"rewrapped")
    _matches(keyring, expected, created_at_is_stored=False)


@given(groups(), salts, st.data())
@settings(max_examples=25)
def test_a_format_3_keystore_of_the_other_with_one_byte_changed_does_not_load(
    expected: list[Group], salt: bytes, data: st.DataObject
) -> None:
    raw = bytearray(independent.write_format3(expected, 1, PASSPHRASE, salt, _counted()))
    # Behind the costs, which would be paid before they are refused.
    at = data.draw(st.integers(raw.index(b'"rootCheck"'), len(raw) - 1))
    raw[at] ^= data.draw(st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128]))
    with pytest.raises((KeystoreError, WrongPassphraseError)):
        _load3(bytes(raw))

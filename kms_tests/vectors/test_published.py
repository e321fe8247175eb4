"""The vectors in docs/vectors are what the independent side makes, and what the program does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from io import BytesIO
from typing import Any
from uuid import UUID

import pytest

from kms.client import files
from kms.client.protocol import DataKey
from kms.core import ciphertext
from kms.core.kek import Kek
from kms.core.keyring import Keyring
from kms.core.secret import Secret
from kms.errors import DecryptionFailedError, InputError, KeystoreError
from kms.storage import format4
from kms_tests import keks
from kms_tests.vectors import independent, published

MADE = published.documents()
CIPHERTEXTS, STREAMS, KEYSTORES = MADE["ciphertext-03.json"], MADE["mke2.json"], MADE["keystore-4.json"]
KEK = Kek(Secret(bytearray(published.KEK)))


@pytest.mark.parametrize("name", MADE)
def test_what_is_published_is_what_the_independent_side_makes(name: str) -> None:
    assert json.loads((published.DIRECTORY / name).read_text(encoding="utf-8")) == MADE[name]


@pytest.mark.parametrize("one", CIPHERTEXTS["open"], ids=lambda one: f"{one['group'][:9]} v{one['version']}")
def test_a_published_ciphertext_opens(one: dict[str, Any]) -> None:
    blob, aad = bytes.fromhex(one["ciphertext"]), bytes.fromhex(one["aad"])
    assert keks.opened(KEK, blob, aad) == bytes.fromhex(one["plaintext"])
    parsed = ciphertext.parse(blob)
    assert (parsed.group, parsed.version, parsed.purpose) == (one["group"], one["version"], one["purpose"])


@pytest.mark.parametrize("one", CIPHERTEXTS["refuse"], ids=lambda one: one["why"])
def test_a_published_forgery_of_a_ciphertext_is_refused_by_both(one: dict[str, Any]) -> None:
    blob, aad = bytes.fromhex(one["ciphertext"]), bytes.fromhex(one["aad"])
    with pytest.raises(DecryptionFailedError):
        keks.opened(KEK, blob, aad)
    with pytest.raises((ValueError, IndexError)):
        independent.open_bound_ciphertext(blob, published.KEK, aad)


def _keyring(one: dict[str, Any]) -> Keyring:
    raw, beside = one["keystore"].encode(), one["journal"]
    sealed = format4.Sealed(raw, None if beside is None else beside.encode())
    with sealed.header.derive(Secret(bytearray(KEYSTORES["passphrase"].encode()))) as root:
        return sealed.open(root)


@pytest.mark.parametrize("one", KEYSTORES["open"], ids=lambda one: f"generation {one['generation']}")
def test_a_published_keystore_opens(one: dict[str, Any]) -> None:
    keyring = _keyring(one)
    assert keyring.generation == one["generation"]
    assert list(keyring.groups) == [group["keyId"] for group in one["keyGroups"]]
    for told in one["keyGroups"]:
        group = keyring.groups[told["keyId"]]
        assert str(UUID(bytes=group.uuid)) == told["keyUuid"]
        assert {str(number): v.status.value for number, v in group.versions.items()} == {
            number: status for number, (status, _) in told["versions"].items()
        }
        for number, (_, key) in told["versions"].items():
            found = group.versions[int(number)].key
            assert (found is None) == (key is None)
            if found is not None:
                assert keks.opened(found, keks.sealed(Kek(Secret(bytearray.fromhex(key))), b"x")) == b"x"


@pytest.mark.parametrize("one", KEYSTORES["refuse"], ids=lambda one: one["why"])
def test_a_published_forgery_of_a_keystore_is_refused(one: dict[str, Any]) -> None:
    with pytest.raises(KeystoreError):
        _keyring(one)


class _Client:
    """A server with the one KEK."""

    def generate_data_key(
        self, key_id: str | None = None, aad: bytes = b"", *, also_key_ids: Sequence[str] = ()
    ) -> DataKey:
        raise NotImplementedError

    def decrypt(self, ciphertext: bytes, aad: bytes = b"", *, source_key_id: str | None = None) -> bytes:
        return keks.opened(KEK, ciphertext, aad)

    def reencrypt(self, ciphertext: bytes, key_id: str, aad: bytes = b"", *, source_key_id: str | None = None) -> bytes:
        raise NotImplementedError


def _opened(file: bytes) -> bytes:
    output = BytesIO()
    files.decrypt_file(_Client(), BytesIO(file), output, aad=bytes.fromhex(STREAMS["aad"]))
    return output.getvalue()


@pytest.mark.parametrize("one", STREAMS["open"], ids=lambda one: str(one["plaintext"]))
def test_a_published_stream_opens(one: dict[str, Any]) -> None:
    recipients = [bytes.fromhex(blob) for blob in one["recipients"]]
    plaintext = published.content(one["plaintext"])
    file = independent.write_stream(recipients, published.DATA_KEY, published.SALT, plaintext, b"aad")
    shown = one["file"]
    if "hex" in shown:
        assert file.hex() == shown["hex"]
    else:
        assert (hashlib.sha256(file).hexdigest(), len(file)) == (shown["sha256"], shown["size"])
    assert _opened(file) == plaintext


@pytest.mark.parametrize("one", STREAMS["refuse"], ids=lambda one: one["why"])
def test_a_published_forgery_of_a_stream_is_refused(one: dict[str, Any]) -> None:
    base = published.base_stream()
    assert (hashlib.sha256(base).hexdigest(), len(base)) == (STREAMS["base"]["sha256"], STREAMS["base"]["size"])
    file = published.assembled(one["file"], base)
    assert file != base
    with pytest.raises((InputError, DecryptionFailedError)):
        _opened(file)

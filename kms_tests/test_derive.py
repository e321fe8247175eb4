"""From the passphrase to the keys: known answers, and bounds."""

from __future__ import annotations

import pytest
from argon2.low_level import Type, hash_secret_raw
from hypothesis import given
from hypothesis import strategies as st

from kms.core import derive
from kms.core.derive import KdfParameters
from kms.core.secret import Secret
from kms.errors import KeystoreError, MemoryShortError

GIB_IN_KIB = 1024 * 1024


ARGON2_MEMORY_ALLOCATION_ERROR = -22
"""Of argon2.h."""


def _bytes(secret: Secret) -> bytes:
    with secret.view() as view:
        return bytes(view)


def test_argon2id_gives_the_answer_of_rfc_9106() -> None:
    # RFC 9106, section 5.3.
    key = derive.argon2id(
        Secret(bytearray(b"\x01" * 32)),
        b"\x02" * 16,
        KdfParameters(memory_kib=32, iterations=3, parallelism=4),
        secret=b"\x03" * 8,
        associated_data=b"\x04" * 12,
    )
    assert _bytes(key).hex() == "0d640df58d78766c08c037a34a8b53c9d01ef0452d75b65eb52520e96b01e659"


@given(st.binary(max_size=80), st.binary(min_size=8, max_size=40), st.integers(1, 3), st.integers(1, 3))
def test_the_root_key_is_argon2id_and_nothing_else(passphrase: bytes, salt: bytes, iterations: int, lanes: int) -> None:
    key = derive.root_key(Secret(bytearray(passphrase)), salt, KdfParameters(32, iterations, lanes))
    assert _bytes(key) == hash_secret_raw(passphrase, salt, iterations, 32, lanes, 32, Type.ID, 0x13)


def test_deriving_leaves_the_passphrase_as_it_is(tiny: KdfParameters) -> None:
    passphrase = Secret(bytearray(b"correct horse"))
    derive.root_key(passphrase, bytes(16), tiny)
    assert _bytes(passphrase) == b"correct horse"


def test_a_salt_of_less_than_8_bytes_is_refused(tiny: KdfParameters) -> None:
    with pytest.raises(KeystoreError, match="salt is too short"):
        derive.root_key(Secret(bytearray(b"x")), bytes(7), tiny)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("memory", KdfParameters(memory_kib=7)),
        ("memory", KdfParameters(memory_kib=4 * GIB_IN_KIB + 1)),
        ("memory", KdfParameters(memory_kib=-1)),
        ("iterations", KdfParameters(iterations=0)),
        ("iterations", KdfParameters(iterations=65)),
        ("parallelism", KdfParameters(parallelism=0)),
        ("parallelism", KdfParameters(parallelism=65)),
    ],
)
def test_a_cost_outside_its_bounds_is_refused_by_name(name: str, parameters: KdfParameters) -> None:
    with pytest.raises(KeystoreError, match=rf"Argon2id {name} is"):
        derive.root_key(Secret(bytearray(b"x")), bytes(16), parameters)


@pytest.mark.parametrize("parameters", [KdfParameters(8, 1, 1), KdfParameters(4 * GIB_IN_KIB, 64, 64), KdfParameters()])
def test_a_cost_at_its_bounds_is_accepted(parameters: KdfParameters) -> None:
    parameters.check()


def test_what_argon2_itself_refuses_is_an_error_of_the_keystore() -> None:
    # 8 KiB for each lane is Argon2's own minimum.
    with pytest.raises(KeystoreError, match="Argon2id failed"):
        derive.root_key(Secret(bytearray(b"x")), bytes(16), KdfParameters(8, 1, 2))


@pytest.mark.parametrize(
    ("key", "salt", "info", "length", "expected"),
    [
        # RFC 5869, appendices A.1 to A.3.
        (
            b"\x0b" * 22,
            bytes(range(13)),
            bytes(range(0xF0, 0xFA)),
            42,
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
        ),
        (
            bytes(range(0x50)),
            bytes(range(0x60, 0xB0)),
            bytes(range(0xB0, 0x100)),
            82,
            "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09"
            "da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
        ),
        (
            b"\x0b" * 22,
            None,
            b"",
            42,
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
        ),
    ],
)
def test_hkdf_gives_the_answers_of_rfc_5869(
    key: bytes, salt: bytes | None, info: bytes, length: int, expected: str
) -> None:
    assert derive.hkdf_sha256(Secret(bytearray(key)), salt=salt, info=info, length=length).hex() == expected


def test_each_use_has_a_sub_key_of_its_own_and_none_is_the_root_key() -> None:
    root = bytes(range(32))
    keys = {_bytes(derive.sub_key(Secret(bytearray(root)), label)) for label in ("wrap", "mac", "check")}
    assert len(keys) == 3
    assert root not in keys
    assert {len(key) for key in keys} == {32}


def test_memory_that_is_short_is_not_a_damaged_keystore(tiny: KdfParameters, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derive, "core", lambda *_: ARGON2_MEMORY_ALLOCATION_ERROR)
    with Secret(bytearray(b"passphrase")) as passphrase, pytest.raises(MemoryShortError, match="not enough") as caught:
        derive.root_key(passphrase, bytes(16), tiny)
    assert caught.value.exit_code == 71

"""Argon2id and HKDF: the vectors of RFC 9106 and RFC 5869, and more against independent implementations.

`derive.argon2id` takes the two inputs that only the RFC's vector uses (a secret and associated data) but always gives
32 bytes, so of the published vectors those of 32 bytes are its own. `derive.hkdf_sha256` is all of HKDF; what the
keystore uses of it is an info label and no salt, which RFC 5869 defines as a salt of zeros.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kms.core import derive
from kms.core.derive import KdfParameters
from kms.core.secret import Secret
from kms_tests.vectors import independent
from kms_tests.vectors.cavp import Record, records

ARGON2 = [r for r in records("KDF/argon2id.txt", "COUNT") if r["length"] == "32"]
HKDF = list(records("KDF/rfc-5869-HKDF-SHA256.txt", "COUNT"))
HKDF_GENERATED = [r for r in records("KDF/hkdf-generated.txt", "COUNT") if r["Hash"] == "SHA-256"]


def _hex(record: Record, name: str) -> bytes:
    return bytes.fromhex(record.get(name, ""))


def _secret(data: bytes) -> Secret:
    return Secret(bytearray(data))


def _bytes(secret: Secret) -> bytes:
    with secret.view() as view:
        return bytes(view)


def test_the_vectors_are_all_there() -> None:
    assert (len(ARGON2), len(HKDF)) == (3, 3)
    assert len(HKDF_GENERATED) >= 1
    assert any(r.get("secret") and r.get("ad") for r in ARGON2)


@pytest.mark.parametrize("record", ARGON2)
def test_argon2id_gives_the_published_answers(record: Record) -> None:
    costs = KdfParameters(int(record["memcost"]), int(record["iter"]), int(record["lanes"]))
    key = derive.argon2id(
        _secret(_hex(record, "pass")),
        _hex(record, "salt"),
        costs,
        secret=_hex(record, "secret"),
        associated_data=_hex(record, "ad"),
    )
    assert _bytes(key) == _hex(record, "output")


def test_the_independent_argon2id_gives_the_answer_of_rfc_9106() -> None:
    assert independent.argon2id(
        b"\x01" * 32,
        b"\x02" * 16,
        iterations=3,
        memory_kib=32,
        lanes=4,
        secret=b"\x03" * 8,
        associated_data=b"\x04" * 12,
    ) == _hex(ARGON2[0], "output")


@given(st.binary(max_size=100), st.binary(min_size=8, max_size=48), st.integers(1, 2), st.sampled_from([(8, 1), (17, 2)]))
@settings(max_examples=15)
def test_the_root_key_is_what_an_independent_argon2id_derives(
    passphrase: bytes, salt: bytes, iterations: int, memory_and_lanes: tuple[int, int]
) -> None:
    memory, lanes = memory_and_lanes
    ours = derive.root_key(_secret(passphrase), salt, KdfParameters(memory, iterations, lanes))
    assert _bytes(ours) == independent.argon2id(passphrase, salt, iterations=iterations, memory_kib=memory, lanes=lanes)


@pytest.mark.parametrize("record", [*HKDF, *HKDF_GENERATED])
def test_hkdf_gives_the_published_answers(record: Record) -> None:
    salt, info, length = _hex(record, "salt"), _hex(record, "info"), int(record["L"])
    ours = derive.hkdf_sha256(_secret(_hex(record, "IKM")), salt=salt or None, info=info, length=length)
    assert ours == _hex(record, "OKM")


@given(st.binary(min_size=1, max_size=80), st.binary(max_size=80), st.binary(max_size=80), st.integers(1, 255 * 32))
def test_hkdf_is_what_an_independent_one_derives(key: bytes, salt: bytes, info: bytes, length: int) -> None:
    ours = derive.hkdf_sha256(_secret(key), salt=salt or None, info=info, length=length)
    assert ours == independent.hkdf(key, length, salt, info)


@given(st.binary(min_size=32, max_size=32), st.text(st.characters(codec="ascii"), min_size=1, max_size=40))
def test_a_sub_key_is_hkdf_with_its_label_and_a_salt_of_zeros(root: bytes, label: str) -> None:
    assert _bytes(derive.sub_key(_secret(root), label)) == independent.hkdf(root, 32, bytes(32), label.encode())

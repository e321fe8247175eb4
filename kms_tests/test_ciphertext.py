"""The ciphertext that clients hold."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms.core import ciphertext
from kms.core.ciphertext import Ciphertext, Purpose, header, kek_id
from kms.core.envelope import COMMITTING_PREFIX, PREFIX
from kms.errors import DecryptionFailedError
from kms.limits import MAX_VERSION
from kms_tests.keks import earlier_header
from kms_tests.strategies import stored_names, versions

PLAIN = PREFIX + bytes(28)
COMMITTING = COMMITTING_PREFIX + bytes(72)
BILLING = kek_id("billing", 1)
BOTH = {"02": earlier_header(BILLING) + PLAIN, "03": header(Purpose.ENCRYPT, BILLING) + COMMITTING}


def test_the_bytes_are_those_of_the_contract() -> None:
    assert kek_id("billing", 258) == b"\x07billing\x00\x00\x00\x00\x00\x00\x01\x02"
    assert earlier_header(kek_id("billing", 258)) == b"\x02\x07billing\x00\x00\x00\x00\x00\x00\x01\x02"
    assert header(Purpose.DATA_KEY, kek_id("billing", 258)) == b"\x03\x02\x07billing\x00\x00\x00\x00\x00\x00\x01\x02"
    assert {purpose.name: purpose.value for purpose in Purpose} == {
        "UNKNOWN": 0,
        "ENCRYPT": 1,
        "DATA_KEY": 2,
        "DATA_KEY_PAIR": 3,
    }


def test_what_a_committing_envelope_authenticates_is_the_header_and_the_aad_each_after_its_length() -> None:
    assert ciphertext.bound(b"head", b"er") == b"\0\0\0\0\0\0\0\4head\0\0\0\0\0\0\0\2er"
    assert ciphertext.bound(b"", b"") == bytes(16)


@given(stored_names, versions, st.sampled_from(Purpose), st.binary(max_size=99))
def test_what_is_put_together_is_taken_apart(group: str, version: int, purpose: Purpose, sealed: bytes) -> None:
    kek = kek_id(group, version)
    for front, envelope, made_for in (
        (header(purpose, kek), COMMITTING + sealed, purpose),
        (earlier_header(kek), PLAIN + sealed, Purpose.UNKNOWN),
    ):
        parsed = ciphertext.parse(front + envelope)
        assert parsed == Ciphertext(group, version, envelope, made_for, front)
        assert parsed.plaintext_bytes == len(sealed)
        assert ciphertext.kek_id_of(front + envelope) == kek
        assert ciphertext.version_of(front + envelope) == version
        assert ciphertext.named(front + envelope) == (group, version)
        assert ciphertext.is_one(front + envelope)


@given(st.binary(max_size=400) | st.tuples(st.sampled_from([b"\x02", b"\x03"]), st.binary(max_size=400)).map(b"".join))
def test_any_bytes_at_all_are_a_ciphertext_or_fail_to_decrypt(blob: bytes) -> None:
    try:
        parsed = ciphertext.parse(blob)
    except DecryptionFailedError:
        return
    assert blob == parsed.header + parsed.envelope


@pytest.mark.parametrize("blob", BOTH.values(), ids=BOTH)
def test_a_ciphertext_cut_short_fails_to_decrypt(blob: bytes) -> None:
    ciphertext.parse(blob)
    for length in range(len(blob)):
        with pytest.raises(DecryptionFailedError):
            ciphertext.parse(blob[:length])


@pytest.mark.parametrize(("first", "of"), list(product([0, 1, 4, 0x7B, 0xFF], BOTH)))
def test_another_format_version_fails_to_decrypt(first: int, of: str) -> None:
    with pytest.raises(DecryptionFailedError):
        ciphertext.parse(bytes((first,)) + BOTH[of][1:])


@pytest.mark.parametrize("purpose", [4, 5, 0x80, 0xFF])
def test_another_purpose_fails_to_decrypt(purpose: int) -> None:
    with pytest.raises(DecryptionFailedError):
        ciphertext.parse(bytes((3, purpose)) + BILLING + COMMITTING)


@pytest.mark.parametrize("inner", [b"\x01\x01", b"\x01\x02", b"\x01\x03", b"\x02\x02", b"\x00\x01"])
def test_each_format_has_the_one_envelope_and_no_key_sees_another(inner: bytes) -> None:
    for form, front in (("02", earlier_header(BILLING)), ("03", header(Purpose.ENCRYPT, BILLING))):
        if (form, inner) in (("02", PREFIX), ("03", COMMITTING_PREFIX)):
            continue
        with pytest.raises(DecryptionFailedError):
            ciphertext.parse(front + inner + bytes(100))


@pytest.mark.parametrize("front", [b"\x02\x00", b"\x03\x01\x00"])
def test_a_name_of_no_bytes_fails_to_decrypt(front: bytes) -> None:
    with pytest.raises(DecryptionFailedError):
        ciphertext.parse(front + bytes(8) + (PLAIN if front[0] == 2 else COMMITTING))


@pytest.mark.parametrize("name", [b"\xff", b"\xed\xa0\x80", b"\xc0\xaf"])
def test_a_name_that_is_not_strict_utf8_fails_to_decrypt(name: bytes) -> None:
    for front, envelope in ((b"\x02", PLAIN), (b"\x03\x01", COMMITTING)):
        with pytest.raises(DecryptionFailedError):
            ciphertext.parse(front + bytes((len(name),)) + name + bytes(8) + envelope)


def test_no_id_is_made_for_an_empty_name() -> None:
    with pytest.raises(ValueError, match="not empty"):
        kek_id("", 1)


@pytest.mark.parametrize("name", ["x" * 256, "é" * 128, "x" * 512, "x" * 100_000])
def test_the_id_for_a_name_that_no_ciphertext_can_hold_opens_nothing(name: str) -> None:
    made = kek_id(name, 1)
    assert made != kek_id(name + "x", 1)
    for front, envelope in ((earlier_header(made), PLAIN), (header(Purpose.ENCRYPT, made), COMMITTING)):
        with pytest.raises(DecryptionFailedError):
            ciphertext.parse(front + envelope)


@pytest.mark.parametrize("version", [-1, 0, MAX_VERSION + 1])
def test_no_id_is_made_for_an_impossible_version(version: int) -> None:
    with pytest.raises(ValueError, match="version"):
        kek_id("x", version)


@pytest.mark.parametrize(("name", "version"), [("x", MAX_VERSION), ("x" * 255, 1)])
def test_the_longest_name_and_the_highest_version_are_possible(name: str, version: int) -> None:
    assert ciphertext.parse(header(Purpose.ENCRYPT, kek_id(name, version)) + COMMITTING)[:2] == (name, version)

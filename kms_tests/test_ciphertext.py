"""The ciphertext that clients hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms.core import ciphertext
from kms.core.ciphertext import Ciphertext
from kms.errors import DecryptionFailedError
from kms.limits import MAX_VERSION
from kms_tests.strategies import stored_names, versions

ENVELOPE = bytes(30)


def test_the_bytes_are_those_of_the_contract() -> None:
    assert ciphertext.header("billing", 258) == b"\x02\x07billing\x00\x00\x00\x00\x00\x00\x01\x02"


@given(stored_names, versions, st.binary(min_size=30, max_size=99))
def test_what_is_put_together_is_taken_apart(group: str, version: int, envelope: bytes) -> None:
    assert ciphertext.parse(ciphertext.header(group, version) + envelope) == Ciphertext(group, version, envelope)


@given(st.binary(max_size=400) | st.binary(max_size=400).map(lambda rest: b"\x02" + rest))
def test_any_bytes_at_all_are_a_ciphertext_or_fail_to_decrypt(blob: bytes) -> None:
    try:
        parsed = ciphertext.parse(blob)
    except DecryptionFailedError:
        return
    assert blob.endswith(parsed.envelope)


@pytest.mark.parametrize("length", range(2 + 7 + 8 + 30))
def test_a_ciphertext_cut_short_fails_to_decrypt(length: int) -> None:
    with pytest.raises(DecryptionFailedError):
        ciphertext.parse((ciphertext.header("billing", 1) + ENVELOPE)[:length])


@pytest.mark.parametrize("first", [0, 1, 3, 0x7B, 0xFF])
def test_another_format_version_fails_to_decrypt(first: int) -> None:
    with pytest.raises(DecryptionFailedError):
        ciphertext.parse(bytes((first,)) + (ciphertext.header("billing", 1) + ENVELOPE)[1:])


def test_a_name_of_no_bytes_fails_to_decrypt() -> None:
    with pytest.raises(DecryptionFailedError):
        ciphertext.parse(b"\x02\x00" + bytes(8) + ENVELOPE)


@pytest.mark.parametrize("name", [b"\xff", b"\xed\xa0\x80", b"\xc0\xaf"])
def test_a_name_that_is_not_strict_utf8_fails_to_decrypt(name: bytes) -> None:
    with pytest.raises(DecryptionFailedError):
        ciphertext.parse(bytes((2, len(name))) + name + bytes(8) + ENVELOPE)


def test_no_header_is_made_for_an_empty_name() -> None:
    with pytest.raises(ValueError, match="not empty"):
        ciphertext.header("", 1)


@pytest.mark.parametrize("name", ["x" * 256, "é" * 128, "x" * 512, "x" * 100_000])
def test_the_header_for_a_name_that_no_ciphertext_can_hold_opens_nothing(name: str) -> None:
    made = ciphertext.header(name, 1)
    assert made != ciphertext.header(name + "x", 1)
    with pytest.raises(DecryptionFailedError):
        ciphertext.parse(made + ENVELOPE)


@pytest.mark.parametrize("version", [-1, 0, MAX_VERSION + 1])
def test_no_header_is_made_for_an_impossible_version(version: int) -> None:
    with pytest.raises(ValueError, match="version"):
        ciphertext.header("x", version)


@pytest.mark.parametrize(("name", "version"), [("x", MAX_VERSION), ("x" * 255, 1)])
def test_the_longest_name_and_the_highest_version_are_possible(name: str, version: int) -> None:
    assert ciphertext.parse(ciphertext.header(name, version) + ENVELOPE)[:2] == (name, version)

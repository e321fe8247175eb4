"""The header of the file container MKE1."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms.core import mke1
from kms.core.ciphertext import Purpose
from kms.core.envelope import EnvelopeKey
from kms.core.kek import Kek
from kms.core.secret import Secret
from kms.errors import InputError
from kms_tests import keks


def test_the_bytes_are_those_of_the_contract() -> None:
    assert mke1.header(b"wrapped") == b"MKE1\x00\x00\x00\x07wrapped"


@given(st.binary(min_size=1, max_size=1024))
def test_the_length_that_is_written_is_read_back(wrapped: bytes) -> None:
    header = mke1.header(wrapped)
    assert mke1.wrapped_key_length(header[:8]) == len(wrapped)
    assert header[8:] == wrapped


@pytest.mark.parametrize("wrapped", [b"", bytes(1025)])
def test_a_wrapped_key_of_impossible_length_is_refused(wrapped: bytes) -> None:
    with pytest.raises(InputError, match="impossible length"):
        mke1.header(wrapped)


@pytest.mark.parametrize("fixed", [b"", b"MKE1", b"MKE1\0\0\0", b"MKE2\0\0\0\x07", b"mke1\0\0\0\x07", b"\x89PNG\r\n\x1a\n"])
def test_what_does_not_begin_like_a_container_is_named_so(fixed: bytes) -> None:
    with pytest.raises(InputError, match="not an MKE1 file"):
        mke1.wrapped_key_length(fixed)


@pytest.mark.parametrize("length", [0, 1025, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_damaged_length_is_refused_before_anything_is_allocated(length: int) -> None:
    with pytest.raises(InputError, match="header is damaged"):
        mke1.wrapped_key_length(b"MKE1" + length.to_bytes(4, "big"))


@pytest.mark.parametrize(
    ("purpose", "size", "is_one"),
    [
        (Purpose.DATA_KEY, 32, True),
        (Purpose.UNKNOWN, 32, True),
        (Purpose.ENCRYPT, 32, False),
        (Purpose.DATA_KEY_PAIR, 32, False),
        (Purpose.DATA_KEY, 31, False),
        (Purpose.DATA_KEY, 33, False),
    ],
)
def test_only_a_data_key_is_one_whatever_somebody_puts_there(purpose: Purpose, size: int, is_one: bool) -> None:
    kek = Kek(Secret(bytearray(32)))
    assert mke1.is_wrapped_key(keks.sealed(kek, bytes(size), purpose=purpose)) is is_one


def test_a_data_key_of_an_earlier_release_is_one() -> None:
    key = EnvelopeKey(Secret(bytearray(32)))
    assert mke1.is_wrapped_key(keks.sealed_earlier(key, bytes(32)))
    assert not mke1.is_wrapped_key(keks.sealed_earlier(key, bytes(33)))

"""Buffers that can be wiped and say nothing."""

from __future__ import annotations

import copy
import pickle

import pytest

from kms.core.secret import Secret


def test_the_repr_says_nothing() -> None:
    secret = Secret(bytearray(b"hunter2"))
    assert "hunter2" not in repr(secret)
    assert "hunter2" not in str(secret)
    assert repr(secret) == "<Secret>"


def test_the_view_is_the_buffer_itself_and_no_copy() -> None:
    buffer = bytearray(b"key")
    with Secret(buffer).view() as view:
        buffer[0] = 0x4B
        assert bytes(view) == b"Key"


def test_wiping_leaves_zeros_of_the_same_length() -> None:
    buffer = bytearray(b"key")
    secret = Secret(buffer)
    secret.wipe()
    assert buffer == b"\0\0\0"
    assert len(secret) == 3


def test_wiping_twice_does_nothing_more() -> None:
    secret = Secret(bytearray(b"key"))
    secret.wipe()
    secret.wipe()
    assert len(secret) == 3


def test_it_is_wiped_even_while_a_view_of_it_is_held() -> None:
    buffer = bytearray(b"key")
    secret = Secret(buffer)
    with secret.view():
        secret.wipe()
    assert buffer == b"\0\0\0"


def test_leaving_the_context_wipes_it() -> None:
    buffer = bytearray(b"key")
    with Secret(buffer) as secret:
        assert len(secret) == 3
    assert buffer == b"\0\0\0"


def test_leaving_the_context_with_an_error_wipes_it() -> None:
    buffer = bytearray(b"key")
    with pytest.raises(RuntimeError), Secret(buffer):
        raise RuntimeError
    assert buffer == b"\0\0\0"


def test_it_is_not_pickled() -> None:
    with pytest.raises(TypeError):
        pickle.dumps(Secret(bytearray(b"key")))


def test_it_is_not_copied() -> None:
    with pytest.raises(TypeError):
        copy.deepcopy(Secret(bytearray(b"key")))


def test_two_are_the_same_when_their_bytes_are() -> None:
    one = Secret(bytearray(b"hunter2"))
    assert one.is_same(Secret(bytearray(b"hunter2")))
    assert not one.is_same(Secret(bytearray(b"hunter3")))
    assert not one.is_same(Secret(bytearray(b"hunter")))

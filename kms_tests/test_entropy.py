"""Fresh random secrets."""

from __future__ import annotations

import pytest

from kms.core.secret import Secret
from kms.host.entropy import random_key, random_secret


def _bytes(secret: Secret) -> bytes:
    with secret.view() as view:
        return bytes(view)


def test_a_key_has_256_bits() -> None:
    assert len(random_key()) == 32


def test_no_two_keys_are_alike() -> None:
    assert len({_bytes(random_key()) for _ in range(100)}) == 100


@pytest.mark.parametrize("length", [1, 16, 256])
def test_a_secret_has_the_length_that_was_asked_for(length: int) -> None:
    assert len(random_secret(length)) == length


def test_every_byte_is_drawn() -> None:
    drawn = [_bytes(random_secret(32)) for _ in range(64)]
    assert all(any(secret[i] for secret in drawn) for i in range(32))


def test_what_the_system_refuses_is_an_error_and_no_zeros() -> None:
    with pytest.raises(OSError):
        random_secret(257)


def test_a_random_secret_can_be_wiped() -> None:
    secret = random_key()
    secret.wipe()
    assert _bytes(secret) == bytes(32)

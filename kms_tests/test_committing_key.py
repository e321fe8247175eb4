"""XAES-256-GCM with key commitment: fresh nonces, subkeys that are kept and bounded, one refusal."""

from __future__ import annotations

import gc
import os
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms.core import envelope
from kms.core.envelope import COMMITTING_OVERHEAD_BYTES, CommittingKey
from kms.core.secret import Secret
from kms.errors import DecryptionFailedError
from kms.limits import MAX_SUBKEYS_KEPT_PER_KEY

KEY = bytes(range(32))


def _key(key: bytes = KEY) -> CommittingKey:
    return CommittingKey(Secret(bytearray(key)))


def _first(blob: bytes) -> bytes:
    return blob[2:14]


def _fresh(key: CommittingKey, plaintext: bytes = b"x") -> bytes:
    """Sealed under a first half that nothing before was."""
    return key.seal_with_nonce(os.urandom(24), plaintext, b"")


def _refused(key: CommittingKey, blob: bytes, aad: bytes = b"") -> None:
    with pytest.raises(DecryptionFailedError) as refusal:
        key.open(blob, aad)
    assert str(refusal.value) == "decryption failed"


@given(st.binary(max_size=300), st.binary(max_size=100))
def test_what_is_sealed_opens(plaintext: bytes, aad: bytes) -> None:
    blob = _key().seal(plaintext, aad, b"in front")
    assert blob.startswith(b"in front\x01\x02")
    assert len(blob) == len(b"in front") + len(plaintext) + COMMITTING_OVERHEAD_BYTES
    assert _key().open(blob[8:], aad) == plaintext


@pytest.mark.parametrize("is_known", [True, False], ids=["by the sealer", "by another"])
def test_every_bit_counts(is_known: bool) -> None:
    sealer = _key()
    blob = sealer.seal(b"ten bytes!", b"aad")
    key = sealer if is_known else _key()
    for bit in range(8 * len(blob)):
        altered = bytearray(blob)
        altered[bit // 8] ^= 1 << bit % 8
        _refused(key, bytes(altered), b"aad")
    assert key.open(blob, b"aad") == b"ten bytes!"


def test_a_commitment_is_looked_at_though_the_tag_is_right_and_a_tag_though_the_commitment_is() -> None:
    key = _key()
    blob, other = key.seal(b"x", b""), key.seal(b"x", b"")
    _refused(key, blob[:-32] + other[-32:])
    _refused(key, blob[:-48] + other[-48:-32] + blob[-32:])


@pytest.mark.parametrize("length", range(COMMITTING_OVERHEAD_BYTES))
def test_what_is_too_short_is_refused(length: int) -> None:
    _refused(_key(), _key().seal(b"", b"")[:length])


def test_no_nonce_comes_twice_and_one_first_half_serves_for_so_many_seals() -> None:
    key = _key()
    with patch.object(envelope, "MAX_SEALS_PER_SUBKEY", 5):
        blobs = [key.seal(b"", b"") for _ in range(15)]
    assert len({blob[2:26] for blob in blobs}) == 15
    assert [_first(blob) for blob in blobs] == [_first(blobs[i // 5 * 5]) for i in range(15)]
    assert len({_first(blob) for blob in blobs}) == 3


def test_one_first_half_serves_for_so_many_bytes() -> None:
    # 2^16 seals are 2^36 bytes, if each 2^20 of them count as one.
    assert envelope._SEAL_BITS == 20
    key = _key()
    with patch.object(envelope, "MAX_SEALS_PER_SUBKEY", 4), patch.object(envelope, "_SEAL_BITS", 6):
        firsts = [_first(key.seal(bytes(size), b"")) for size in (128, 63, 0, 192, 1, 64, 64)]
    assert firsts[0] == firsts[1] != firsts[2] != firsts[3] != firsts[4]
    assert firsts[4] != firsts[6]
    assert len(set(firsts)) == 5


def test_two_keys_of_the_same_bytes_do_not_share_a_first_half() -> None:
    assert _first(_key().seal(b"", b"")) != _first(_key().seal(b"", b""))


def test_only_what_was_authentic_is_kept() -> None:
    key = _key()
    blob = _fresh(key)
    for altered in (blob[:-1] + bytes((blob[-1] ^ 1,)), blob[:-33] + bytes((blob[-33] ^ 1,)) + blob[-32:]):
        _refused(key, altered)
    assert list(key._kept) == []
    key.open(blob, b"")
    assert list(key._kept) == [blob[:14]]


def test_what_was_opened_last_is_kept_up_to_a_bound() -> None:
    key = _key()
    blobs = [_fresh(key) for _ in range(MAX_SUBKEYS_KEPT_PER_KEY + 3)]
    for blob in blobs[:MAX_SUBKEYS_KEPT_PER_KEY]:
        key.open(blob, b"")
    key.open(blobs[0], b"")
    for blob in blobs[MAX_SUBKEYS_KEPT_PER_KEY:]:
        key.open(blob, b"")
    assert list(key._kept) == [blob[:14] for blob in (*blobs[4:8], blobs[0], *blobs[8:])]
    assert all(key.open(blob, b"") == b"x" for blob in blobs)


def test_what_all_keys_keep_together_is_bounded_and_keeps_no_key_alive() -> None:
    envelope._keepers.clear()
    with patch.object(envelope, "MAX_SUBKEYS_KEPT", 3 * MAX_SUBKEYS_KEPT_PER_KEY):
        keys = [_key(bytes([number] * 32)) for number in range(5)]
        for key in keys:
            for _ in range(2):
                key.open(_fresh(key), b"")
        assert [len(key._kept) for key in keys] == [0, 0, 2, 2, 2]
        keys[0].open(_fresh(keys[0]), b"")
        assert [len(key._kept) for key in keys] == [1, 0, 0, 2, 2]
        del key, keys
        gc.collect()
        assert len(envelope._keepers) == 0


def test_a_wiped_one_has_nothing_left() -> None:
    key = _key()
    mine, other = key.seal(b"x", b""), _fresh(key)
    key.open(other, b"")
    key.wipe()
    assert (len(key._kept), key._sealer, key._k1) == (0, None, 0)
    for blob in (mine, other):
        _refused(key, blob)
    with pytest.raises(DecryptionFailedError):
        key.seal(b"x", b"")


def test_it_takes_only_keys_of_256_bits_and_tells_none() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        CommittingKey(Secret(bytearray(16)))
    assert repr(_key()) == "<CommittingKey>"

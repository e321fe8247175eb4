"""XAES-256-GCM with key commitment: known answers as published with AWS-LC, and C2SP's accumulated tests."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from kms.core.envelope import CommittingKey
from kms.core.secret import Secret

_FILE = Path(__file__).with_name("xaes-256-gcm-kc.txt").read_text(encoding="utf-8")
_FIELDS = ["KEY", "NONCE", "PLAINTEXT", "AAD", "CT", "TAG", "COMMITMENT"]
KNOWN = [
    tuple(map(bytes.fromhex, found))
    for found in re.findall("\n".join(rf"{field}[ ]?([0-9a-f]*)" for field in _FIELDS) + "\n", _FILE)
]
ACCUMULATED = dict(re.findall(r"^ITERATIONS (\d+) ([0-9a-f]{64})$", _FILE, re.MULTILINE))
_PIECE = 1 << 20


def test_the_file_was_read_whole() -> None:
    assert len(KNOWN) == 3
    assert list(ACCUMULATED) == ["10000", "1000000"]


@pytest.mark.parametrize(("key", "nonce", "plaintext", "aad", "sealed", "tag", "commitment"), KNOWN)
def test_a_known_answer(
    key: bytes, nonce: bytes, plaintext: bytes, aad: bytes, sealed: bytes, tag: bytes, commitment: bytes
) -> None:
    envelope = b"\x01\x02" + nonce + sealed + tag + commitment
    ours = CommittingKey(Secret(bytearray(key)))
    assert ours.seal_with_nonce(nonce, plaintext, aad) == envelope
    assert ours.open(envelope, aad) == plaintext


class _Random:
    """SHAKE-128 of nothing, read on and on."""

    def __init__(self, most: int) -> None:
        self._octets = hashlib.shake_128(b"").digest(most)
        self._read = 0

    def take(self, count: int) -> bytes:
        self._read += count
        assert self._read <= len(self._octets)
        return self._octets[self._read - count : self._read]

    def take_some(self) -> bytes:
        return self.take(self.take(1)[0])


@pytest.mark.parametrize("iterations", ACCUMULATED)
def test_the_sum_of_many_random_answers(iterations: str) -> None:
    count = int(iterations)
    # On average a round reads 32 + 24 + 2 * 128.5 bytes.
    random, found = _Random(count * 320 + _PIECE), hashlib.shake_128()
    for _ in range(count):
        key, nonce, plaintext, aad = random.take(32), random.take(24), random.take_some(), random.take_some()
        envelope = CommittingKey(Secret(bytearray(key))).seal_with_nonce(nonce, plaintext, aad)
        found.update(envelope[26:-32])
    assert found.hexdigest(32) == ACCUMULATED[iterations]

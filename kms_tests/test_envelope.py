"""The inner envelope: AES-256-GCM."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from kms.core import envelope
from kms.core.envelope import HEADER_BYTES, OVERHEAD_BYTES, EnvelopeKey, StreamOpener, StreamSealer
from kms.core.secret import Secret
from kms.errors import DecryptionFailedError, InputError
from kms_tests.strategies import aads, plaintexts

KEY = bytes(range(32))


def _secret(key: bytes = KEY) -> Secret:
    return Secret(bytearray(key))


def _key(key: bytes = KEY) -> EnvelopeKey:
    return EnvelopeKey(_secret(key))


@given(plaintexts, aads)
def test_what_is_sealed_opens(plaintext: bytes, aad: bytes) -> None:
    assert _key().open(_key().seal(plaintext, aad), aad) == plaintext


@given(plaintexts, aads)
def test_any_independent_aes_gcm_opens_it(plaintext: bytes, aad: bytes) -> None:
    sealed = _key().seal(plaintext, aad)
    assert sealed[:2] == b"\x01\x01"
    assert AESGCM(KEY).decrypt(sealed[2:14], sealed[14:], aad) == plaintext


@given(plaintexts, aads, st.data())
def test_no_flipped_bit_ever_opens(plaintext: bytes, aad: bytes, data: st.DataObject) -> None:
    sealed = bytearray(_key().seal(plaintext, aad))
    bit = data.draw(st.integers(0, len(sealed) * 8 - 1))
    sealed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(DecryptionFailedError):
        _key().open(sealed, aad)
    with pytest.raises(DecryptionFailedError):
        _key().open_secret(sealed, aad)


@given(plaintexts, aads, aads)
def test_another_aad_does_not_open_it(plaintext: bytes, aad: bytes, other: bytes) -> None:
    sealed = _key().seal(plaintext, aad)
    if aad != other:
        with pytest.raises(DecryptionFailedError):
            _key().open(sealed, other)


@pytest.mark.parametrize("length", range(OVERHEAD_BYTES))
def test_an_envelope_cut_short_does_not_open(length: int) -> None:
    sealed = _key().seal(b"", b"")
    assert len(sealed) == OVERHEAD_BYTES == 30
    for way in (_key().open, _key().open_secret):
        opened: Callable[[bytes, bytes], object] = way
        with pytest.raises(DecryptionFailedError):
            opened(sealed[:length], b"")


def test_another_key_does_not_open_it() -> None:
    with pytest.raises(DecryptionFailedError):
        _key(bytes(32)).open(_key().seal(b"x", b""), b"")


def test_each_seal_draws_a_fresh_nonce() -> None:
    key = _key()
    nonces = {key.seal(b"x", b"")[2:14] for _ in range(200)}
    assert len(nonces) == 200


def test_the_callers_prefix_stands_in_front_unsealed() -> None:
    sealed = _key().seal(b"x", b"", b"prefix")
    assert sealed.startswith(b"prefix\x01\x01")
    assert _key().open(sealed[6:], b"") == b"x"


def test_a_known_answer_of_the_gcm_specification() -> None:
    # McGrew and Viega, "The Galois/Counter Mode of Operation", test case 14: a zero key, nonce and block.
    sealed = _key(bytes(32)).seal_with_nonce(bytes(12), bytes(16), b"")
    assert sealed[:14] == b"\x01\x01" + bytes(12)
    assert sealed[14:].hex() == "cea7403d4d606b6e074ec5d3baf39d18" + "d0d1c8a799996bf0265b98b5d48ab919"


def test_a_known_answer_with_aad_and_a_partial_block() -> None:
    # The same paper, test case 16.
    key = bytes.fromhex("feffe9928665731c6d6a8f9467308308" * 2)
    plaintext = bytes.fromhex(
        "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
        "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39"
    )
    aad = bytes.fromhex("feedfacedeadbeeffeedfacedeadbeefabaddad2")
    sealed = _key(key).seal_with_nonce(bytes.fromhex("cafebabefacedbaddecaf888"), plaintext, aad)
    assert sealed[14:].hex() == (
        "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
        "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662"
        "76fc6ece0f4e1768cddf8853bb2d551b"
    )


def test_a_secret_opens_into_a_buffer_that_can_be_wiped() -> None:
    with _key().open_secret(_key().seal(KEY, b"slot"), b"slot") as secret, secret.view() as view:
        assert bytes(view) == KEY


@pytest.mark.parametrize("length", [0, 16, 24, 31, 33])
def test_a_key_of_another_length_than_32_bytes_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        _key(bytes(length))


def test_a_wiped_key_neither_opens_nor_seals() -> None:
    key = _key()
    sealed = key.seal(b"x", b"")
    key.wipe()
    with pytest.raises(DecryptionFailedError):
        key.open(sealed, b"")
    with pytest.raises(DecryptionFailedError):
        key.open_secret(sealed, b"")
    with pytest.raises(DecryptionFailedError):
        key.seal(b"x", b"")


def test_the_repr_of_a_key_says_nothing() -> None:
    assert repr(_key()) == "<EnvelopeKey>"


def _stream_seal(pieces: list[bytes], aad: bytes) -> bytes:
    sealer = StreamSealer(_secret(), aad)
    sealed = bytearray(sealer.header)
    for piece in pieces:
        output = bytearray(len(piece) + 15)
        written = sealer.update_into(memoryview(piece), output)
        sealed += output[:written]
    return bytes(sealed + sealer.finish())


def _stream_open(sealed: bytes, aad: bytes, at: int) -> bytes:
    opener = StreamOpener(_secret(), sealed[:HEADER_BYTES], aad)
    body, tag = sealed[HEADER_BYTES:-16], sealed[-16:]
    opened = bytearray()
    for piece in (body[:at], body[at:]):
        output = bytearray(len(piece) + 15)
        written = opener.update_into(memoryview(piece), output)
        opened += output[:written]
    opener.finish(tag)
    return bytes(opened)


@given(st.lists(plaintexts, max_size=5), aads)
def test_an_envelope_sealed_piece_by_piece_opens_in_one(pieces: list[bytes], aad: bytes) -> None:
    assert _key().open(_stream_seal(pieces, aad), aad) == b"".join(pieces)


@given(plaintexts, aads, st.integers(0, 300))
def test_an_envelope_sealed_in_one_opens_piece_by_piece(plaintext: bytes, aad: bytes, at: int) -> None:
    assert _stream_open(_key().seal(plaintext, aad), aad, at) == plaintext


@given(plaintexts, st.data())
def test_no_flipped_bit_passes_the_end_of_a_stream(plaintext: bytes, data: st.DataObject) -> None:
    sealed = bytearray(_key().seal(plaintext, b"aad"))
    bit = data.draw(st.integers(0, len(sealed) * 8 - 1))
    sealed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(DecryptionFailedError):
        _stream_open(bytes(sealed), b"aad", 0)


@pytest.mark.parametrize("header", [b"", b"\x01\x01", bytes(14), b"\x01\x02" + bytes(12), b"\x01\x01" + bytes(13)])
def test_a_stream_with_another_header_does_not_open(header: bytes) -> None:
    with pytest.raises(DecryptionFailedError):
        StreamOpener(_secret(), header, b"")


def test_a_stream_with_a_tag_cut_short_does_not_open() -> None:
    opener = StreamOpener(_secret(), _key().seal(b"", b"")[:14], b"")
    with pytest.raises(DecryptionFailedError):
        opener.finish(b"short")


def test_two_streams_have_two_nonces() -> None:
    assert StreamSealer(_secret(), b"").header != StreamSealer(_secret(), b"").header


def test_a_stream_is_sealed_up_to_the_most_gcm_protects_and_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envelope, "MAX_GCM_PLAINTEXT_BYTES", 4)
    sealer = StreamSealer(_secret(), b"")
    assert sealer.update_into(memoryview(b"four"), bytearray(19)) == 4
    with pytest.raises(InputError, match="split it"):
        sealer.update_into(memoryview(b"5"), bytearray(16))


def test_a_stream_is_opened_up_to_the_most_gcm_protects_and_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envelope, "MAX_GCM_PLAINTEXT_BYTES", 4)
    opener = StreamOpener(_secret(), _key().seal(b"", b"")[:14], b"")
    assert opener.update_into(memoryview(b"four"), bytearray(19)) == 4
    with pytest.raises(DecryptionFailedError):
        opener.update_into(memoryview(b"5"), bytearray(16))

"""The AES-256-GCM vectors of NIST's CAVP, through the functions that seal and open.

Our envelope has a nonce of 96 bits and a tag of 128 and nothing else, so those vectors are known answers for it: 375 to
open and 375 to seal. Of the others, those with a shorter tag have to be refused; other nonces cannot be expressed.
"""

from __future__ import annotations

import pytest

from kms.core.envelope import HEADER_BYTES, PREFIX, EnvelopeKey, StreamOpener
from kms.core.secret import Secret
from kms.errors import DecryptionFailedError
from kms_tests.vectors.cavp import Record, records

DECRYPT = [r for r in records("ciphers/AES/GCM/gcmDecrypt256.rsp", "Count") if r["IVlen"] == "96"]
ENCRYPT = [r for r in records("ciphers/AES/GCM/gcmEncryptExtIV256.rsp", "Count") if r["IVlen"] == "96"]
WHOLE = [r for r in DECRYPT if r["Taglen"] == "128"]
SEALED = [r for r in ENCRYPT if r["Taglen"] == "128"]
CUT = [r for r in DECRYPT if r["Taglen"] != "128" and "FAIL" not in r]
PIECES = [1, 15, 16, 17, 1000]


def _bytes(record: Record, *names: str) -> bytes:
    return bytes.fromhex("".join(record[name] for name in names))


def _secret(record: Record) -> Secret:
    return Secret(bytearray(_bytes(record, "Key")))


def _envelope(record: Record) -> bytes:
    return PREFIX + _bytes(record, "IV", "CT", "Tag")


def _stream_open(record: Record, piece: int) -> bytes:
    envelope = _envelope(record)
    opener = StreamOpener(_secret(record), envelope[:HEADER_BYTES], _bytes(record, "AAD"))
    body = memoryview(envelope)[HEADER_BYTES:-16]
    opened = bytearray()
    for start in range(0, len(body), piece):
        output = bytearray(piece + 15)
        opened += output[: opener.update_into(body[start : start + piece], output)]
    opener.finish(envelope[-16:])
    return bytes(opened)


def test_the_vectors_are_all_there() -> None:
    failing = [r for r in WHOLE if "FAIL" in r]
    assert (len(WHOLE), len(SEALED), len(CUT) > 1000, 100 < len(failing) < 300) == (375, 375, True, True)
    assert {r["Keylen"] for r in DECRYPT + ENCRYPT} == {"256"}


def test_what_nist_sealed_opens_and_what_it_altered_does_not() -> None:
    for record in WHOLE:
        key = EnvelopeKey(_secret(record))
        for way in (key.open, key.open_secret):
            if "FAIL" in record:
                with pytest.raises(DecryptionFailedError):
                    way(_envelope(record), _bytes(record, "AAD"))
            else:
                opened = way(_envelope(record), _bytes(record, "AAD"))
                if isinstance(opened, Secret):
                    with opened.view() as view:
                        opened = bytes(view)
                assert opened == _bytes(record, "PT"), record


@pytest.mark.parametrize("piece", PIECES)
def test_the_same_piece_by_piece(piece: int) -> None:
    for record in WHOLE:
        if "FAIL" in record:
            with pytest.raises(DecryptionFailedError):
                _stream_open(record, piece)
        else:
            assert _stream_open(record, piece) == _bytes(record, "PT"), record


def test_what_is_sealed_is_what_nist_sealed() -> None:
    for record in SEALED:
        key = EnvelopeKey(_secret(record))
        sealed = key.seal_with_nonce(_bytes(record, "IV"), _bytes(record, "PT"), _bytes(record, "AAD"))
        assert sealed == _envelope(record), record


def test_a_tag_cut_short_is_refused_however_right_it_is() -> None:
    for record in CUT:
        with pytest.raises(DecryptionFailedError):
            EnvelopeKey(_secret(record)).open(_envelope(record), _bytes(record, "AAD"))

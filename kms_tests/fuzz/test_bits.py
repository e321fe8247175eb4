"""Every bit of what the server hands out or stores, flipped: nothing opens, and nothing tells which bit it was."""

from __future__ import annotations

import json
import random
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kms.core.ciphertext import Purpose
from kms.core.keyring import Keyring
from kms.errors import KeystoreError, WrongPassphraseError
from kms_tests.fuzz.targets import (
    AAD,
    DECRYPTION_FAILED,
    KEYSTORES,
    decrypt_line,
    world,
)
from kms_tests.in_memory import PEER, Server, text

CIPHERTEXTS = 100
NAMES = ["default", "billing", "a", "x" * 64]
FORMATS = [pytest.param(one.encode(), one.open, id=f"format {number}") for number, one in KEYSTORES.items()]


def flipped(data: bytes) -> Iterator[bytes]:
    """`data` with each of its bits flipped in turn."""
    for bit in range(len(data) * 8):
        altered = bytearray(data)
        altered[bit // 8] ^= 1 << bit % 8
        yield bytes(altered)


@pytest.fixture(scope="module")
def server() -> Server:
    server = Server()
    for name in NAMES[1:]:
        server.admin("CreateKeyGroup", keyId=name)
    # A version whose number is one bit from another's, so that a flipped number finds a key.
    server.admin("RotateKeyGroup", keyId="billing")
    server.admin("RotateKeyGroup", keyId="billing")
    return server


def _ciphertexts(server: Server) -> list[bytes]:
    """A hundred, over all groups, of 0 to 32 bytes, with and without AAD."""
    drawn = random.Random(5)
    made = []
    for number in range(CIPHERTEXTS):
        fields = {"keyId": NAMES[number % len(NAMES)], "plaintext": text(drawn.randbytes(number % 33))}
        made.append(b64decode(server.ask("Encrypt", aad=text(AAD), **fields)["ciphertext"]))
    return made


def _reply(server: Server, kind: str, blob: bytes) -> bytes:
    line = {"type": kind, "token": "api-token-canary", "ciphertext": text(blob), "aad": text(AAD)}
    answer = server.pipeline.session(PEER).serve(json.dumps(line).encode())
    assert isinstance(answer, bytes)
    return answer


def test_no_flipped_bit_of_a_hundred_ciphertexts_opens_and_all_fail_alike(server: Server) -> None:
    flips = 0
    for blob in _ciphertexts(server):
        assert _reply(server, "Decrypt", blob).startswith(b'{"status":"ok"')
        for altered in flipped(blob):
            assert _reply(server, "Decrypt", altered) == DECRYPTION_FAILED
            flips += 1
    assert flips > CIPHERTEXTS * 8 * 48
    print(f"{flips} flipped bits")


def test_no_flipped_bit_of_a_ciphertext_is_encrypted_anew(server: Server) -> None:
    for blob in _ciphertexts(server)[:: CIPHERTEXTS // 8]:
        assert _reply(server, "ReEncrypt", blob).startswith(b'{"status":"ok"')
        for altered in flipped(blob):
            assert _reply(server, "ReEncrypt", altered) == DECRYPTION_FAILED


def test_no_flipped_bit_of_a_ciphertext_of_an_earlier_release_or_of_another_purpose_opens() -> None:
    session = world().pipeline.session(PEER)
    seen = set()
    for blob in world().ciphertexts:
        seen.add(blob[:1] if blob[0] == 2 else blob[:2])
        for altered in flipped(blob):
            assert session.serve(decrypt_line(altered)) == DECRYPTION_FAILED
    assert len(seen) == 1 + len(Purpose)


def test_no_flipped_bit_of_the_aad_opens_a_ciphertext(server: Server) -> None:
    sealed = server.ask("Encrypt", plaintext=text(b"x"), aad=text(AAD))["ciphertext"]
    for altered in flipped(AAD):
        reply = server.ask("Decrypt", ciphertext=sealed, aad=text(altered))
        assert json.dumps(reply, separators=(",", ":")).encode() == DECRYPTION_FAILED


def test_a_ciphertext_of_a_closed_version_fails_like_any_other() -> None:
    for blob in world().closed:
        assert world().pipeline.session(PEER).serve(decrypt_line(blob)) == DECRYPTION_FAILED


@pytest.mark.parametrize(("raw", "open_"), FORMATS)
def test_no_flipped_bit_of_a_keystore_loads(raw: bytes, open_: Callable[[bytes], Keyring]) -> None:
    made = open_(raw)
    end_of_line = raw.endswith(b"\n")
    for number, altered in enumerate(flipped(raw)):
        try:
            loaded = open_(altered)
        except (KeystoreError, WrongPassphraseError):
            continue
        # The line end is no part of the JSON; a bit of it may make another kind of white space.
        assert loaded == made, number
        assert end_of_line, number
        assert number // 8 == len(raw) - 1, number


@pytest.mark.parametrize(("raw", "open_"), FORMATS)
def test_no_flipped_bit_within_a_binary_field_is_lost_in_its_base64(raw: bytes, open_: Callable[[bytes], Keyring]) -> None:
    tree = json.loads(raw)
    for group in tree["keyGroups"]:
        for version in group["versions"]:
            name: Any = next(name for name in version if name.startswith("wrapped"))
            if version[name] is None:
                continue
            whole = version[name]
            for altered in flipped(b64decode(whole)):
                version[name] = b64encode(altered).decode()
                with pytest.raises(KeystoreError, match="altered or damaged"):
                    open_(json.dumps(tree).encode())
            version[name] = whole
    assert open_(json.dumps(tree, ensure_ascii=False).encode()) == open_(raw)

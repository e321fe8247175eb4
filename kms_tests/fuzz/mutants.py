"""Bugs to put into the program, so that the fuzzer can prove that it finds them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from cryptography.exceptions import InvalidTag

from kms.core import ciphertext, mke2
from kms.core.envelope import HEADER_BYTES, ChunkOpener, CommittingKey, EnvelopeKey, StreamOpener
from kms.core.kek import Kek
from kms.core.keyring import KeyVersion, VersionStatus
from kms.errors import DecryptionFailedError
from kms.server import config
from kms.storage import format2, format3, format4, journal, stored
from kms.wire import messages
from kms_tests.fuzz import targets


@dataclass(frozen=True)
class Mutant:
    """The target that must find it, the error it shows as, and how it is put in."""

    target: str
    shows_as: str
    put_in: Callable[[], None]


def _replacing(owner: Any, name: str, value: object) -> Callable[[], None]:
    assert hasattr(owner, name), name
    return lambda: setattr(owner, name, value)


def _decode_with_another_error(line: bytes) -> messages.Request:
    try:
        return messages.decode_request(line)
    except messages.UndecodableRequestError as error:
        raise RecursionError from error


def _decode_slowly(line: bytes) -> messages.Request:
    re.search(rb"A{0,100}?[^A]=x", line)
    return messages.decode_request(line)


def _group_without_looking(blob: bytes) -> str:
    return blob[2 : 2 + blob[1]].decode("utf-8")


def _open_without_tag(self: EnvelopeKey, envelope: bytes, aad: bytes) -> bytes:
    return bytes(envelope[HEADER_BYTES:-16])


def _open_without_looking(self: CommittingKey, envelope: bytes, aad: bytes) -> bytes:
    return bytes(envelope[26:-48])


def _open_without_commitment(self: CommittingKey, envelope: bytes, aad: bytes) -> bytes:
    key = self._derived(envelope[:14])
    try:
        return key.gcm.decrypt(envelope[14:26], envelope[26:-32], aad)
    except InvalidTag:
        raise DecryptionFailedError from None


def _open_without_header(self: Kek, sealed: ciphertext.Ciphertext, aad: bytes) -> bytes:
    return self._committing.open(sealed.envelope, aad) if sealed.is_bound else self._earlier.open(sealed.envelope, aad)


def _seal_without_header(self: Kek, plaintext: bytes, aad: bytes, purpose: ciphertext.Purpose, kek_id: bytes) -> bytes:
    return self._committing.seal(plaintext, aad, ciphertext.header(purpose, kek_id))


def _put_in_both() -> None:
    Kek.open, Kek.seal = _open_without_header, _seal_without_header  # type: ignore[method-assign]  # a mutant


def _open_chunk(_self: ChunkOpener, _sealed: memoryview, output: memoryview, *, is_last: bool) -> None:
    output[:] = bytes(len(output))


def _build_any_version(slot: Any, stored: Any, unwrap: Any, rewrap: Any) -> Any:
    status = VersionStatus.__members__.get(stored.status, VersionStatus.ENABLED)
    return KeyVersion.build(slot.group, max(1, stored.version) & 0xFFFF or 1, status, 0, b"", None)


def _body_of_any(line: bytes, mac: Any) -> bytes | None:
    return line[: -journal._TAIL_BYTES] + b"}" if len(line) > journal._TAIL_BYTES else None


MUTANTS: Final = {
    "a decoder that lets another error out": Mutant(
        "stream", "RecursionError", _replacing(targets, "decode_request", _decode_with_another_error)
    ),
    "a decoder that looks at each byte a hundred times": Mutant(
        "long-line", "SlowError", _replacing(targets, "decode_request", _decode_slowly)
    ),
    "a ciphertext taken apart without looking at its length": Mutant(
        "ciphertext", "IllegalError", _replacing(ciphertext, "group", _group_without_looking)
    ),
    "an earlier ciphertext whose tag is not verified": Mutant(
        "ciphertext", "ForgedError", _replacing(EnvelopeKey, "open", _open_without_tag)
    ),
    "a ciphertext of which neither tag nor commitment is verified": Mutant(
        "edited-ciphertext", "ForgedError", _replacing(CommittingKey, "open", _open_without_looking)
    ),
    "a ciphertext whose commitment is not verified": Mutant(
        "edited-ciphertext", "ForgedError", _replacing(CommittingKey, "open", _open_without_commitment)
    ),
    "a ciphertext whose header is not authenticated": Mutant("edited-ciphertext", "ForgedError", _put_in_both),
    "a stream whose tag is not verified": Mutant(
        "container", "ForgedError", _replacing(StreamOpener, "finish", lambda _self, _tag: None)
    ),
    "a chunk whose tag is not verified": Mutant(
        "container", "ForgedError", _replacing(ChunkOpener, "open_into", _open_chunk)
    ),
    "a file whose commitment is not verified": Mutant(
        "container", "ForgedError", _replacing(mke2, "opened", lambda header, key, aad: mke2.keys(key, header.salt, aad)[1])
    ),
    "a format 4 keystore whose MAC is not checked": Mutant(
        "keystore-4", "ForgedError", _replacing(format4, "check_mac", lambda _expected, _presented: None)
    ),
    "a journal whose MACs are not checked": Mutant("journal", "ForgedError", _replacing(journal, "_body", _body_of_any)),
    "a journal whose damage is taken for a torn end": Mutant(
        "journal", "IllegalError", _replacing(journal, "_is_torn", lambda _rest, _mac: True)
    ),
    "a format 3 keystore whose MAC is not checked": Mutant(
        "keystore-3", "ForgedError", _replacing(format3, "check_mac", lambda _expected, _presented: None)
    ),
    "a format 2 keystore whose MAC is not checked": Mutant(
        "keystore-2", "ForgedError", _replacing(format2, "check_mac", lambda _expected, _presented: None)
    ),
    "a keystore whose versions are believed because its MAC is right": Mutant(
        "keystore-4-resealed", "IllegalError", _replacing(stored, "_build_version", _build_any_version)
    ),
    "a number out of its bounds": Mutant(
        "config", "IllegalError", _replacing(config._Source, "number", lambda self, name, *_: int(self._find(name)[0] or 1))
    ),
}

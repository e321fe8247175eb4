"""The vectors for other implementers, in docs/vectors: made by the independent side, and held to both.

`python -m kms_tests.vectors.published` writes them anew.
"""

from __future__ import annotations

import hashlib
import json
from itertools import count
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from kms_tests.vectors import independent
from kms_tests.vectors.independent import Group, Version

DIRECTORY: Final = Path(__file__).parents[2] / "docs" / "vectors"
KEK: Final = bytes(range(32))
DATA_KEY: Final = bytes(range(100, 132))
SALT: Final = bytes(range(200, 232))
_NONCE: Final = bytes(range(0xA0, 0xB8))
_PASSPHRASE: Final = "correct horse, Übung 日本".encode()
_CHUNK: Final = independent.CHUNK_BYTES


def documents() -> dict[str, dict[str, Any]]:
    """Each file by its name."""
    return {"ciphertext-03.json": _ciphertexts(), "mke2.json": _streams(), "keystore-4.json": _keystores()}


def content(recipe: dict[str, Any]) -> bytes:
    """What a `plaintext` says: `hex`, or a pattern of `size` bytes."""
    return bytes.fromhex(recipe["hex"]) if "hex" in recipe else _pattern(recipe["size"])


def assembled(recipe: dict[str, Any], base: bytes) -> bytes:
    """What a `file` says: `hex`, or `pieces`, each of them `hex`, or the bytes of `base` from one place to another."""
    if "hex" in recipe:
        return bytes.fromhex(recipe["hex"])
    pieces = (bytes.fromhex(one) if isinstance(one, str) else base[slice(*one)] for one in recipe["pieces"])
    return b"".join(pieces)


def _pattern(size: int) -> bytes:
    return (bytes(7 * place & 0xFF for place in range(256)) * (size // 256 + 1))[:size]


def _ciphertexts() -> dict[str, Any]:
    def sealed(purpose: int, group: str, version: int, plaintext: bytes, aad: bytes) -> bytes:
        return independent.bound_ciphertext(purpose, group, version, KEK, _NONCE, plaintext, aad)

    good = [
        (1, "billing", 1, b"hello", b"file"),
        (1, "default", 1, b"", b""),
        (2, "default", 258, DATA_KEY, b"invoice/7"),
        (3, "x" * 255, (1 << 63) - 1, b"\0" * 17, b"\0"),
        (0, "größe", 3, b"moved", b""),
    ]
    blob = sealed(*good[0])
    end = 3 + 7 + 8
    altered: dict[str, bytes] = {
        "another purpose": b"\x03\x02" + blob[2:],
        "a purpose that there is not": b"\x03\x04" + blob[2:],
        "another version of the format": b"\x04" + blob[1:],
        "a header of format 02": b"\x02" + blob[2:],
        "an inner envelope of AES-256-GCM": blob[:end] + b"\x01\x01" + blob[end + 2 :],
        "another group": blob.replace(b"billing", b"Billing"),
        "another version of the key": blob[: end - 1] + b"\x02" + blob[end:],
        "another nonce, first half": _flipped(blob, end + 2),
        "another nonce, second half": _flipped(blob, end + 14),
        "another ciphertext": _flipped(blob, end + 26),
        "another tag": _flipped(blob, -48),
        "another commitment": _flipped(blob, -1),
        "no commitment": blob[:-32],
        "cut off": blob[:-1],
        "a byte more": blob + b"\0",
        "a name of no bytes": b"\x03\x01\x00" + blob[10:],
    }
    return {
        "about": "Ciphertext 03 of mini-kms, see docs/formats.rst. All of it is hexadecimal.",
        "kek": KEK.hex(),
        "open": [
            {
                "purpose": purpose,
                "group": group,
                "version": version,
                "nonce": _NONCE.hex(),
                "aad": aad.hex(),
                "plaintext": plaintext.hex(),
                "ciphertext": sealed(purpose, group, version, plaintext, aad).hex(),
            }
            for purpose, group, version, plaintext, aad in good
        ],
        "refuse": [
            {"why": "another AAD", "aad": b"fil".hex(), "ciphertext": blob.hex()},
            *({"why": why, "aad": b"file".hex(), "ciphertext": one.hex()} for why, one in altered.items()),
        ],
    }


def _streams() -> dict[str, Any]:
    def recipient(group: str, version: int, key: bytes = DATA_KEY, purpose: int = 2, aad: bytes = b"aad") -> bytes:
        return independent.bound_ciphertext(purpose, group, version, KEK, _NONCE, key, aad)

    one = [recipient("default", 1)]

    def file(plaintext: bytes, recipients: list[bytes] = one, data_key: bytes = DATA_KEY) -> bytes:
        return independent.write_stream(recipients, data_key, SALT, plaintext, b"aad")

    base = file(_pattern(2 * _CHUNK + 9))
    head, small = len(file(b"")) - 16, file(b"hello")
    first, second = [head, head + _CHUNK + 16], [head + _CHUNK + 16, head + 2 * (_CHUNK + 16)]
    header, last = [0, head], [second[1], len(base)]
    pieces: dict[str, list[Any]] = {
        "cut off after the first chunk": [header, first],
        "cut off within the last": [header, first, second, [last[0], last[1] - 1]],
        "no chunk": [header],
        "the first two chunks exchanged": [header, second, first, last],
        "a chunk left out": [header, first, last],
        "a chunk twice": [header, first, second, second, last],
        "a byte after the last": [header, first, second, last, "00"],
    }
    files = {
        "another salt": _flipped(small, head - 64),
        "another commitment": _flipped(small, head - 1),
        "another body": _flipped(small, -1),
        "no recipient": b"MKE2\0" + SALT + bytes(32) + bytes(16),
        "a recipient twice": file(b"hello", one * 2),
        "a recipient of purpose 01": file(b"hello", [recipient("default", 1, purpose=1)]),
        "a data key of 31 bytes": file(b"hello", [recipient("default", 1, DATA_KEY[:31])]),
        "a recipient with the data key of another file": file(b"hello", data_key=bytes(32)),
        "seventeen recipients": file(b"hello", [recipient("default", number + 1) for number in range(17)]),
    }
    good: list[tuple[dict[str, Any], list[bytes]]] = [
        ({"hex": ""}, one),
        ({"hex": b"hello".hex()}, one),
        ({"size": _CHUNK}, one),
        ({"size": _CHUNK + 1}, one),
        ({"size": 2 * _CHUNK + 9}, one),
        ({"size": 3 * _CHUNK}, [recipient("archive", 7), *one]),
    ]
    return {
        "about": (
            "The container MKE2 of mini-kms, see docs/formats.rst. All of it is hexadecimal. Of a file longer than 4096 "
            "bytes there is its SHA-256. Byte i of a plaintext of a size is 7 * i modulo 256. Every recipient is under "
            "this KEK. A file to refuse may be made of pieces of the base, whose plaintext has 131081 bytes: each from one "
            "place to before another."
        ),
        "kek": KEK.hex(),
        "dataKey": DATA_KEY.hex(),
        "salt": SALT.hex(),
        "aad": b"aad".hex(),
        "open": [
            {
                "recipients": [blob.hex() for blob in recipients],
                "plaintext": recipe,
                "file": _shown(file(content(recipe), recipients)),
            }
            for recipe, recipients in good
        ],
        "base": {"sha256": hashlib.sha256(base).hexdigest(), "size": len(base)},
        "refuse": [
            *({"why": why, "file": {"pieces": listed}} for why, listed in pieces.items()),
            *({"why": why, "file": {"hex": data.hex()}} for why, data in files.items()),
        ],
    }


def _keystores() -> dict[str, Any]:
    def version(number: int, status: str = "ENABLED") -> Version:
        kek = None if status == "DESTROYED" else hashlib.sha256(b"kek %d" % number).digest()
        return Version(number, status, 1_700_000_000 + number, kek)

    default = Group("default", 1_700_000_000, 1, (version(1, "ACTIVE"),))
    states = (version(1, "DESTROYED"), version(2, "DISABLED"), version(3), version(5, "ACTIVE"))
    billing = Group("größe", 1_600_000_000, 5, states)
    rotated = Group("default", 1_700_000_000, 2, (version(1), version(2, "ACTIVE")))
    later = Group("later", 1_700_000_009, 1, (version(1, "ACTIVE"),))

    def written(commits: list[list[Group]]) -> tuple[str, str | None]:
        nonces = (hashlib.sha256(b"nonce %d" % number).digest()[:12] for number in count())
        file, journal = independent.write_format4([default, billing], 7, _PASSPHRASE, SALT[:16], nonces, commits)
        return file.decode(), None if journal is None else journal.decode()

    alone, _ = written([])
    file, journal = written([[rotated], [later, rotated]])
    assert journal is not None
    lines = journal.splitlines(keepends=True)
    refuse: dict[str, tuple[str, str | None]] = {
        "a name that the MAC is not over": (alone.replace("default", "Default"), None),
        "another generation": (alone.replace('"generation":7', '"generation":8'), None),
        "another format": (alone.replace('"formatVersion":4', '"formatVersion":5'), None),
        "a journal that is missing": (file, None),
        "a journal that is not named": (alone, journal),
        "another's journal": (file, journal.replace("0badcafe-", "0badcaff-")),
        "a line that was left out": (file, lines[0] + lines[2]),
        "a line twice": (file, journal + lines[2]),
        "two lines exchanged": (file, lines[0] + lines[2] + lines[1]),
        "a line that was altered": (file, lines[0] + lines[1].replace("default", "Default") + lines[2]),
        "a last line that was altered": (file, lines[0] + lines[1] + lines[2].replace("later", "Later")),
        "a line whose end was taken": (file, lines[0] + lines[1].rstrip("\n") + lines[2]),
    }

    def told(groups: list[Group]) -> list[dict[str, Any]]:
        return [
            {
                "keyId": group.name,
                "keyUuid": str(UUID(bytes=group.uuid)),
                "versions": {str(v.number): [v.status, None if v.kek is None else v.kek.hex()] for v in group.versions},
            }
            for group in groups
        ]

    return {
        "about": (
            "Keystores of format 4 of mini-kms and their journals, as the text of the files, see docs/formats.rst. Keys "
            "are hexadecimal. Of a journal that was torn, what is not a line is not there."
        ),
        "passphrase": _PASSPHRASE.decode(),
        "open": [
            {"keystore": alone, "journal": None, "generation": 7, "keyGroups": told([default, billing])},
            {"keystore": file, "journal": journal, "generation": 9, "keyGroups": told([rotated, billing, later])},
            {"keystore": file, "journal": journal[:-9], "generation": 8, "keyGroups": told([rotated, billing])},
            {"keystore": file, "journal": lines[0], "generation": 7, "keyGroups": told([default, billing])},
        ],
        "refuse": [{"why": why, "keystore": keystore, "journal": beside} for why, (keystore, beside) in refuse.items()],
    }


def base_stream() -> bytes:
    """The file that the pieces are of."""
    blob = independent.bound_ciphertext(2, "default", 1, KEK, _NONCE, DATA_KEY, b"aad")
    return independent.write_stream([blob], DATA_KEY, SALT, _pattern(2 * _CHUNK + 9), b"aad")


def _shown(data: bytes) -> dict[str, Any]:
    if len(data) <= 4096:
        return {"hex": data.hex()}
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def _flipped(blob: bytes, at: int) -> bytes:
    altered = bytearray(blob)
    altered[at] ^= 1
    return bytes(altered)


if __name__ == "__main__":
    DIRECTORY.mkdir(exist_ok=True)
    for name, document in documents().items():
        (DIRECTORY / name).write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

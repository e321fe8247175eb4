"""An independent writer of keystore format 2, from section 4 of the contract. It shares no code with `kms`."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import struct
from base64 import b64encode
from dataclasses import dataclass, field
from typing import Any

from argon2.low_level import Type, hash_secret_raw
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

MEMORY_KIB = 8
ITERATIONS = 1
PARALLELISM = 1


@dataclass
class Version:
    number: int
    status: str
    created_at: int = 1_700_000_000
    kek: bytes = field(default_factory=lambda: os.urandom(32))
    is_keyless: bool = False
    """It was destroyed, whatever its status says now."""


@dataclass
class Group:
    id: str
    active: int
    versions: list[Version]


def _base64(data: bytes) -> str:
    return b64encode(data).decode("ascii")


def envelope(key: bytes, plaintext: bytes, aad: bytes = b"") -> bytes:
    nonce = os.urandom(12)
    return b"\x01\x01" + nonce + AESGCM(key).encrypt(nonce, plaintext, aad)


def ciphertext(group: Group, version: Version, plaintext: bytes, aad: bytes) -> bytes:
    """What a client holds that encrypted under this version."""
    name = group.id.encode("utf-8")
    return (
        struct.pack(">BB", 2, len(name)) + name + struct.pack(">q", version.number) + envelope(version.kek, plaintext, aad)
    )


def _text(value: str | None) -> bytes:
    if value is None:
        return struct.pack(">i", -1)
    # Java's getBytes(UTF_8): a question mark for what is no character.
    data = value.encode("utf-8", "replace")
    return struct.pack(">i", len(data)) + data


def mac(root: bytes, tree: dict[str, Any]) -> str:
    """The MAC over a format 2 object, as base64."""
    message = struct.pack(">i", tree["formatVersion"]) + _text(tree["kdf"])
    message += struct.pack(">iii", tree["argonMemoryKiB"], tree["argonIterations"], tree["argonParallelism"])
    message += _text(tree["saltBase64"]) + _text(tree["rootVerificationTokenBase64"])
    message += struct.pack(">i", len(tree["keyGroups"]))
    for group in tree["keyGroups"]:
        message += _text(group["id"]) + struct.pack(">qi", group["activeVersion"], len(group["versions"]))
        for version in group["versions"]:
            message += struct.pack(">q", version["version"]) + _text(version["status"])
            message += struct.pack(">q", version["createdAtEpochSec"]) + _text(version["wrappedKekBase64"])
    key = hmac.new(root, b"mini-kms/keystore-integrity/v1", hashlib.sha256).digest()
    return _base64(hmac.new(key, message, hashlib.sha256).digest())


def root_key(passphrase: str, salt: bytes) -> bytes:
    return hash_secret_raw(
        passphrase.encode("utf-8"), salt, ITERATIONS, MEMORY_KIB, PARALLELISM, hash_len=32, type=Type.ID, version=0x13
    )


def tree(groups: list[Group], root: bytes, salt: bytes) -> dict[str, Any]:
    """The JSON object of a format 2 keystore, its MAC included."""
    made: dict[str, Any] = {
        "formatVersion": 2,
        "kdf": "argon2id",
        "argonMemoryKiB": MEMORY_KIB,
        "argonIterations": ITERATIONS,
        "argonParallelism": PARALLELISM,
        "saltBase64": _base64(salt),
        "rootVerificationTokenBase64": _base64(envelope(root, b"mini-kms/root-verification/v2")),
        "keyGroups": [
            {
                "id": group.id,
                "activeVersion": group.active,
                "versions": [
                    {
                        "version": version.number,
                        "status": version.status,
                        "createdAtEpochSec": version.created_at,
                        "wrappedKekBase64": (
                            None
                            if version.status == "DESTROYED" or version.is_keyless
                            else _base64(envelope(root, version.kek))
                        ),
                    }
                    for version in group.versions
                ],
            }
            for group in groups
        ],
    }
    made["macBase64"] = mac(root, made)
    return made


def write(groups: list[Group], passphrase: str, salt: bytes | None = None) -> bytes:
    """A format 2 keystore file."""
    salt = os.urandom(16) if salt is None else salt
    return encode(tree(groups, root_key(passphrase, salt), salt))


def encode(made: dict[str, Any]) -> bytes:
    """The tree as JSON text without insignificant white space, so that each of its bytes means something."""
    text = json.dumps(made, ensure_ascii=False, separators=(",", ":"))
    # Half of a surrogate pair stands there as an escape.
    return text.encode("utf-8", "backslashreplace")

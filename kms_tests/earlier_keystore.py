"""Writes keystore files of format 3, as releases before 0.2 did: the project itself only reads them by now."""

from __future__ import annotations

import json
from base64 import b64encode
from dataclasses import dataclass
from typing import Any

from kms.core.derive import KdfParameters, sub_key
from kms.core.envelope import EnvelopeKey
from kms.core.secret import Secret
from kms.storage import format3
from kms.storage.stored import KdfHeader

CREATED = 1_700_000_000


@dataclass(frozen=True)
class Group:
    """A group whose versions are numbered from 1; the last is ACTIVE."""

    name: str
    statuses: tuple[str, ...] = ("ACTIVE",)


def kek(group: str, version: int) -> bytes:
    """The key of a version, which anybody can tell."""
    return (group.encode()[:16] + version.to_bytes(16, "big")).rjust(32, b".")[:32]


def tree(groups: list[Group], root: Secret, header: KdfHeader, generation: int = 3) -> dict[str, Any]:
    """The file as an object, without its MAC."""
    with sub_key(root, "mini-kms/v3/wrap-kek") as wrap, sub_key(root, "mini-kms/v3/root-check") as check:
        wrapping, checking = EnvelopeKey(wrap), EnvelopeKey(check)
    return {
        "formatVersion": 3,
        "generation": generation,
        "kdf": {
            "name": "argon2id",
            "version": 19,
            "memoryKiB": header.parameters.memory_kib,
            "iterations": header.parameters.iterations,
            "parallelism": header.parameters.parallelism,
            "salt": b64encode(header.salt).decode(),
        },
        "rootCheck": b64encode(checking.seal(b"mini-kms/root-check/v3", b"")).decode(),
        "keyGroups": [
            {
                "keyId": group.name,
                "createdAtEpochSec": CREATED,
                "activeVersion": len(group.statuses),
                "versions": [
                    {
                        "version": number,
                        "status": status,
                        "createdAtEpochSec": CREATED + number,
                        "wrappedKek": None if status == "DESTROYED" else _wrapped(wrapping, group.name, number),
                    }
                    for number, status in enumerate(group.statuses, 1)
                ],
            }
            for group in groups
        ],
    }


def _wrapped(wrapping: EnvelopeKey, group: str, version: int) -> str:
    name = group.encode()
    slot = len(name).to_bytes(4, "big") + name + version.to_bytes(8, "big")
    return b64encode(wrapping.seal(kek(group, version), slot)).decode()


def sealed(made: dict[str, Any], root: Secret) -> bytes:
    """The file of a tree, with a right MAC."""
    message = json.dumps(made, ensure_ascii=False, separators=(",", ":")).encode()
    with format3.Keys(root) as keys:
        mac = b64encode(keys.mac(message)).decode()
    return json.dumps({**made, "mac": mac}, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def write(
    groups: list[Group],
    passphrase: str,
    parameters: KdfParameters | None = None,
    salt: bytes = bytes(16),
    generation: int = 3,
) -> bytes:
    """A keystore file of format 3."""
    header = KdfHeader(parameters or KdfParameters(8, 1, 1), salt)
    with header.derive(Secret(bytearray(passphrase.encode()))) as root:
        return sealed(tree(groups, root, header, generation), root)

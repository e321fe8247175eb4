"""Every format read and written a second time, from its description alone.

Nothing here is shared with the program: no import of `kms`, AES-GCM, HMAC and HKDF from PyCryptodome (its own C, not
OpenSSL), Argon2 from argon2pure (pure Python, not the reference code), JSON from the standard library. What both sides
understand of each other is then what the description says, and not a mistake that they share.
"""

from __future__ import annotations

import json
import struct
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import argon2pure
from Crypto.Cipher import AES
from Crypto.Hash import HMAC, SHA256
from Crypto.Protocol.KDF import HKDF

MEMORY_KIB, ITERATIONS, PARALLELISM = 8, 1, 1


@dataclass(frozen=True)
class Version:
    """A KEK version; `kek` is None when it is destroyed."""

    number: int
    status: str
    created_at: int
    kek: bytes | None


@dataclass(frozen=True)
class Group:
    name: str
    created_at: int
    active: int
    versions: tuple[Version, ...]

    @property
    def uuid(self) -> bytes:
        """What format 4 has besides; any will do that is the same each time."""
        return SHA256.new(self.name.encode()).digest()[:16]


def argon2id(
    passphrase: bytes,
    salt: bytes,
    *,
    iterations: int = ITERATIONS,
    memory_kib: int = MEMORY_KIB,
    lanes: int = PARALLELISM,
    secret: bytes = b"",
    associated_data: bytes = b"",
) -> bytes:
    """Argon2id version 0x13, 32 bytes."""
    return bytes(
        argon2pure.argon2(
            passphrase,
            salt,
            iterations,
            memory_kib,
            lanes,
            tag_length=32,
            secret=secret,
            associated_data=associated_data,
            type_code=argon2pure.ARGON2ID,
            threads=1,
            version=0x13,
            use_threads=True,
        )
    )


def hkdf(key: bytes, length: int, salt: bytes, info: bytes) -> bytes:
    """HKDF-SHA256."""
    return bytes(HKDF(key, length, salt, SHA256, 1, info))


def hmac(key: bytes, message: bytes) -> bytes:
    """HMAC-SHA256."""
    return bytes(HMAC.new(key, message, SHA256).digest())


def seal(key: bytes, nonce: bytes, plaintext: bytes, aad: bytes) -> bytes:
    """An inner envelope."""
    gcm = AES.new(key, AES.MODE_GCM, nonce=nonce, mac_len=16)
    gcm.update(aad)
    body, tag = gcm.encrypt_and_digest(plaintext)
    return b"\x01\x01" + nonce + body + tag


def unseal(key: bytes, envelope: bytes, aad: bytes) -> bytes:
    """The plaintext of an inner envelope; raises `ValueError`."""
    if len(envelope) < 30 or envelope[:2] != b"\x01\x01":
        raise ValueError("not an envelope")
    gcm = AES.new(key, AES.MODE_GCM, nonce=envelope[2:14], mac_len=16)
    gcm.update(aad)
    return bytes(gcm.decrypt_and_verify(envelope[14:-16], envelope[-16:]))


def committing_seal(key: bytes, nonce: bytes, plaintext: bytes, aad: bytes) -> bytes:
    """A committing envelope: XAES-256-GCM with key commitment, from its formulas."""
    block, k1, first, second = _xaes(key, nonce)
    gcm = AES.new(block(k1, b"\0\1X\0" + first) + block(k1, b"\0\2X\0" + first), AES.MODE_GCM, nonce=second, mac_len=16)
    gcm.update(aad)
    body, tag = gcm.encrypt_and_digest(plaintext)
    return b"\x01\x02" + nonce + body + tag + _commitment(key, nonce)


def committing_unseal(key: bytes, envelope: bytes, aad: bytes) -> bytes:
    """The plaintext of a committing envelope; raises `ValueError`."""
    if len(envelope) < 74 or envelope[:2] != b"\x01\x02":
        raise ValueError("not a committing envelope")
    nonce = envelope[2:26]
    if _commitment(key, nonce) != envelope[-32:]:
        raise ValueError("another key")
    block, k1, first, second = _xaes(key, nonce)
    gcm = AES.new(block(k1, b"\0\1X\0" + first) + block(k1, b"\0\2X\0" + first), AES.MODE_GCM, nonce=second, mac_len=16)
    gcm.update(aad)
    return bytes(gcm.decrypt_and_verify(envelope[26:-48], envelope[-48:-32]))


def _commitment(key: bytes, nonce: bytes) -> bytes:
    block, k1, first, second = _xaes(key, nonce)
    x1 = block(bytes(16), b"XCMT" + first)
    both = bytes(a ^ b for a, b in zip(k1, x1, strict=True))
    return block(both, second + b"\0\1\0\1") + block(both, second + b"\0\1\0\2")


def _xaes(key: bytes, nonce: bytes) -> tuple[Callable[[bytes, bytes], bytes], bytes, bytes, bytes]:
    """AES of the exclusive-or of two blocks, K1, and the halves of the nonce."""
    ecb = AES.new(key, AES.MODE_ECB)

    def block(one: bytes, other: bytes) -> bytes:
        return bytes(ecb.encrypt(bytes(a ^ b for a, b in zip(one, other, strict=True))))

    doubled = []
    carry = 0
    for octet in reversed(block(bytes(16), bytes(16))):
        doubled.append((octet << 1 | carry) & 0xFF)
        carry = octet >> 7
    doubled[0] ^= 0x87 * carry
    return block, bytes(reversed(doubled)), nonce[:12], nonce[12:]


def bound_ciphertext(
    purpose: int, group: str, version: int, kek: bytes, nonce: bytes, plaintext: bytes, aad: bytes
) -> bytes:
    """What a client holds today, made with the KEK."""
    name = group.encode("utf-8")
    header = struct.pack(">BBB", 3, purpose, len(name)) + name + struct.pack(">Q", version)
    return header + committing_seal(_committing_key(kek), nonce, plaintext, _bound(header, aad))


def open_bound_ciphertext(blob: bytes, kek: bytes, aad: bytes) -> tuple[int, str, int, bytes]:
    """Purpose, group, version and plaintext; raises `ValueError`."""
    if blob[0] != 3 or blob[1] > 3:
        raise ValueError("not a ciphertext")
    end = 3 + blob[2] + 8
    plaintext = committing_unseal(_committing_key(kek), blob[end:], _bound(blob[:end], aad))
    return blob[1], blob[3 : end - 8].decode("utf-8"), struct.unpack(">Q", blob[end - 8 : end])[0], plaintext


def _bound(header: bytes, aad: bytes) -> bytes:
    return struct.pack(">Q", len(header)) + header + struct.pack(">Q", len(aad)) + aad


def _committing_key(kek: bytes) -> bytes:
    return hkdf(kek, 32, b"", b"mini-kms/v3/kek/xaes-256-gcm-kc")


def ciphertext(group: str, version: int, envelope: bytes) -> bytes:
    """What a client holds."""
    name = group.encode("utf-8")
    return struct.pack(">BB", 2, len(name)) + name + struct.pack(">Q", version) + envelope


def take_apart(blob: bytes) -> tuple[str, int, bytes]:
    """Group, version and envelope of a ciphertext; raises `ValueError`."""
    if blob[0] != 2:
        raise ValueError("not a ciphertext")
    end = 2 + blob[1]
    return blob[2:end].decode("utf-8"), struct.unpack(">Q", blob[end : end + 8])[0], blob[end + 8 :]


def container(wrapped_key: bytes, envelope: bytes) -> bytes:
    """A file in the container MKE1."""
    return b"MKE1" + struct.pack(">I", len(wrapped_key)) + wrapped_key + envelope


def open_container(file: bytes) -> tuple[bytes, bytes]:
    """The wrapped data key and the file's envelope; raises `ValueError`."""
    if file[:4] != b"MKE1":
        raise ValueError("not a container")
    end = 8 + struct.unpack(">I", file[4:8])[0]
    return file[8:end], file[end:]


CHUNK_BYTES = 65_536


def write_stream(recipients: list[bytes], data_key: bytes, salt: bytes, content: bytes, aad: bytes) -> bytes:
    """A file in the container MKE2; `recipients` wrap the data key."""
    commitment, key = _stream_keys(data_key, salt, aad)
    listed = b"".join(struct.pack(">H", len(one)) + one for one in recipients)
    pieces = [content[start : start + CHUNK_BYTES] for start in range(0, len(content), CHUNK_BYTES)] or [b""]
    sealed = [_chunk(key, number, number == len(pieces) - 1, piece) for number, piece in enumerate(pieces)]
    return b"MKE2" + struct.pack(">B", len(recipients)) + listed + salt + commitment + b"".join(sealed)


def read_stream(file: bytes, data_key: bytes, aad: bytes) -> tuple[list[bytes], bytes]:
    """The recipients and the content of an MKE2 file; raises `ValueError`."""
    if file[:4] != b"MKE2" or not 1 <= file[4] <= 16:
        raise ValueError("not a stream")
    recipients, at = [], 5
    for _ in range(file[4]):
        (length,) = struct.unpack(">H", file[at : at + 2])
        recipients.append(file[at + 2 : at + 2 + length])
        at += 2 + length
    commitment, key = _stream_keys(data_key, file[at : at + 32], aad)
    if file[at + 32 : at + 64] != commitment:
        raise ValueError("another key")
    body = file[at + 64 :]
    content = b""
    chunks = [body[start : start + CHUNK_BYTES + 16] for start in range(0, len(body), CHUNK_BYTES + 16)]
    for number, chunk in enumerate(chunks):
        if len(chunk) < 16 or (len(chunk) == 16 and number):
            raise ValueError("an empty chunk")
        gcm = AES.new(key, AES.MODE_GCM, nonce=_chunk_nonce(number, number == len(chunks) - 1), mac_len=16)
        content += gcm.decrypt_and_verify(chunk[:-16], chunk[-16:])
    if not chunks:
        raise ValueError("no chunk")
    return recipients, content


def _stream_keys(data_key: bytes, salt: bytes, aad: bytes) -> tuple[bytes, bytes]:
    output = hkdf(data_key, 64, salt, b"mini-kms/MKE2/64KiB\0" + aad)
    return output[:32], output[32:]


def _chunk(key: bytes, number: int, is_last: bool, plaintext: bytes) -> bytes:
    gcm = AES.new(key, AES.MODE_GCM, nonce=_chunk_nonce(number, is_last), mac_len=16)
    body, tag = gcm.encrypt_and_digest(plaintext)
    return bytes(body + tag)


def _chunk_nonce(number: int, is_last: bool) -> bytes:
    return number.to_bytes(11, "big") + (b"\x01" if is_last else b"\x00")


def _text(data: bytes) -> str:
    return b64encode(data).decode("ascii")


def _compact(tree: dict[str, Any]) -> bytes:
    return json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def _slot(group: str, version: int) -> bytes:
    name = group.encode("utf-8")
    return struct.pack(">I", len(name)) + name + struct.pack(">Q", version)


def _sub_key(root: bytes, use: str) -> bytes:
    return hkdf(root, 32, b"", f"mini-kms/v3/{use}".encode())


def _kdf(salt: bytes) -> dict[str, Any]:
    return {
        "name": "argon2id",
        "version": 19,
        "memoryKiB": MEMORY_KIB,
        "iterations": ITERATIONS,
        "parallelism": PARALLELISM,
        "salt": _text(salt),
    }


def _root(kdf: dict[str, Any], passphrase: bytes) -> bytes:
    salt, costs = b64decode(kdf["salt"]), (kdf["iterations"], kdf["memoryKiB"], kdf["parallelism"])
    return argon2id(passphrase, salt, iterations=costs[0], memory_kib=costs[1], lanes=costs[2])


def write_format3(groups: list[Group], generation: int, passphrase: bytes, salt: bytes, nonces: Iterator[bytes]) -> bytes:
    """A format 3 file; each of `nonces` is 12 bytes."""
    root = argon2id(passphrase, salt)
    wrap = _sub_key(root, "wrap-kek")
    body = {
        "formatVersion": 3,
        "generation": generation,
        "kdf": _kdf(salt),
        "rootCheck": _text(seal(_sub_key(root, "root-check"), next(nonces), b"mini-kms/root-check/v3", b"")),
        "keyGroups": [
            {
                "keyId": group.name,
                "createdAtEpochSec": group.created_at,
                "activeVersion": group.active,
                "versions": [
                    {
                        "version": v.number,
                        "status": v.status,
                        "createdAtEpochSec": v.created_at,
                        "wrappedKek": None
                        if v.kek is None
                        else _text(seal(wrap, next(nonces), v.kek, _slot(group.name, v.number))),
                    }
                    for v in group.versions
                ],
            }
            for group in groups
        ],
    }
    return _compact({**body, "mac": _text(hmac(_sub_key(root, "keystore-mac"), _compact(body)))})


def read_format3(raw: bytes, passphrase: bytes) -> tuple[int, list[Group]]:
    """Generation and groups of a format 3 file; raises `ValueError`."""
    tree = json.loads(raw)
    root = _root(tree["kdf"], passphrase)
    if unseal(_sub_key(root, "root-check"), b64decode(tree["rootCheck"]), b"") != b"mini-kms/root-check/v3":
        raise ValueError("wrong passphrase")
    mac = tree.pop("mac")
    if hmac(_sub_key(root, "keystore-mac"), _compact(tree)) != b64decode(mac):
        raise ValueError("wrong MAC")
    wrap = _sub_key(root, "wrap-kek")
    groups = [
        _group(group, "wrappedKek", lambda slot, number, wrapped: unseal(wrap, wrapped, _slot(slot["keyId"], number)))
        for group in tree["keyGroups"]
    ]
    return tree["generation"], groups


def _slot4(group: str, version: int, uuid: bytes) -> bytes:
    name, spec = group.encode(), b"AES_256"
    return struct.pack(">Q", len(name)) + name + struct.pack(">Q", version) + struct.pack(">Q", len(spec)) + spec + uuid


def _sub_key4(root: bytes, use: str) -> bytes:
    return hkdf(root, 32, b"", f"mini-kms/v4/{use}".encode())


def write_format4(
    groups: list[Group], generation: int, passphrase: bytes, salt: bytes, nonces: Iterator[bytes], later: list[list[Group]]
) -> tuple[bytes, bytes | None]:
    """A format 4 file and its journal, with a commit for each of `later`; each of `nonces` is 12 bytes."""
    root = argon2id(passphrase, salt)
    identity = None if not later else "0badcafe-0bad-4afe-8bad-cafe0badcafe"
    body = {
        "formatVersion": 4,
        "generation": generation,
        "kdf": _kdf(salt),
        "rootCheck": _text(seal(_sub_key4(root, "root-check"), next(nonces), b"mini-kms/root-check/v4", b"")),
        "journal": identity,
        "formerJournal": None,
        "keyGroups": [_group4(group, root, nonces) for group in groups],
    }
    file = _compact({**body, "mac": _text(hmac(_sub_key4(root, "keystore-mac"), _compact(body)))})
    if identity is None:
        return file, None
    lines, mac = [], ""
    for number, changed in enumerate([[], *later]):
        line: dict[str, Any] = {"journal": identity, "generation": generation}
        if number:
            line = {"generation": generation + number, "previous": mac}
            line["keyGroups"] = [_group4(group, root, nonces) for group in changed]
        mac = _text(hmac(_sub_key4(root, "journal-mac"), _compact(line)))
        lines.append(_compact({**line, "mac": mac}) + b"\n")
    return file, b"".join(lines)


def _group4(group: Group, root: bytes, nonces: Iterator[bytes]) -> dict[str, Any]:
    wrap = _sub_key4(root, "wrap-kek")
    return {
        "keyId": group.name,
        "keyUuid": str(UUID(bytes=group.uuid)),
        "spec": "AES_256",
        "use": "encrypt",
        "createdAtEpochSec": group.created_at,
        "activeVersion": group.active,
        "versions": [
            {
                "version": v.number,
                "status": v.status,
                "createdAtEpochSec": v.created_at,
                "wrappedKey": None
                if v.kek is None
                else _text(
                    committing_seal(wrap, next(nonces) + next(nonces), v.kek, _slot4(group.name, v.number, group.uuid))
                ),
            }
            for v in group.versions
        ],
    }


def read_format4(raw: bytes, journal: bytes | None, passphrase: bytes) -> tuple[int, list[Group]]:
    """Generation and groups of a format 4 file with its journal; raises `ValueError`."""
    tree = json.loads(raw)
    root = _root(tree["kdf"], passphrase)
    if unseal(_sub_key4(root, "root-check"), b64decode(tree["rootCheck"]), b"") != b"mini-kms/root-check/v4":
        raise ValueError("wrong passphrase")
    mac = tree.pop("mac")
    if hmac(_sub_key4(root, "keystore-mac"), _compact(tree)) != b64decode(mac):
        raise ValueError("wrong MAC")
    groups = {group["keyId"]: group for group in tree["keyGroups"]}
    generation = tree["generation"]
    if (tree["journal"] is None) != (journal is None):
        raise ValueError("no journal, or one too many")
    previous = ""
    for number, line in enumerate((journal or b"").splitlines()):
        record = json.loads(line)
        mac = record.pop("mac")
        if hmac(_sub_key4(root, "journal-mac"), _compact(record)) != b64decode(mac):
            raise ValueError("wrong MAC in the journal")
        if number and (record["previous"] != previous or record["generation"] != generation + number):
            raise ValueError("not the next line")
        if not number and (record["journal"], record["generation"]) != (tree["journal"], generation):
            raise ValueError("another's journal")
        groups.update((group["keyId"], group) for group in record.get("keyGroups", ()))
        previous = mac
    count = max(0, (journal or b"").count(b"\n") - 1)
    return generation + count, [_read4(group, root) for group in groups.values()]


def _read4(group: dict[str, Any], root: bytes) -> Group:
    wrap, uuid = _sub_key4(root, "wrap-kek"), UUID(group["keyUuid"]).bytes
    return _group(
        group,
        "wrappedKey",
        lambda slot, number, wrapped: committing_unseal(wrap, wrapped, _slot4(slot["keyId"], number, uuid)),
    )


def _group(group: dict[str, Any], field: str, unwrap: Callable[[dict[str, Any], int, bytes], bytes]) -> Group:
    return Group(
        group["keyId"],
        group["createdAtEpochSec"],
        group["activeVersion"],
        tuple(
            Version(
                v["version"],
                v["status"],
                v["createdAtEpochSec"],
                None if v[field] is None else unwrap(group, v["version"], b64decode(v[field])),
            )
            for v in group["versions"]
        ),
    )


def write_format2(groups: list[Group], passphrase: bytes, salt: bytes, nonces: Iterator[bytes]) -> bytes:
    """A format 2 file, of which the program has no writer."""
    root = argon2id(passphrase, salt)
    tree: dict[str, Any] = {
        "formatVersion": 2,
        "kdf": "argon2id",
        "argonMemoryKiB": MEMORY_KIB,
        "argonIterations": ITERATIONS,
        "argonParallelism": PARALLELISM,
        "saltBase64": _text(salt),
        "rootVerificationTokenBase64": _text(seal(root, next(nonces), b"mini-kms/root-verification/v2", b"")),
        "keyGroups": [
            {
                "id": group.name,
                "activeVersion": group.active,
                "versions": [
                    {
                        "version": v.number,
                        "status": v.status,
                        "createdAtEpochSec": v.created_at,
                        "wrappedKekBase64": None if v.kek is None else _text(seal(root, next(nonces), v.kek, b"")),
                    }
                    for v in group.versions
                ],
            }
            for group in groups
        ],
    }
    tree["macBase64"] = _text(hmac(hmac(root, b"mini-kms/keystore-integrity/v1"), _message2(tree)))
    return _compact(tree)


def _message2(tree: dict[str, Any]) -> bytes:
    message = bytearray(struct.pack(">i", tree["formatVersion"]) + _str2(tree["kdf"]))
    message += struct.pack(">iii", tree["argonMemoryKiB"], tree["argonIterations"], tree["argonParallelism"])
    message += _str2(tree["saltBase64"]) + _str2(tree["rootVerificationTokenBase64"])
    message += struct.pack(">i", len(tree["keyGroups"]))
    for group in tree["keyGroups"]:
        message += _str2(group["id"]) + struct.pack(">qi", group["activeVersion"], len(group["versions"]))
        for v in group["versions"]:
            message += struct.pack(">q", v["version"]) + _str2(v["status"])
            message += struct.pack(">q", v["createdAtEpochSec"]) + _str2(v["wrappedKekBase64"])
    return bytes(message)


def _str2(text: str | None) -> bytes:
    if text is None:
        return struct.pack(">i", -1)
    data = text.encode("utf-8")
    return struct.pack(">i", len(data)) + data

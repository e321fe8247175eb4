"""Make a release's directory: what it writes, and what its clients send, for every later release to understand.

    python -m kms_tests.releases.make kms_tests/releases/0.1.0

One that is called `format2` is what the Java mini-kms wrote instead.

`promise.json` says what is in the other files: passphrase and tokens, which here are no secrets; key groups with their
versions; ciphertexts with what they hold. Its `requests` are those that a client sent to a server with an empty keystore,
with the replies they had: `…` stands for what differs each time, and in a request for the first ciphertext of a reply.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from kms_tests import java_keystore
from kms_tests.integration.processes import PASSPHRASE, Machine, Server, Wire

KEPT: Final = ("keystore.json", "principals.toml", "audit.log", "audit.log-1", "audit.log.head", "letter.mke")
LETTER: Final = b"Dear Alice,\n" + bytes(range(256))
LETTER_AAD: Final = "letters/7"
PRINCIPAL_TOKEN: Final = "a token of billing"
PRINCIPALS: Final = f"""\
[shared]
api_token = true
admin_token = true

[principals.billing]
token_sha256 = [
    "{sha256(PRINCIPAL_TOKEN.encode()).hexdigest()}",
    {{ digest = "{"ab" * 32}", expires = 2020-01-01T00:00:00Z }},
]

[[principals.billing.allow]]
groups = ["billing", "billing-*"]
operations = ["Encrypt", "Decrypt", "GenerateDataKey"]
aad_prefix = "aW52b2ljZS8="

[[principals.billing.deny]]
groups = ["billing-secret"]
operations = ["*"]

[principals.backup]
uids = [4001]
gids = [4002]
"""
_VOLATILE: Final = ("ciphertext", "plaintextDataKey", "wrappedDataKey")


def make(directory: Path) -> None:
    """Fill `directory`, which must not exist yet."""
    directory.mkdir()
    machine = Machine()
    try:
        assert machine.admin("init").status == 0
        (machine.data / "principals.toml").write_text(PRINCIPALS, encoding="utf-8")
        (machine.data / "principals.toml").chmod(0o600)
        server = machine.start()
        promise = _fill(machine, server)
        letter = machine.file("letter", LETTER)
        sealed = machine.data / "letter.mke"
        done = server.client(
            "encrypt-file", "--in", str(letter), "--out", str(sealed), "--key", "billing", "--aad", LETTER_AAD
        )
        assert done.status == 0, done.stderr
        assert server.stop() == 0
        _rotate_the_log(machine)
        for name in KEPT:
            shutil.copyfile(machine.data / name, directory / name)
        _write(directory, promise)
    finally:
        machine.dispose()


def make_format_2(directory: Path) -> None:
    """Fill `directory` with what the Java mini-kms wrote, from the description of its formats alone."""
    directory.mkdir()
    versions = [
        java_keystore.Version(1, "DESTROYED"),
        java_keystore.Version(2, "DISABLED"),
        java_keystore.Version(3, "ENABLED"),
    ]
    group = java_keystore.Group("billing", 4, [*versions, java_keystore.Version(4, "ACTIVE")])
    (directory / "keystore.json").write_bytes(java_keystore.write([group], PASSPHRASE))
    sealed = [(version, f"version {version.number}".encode()) for version in group.versions]
    data_key = os.urandom(32)
    wrapped = java_keystore.ciphertext(group, group.versions[-1], data_key, LETTER_AAD.encode())
    body = java_keystore.envelope(data_key, LETTER, LETTER_AAD.encode())
    (directory / "letter.mke").write_bytes(b"MKE1" + len(wrapped).to_bytes(4, "big") + wrapped + body)
    promise = {
        "passphrase": PASSPHRASE,
        "apiToken": "an API token",
        "adminToken": "an admin token",
        "keyGroups": [
            {
                "keyId": group.id,
                "activeVersion": group.active,
                "versions": [
                    {"version": version.number, "status": version.status, "createdAtEpochSec": version.created_at}
                    for version in group.versions
                ],
            }
        ],
        "ciphertexts": [
            {
                "group": group.id,
                "version": version.number,
                "ciphertext": _text(java_keystore.ciphertext(group, version, plaintext, b"")),
                "plaintext": _text(plaintext),
            }
            for version, plaintext in sealed
        ],
        "container": {"file": "letter.mke", "aad": LETTER_AAD, "plaintext": _text(LETTER)},
    }
    _write(directory, promise)


def _write(directory: Path, promise: dict[str, Any]) -> None:
    text = json.dumps(promise, indent=1, ensure_ascii=False)
    (directory / "promise.json").write_text(f"{text}\n", encoding="utf-8")


def _rotate_the_log(machine: Machine) -> None:
    (machine.data / "audit.log").rename(machine.data / "audit.log-1")
    assert machine.start().stop() == 0


def _fill(machine: Machine, server: Server) -> dict[str, Any]:
    ciphertexts: list[dict[str, Any]] = []
    requests: list[dict[str, Any]] = []
    with server.unix() as wire:

        def ask(token: str, kind: str, **fields: Any) -> dict[str, Any]:
            request = {"type": kind, "token": token, **fields}
            reply = wire.ask(**request)
            requests.append({"request": _steady(request), "reply": _steady(reply)})
            return reply

        def seal(group: str, version: int, plaintext: bytes, aad: bytes) -> None:
            fields = {"aad": _text(aad)} if aad else {}
            reply = ask(machine.api_token, "Encrypt", keyId=group, plaintext=_text(plaintext), **fields)
            ciphertexts.append(
                {
                    "group": group,
                    "version": version,
                    "ciphertext": reply["ciphertext"],
                    "plaintext": _text(plaintext),
                    **fields,
                }
            )

        ask(machine.api_token, "Health")
        ask(machine.api_token, "Ping", requestId="nightly-7")
        seal("default", 1, b"", b"")
        ask(machine.admin_token, "CreateKeyGroup", keyId="billing")
        for version in range(1, 5):
            seal("billing", version, f"version {version}".encode(), b"invoice/7")
            ask(machine.admin_token, "RotateKeyGroup", keyId="billing")
        seal("billing", 5, os.urandom(100), b"")
        ask(machine.admin_token, "DisableVersion", keyId="billing", version=2)
        ask(machine.admin_token, "DisableVersion", keyId="billing", version=3, forSeconds=60)
        ask(machine.admin_token, "EnableVersion", keyId="billing", version=3)
        ask(machine.admin_token, "DestroyVersion", keyId="billing", version=1)
        _ask_what_is_left(machine, wire, ask, ciphertexts[0]["ciphertext"])
        groups = wire.ask(type="ListKeyGroups", token=machine.admin_token)["keyGroups"]
    return {
        "passphrase": PASSPHRASE,
        "apiToken": machine.api_token,
        "adminToken": machine.admin_token,
        "keyGroups": groups,
        "ciphertexts": ciphertexts,
        "container": {"file": "letter.mke", "aad": LETTER_AAD, "plaintext": _text(LETTER)},
        "requests": requests,
    }


def _ask_what_is_left(machine: Machine, wire: Wire, ask: Any, ciphertext: str) -> None:
    """Each other kind of request, and each refusal that keeps the connection."""
    api, admin = machine.api_token, machine.admin_token
    ask(api, "GenerateDataKey", keyId="billing", aad=_text(b"file"))
    ask(api, "GenerateDataKey")
    ask(api, "Decrypt", ciphertext=ciphertext)
    ask(api, "Decrypt", ciphertext=ciphertext, aad=_text(b"another"))
    ask(api, "ReEncrypt", ciphertext=ciphertext, keyId="billing")
    ask(api, "Encrypt", keyId=None, plaintext="", unknownField={"is": "ignored"})
    ask(api, "Encrypt", keyId="  ", plaintext="")
    ask(api, "Encrypt", keyId="nobody", plaintext="")
    ask(api, "Encrypt")
    ask(api, "Nonsense")
    ask(admin, "DescribeKeyGroup", keyId="billing")
    ask(admin, "ListKeyGroups", usage=True)
    ask(admin, "CreateKeyGroup", keyId="billing")
    ask(admin, "DisableVersion", keyId="billing", version=5)
    ask("wrong", "Encrypt", plaintext="")
    ask("wrong", "ListKeyGroups")
    ask(PRINCIPAL_TOKEN, "Encrypt", keyId="billing", plaintext="", aad=_text(b"invoice/8"))
    ask(PRINCIPAL_TOKEN, "Encrypt", keyId="billing", plaintext="", aad=_text(b"file"))
    ask(PRINCIPAL_TOKEN, "ListKeyGroups")


def _steady(message: Any) -> Any:
    """A request or reply with `…` for what differs each time."""
    if isinstance(message, dict):
        return {name: "…" if name in _VOLATILE or name.endswith("EpochSec") else _steady(message[name]) for name in message}
    if isinstance(message, list):
        return [_steady(item) for item in message]
    return message


def _text(data: bytes) -> str:
    return b64encode(data).decode("ascii")


if __name__ == "__main__":
    place = Path(sys.argv[1])
    (make_format_2 if place.name == "format2" else make)(place)

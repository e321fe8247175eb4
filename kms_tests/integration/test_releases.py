"""What earlier releases wrote, and what their clients sent: this one has to open and to understand all of it."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from kms_tests.integration.processes import ROOT, Machine, Server

RELEASES = sorted(path.parent for path in (ROOT / "kms_tests" / "releases").glob("*/promise.json"))
FINGERPRINTS = {"0.1.0": "97e7a4ad860202dc", "format2": "b4852770ef1a6bc6"}
"""To be written once for each release, and never again."""
ANY = "…"


@pytest.fixture(params=RELEASES, ids=lambda path: path.name)
def release(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.fixture
def promise(release: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((release / "promise.json").read_text(encoding="utf-8"))
    return read


@pytest.fixture
def installed(release: Path, promise: dict[str, Any]) -> Iterator[Machine]:
    """A machine where that release has been at work, and was stopped."""
    machine = empty(promise)
    for source in release.iterdir():
        if source.name != "promise.json":
            put(machine.data / source.name, source.read_bytes())
    yield machine
    machine.dispose()


def empty(promise: dict[str, Any]) -> Machine:
    """A machine with that release's passphrase and tokens alone."""
    machine = Machine()
    machine.environment["MINIKMS_PASSPHRASE"] = promise["passphrase"]
    machine.data.mkdir(mode=0o700)
    put(machine.data / "api.token", promise["apiToken"].encode())
    put(machine.data / "admin.token", promise["adminToken"].encode())
    return machine


def put(path: Path, content: bytes) -> None:
    path.touch(0o600)
    path.write_bytes(content)


def holds(shown: Any, real: Any) -> bool:
    """Whether all that is `shown` is in `real`, which may have more fields; the text of a message may be another."""
    if isinstance(shown, dict):
        return isinstance(real, dict) and all(
            name in real and (name == "message" or holds(shown[name], real[name])) for name in shown
        )
    if isinstance(shown, list):
        return isinstance(real, list) and len(shown) == len(real) and all(map(holds, shown, real))
    return shown in (ANY, real)


def opens(server: Server, promise: dict[str, Any]) -> None:
    """Each ciphertext opens, unless its version may not be used; that is what the promise says of its state."""
    usable = {
        (group["keyId"], version["version"])
        for group in promise["keyGroups"]
        for version in group["versions"]
        if version["status"] in ("ACTIVE", "ENABLED")
    }
    with server.unix() as wire:
        for kept in promise["ciphertexts"]:
            context = {"aad": kept["aad"]} if "aad" in kept else {}
            reply = wire.ask(type="Decrypt", token=promise["apiToken"], ciphertext=kept["ciphertext"], **context)
            if (kept["group"], kept["version"]) in usable:
                assert reply == {"status": "ok", "plaintext": kept["plaintext"]}, kept
            else:
                assert reply == {"status": "error", "errorCode": "DecryptionFailed", "message": "decryption failed"}, kept


def test_its_keystore_and_its_ciphertexts_open_before_and_after_the_next_save(
    installed: Machine, promise: dict[str, Any]
) -> None:
    server = installed.start()
    with server.unix() as wire:
        listed = wire.ask(type="ListKeyGroups", token=promise["adminToken"])["keyGroups"]
        assert holds(promise["keyGroups"], listed)
        opens(server, promise)
        assert wire.ask(type="CreateKeyGroup", token=promise["adminToken"], keyId="later")["status"] == "ok"
    assert server.stop() == 0
    again = installed.start()
    with again.unix() as wire:
        groups = wire.ask(type="ListKeyGroups", token=promise["adminToken"])["keyGroups"]
    assert holds(promise["keyGroups"], groups[:-1])
    opens(again, promise)


def test_its_container_opens(installed: Machine, promise: dict[str, Any]) -> None:
    kept = promise["container"]
    file = str(installed.data / kept["file"])
    opened = installed.start().client("decrypt-file", "--in", file, "--out", "-", "--aad", kept["aad"])
    assert (opened.status, opened.stdout) == (0, b64decode(kept["plaintext"]))


@pytest.mark.parametrize("release", [path for path in RELEASES if (path / "audit.log").exists()], indirect=True)
def test_its_audit_log_is_authentic_and_goes_on(installed: Machine) -> None:
    logs = [str(path) for path in sorted(installed.data.glob("audit.log*"), reverse=True) if path.suffix != ".head"]
    before = json.loads(installed.admin("--json", "verify-audit", *logs).stdout)
    assert installed.start().stop() == 0
    after = json.loads(installed.admin("--json", "verify-audit", *logs).stdout)
    assert (before["authentic"], after["authentic"]) == (True, True)
    assert after["files"][-1]["last"] > before["files"][-1]["last"]


@pytest.mark.parametrize("release", [path for path in RELEASES if path.name != "format2"], indirect=True)
def test_its_clients_are_understood_and_answered_as_they_were(release: Path, promise: dict[str, Any]) -> None:
    machine = empty(promise)
    try:
        if (release / "principals.toml").exists():
            put(machine.data / "principals.toml", (release / "principals.toml").read_bytes())
        # Its server made one when it was started the first time.
        assert machine.admin("init", "--keystore-only").status == 0
        server = machine.start()
        first = ""
        with server.unix() as wire:
            for exchange in promise["requests"]:
                request = {name: first if value == ANY else value for name, value in exchange["request"].items()}
                reply = wire.ask(**request)
                assert holds(exchange["reply"], reply), f"{request} had {exchange['reply']}, and now {reply}"
                first = first or reply.get("ciphertext", "")
    finally:
        machine.dispose()


def test_nobody_has_edited_what_they_wrote() -> None:
    assert {path.name: fingerprint(path) for path in RELEASES} == FINGERPRINTS


def fingerprint(release: Path) -> str:
    """One digest over the names and contents of all its files."""
    whole = sha256()
    for path in sorted(release.iterdir()):
        whole.update(sha256(path.name.encode()).digest() + sha256(path.read_bytes()).digest())
    return whole.hexdigest()[:16]

"""The life of a file and of the keys it depends on, told with real processes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from kms_tests.integration.processes import PASSPHRASE, Machine, Server

MIB = 1 << 20


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def body(container: Path) -> bytes:
    content = container.read_bytes()
    assert content[:5] == b"MKE2\x01"
    return content[7 + int.from_bytes(content[5:7], "big") :]


class Story:
    """A plaintext and whoever wants to have it back."""

    def __init__(self, machine: Machine, plaintext: Path) -> None:
        self.machine = machine
        self.plaintext = plaintext
        self.back = machine.root / "back"

    def opens(self, server: Server, container: Path) -> None:
        self.back.unlink(missing_ok=True)
        outcome = server.client("decrypt-file", "--in", str(container), "--out", str(self.back))
        assert outcome.status == 0, outcome.stderr
        assert digest(self.back) == digest(self.plaintext)

    def stays_shut(self, server: Server, container: Path) -> None:
        self.back.unlink(missing_ok=True)
        outcome = server.client("decrypt-file", "--in", str(container), "--out", str(self.back))
        assert outcome.status == 1
        assert "decryption failed" in outcome.said_one_line("kms-client")
        assert not self.back.exists()


def admin(server: Server, *arguments: str) -> None:
    outcome = server.admin(*arguments)
    assert outcome.status == 0, outcome.stderr


def test_a_file_lives_through_all_that_can_happen_to_its_keys(machine: Machine) -> None:
    server = machine.start()
    story = Story(machine, machine.file("plain", os.urandom(16 * MIB)))
    first, moved = machine.root / "first.mke", machine.root / "moved.mke"

    encrypted = server.client_over_tcp("encrypt-file", "--in", str(story.plaintext), "--out", str(first))
    assert encrypted.status == 0, encrypted.stderr
    assert first.stat().st_mode & 0o777 == 0o600
    story.opens(server, first)

    admin(server, "rotate-key", "--key", "default")
    story.opens(server, first)

    admin(server, "create-key", "--key", "other")
    reencrypted = server.client("reencrypt", "--in", str(first), "--out", str(moved), "--key", "other")
    assert reencrypted.status == 0, reencrypted.stderr
    assert body(moved) == body(first)
    assert moved.read_bytes() != first.read_bytes()
    story.opens(server, moved)

    admin(server, "rotate-key", "--key", "other")
    story.opens(server, moved)
    admin(server, "disable-version", "--key", "other", "--version", "1")
    story.stays_shut(server, moved)
    admin(server, "enable-version", "--key", "other", "--version", "1")
    story.opens(server, moved)
    admin(server, "destroy-version", "--key", "other", "--version", "1", "--yes")
    story.stays_shut(server, moved)
    story.opens(server, first)

    assert server.stop() == 0
    server = machine.start()
    story.stays_shut(server, moved)
    story.opens(server, first)
    states = server.groups()
    assert states["other"] == {1: "DESTROYED", 2: "ACTIVE"}

    assert server.stop() == 0
    changed = machine.admin(
        "change-passphrase", "--keystore", str(machine.keystore), environment={"MINIKMS_NEW_PASSPHRASE": "another one"}
    )
    assert changed.status == 0, changed.stderr
    assert machine.refused_start(environment={"MINIKMS_PASSPHRASE": PASSPHRASE}).status == 2
    server = machine.start(environment={"MINIKMS_PASSPHRASE": "another one"})
    assert server.groups() == states
    story.opens(server, first)
    story.stays_shut(server, moved)


def test_a_file_larger_than_the_memory_the_client_may_use_is_encrypted_and_decrypted(
    machine: Machine, server: Server
) -> None:
    plain, sealed, back = (machine.root / name for name in ("plain", "sealed", "back"))
    with plain.open("wb") as file:
        file.write(os.urandom(MIB))
        file.truncate(128 * MIB)
    address = ("--unix", str(server.socket))

    status, peak = machine.client_peak(*address, "encrypt-file", "--in", str(plain), "--out", str(sealed))
    assert status == 0
    assert peak <= 100 * 1024
    status, peak = machine.client_peak(*address, "decrypt-file", "--in", str(sealed), "--out", str(back))
    assert status == 0
    assert peak <= 100 * 1024
    assert digest(back) == digest(plain)


def test_a_file_opens_only_with_the_aad_it_was_sealed_with(machine: Machine, server: Server) -> None:
    plain, sealed, back = machine.file("plain", b"secret"), machine.root / "sealed", machine.root / "back"
    ends = ("--in", str(sealed), "--out", str(back))
    assert server.client("encrypt-file", "--in", str(plain), "--out", str(sealed), "--aad", "a").status == 0
    assert server.client("decrypt-file", *ends, "--aad", "b").status == 1
    assert server.client("decrypt-file", *ends).status == 1
    assert not back.exists()
    assert server.client("decrypt-file", *ends, "--aad", "a").status == 0
    assert back.read_bytes() == b"secret"

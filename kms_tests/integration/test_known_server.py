"""Nobody but the server is shown a token: each command against a process of another user that has the server's place."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kms_tests.integration.processes import DEADLINE, Machine

OTHER = 54321
IMPOSTER = """
import os, socket, sys
listening = socket.socket(fileno=int(sys.argv[1]))
os.setgid(54321); os.setuid(54321)
if listening.family == socket.AF_UNIX:
    listening.listen()
print("listening", flush=True)
while True:
    link, _ = listening.accept()
    print("heard", link.recv(65536), flush=True)
    try:
        link.sendall(b'{"status":"ok","detail":"ok","keyGroups":[]}\\n')
    except OSError:
        pass
    link.close()
"""
COMMANDS = [
    ["client", "health"],
    ["client", "generate-data-key"],
    ["client", "encrypt", "--text", "s3cret"],
    ["client", "decrypt", "--in", "ciphertext"],
    ["client", "encrypt-file", "--in", "plaintext", "--out", "out"],
    ["client", "decrypt-file", "--in", "container", "--out", "out"],
    ["client", "reencrypt", "--in", "container", "--out", "out", "--key", "default"],
    ["admin", "create-key", "--key", "new"],
    ["admin", "rotate-key", "--key", "default"],
    ["admin", "list-keys"],
    ["admin", "describe-key", "--key", "default"],
    ["admin", "disable-version", "--key", "default", "--version", "1"],
    ["admin", "disable-version", "--key", "default", "--version", "1", "--for", "1s"],
    ["admin", "enable-version", "--key", "default", "--version", "1"],
    ["admin", "destroy-version", "--key", "default", "--version", "1", "--yes"],
    ["admin", "destroy-version", "--key", "default", "--version", "1"],
]


class Imposter:
    """A process of another user with a listening socket that was made for it."""

    def __init__(self, listening: socket.socket) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", IMPOSTER, str(listening.fileno())],
            pass_fds=[listening.fileno()],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "listening\n"

    def heard(self) -> str:
        self.process.kill()
        out, _ = self.process.communicate(timeout=DEADLINE)
        return out


@pytest.fixture
def prepared(machine: Machine) -> Machine:
    if os.geteuid() != 0:
        pytest.skip("only root can run a process of another user")
    from kms.core import mke1
    from kms.core.ciphertext import Purpose
    from kms_tests.keks import forged

    blob = forged("default", 1, Purpose.DATA_KEY)
    machine.file("ciphertext", blob)
    machine.file("container", mke1.header(blob) + bytes(100))
    machine.file("plaintext", b"s3cret")
    return machine


@pytest.fixture(params=["tcp", "unix"])
def imposter(prepared: Machine, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Imposter, list[str]]]:
    if request.param == "tcp":
        listening = socket.create_server(("127.0.0.1", 0))
        where = ["--tcp", f"127.0.0.1:{listening.getsockname()[1]}"]
    else:
        listening = socket.socket(socket.AF_UNIX)
        path = prepared.root / "planted.sock"
        listening.bind(str(path))
        where = ["--unix", str(path)]
    with listening:
        one = Imposter(listening)
        yield one, where
        one.process.kill()
        one.process.wait(DEADLINE)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: "-".join(command[1:2] + command[-1:]))
def test_no_command_shows_it_anything(command: list[str], prepared: Machine, imposter: tuple[Imposter, list[str]]) -> None:
    who, where = imposter
    program, *arguments = command
    run = prepared.client if program == "client" else prepared.admin
    outcome = run(
        *where,
        *(str(prepared.root / one) if one.isalpha() and (prepared.root / one).exists() else one for one in arguments),
    )
    assert outcome.status == 77, outcome
    assert f"process of user {OTHER}" in outcome.said_one_line(f"kms-{program}")
    assert who.heard() in ("", "heard b''\n")


def test_it_is_believed_where_it_is_named(prepared: Machine, imposter: tuple[Imposter, list[str]]) -> None:
    who, where = imposter
    assert prepared.client(*where, "--server-user", str(OTHER), "health").stdout == b"ok\n"
    assert prepared.api_token in who.heard()

"""No file, directory or socket of ours is open to others, not even for the instant before somebody mends its mode.

inotify would tell of a file once it is there, which may be too late to see what it was born as. So the system calls
are recorded instead: the mode each asks for is the mode of that instant, since everything runs with umask 000.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from kms_tests import java_keystore
from kms_tests.integration.processes import DEADLINE, PASSPHRASE, Machine, Server, eventually, program

CALLS: Final = "open,openat,openat2,creat,mkdir,mkdirat,mknod,mknodat,bind,umask,chmod,fchmod,fchmodat"
OTHERS: Final = 0o077


class Recorder:
    """Runs programs under strace and umask 000."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.trace = machine.root / "strace"

    def start(self, command: list[str], stderr: Path | None = None) -> subprocess.Popen[bytes]:
        with (stderr or Path(os.devnull)).open("wb") as errors:
            return subprocess.Popen(
                ["strace", "-f", "-o", str(self.trace), "-e", f"trace={CALLS}", "--", *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=self.machine.environment,
                umask=0,
                start_new_session=True,
            )

    def run(self, command: list[str]) -> None:
        with self.start(command) as process:
            assert process.wait(DEADLINE) == 0

    @property
    def too_open(self) -> list[str]:
        return list(too_open(self.trace.read_text(encoding="utf-8"), self.machine.root))

    @property
    def born(self) -> set[str]:
        """The names of what was made."""
        lines = self.trace.read_text(encoding="utf-8").splitlines()
        paths = (path_of(line) for line in lines if "O_CREAT" in line or "mkdir(" in line or "sun_path" in line)
        return {path.name for path in paths if path is not None and self.machine.root in path.parents}


def path_of(line: str) -> Path | None:
    found = re.search(r'"(/[^"]*)"', line)
    return None if found is None else Path(found[1])


def too_open(trace: str, root: Path) -> Iterator[str]:
    """The recorded calls that made something below `root`, or gave it a mode, that others may use."""
    umask = 0
    for line in trace.splitlines():
        call = re.match(r"\d+ +(\w+)\((.*)", line)
        if call is None:
            continue
        name, arguments = call.groups()
        if name == "umask":
            umask = int(re.match(r"0\d*", arguments)[0], 8)  # type: ignore[index]  # strace writes octal
            continue
        path = path_of(arguments)
        if name != "fchmod" and (path is None or root not in (path, *path.parents)):
            continue
        if name == "bind":
            mode = 0o777 & ~umask
        elif name.startswith("open") and "O_CREAT" not in arguments:
            continue
        else:
            mode = int(re.findall(r", (0\d*)", arguments)[-1], 8)
            if "chmod" not in name:
                mode &= ~umask
        if mode & OTHERS:
            yield line


@pytest.fixture
def recorder(machine: Machine) -> Recorder:
    return Recorder(machine)


def tell(server: Server, number: int) -> None:
    """Send a signal to the server itself, not to the strace around it."""
    found = re.search(r"\(pid (\d+)\)", server.stderr)
    assert found is not None
    os.kill(int(found[1]), number)


def stop(process: subprocess.Popen[bytes], server: Server) -> None:
    tell(server, signal.SIGTERM)
    assert process.wait(DEADLINE) == 0


def serve(recorder: Recorder, work: Callable[[Server], None]) -> None:
    log = recorder.machine.root / "server.stderr"
    process = recorder.start([*program("server"), "--tcp-port=0"], log)
    try:
        server = Server(process, recorder.machine, log)
        eventually("the server is ready", lambda: "ready on" in server.stderr)
        work(server)
        stop(process, server)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def rotate(server: Server) -> None:
    with server.unix() as wire:
        reply = wire.ask(type="RotateKeyGroup", token=server.machine.admin_token, keyId="default")
        assert reply["status"] == "ok"


def test_what_init_makes_is_private_from_the_start(bare: Machine) -> None:
    recorder = Recorder(bare)
    recorder.run([*program("admin"), "init"])
    born = {name.partition(".tmp-")[0] for name in recorder.born}
    assert born == {"mini-kms", ".api.token", ".admin.token", ".keystore.json", "keystore.json.lock"}
    assert recorder.too_open == []


def test_what_a_server_makes_is_private_from_the_start(recorder: Recorder) -> None:
    recorder.machine.keystore.unlink()
    recorder.run([*program("admin"), "init", "--keystore-only"])
    serve(recorder, rotate)
    assert "kms.sock" in recorder.born
    assert sum(".keystore.json.tmp-" in name for name in recorder.born) == 1, "a save"
    assert sum(".keystore.json.usage.tmp-" in name for name in recorder.born) == 1, "how the keys were used, at the end"
    assert recorder.too_open == []


def test_what_a_migration_makes_is_private_from_the_start(recorder: Recorder) -> None:
    keystore = java_keystore.write([java_keystore.Group("default", 1, [java_keystore.Version(1, "ACTIVE")])], PASSPHRASE)
    recorder.machine.keystore.write_bytes(keystore)
    serve(recorder, rotate)
    assert any(name.startswith(".keystore.json.v2.tmp-") for name in recorder.born)
    assert recorder.too_open == []


def test_what_changing_the_passphrase_makes_is_private_from_the_start(recorder: Recorder) -> None:
    recorder.machine.environment["MINIKMS_NEW_PASSPHRASE"] = secrets.token_urlsafe()
    recorder.run([*program("admin"), "change-passphrase"])
    assert any(".tmp-" in name for name in recorder.born)
    assert recorder.too_open == []


@pytest.mark.parametrize("command", ["encrypt", "encrypt-file", "decrypt", "decrypt-file", "reencrypt"])
def test_what_a_client_writes_is_private_from_the_start(recorder: Recorder, server: Server, command: str) -> None:
    source = recorder.machine.file("plaintext", b"for nobody else")
    for made in ("encrypt", "encrypt-file"):
        assert server.client(made, "--in", str(source), "--out", f"{recorder.machine.root}/{made}d").status == 0
    inputs = {"decrypt": "encryptd", "decrypt-file": "encrypt-filed", "reencrypt": "encrypt-filed"}
    taken = recorder.machine.root / inputs.get(command, "plaintext")
    output = recorder.machine.root / "output"
    key = ["--key", "default"] if command == "reencrypt" else []
    place = ["--unix", str(server.socket)]
    recorder.run([*program("client"), *place, command, "--in", str(taken), "--out", str(output), *key])
    trace = recorder.trace.read_text(encoding="utf-8")
    assert re.search(r"O_TMPFILE[^)]*, 0600\)", trace) or any(name.startswith(".kms-") for name in recorder.born)
    assert recorder.too_open == []
    assert output.stat().st_mode & OTHERS == 0


@pytest.mark.parametrize(
    "carelessness",
    [
        "open({0!r}, 'w').close(); os.chmod({0!r}, 0o600)",
        "os.mkdir({0!r}); os.chmod({0!r}, 0o700)",
        "socket.socket(socket.AF_UNIX).bind({0!r}); os.chmod({0!r}, 0o600)",
        "os.umask(0o177); os.umask(0o022); socket.socket(socket.AF_UNIX).bind({0!r}); os.chmod({0!r}, 0o600)",
        "os.close(os.open({0!r}, os.O_CREAT, 0o600)); os.chmod({0!r}, 0o644); os.chmod({0!r}, 0o600)",
    ],
)
def test_what_was_open_for_an_instant_only_is_caught(recorder: Recorder, carelessness: str) -> None:
    path = str(recorder.machine.root / "made")
    recorder.run([sys.executable, "-c", f"import os, socket\n{carelessness.format(path)}"])
    assert len(recorder.too_open) == 1
    assert Path(path).stat().st_mode & OTHERS == 0, "a look at the end sees nothing wrong"

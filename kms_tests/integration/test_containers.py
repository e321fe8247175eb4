"""What a container does to a server: it is the first process of its namespace, and its files are mounted from elsewhere."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kms_tests.integration.processes import DEADLINE, Machine, Server, eventually

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="namespaces and mounts need root and util-linux"
)
MOUNT_TOLD = "It is a mount point of its own, which nothing can replace: mount its directory instead"


def mounted(source: Path, target: Path) -> Iterator[None]:
    subprocess.run(["mount", "--bind", str(source), str(target)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(target)], check=True, capture_output=True)


@pytest.fixture
def mounted_keystore(machine: Machine) -> Iterator[None]:
    yield from mounted(machine.keystore, machine.keystore)


@pytest.fixture
def mounted_data(machine: Machine) -> Iterator[None]:
    yield from mounted(machine.data, machine.data)


def change_of_keys(server: Server) -> dict[str, object]:
    with server.unix() as wire:
        return wire.ask(type="RotateKeyGroup", token=server.machine.admin_token, keyId="default")


def test_a_data_directory_that_is_mounted_is_one_like_others(machine: Machine, mounted_data: None) -> None:
    server = machine.start()
    assert change_of_keys(server)["status"] == "ok"
    assert server.stop() == 0
    assert machine.start().groups() == {"default": {1: "ENABLED", 2: "ACTIVE"}}


def test_a_keystore_that_is_mounted_by_itself_is_told_and_stays_as_it_is(machine: Machine, mounted_keystore: None) -> None:
    before = machine.keystore.read_bytes()
    server = machine.start()
    for _ in range(2):
        assert change_of_keys(server)["message"] == "the keystore could not be saved; nothing was changed"
    assert MOUNT_TOLD in server.stderr
    with server.unix() as wire:
        assert wire.ask(type="Encrypt", token=machine.api_token, plaintext="")["status"] == "ok"
    assert server.stop() == 0
    assert machine.keystore.read_bytes() == before
    assert not machine.temp_files()


def test_an_output_that_is_mounted_by_itself_is_written_through_a_redirection(machine: Machine) -> None:
    server = machine.start()
    plain, sealed, out = (machine.file(name, b"") for name in ("plain", "sealed", "out"))
    plain.write_bytes(b"hello")
    assert server.client("encrypt-file", "--in", str(plain), "--out", str(sealed)).status == 0
    for _ in mounted(out, out):
        refused = server.client("decrypt-file", "--in", str(sealed), "--out", str(out))
        assert refused.status == 74
        assert "write with --out - > FILE" in refused.stderr
        with out.open("wb") as redirected:
            done = server.client("decrypt-file", "--in", str(sealed), "--out", "-", stdout=redirected)
        assert done.status == 0
    assert out.read_bytes() == b"hello"


def test_a_server_that_is_the_first_process_stops_on_SIGTERM(machine: Machine) -> None:
    log = machine.root / "first.stderr"
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    with log.open("wb") as stderr:
        server = subprocess.Popen(
            [*command, str(Path(machine.path().split(os.pathsep)[0]) / "kms-server"), "--no-tcp"],
            env=machine.environment,
            stdin=subprocess.DEVNULL,
            stderr=stderr,
        )
    try:
        eventually("it is ready", lambda: "ready on" in log.read_text() or server.poll() is not None)
        assert "(pid 1)" in log.read_text()
        assert machine.admin("rotate-key", "--key", "default").status == 0
        (first,) = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        os.kill(int(first), signal.SIGTERM)
        assert server.wait(DEADLINE) == 0
        assert "stopping on SIGTERM" in log.read_text()
    finally:
        server.kill()
        server.wait()

"""The server as a process: what it refuses to start on, how it ends, and what it leaves behind."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kms_tests.integration.processes import DEADLINE, PASSPHRASE, UNPRIVILEGED, Machine, Server, Wire, after, eventually


def test_a_second_server_on_the_same_keystore_is_refused_and_names_the_first(machine: Machine, server: Server) -> None:
    refused = machine.refused_start("--unix-socket", str(machine.data / "second.sock"))
    assert refused.status == 75
    assert str(server.pid) in refused.said_one_line("kms-server")


def test_a_wrong_passphrase_is_refused_and_the_keystore_is_not_touched(machine: Machine) -> None:
    before = machine.keystore.read_bytes()
    refused = machine.refused_start(environment={"MINIKMS_PASSPHRASE": "not this one"})
    assert refused.status == 2
    assert "not this one" not in refused.stderr
    assert machine.keystore.read_bytes() == before


@pytest.mark.parametrize("tampering", ["an extra version", "cut short", "no mac"])
def test_an_altered_keystore_is_refused_and_not_touched(machine: Machine, tampering: str) -> None:
    content = machine.keystore.read_bytes()
    document = json.loads(content)
    if tampering == "an extra version":
        document["generation"] += 1
    elif tampering == "no mac":
        del document["mac"]
    altered = content[: len(content) // 2] if tampering == "cut short" else json.dumps(document).encode()
    machine.keystore.write_bytes(altered)
    refused = machine.refused_start()
    assert refused.status == 65, refused.stderr
    assert machine.keystore.read_bytes() == altered


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_in_flight_finish(machine: Machine, server: Server, number: signal.Signals) -> None:
    count = 40
    with server.unix() as busy, server.tcp() as idle:
        assert idle.ask(type="Health", token=machine.api_token)["status"] == "ok"
        busy.send(*[{"type": "RotateKeyGroup", "token": machine.admin_token, "keyId": "default"}] * count)
        replies = [busy.reply()]
        server.process.send_signal(number)
        replies += [busy.reply() for _ in range(count - 1)]
        assert [reply["keyGroup"]["activeVersion"] for reply in replies] == list(range(2, count + 2))
        assert busy.is_at_end()
        assert idle.is_at_end()
    assert server.process.wait(DEADLINE) == 0
    assert not server.socket.exists()
    assert not machine.temp_files()


def test_the_service_manager_is_told_when_it_is_ready_and_when_it_stops(machine: Machine) -> None:
    path = machine.root / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(DEADLINE)
        server = machine.start(environment={"NOTIFY_SOCKET": str(path)})
        assert manager.recv(100) == b"READY=1"
        assert server.stop() == 0
        assert manager.recv(100) == b"STOPPING=1"


def test_the_unix_socket_and_its_directory_are_private(machine: Machine) -> None:
    server = machine.start("--unix-socket", str(machine.root / "made" / "kms.sock"))
    assert stat.S_IMODE(server.socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(server.socket.parent.stat().st_mode) == 0o700


def test_the_socket_of_a_dead_server_is_replaced(machine: Machine, server: Server) -> None:
    server.kill()
    assert server.socket.exists()
    again = machine.start()
    assert again.groups() == {"default": {1: "ACTIVE"}}


def test_the_socket_of_a_live_server_is_left_alone(machine: Machine, server: Server) -> None:
    other = machine.data / "other.json"
    assert machine.admin("init", "--keystore-only", "--keystore", str(other)).status == 0
    refused = machine.refused_start("--keystore", str(other))
    assert refused.status == 64
    assert str(server.socket) in refused.stderr
    assert server.groups() == {"default": {1: "ACTIVE"}}


def test_a_server_without_a_way_in_is_refused(machine: Machine) -> None:
    refused = machine.refused_start("--no-tcp", "--no-unix")
    assert refused.status == 64
    refused.said_one_line("kms-server")


def test_one_connection_more_than_the_cap_is_closed_at_once(machine: Machine) -> None:
    server = machine.start("--max-connections", "3")
    health = {"type": "Health", "token": machine.api_token}

    def serves() -> bool:
        with server.tcp() as wire:
            try:
                wire.send(health)
            except OSError:
                return False
            return not wire.is_at_end()

    wires = [server.tcp(), server.unix(), server.tcp()]
    try:
        for wire in wires:
            assert wire.ask(**health)["status"] == "ok"
        with server.tcp() as over:
            assert over.is_at_end()
        assert wires[0].ask(**health)["status"] == "ok"
        wires.pop().close()
        eventually("the place that was left is taken", serves)
    finally:
        for wire in wires:
            wire.close()


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_client_that_is_cut_off_in_a_save_does_not_tear_it(machine: Machine, server: Server, reset: bool) -> None:
    rotate = {"type": "RotateKeyGroup", "token": machine.admin_token, "keyId": "default"}
    cut = 8
    for _ in range(cut):
        with Wire(server.port) as wire:
            wire.send(rotate)
            if reset:
                wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with server.unix() as wire:
        acknowledged = wire.ask(**rotate)["keyGroup"]["activeVersion"]
    server.kill()

    versions = machine.start().groups()["default"]
    assert list(versions) == list(range(1, len(versions) + 1))
    assert acknowledged <= len(versions) <= 2 + cut
    assert [number for number, state in versions.items() if state == "ACTIVE"] == [len(versions)]


def test_every_mutation_that_was_answered_is_on_disk_after_sigkill(machine: Machine, server: Server) -> None:
    def rotate(_: int) -> int:
        with server.unix() as wire:
            reply = wire.ask(type="RotateKeyGroup", token=machine.admin_token, keyId="default")
        assert reply["status"] == "ok"
        version = reply["keyGroup"]["activeVersion"]
        assert isinstance(version, int)
        return version

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(rotate, range(20)))
    server.kill()

    assert sorted(answers) == list(range(2, 22))
    versions = machine.start().groups()["default"]
    assert versions == dict.fromkeys(range(1, 21), "ENABLED") | {21: "ACTIVE"}


def test_sigkill_in_the_middle_of_saving_leaves_a_keystore_that_loads(machine: Machine) -> None:
    acknowledged = 1
    for _ in range(3):
        server = machine.start()
        with server.unix() as wire:
            wire.send(*[{"type": "RotateKeyGroup", "token": machine.admin_token, "keyId": "default"}] * 100)
            for _ in range(5):
                acknowledged = wire.reply()["keyGroup"]["activeVersion"]
            server.kill()
    server = machine.start()
    versions = server.groups()["default"]
    assert list(versions) == list(range(1, len(versions) + 1))
    assert len(versions) >= acknowledged
    assert not machine.temp_files()


def test_a_ciphertext_made_before_sigkill_opens_after_it(machine: Machine, server: Server) -> None:
    with server.tcp() as wire:
        assert wire.ask(type="CreateKeyGroup", token=machine.admin_token, keyId="k")["status"] == "ok"
        sealed = wire.ask(type="Encrypt", token=machine.api_token, keyId="k", plaintext="aGVsbG8=")["ciphertext"]
    server.kill()
    with machine.start().tcp() as wire:
        opened = wire.ask(type="Decrypt", token=machine.api_token, ciphertext=sealed)
    assert opened == {"status": "ok", "plaintext": "aGVsbG8="}


def test_no_process_of_the_same_user_can_look_into_the_server(machine: Machine) -> None:
    server = machine.start(prologue=UNPRIVILEGED)
    assert not _can_look_into(server.pid)
    if _yama_forbids_all():
        return
    # The same question about a process like any other, to see that the answer means something.
    with subprocess.Popen(
        after(UNPRIVILEGED, [sys.executable, "-c", "print(flush=True); input()"]),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as ordinary:
        assert ordinary.stdout is not None
        ordinary.stdout.readline()
        assert _can_look_into(ordinary.pid)
        ordinary.communicate(b"\n", timeout=DEADLINE)


def _yama_forbids_all() -> bool:
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    return scope.exists() and scope.read_text(encoding="ascii").strip() != "0"


def _can_look_into(pid: int) -> bool:
    """Whether another process of this user, not its parent, may read its memory."""
    look = f"open('/proc/{pid}/mem', 'rb')"
    process = subprocess.run(
        after(UNPRIVILEGED, [sys.executable, "-c", look]), capture_output=True, check=False, timeout=DEADLINE
    )
    assert process.returncode == 0 or b"PermissionError" in process.stderr
    return process.returncode == 0


def test_the_server_leaves_no_core_file(server: Server) -> None:
    limits = Path(f"/proc/{server.pid}/limits").read_text(encoding="ascii")
    core = next(line for line in limits.splitlines() if line.startswith("Max core file size"))
    assert core.split()[4:6] == ["0", "0"]


def test_no_secret_is_where_others_could_read_it(machine: Machine) -> None:
    api, admin = "api-token-of-this-test", "admin-token-of-this-test"
    server = machine.start(environment={"MINIKMS_API_TOKEN": api, "MINIKMS_ADMIN_TOKEN": admin})
    with server.tcp() as wire:
        assert wire.ask(type="Health", token=api)["status"] == "ok"
        assert wire.ask(type="Health", token=admin)["errorCode"] == "AuthFailed"
        assert wire.ask(type="RotateKeyGroup", token=admin, keyId="default")["status"] == "ok"
        key = wire.ask(type="GenerateDataKey", token=api)
        wire.ask(type="Encrypt", token=api, plaintext="cGxhaW50ZXh0IG9mIHRoaXMgdGVzdA==")
        wire.ask(type="Encrypt", token=api, plaintext="%%% no base64 %%%")
        wire.sock.sendall(b"not JSON at all\n")
        assert wire.reply()["errorCode"] == "InvalidRequest"
    process = Path("/proc") / str(server.pid)
    places = [(process / name).read_bytes() for name in ("cmdline", "environ")] + [server.stderr.encode()]
    secrets = [api, admin, PASSPHRASE, key["plaintextDataKey"], "cGxhaW50ZXh0", "plaintext of", "no base64", "not JSON at"]
    for place in places:
        for secret in secrets:
            assert secret.encode() not in place, secret


def test_standard_error_that_nobody_reads_stops_nobody(machine: Machine) -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    with os.fdopen(reading, "rb"), os.fdopen(writing, "wb") as stderr:
        process = machine.popen("server", "--no-tcp", stderr=stderr, stdout=subprocess.DEVNULL)
        try:
            eventually("the socket is there", machine.socket.exists)
            for _ in range(20):
                with Wire(machine.socket) as stranger:
                    stranger.send(*[{}] * 99)
                    for _reply in range(99):
                        assert stranger.reply()["errorCode"] == "InvalidRequest"
            with Wire(machine.socket) as wire:
                assert wire.ask(type="Health", token=machine.api_token)["status"] == "ok"
            process.terminate()
            assert process.wait(DEADLINE) == 0
        finally:
            process.kill()
            process.communicate()

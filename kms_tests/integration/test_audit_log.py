"""The audit log of real servers: killed, rotated, out of space, put back, and verified with the real command."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kms_tests.integration.processes import Machine, Server, Wire, eventually

TMPFS_BYTES = 256 * 1024
DATA = base64.b64encode(b"x" * 16).decode()


@pytest.fixture
def log(machine: Machine) -> Path:
    return machine.data / "audit.log"


def _start(machine: Machine, log: Path, *flags: str, **options: Any) -> Server:
    return machine.start("--audit-log", str(log), "--no-principals", *flags, **options)


def _encrypt(wire: Wire, machine: Machine, request_id: str) -> dict[str, Any]:
    return wire.ask(type="Encrypt", token=machine.api_token, plaintext=DATA, requestId=request_id)


def _verify(machine: Machine, log: Path, *files: Path) -> dict[str, Any]:
    """The report; its verdict agrees with the exit code."""
    outcome = machine.admin("--json", "verify-audit", "--audit-log", str(log), *map(str, files))
    report: dict[str, Any] = json.loads(outcome.stdout)
    assert outcome.status == (0 if report["authentic"] else 65)
    return report


def _is_authentic(machine: Machine, log: Path, *files: Path) -> bool:
    report = _verify(machine, log, *files)
    assert report["findings"] == []
    return True


def _records(*files: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in files for line in file.read_bytes().splitlines() if line.endswith(b'"}')]


def _rotate(server: Server, log: Path, number: int) -> Path:
    old = log.with_name(f"{log.name}.{number}")
    log.rename(old)
    server.process.send_signal(signal.SIGHUP)
    eventually("the log goes on in a new file", log.exists)
    eventually("its first record is there", lambda: log.stat().st_size > 0)
    return old


def test_a_log_is_verified_beside_its_server_over_rotation_restart_and_a_new_passphrase(
    machine: Machine, log: Path
) -> None:
    server = _start(machine, log)
    with server.unix() as wire:
        assert _encrypt(wire, machine, "a")["status"] == "ok"
        assert _is_authentic(machine, log)
        files = [_rotate(server, log, 2)]
        assert _encrypt(wire, machine, "b")["status"] == "ok"
        assert _is_authentic(machine, log, *files, log)
    assert server.admin("rotate-key", "--key", "default").status == 0
    assert server.stop() == 0
    files.append(log.with_name("audit.log.1"))
    log.rename(files[-1])
    _start(machine, log).stop()
    machine.environment["MINIKMS_NEW_PASSPHRASE"] = "a new one"
    assert machine.admin("change-passphrase").status == 0
    machine.environment["MINIKMS_PASSPHRASE"] = "a new one"
    server = _start(machine, log)
    with server.unix() as wire:
        assert _encrypt(wire, machine, "c")["status"] == "ok"
    assert server.stop() == 0
    assert _is_authentic(machine, log, *files, log)
    records = _records(*files, log)
    assert [one["seq"] for one in records] == list(range(1, len(records) + 1))
    assert [one["requestId"] for one in records if "requestId" in one] == ["a", "b", "c"]
    assert [one["event"] for one in records if "event" in one and one["event"] != "Principals"] == [
        *("Start", "Continue", "Stop", "Start", "Stop", "ChangePassphrase", "Start", "Stop")
    ]
    assert [one["outcome"] for one in records if one.get("operation") == "RotateKeyGroup"] == ["begun", "ok"]


def test_what_was_answered_before_a_kill_is_in_the_log_and_the_next_server_goes_on(machine: Machine, log: Path) -> None:
    answered = []
    for life in range(3):
        server = _start(machine, log)
        with server.unix() as wire:
            for number in range(20):
                answered.append(f"{life}-{number}")
                assert _encrypt(wire, machine, answered[-1])["status"] == "ok"
            server.kill()
    _start(machine, log).stop()
    assert [one["requestId"] for one in _records(log) if "requestId" in one] == answered
    assert _is_authentic(machine, log)


def test_a_torn_line_is_told_and_excused_by_the_next_start(machine: Machine, log: Path) -> None:
    _start(machine, log).kill()
    with log.open("ab") as file:
        file.write(b'{"seq":3,"time":"20')
    report = _verify(machine, log)
    assert report["authentic"]
    assert "the last line is torn: 19 bytes" in report["notes"][0]["what"]
    _start(machine, log).stop()
    assert "follows a write that was cut short: 19 bytes of it are left" in _verify(machine, log)["notes"][0]["what"]
    assert _is_authentic(machine, log)


def test_a_log_that_was_cut_short_is_found_and_no_server_goes_on_with_it(machine: Machine, log: Path) -> None:
    server = _start(machine, log)
    with server.unix() as wire:
        assert _encrypt(wire, machine, "a")["status"] == "ok"
    assert server.stop() == 0
    log.write_bytes(log.read_bytes()[: log.read_bytes().index(b'{"seq":3')])
    (finding,) = _verify(machine, log)["findings"]
    assert finding["what"] == "was cut short: it ends with record 2, and record 4 was in it"
    refused = machine.refused_start("--audit-log", str(log), "--no-principals")
    assert refused.status == 65
    assert "was cut short" in refused.said_one_line("kms-server")


def test_an_older_keystore_is_refused_until_it_is_accepted(machine: Machine, log: Path) -> None:
    old = machine.keystore.read_bytes()
    server = _start(machine, log)
    assert server.admin("rotate-key", "--key", "default").status == 0
    assert server.stop() == 0
    machine.keystore.write_bytes(old)
    assert "is older than the log" in _verify(machine, log)["findings"][0]["what"]
    refused = machine.refused_start("--audit-log", str(log), "--no-principals")
    assert refused.status == 65
    assert "--accept-rollback" in refused.said_one_line("kms-server")
    _start(machine, log, "--accept-rollback").stop()
    assert _is_authentic(machine, log)
    _start(machine, log).stop()
    assert [one.get("acceptedRollback", False) for one in _records(log) if one.get("event") == "Start"] == [
        False,
        True,
        False,
    ]


needs_mount = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")


@pytest.fixture
def small_disk(machine: Machine) -> Iterator[Path]:
    """A disk of its own, of a quarter of a megabyte."""
    path = machine.root / "small"
    path.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES},mode=0700", "none", str(path)]
    subprocess.run(mount, check=True, capture_output=True)
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True, capture_output=True)


def _fill(disk: Path) -> Path:
    """A file that takes all the room there is."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(b"\0" * 4096)
            except OSError:
                return ballast


@needs_mount
def test_on_a_full_disk_nothing_is_answered_that_is_not_in_the_log_until_there_is_room(
    machine: Machine, small_disk: Path
) -> None:
    log = small_disk / "audit.log"
    server = _start(machine, log)
    answered, refused = [], 0
    with server.unix() as wire:
        ballast = _fill(small_disk)
        for round_number in range(2):
            for number in range(200):
                name = f"{round_number}-{number}"
                reply = _encrypt(wire, machine, name)
                if reply["status"] == "ok":
                    answered.append(name)
                else:
                    assert (reply["errorCode"], reply["requestId"]) == ("Unavailable", name)
                    assert "No space left on device" in reply["message"] or "part of a record" in reply["message"]
                    refused += 1
            assert refused >= 100
            assert wire.ask(type="Health", token=machine.api_token)["status"] == "ok"
            rotation = wire.ask(type="RotateKeyGroup", token=machine.admin_token, keyId="default")
            assert rotation["errorCode"] == "Unavailable"
            # Beside a server in trouble, too, the log is what it should be.
            assert _is_authentic(machine, log)
            ballast.unlink()
            eventually("it has recovered", lambda: _encrypt(wire, machine, "probe")["status"] == "ok")
            if not round_number:
                ballast = _fill(small_disk)
                refused = 0
    assert server.groups() == {"default": {1: "ACTIVE"}}
    assert server.stop() == 0
    records = _records(log)
    recorded = [
        one["requestId"] for one in records if one.get("outcome") == "ok" and one.get("requestId", "probe") != "probe"
    ]
    assert recorded == answered
    assert len(answered) >= 2
    unrecorded = [one["unrecorded"] for one in records if one.get("event") == "Recover" and "unrecorded" in one]
    assert sum(unrecorded) >= 200
    assert _is_authentic(machine, log)
    assert not [path for path in small_disk.iterdir() if ".tmp-" in path.name]


@needs_mount
def test_no_server_starts_on_a_full_disk_and_one_does_when_there_is_room(machine: Machine, small_disk: Path) -> None:
    log = small_disk / "audit.log"
    _start(machine, log).stop()
    log.rename(small_disk / "audit.log.1")
    ballast = _fill(small_disk)
    refused = machine.refused_start("--audit-log", str(log), "--no-principals")
    assert refused.status == 74
    assert "No space left on device" in refused.said_one_line("kms-server")
    ballast.unlink()
    _start(machine, log).stop()
    assert _is_authentic(machine, log, small_disk / "audit.log.1", log)


@pytest.mark.skipif(shutil.which("logrotate") is None, reason="logrotate is not installed")
def test_logrotate_rotates_it_as_the_manual_says(machine: Machine, log: Path) -> None:
    manual = (Path(__file__).parents[2] / "docs" / "audit.rst").read_text(encoding="utf-8")
    example = manual.partition("/etc/logrotate.d/mini-kms")[2].partition("::\n\n")[2].partition("\n\n")[0]
    server = _start(machine, log)
    lines = [line.strip() for line in example.splitlines()]
    assert lines[0].endswith("{")
    lines[0] = f"{log} {{"
    user = f"su {os.geteuid()} {os.getegid()}"
    lines = [user if line.startswith("su ") else line for line in lines]
    lines = [f"kill -HUP {server.pid}" if line.startswith("systemctl") else line for line in lines]
    configuration = machine.file("logrotate.conf", "\n".join(lines).encode() + b"\n")
    configuration.chmod(0o600)
    command = [shutil.which("logrotate") or "", "--force", "--state", str(machine.root / "state"), str(configuration)]
    for _ in range(2):
        subprocess.run(command, check=True)
        eventually("the log goes on", lambda: log.exists() and log.stat().st_size > 0)
        time.sleep(1.1)  # a rotated file's name has the second in it
    old = sorted(log.parent.glob("audit.log-*"))
    assert len(old) == 2
    assert server.stop() == 0
    assert _is_authentic(machine, log, *old, log)

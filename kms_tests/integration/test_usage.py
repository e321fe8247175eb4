"""Who still needs a key: what a real server counts and keeps, and how a version is retired with it."""

from __future__ import annotations

import json
import os
import pty
import signal
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from kms_tests.integration.processes import DEADLINE, Machine, Server, eventually, program

TOKEN = "nightly's token, which is long enough to be one"
PRINCIPALS = f"""
[principals.nightly]
token_sha256 = ["{sha256(TOKEN.encode()).hexdigest()}"]
[[principals.nightly.allow]]
groups = ["default"]
operations = ["Encrypt", "Decrypt"]
"""
PLAINTEXT = b64encode(b"x").decode()


@pytest.fixture
def server(machine: Machine) -> Server:
    path = machine.data / "principals.toml"
    path.write_text(PRINCIPALS)
    path.chmod(0o600)
    return machine.start()


def use(server: Server, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    with server.unix() as wire:
        return [wire.ask(**{"token": TOKEN, **request}) for request in requests]


def described(server: Server) -> list[dict[str, Any]]:
    """Each version of the default group with its use."""
    told = server.machine.admin("--json", "--unix", str(server.socket), "describe-key", "--key", "default")
    assert told.status == 0, told.stderr
    versions: list[dict[str, Any]] = json.loads(told.stdout)["keyGroup"]["versions"]
    return versions


def retire_version_1(server: Server) -> str:
    """A rotation; returns a ciphertext that still needs version 1."""
    (reply,) = use(server, {"type": "Encrypt", "plaintext": PLAINTEXT})
    rotated = server.machine.admin("rotate-key", "--key", "default")
    assert rotated.status == 0, rotated.stderr
    return str(reply["ciphertext"])


def test_what_was_counted_survives_a_stop(server: Server) -> None:
    sealed = retire_version_1(server)
    use(server, {"type": "Decrypt", "ciphertext": sealed}, {"type": "Decrypt", "ciphertext": sealed})
    before = described(server)[0]["usage"]
    assert (before["operations"], before["lastUsedBy"]) == ({"Encrypt": 1, "Decrypt": 2}, "nightly")
    assert server.stop() == 0
    assert (server.machine.data / "keystore.json.usage").stat().st_mode & 0o777 == 0o600
    assert described(server.machine.start())[0]["usage"] == before


def test_a_server_that_is_killed_forgets_what_it_had_not_written_and_starts(server: Server) -> None:
    retire_version_1(server)
    server.kill()
    again = server.machine.start()
    assert described(again)[0]["usage"]["operations"] == {}
    assert "usage" not in again.stderr


def test_a_damaged_file_is_a_warning_and_no_obstacle(server: Server) -> None:
    assert server.stop() == 0
    path = server.machine.data / "keystore.json.usage"
    path.write_bytes(path.read_bytes()[:-5])
    again = server.machine.start()
    assert "usage is counted anew" in again.stderr
    retire_version_1(again)
    assert described(again)[0]["usage"]["operations"] == {"Encrypt": 1}


def test_a_program_that_still_needs_a_version_is_found_by_disabling_it_for_a_time(server: Server) -> None:
    sealed = retire_version_1(server)
    waiting = server.machine.popen("admin", "disable-version", "--key", "default", "--version", "1", "--for", "3s")
    with waiting:
        eventually(
            "it is disabled",
            lambda: use(server, {"type": "Decrypt", "ciphertext": sealed})[0].get("errorCode") == "DecryptionFailed",
        )
        stdout, stderr = waiting.communicate(timeout=DEADLINE)
    assert waiting.returncode == 0, stderr
    first, second = stdout.decode().splitlines()
    assert first == "default v1 is ENABLED; refused while it was disabled:"
    assert second.startswith("  nightly: 1 request, last ")
    assert use(server, {"type": "Decrypt", "ciphertext": sealed})[0]["status"] == "ok"
    assert "refused meanwhile: nightly (1 requests)" in server.stderr
    assert described(server)[0]["usage"]["timedDisable"]["refused"]["nightly"]["requests"] == 1
    assert server.stop() == 0
    verified = server.machine.admin("verify-audit")
    assert verified.status == 0, verified.stderr
    on_record = [json.loads(line) for line in (server.machine.data / "audit.log").read_text().splitlines()]
    assert [
        (one["principal"], one["outcome"])
        for one in on_record
        if one.get("operation") in ("DisableVersion", "EnableVersion")
    ] == [("admin", "begun"), ("admin", "ok"), ("(schedule)", "begun"), ("(schedule)", "ok")]


def test_its_end_comes_even_if_the_server_was_killed_meanwhile(server: Server) -> None:
    retire_version_1(server)
    disabled = server.machine.admin("disable-version", "--key", "default", "--version", "1", "--for", "1s", "--no-wait")
    assert (disabled.status, disabled.stdout.decode()) == (0, "default v1 disabled for 1 second\n")
    server.kill()
    again = server.machine.start()
    eventually("it is enabled again", lambda: described(again)[0]["status"] == "ENABLED")


def test_who_stops_waiting_does_not_stop_the_end(server: Server) -> None:
    retire_version_1(server)
    arguments = ("disable-version", "--key", "default", "--version", "1", "--for", "1h")
    with server.machine.popen("admin", *arguments) as waiting:
        eventually("it is disabled", lambda: server.groups()["default"][1] == "DISABLED")
        # It asks for the end that it waits for only after that.
        eventually("it waits", lambda: "operation=DescribeKeyGroup" in server.stderr)
        waiting.send_signal(signal.SIGINT)
        _, stderr = waiting.communicate(timeout=DEADLINE)
    assert waiting.returncode == 130
    assert b"stopped waiting; the server enables default v1 " in stderr
    trial = described(server)[0]["usage"]["timedDisable"]
    assert trial["untilEpochSec"] - trial["sinceEpochSec"] >= 3600
    assert "endedEpochSec" not in trial


def at_a_terminal(machine: Machine, answer: bytes, *arguments: str) -> tuple[int, str]:
    """Run kms-admin with a terminal where somebody types `answer` when asked; its exit status and the screen."""
    child, screen = pty.fork()
    if child == 0:
        os.execvpe(program("admin")[0], [*program("admin"), *arguments], machine.environment)
    seen = b""
    while b"to go on: " not in seen:
        seen += os.read(screen, 4096)
    os.write(screen, answer)
    try:
        while more := os.read(screen, 4096):
            seen += more
    except OSError:
        pass  # EIO: it is gone
    _, status = os.waitpid(child, 0)
    os.close(screen)
    return os.waitstatus_to_exitcode(status), seen.decode()


def test_who_destroys_a_version_is_told_who_used_it_last_and_has_to_type_the_name_of_its_group(server: Server) -> None:
    retire_version_1(server)
    destroy = ("destroy-version", "--key", "default", "--version", "1")
    status, screen = at_a_terminal(server.machine, b"yes\n", *destroy)
    assert status == 130
    assert " by nightly; 1 Encrypt since " in screen.replace("\r\n", "")
    assert "It was not disabled first" in screen
    assert described(server)[0]["status"] == "ENABLED"
    assert at_a_terminal(server.machine, b"default\n", *destroy)[0] == 0
    assert described(server)[0]["status"] == "DESTROYED"
    assert described(server)[0]["usage"]["operations"] == {"Encrypt": 1}, "its figures stay"


def test_usage_is_listed_for_people_and_programs(server: Server, tmp_path: Path) -> None:
    retire_version_1(server)
    listed = server.machine.admin("list-keys", "--usage")
    first, second = listed.stdout.decode().splitlines()
    assert first.split("\t")[6:] == ["nightly", "Encrypt=1"]
    assert second.split("\t")[5:] == ["", "", ""]
    assert len(server.machine.admin("list-keys").stdout.decode().splitlines()[0].split("\t")) == 4

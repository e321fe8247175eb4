"""What a real server writes to standard error, when programs are to read it."""

from __future__ import annotations

import json
import os
import signal
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest

from kms import AsyncKmsClient, InvalidRequestError, KmsClient
from kms.limits import MAX_QUEUED_LINES
from kms_tests.integration.processes import DEADLINE, ROOT, Machine, Server, Wire, eventually


def lines_of(text: str) -> list[dict[str, Any]]:
    """The events of a log of which every line has to be a JSON object."""
    events = [json.loads(line) for line in text.splitlines()]
    assert all(isinstance(event, dict) for event in events), text
    for event in events:
        assert abs(datetime.now(UTC) - datetime.fromisoformat(event["time"])) < timedelta(minutes=1)
        assert {"level", "logger", "message"} < event.keys()
    return events


def reload(server: Server) -> None:
    server.process.send_signal(signal.SIGHUP)


def test_every_line_of_a_servers_life_is_one_JSON_object(machine: Machine) -> None:
    principals = machine.data / "principals.toml"
    principals.write_text("[principals.billing]\nuids = [4242]\n", encoding="ascii")
    principals.chmod(0o600)
    server = machine.start("--log-format", "json")
    hostile = "x\n\x1b[2J\u2028' outcome=ok"
    with server.unix() as wire:
        wire.ask(type="RotateKeyGroup", token=machine.admin_token, keyId="default", requestId="nightly 7")
        wire.ask(type="Encrypt", token="wrong", plaintext="", keyId=hostile)
        wire.ask(type="Encrypt", token=machine.api_token, plaintext="", keyId="x" * 1_000_000)
        wire.ask(type="DisableVersion", token=machine.admin_token, keyId="default", version=2)
        wire.sock.sendall(b"no JSON\n")
        wire.reply()
    reload(server)
    eventually("it has reloaded", lambda: "reloaded: " in server.stderr)
    principals.write_text("[principals.billing]\nlines = [\n", encoding="ascii")
    reload(server)
    eventually("it has refused to", lambda: "not reloaded" in server.stderr)
    assert server.stop() == 0

    events = lines_of(server.stderr)
    said = [event["message"] for event in events if event["logger"] == "kms-server"]
    assert [text.split()[0] for text in said] == ["memory", "principals", "audit", "ready", "stopping"]
    kept = ("request", "principal", "operation", "group", "version", "outcome", "requestId")
    audited = [event for event in events if event["logger"] == "kms.audit"]
    assert [tuple(event.get(name) for name in kept) for event in audited] == [
        (1, "admin", "RotateKeyGroup", "default", None, "ok", "nightly 7"),
        (2, None, "Encrypt", None, None, "AuthFailed", None),
        (3, "api", "Encrypt", audited[2]["group"], None, "InvalidRequest", None),
        (4, "admin", "DisableVersion", "default", 2, "InvalidRequest", None),
        (5, None, None, None, None, "InvalidRequest", None),
    ]
    assert len({event["connection"] for event in audited}) == 1
    page = (ROOT / "docs" / "logs.rst").read_text(encoding="utf-8").splitlines()
    shown = json.loads(next(line for line in page if line.lstrip().startswith('{"time"')))
    assert list(shown) == list(audited[0]), "the page shows another line"
    assert {event["transport"] for event in audited} == {"unix"}
    assert max(map(len, server.stderr.splitlines())) < 5000


def test_what_nobody_read_in_time_is_counted_in_a_line_of_JSON_too(machine: Machine) -> None:
    flags = ("--log-format=json", "--no-tcp", f"--unix-socket={machine.socket}")
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as stderr, os.fdopen(writing, "wb") as theirs:
        process = machine.popen("server", *flags, stderr=theirs)
        theirs.close()
        try:
            eventually("it listens", lambda: machine.socket.exists())
            listed = {"type": "ListKeyGroups", "token": machine.admin_token}
            for _ in range((MAX_QUEUED_LINES + 2_000) // 1_000):
                with Wire(machine.socket) as wire:
                    wire.send(*[listed] * 1_000)
                    assert {wire.reply()["status"] for _ in range(1_000)} == {"ok"}
            lines: list[bytes] = []
            while not lines or b"lines were dropped" not in lines[-1]:
                lines.append(stderr.readline())
            # All that waited, before it has to hurry.
            lines += [stderr.readline() for _ in range(MAX_QUEUED_LINES)]
            process.terminate()
            events = lines_of(b"".join([*lines, *stderr]).decode("ascii"))
            assert process.wait(DEADLINE) == 0
        finally:
            process.kill()
            process.communicate()
    (notice,) = [event for event in events if "lines were dropped" in event["message"]]
    assert (notice["level"], notice["logger"]) == ("WARNING", "kms-server")


def test_the_line_with_which_a_start_fails_is_JSON_too(machine: Machine, server: Server) -> None:
    for flags, environment, status, words in (
        (["--unix-socket", str(machine.data / "second.sock")], {}, 75, str(server.pid)),
        ([], {"MINIKMS_PASSPHRASE": None}, 64, "MINIKMS_PASSPHRASE"),
        (["--max-connections", "x"], {}, 64, "--max-connections"),
    ):
        refused = machine.refused_start(*flags, environment={"MINIKMS_LOG_FORMAT": "json", **environment})
        assert refused.status == status
        (event,) = lines_of(refused.stderr)
        assert (event["level"], event["logger"]) == ("ERROR", "kms-server")
        assert words in event["message"]


def test_a_keystore_that_is_not_there_is_made_by_no_start_that_nobody_watches(machine: Machine) -> None:
    machine.keystore.unlink()
    refused = machine.refused_start("--log-format=json")
    assert refused.status == 66
    (event,) = lines_of(refused.stderr)
    assert event["message"].endswith("For a first start make one: kms-admin init")
    assert not machine.keystore.exists()


async def test_whoever_calls_a_server_can_be_found_in_its_log_by_the_requestId(machine: Machine, server: Server) -> None:
    assert server.client("--request-id", "by hand", "encrypt", "--text=x", "--key=absent").status == 1
    assert server.client_over_tcp("--request-id", "over tcp", "encrypt", "--text=x", "--key=absent").status == 1
    assert server.admin("--request-id", "by an admin", "rotate-key", "--key=default").status == 0
    for connect in (
        partial(KmsClient.connect_unix, server.socket),
        partial(KmsClient.connect_tcp, port=server.port),
    ):
        with connect(token=machine.api_token, request_id="a program") as client, pytest.raises(InvalidRequestError):
            client.encrypt(b"", "absent")
    for connect_async in (
        partial(AsyncKmsClient.connect_unix, server.socket),
        partial(AsyncKmsClient.connect_tcp, port=server.port),
    ):
        async with await connect_async(token=machine.api_token, request_id="a task") as client:
            with pytest.raises(InvalidRequestError):
                await client.encrypt(b"", "absent")
    refused = server.client("--request-id", "x" * 65, "health")
    assert refused.status == 64
    assert "64 printable characters" in refused.said_one_line("kms-client")
    assert server.stop() == 0
    lines = [line.split(" requestId=")[1] for line in server.stderr.splitlines() if "kms.audit" in line]
    assert lines == ["'by hand'", "'over tcp'", "'by an admin'", *["'a program'"] * 2, *["'a task'"] * 2]


def test_the_largest_plaintext_leaves_room_for_the_requestId(machine: Machine, server: Server) -> None:
    name = "\U0001f511" * 64
    large = machine.file("large", b"x" * 786_000)
    out = str(machine.root / "out")
    assert server.client("--request-id", name, "encrypt", "--in", str(large), "--out", out).status == 0
    large.write_bytes(b"x" * 786_200)
    refused = server.client("--request-id", name, "encrypt", "--in", str(large), "--out", out)
    assert (refused.status, "use encrypt-file" in refused.stderr) == (65, True)
    assert server.client("--request-id", name, "decrypt", "--in", out).stdout == b"x" * 786_000


def test_people_get_lines_of_names_and_values(machine: Machine, server: Server) -> None:
    with server.unix() as wire:
        wire.ask(type="RotateKeyGroup", token=machine.admin_token, keyId="default", requestId="nightly 7")
    assert server.stop() == 0
    line = next(line for line in server.stderr.splitlines() if "RotateKeyGroup" in line)
    assert line.endswith(
        " INFO kms.audit: connection=1 request=1 transport=unix principal=admin operation=RotateKeyGroup"
        " group='default' version=- outcome=ok requestId='nightly 7'"
    )

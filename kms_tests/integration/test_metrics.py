"""What Prometheus gets from a real server, and what nobody gets from it."""

from __future__ import annotations

import re
import signal
import socket
import time
import urllib.error
import urllib.request
from collections import Counter
from contextlib import ExitStack, suppress
from itertools import chain
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kms_tests.integration.processes import DEADLINE, Machine, Server, eventually
from kms_tests.secrets.canaries import leaked, text

FRESH = "from kms import limits; limits.EXPOSITION_LIFETIME = 0"
"""Each scrape gets a text of its own."""
TELL = """
import atexit, socket, sys
def loaded():
    extra = sorted({name.partition(".")[0] for name in sys.modules} & {"prometheus_client", "h11"})
    ours = [name for name in sorted(sys.modules) if name.startswith("kms.") and ".metrics" in name]
    print("LOADED", *extra, *ours, file=sys.stderr)
atexit.register(loaded)
def listen(self, *arguments, _listen=socket.socket.listen):
    print("LISTENS", self.getsockname(), file=sys.stderr)
    return _listen(self, *arguments)
socket.socket.listen = listen
"""
"""The server says on what it listens, and in the end which of the modules for metrics it has loaded."""


def url_of(server: Server) -> str:
    found = re.search(r"metrics on (\S+)\n", server.stderr)
    assert found is not None, server.stderr
    return found[1]


def address_of(server: Server) -> tuple[str, int]:
    return "127.0.0.1", int(url_of(server).rpartition(":")[2].removesuffix("/metrics"))


def scrape(server: Server) -> str:
    with urllib.request.urlopen(url_of(server), timeout=DEADLINE) as answer:
        assert answer.headers.get_content_type() == "text/plain"
        return str(answer.read(), "utf-8")


def values(page: str, name: str) -> dict[tuple[str, ...], float]:
    """The samples of this name that are not 0, by the values of their labels in alphabetical order of the labels."""
    samples = chain.from_iterable(family.samples for family in text_string_to_metric_families(page))
    return {
        tuple(value for _, value in sorted(sample.labels.items())): sample.value
        for sample in samples
        if sample.name == name and sample.value
    }


def test_the_counts_are_what_was_asked(machine: Machine) -> None:
    server = machine.start("--metrics-port", "0", "--max-connections", "3", change=FRESH)
    api, admin = machine.api_token, machine.admin_token
    asked: Counter[tuple[str, str, str]] = Counter()
    with server.unix() as wire, server.tcp() as second:

        def ask(kind: str, token: str, plane: str, **fields: object) -> dict[str, object]:
            reply = wire.ask(type=kind, token=token, **fields)
            asked[kind, str(reply.get("errorCode", "ok")), plane] += 1
            return reply

        sealed = ask("Encrypt", api, "data", plaintext="aGk=")["ciphertext"]
        for _ in range(7):
            ask("Decrypt", api, "data", ciphertext=sealed)
        ask("Decrypt", api, "data", ciphertext=sealed, aad="aGk=")
        ask("Encrypt", api, "data", plaintext="not base64")
        ask("Encrypt", "wrong", "data", plaintext="aGk=")
        ask("Health", api, "data")
        for _ in range(3):
            ask("RotateKeyGroup", admin, "control", keyId="default")
        ask("DisableVersion", admin, "control", keyId="default", version=1)
        ask("DestroyVersion", admin, "control", keyId="default", version=2)
        ask("CreateKeyGroup", admin, "control", keyId="default")
        ask("ListKeyGroups", api, "control")
        wire.send(*[{"type": "Health", "token": api}] * 20)
        for _ in range(20):
            assert wire.reply()["status"] == "ok"
        asked["Health", "ok", "data"] += 20
        assert second.ask(type="Health", token=api)["status"] == "ok"
        asked["Health", "ok", "data"] += 1
        with server.tcp() as third:
            assert third.ask(type="Health", token=api)["status"] == "ok"
            asked["Health", "ok", "data"] += 1
            with server.unix() as fourth:
                assert fourth.is_at_end()
        page = scrape(server)
    assert values(page, "minikms_requests_total") == asked
    per_operation: Counter[tuple[str, str]] = Counter()
    for (operation, _, plane), count in asked.items():
        per_operation[operation, plane] += count
    assert values(page, "minikms_request_duration_seconds_count") == per_operation
    assert values(page, "minikms_saves_total") == {("ok",): 5}
    assert values(page, "minikms_save_duration_seconds_count") == {(): 5}
    assert values(page, "minikms_key_groups") == {(): 1}
    states = {("ACTIVE",): 1, ("ENABLED",): 1, ("DISABLED",): 1, ("DESTROYED",): 1}
    assert values(page, "minikms_key_versions") == states
    assert values(page, "minikms_keyring_generation") == {(): 6}
    assert values(page, "minikms_connections_accepted_total") == {("tcp",): 2, ("unix",): 1}
    assert values(page, "minikms_connections_refused_total") == {("unix",): 1}
    status = Path(f"/proc/{server.pid}/status").read_text(encoding="ascii")
    resident = int(status.partition("VmRSS:")[2].split()[0]) * 1024
    assert values(page, "process_resident_memory_bytes")[()] == pytest.approx(resident, rel=0.2)

    # Once they have left.
    deadline = time.monotonic() + DEADLINE
    while values(scrape(server), "minikms_connections_open"):
        assert time.monotonic() < deadline, "connections that were closed are still counted"


@pytest.mark.parametrize("flags", [(), ("--metrics-groups",)])
def test_no_secret_and_no_name_is_shown_but_those_of_groups_when_they_are_asked_for(
    machine: Machine, flags: tuple[str, ...]
) -> None:
    canaries = {name: text(name) for name in ("token", "plaintext", "principal", "group", "request", "invented", "type")}
    principals = machine.data / "principals.toml"
    principals.touch(0o600)
    told = machine.admin("new-token", canaries["principal"])
    token = told.stdout.decode().strip()
    principals.write_text(
        f"[principals.{canaries['principal']}]\n{told.stderr}"
        f'[[principals.{canaries["principal"]}.allow]]\ngroups = ["*"]\noperations = ["*"]\n',
        encoding="ascii",
    )
    server = machine.start("--metrics-port", "0", *flags)
    with server.unix() as wire:
        assert wire.ask(type="CreateKeyGroup", token=token, keyId=canaries["group"])["status"] == "ok"
        fields = {"keyId": canaries["group"], "requestId": canaries["request"]}
        plaintext = "Y2FuYXJ5LXBsYWludGV4dA=="
        sealed = wire.ask(type="Encrypt", token=token, plaintext=plaintext, aad="Y2FuYXJ5LWFhZC1jYW5hcnk=", **fields)
        assert sealed["status"] == "ok"
        wire.ask(type="Encrypt", token=canaries["token"], plaintext=plaintext, **fields)
        wire.ask(type="GenerateDataKey", token=token, keyId=canaries["invented"])
        wire.ask(type="RotateKeyGroup", token=token, keyId=canaries["invented"])
        wire.ask(type=canaries["type"], token=token)
    page = scrape(server)
    secrets = {name: value.encode() for name, value in canaries.items()} | {
        "API token": machine.api_token.encode(),
        "admin token": machine.admin_token.encode(),
        "principal's token": token.encode(),
        "plaintext": b"canary-plaintext",
        "AAD": b"canary-aad-canary",
        "ciphertext": sealed["ciphertext"].encode(),
    }
    named = {("group", "page")} if flags else set()
    assert leaked(secrets, {"page": page.encode()}) == named
    shown = values(page, "minikms_group_requests_total")
    assert shown == ({(canaries["group"], kind): 1 for kind in ("CreateKeyGroup", "Encrypt")} if flags else {})


def test_the_audit_log_is_watched_from_when_there_is_one(machine: Machine) -> None:
    server = machine.start("--metrics-port", "0", change=FRESH)
    assert "minikms_audit" not in scrape(server)
    principals = machine.data / "principals.toml"
    principals.touch(0o600)
    principals.write_text("[shared]\napi_token = true\n")
    server.process.send_signal(signal.SIGHUP)
    eventually("the log is kept", lambda: "minikms_audit_records_total" in scrape(server))
    before = values(scrape(server), "minikms_audit_records_total")[()]
    with server.unix() as wire:
        for _ in range(5):
            assert wire.ask(type="Encrypt", token=machine.api_token, plaintext="aGk=")["status"] == "ok"
    page = scrape(server)
    assert values(page, "minikms_audit_records_total")[()] == before + 5
    assert values(page, "minikms_audit_failing") == {}
    eventually("all is durable", lambda: values(scrape(server), "minikms_audit_unsynced_records") == {})
    assert values(scrape(server), "minikms_audit_unsynced_seconds") == {}
    (machine.data / "audit.log").rename(machine.data / "gone")
    eventually("it fails", lambda: values(scrape(server), "minikms_audit_failing") == {(): 1})
    with server.unix() as wire:
        refused = wire.ask(type="Encrypt", token=machine.api_token, plaintext="aGk=")
    assert refused["errorCode"] == "Unavailable"
    assert values(scrape(server), "minikms_requests_total")["Encrypt", "Unavailable", "data"] == 1


def test_without_the_flag_nothing_more_listens_and_nothing_more_is_imported(machine: Machine) -> None:
    server = machine.start(change=TELL)
    assert server.stop() == 0
    assert server.stderr.count("LISTENS") == 2
    assert "LOADED\n" in server.stderr
    assert "metrics" not in server.stderr

    server = machine.start("--metrics-port", "0", change=TELL)
    scrape(server)
    assert server.stop() == 0
    assert server.stderr.count("LISTENS") == 3
    assert "LOADED h11 prometheus_client kms.server.metrics_listener kms.service.metrics\n" in server.stderr


def test_the_metrics_are_on_loopback_alone(machine: Machine) -> None:
    server = machine.start("--metrics-port", "0", "--no-tcp", tcp_port=None, change=TELL)
    assert re.findall(r"LISTENS \('([^']+)'", server.stderr) == ["127.0.0.1"]


def test_who_sends_slowly_or_takes_all_places_hurts_nobody_who_uses_keys(machine: Machine) -> None:
    hurry = "from kms import limits; limits.SCRAPE_REQUEST_TIMEOUT = 1.5"
    server = machine.start("--metrics-port", "0", change=hurry)
    with ExitStack() as held, server.unix() as wire:
        start = time.monotonic()
        slow = [held.enter_context(socket.create_connection(address_of(server), DEADLINE)) for _ in range(16)]
        for sock in slow:
            sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n")
        assert "minikms_build_info" in scrape(server)
        assert wire.ask(type="Health", token=machine.api_token)["status"] == "ok"
        for sock in slow:
            # Reset, where what it sent was not read any more.
            with suppress(ConnectionResetError):
                assert sock.recv(1) == b""
        assert time.monotonic() - start >= 1.5
        assert values(scrape(server), "minikms_requests_total") == {("Health", "ok", "data"): 1}


def test_a_page_of_another_site_cannot_read_them(machine: Machine) -> None:
    server = machine.start("--metrics-port", "0")
    request = urllib.request.Request(url_of(server), headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=DEADLINE)
    with refused.value as answer:
        assert answer.status == 421
        assert "minikms" not in answer.read().decode()


def test_a_scrape_that_goes_on_does_not_hold_up_the_end(machine: Machine) -> None:
    server = machine.start("--metrics-port", "0")
    with socket.create_connection(address_of(server), DEADLINE) as sock:
        sock.sendall(b"GET /met")
        start = time.monotonic()
        assert server.stop(signal.SIGTERM) == 0
        assert time.monotonic() - start < 4
        assert sock.recv(1) == b""


def test_a_port_that_is_taken_does_not_keep_the_server_from_serving(machine: Machine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = machine.start("--metrics-port", str(taken.getsockname()[1]))
        assert "no metrics: cannot listen on 127.0.0.1:" in server.stderr
        assert server.client("health").stdout == b"ok\n"
        assert server.stop() == 0


@pytest.mark.parametrize("missing", ["prometheus_client", "h11"])
def test_without_the_extra_the_flag_is_refused_with_the_way_to_install_it_before_a_secret_is_asked_for(
    machine: Machine, missing: str
) -> None:
    refused = machine.refused_start(
        "--metrics-port",
        "0",
        change=f"import sys; sys.modules[{missing!r}] = None",
        environment={"MINIKMS_PASSPHRASE": None},
    )
    assert refused.status == 64
    assert "pip install 'mini-kms[metrics]'" in refused.said_one_line("kms-server")

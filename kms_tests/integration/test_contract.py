"""Configuration: each flag over its environment variable over its default."""

from __future__ import annotations

import contextlib
import grp
import os
import shutil
import socket
import stat
import time
from pathlib import Path

import pytest

from kms.limits import IDLE_TIMEOUT
from kms.server.config import ENVIRONMENT, Places, resolve
from kms_tests.integration.processes import PASSPHRASE, Machine


def test_each_default_is_used_when_nothing_is_said(machine: Machine) -> None:
    # Nobody else may answer at the default port, whatever runs on this computer: so it is taken, and the server says so.
    with contextlib.ExitStack() as taken:
        with contextlib.suppress(OSError):
            taken.enter_context(socket.create_server(("127.0.0.1", 9123)))
        refused = machine.refused_start(tcp_port=None)
    assert refused.status == 64
    assert "127.0.0.1:9123" in refused.said_one_line("kms-server")

    server = machine.start("--no-tcp", tcp_port=None)
    assert server.socket == machine.data / "kms.sock"
    with server.unix() as wire:
        assert wire.ask(type="Health", token=machine.api_token) == {"status": "ok", "detail": "ok"}
        assert wire.ask(type="ListKeyGroups", token=machine.admin_token)["status"] == "ok"
        wire.sock.sendall(b"x" * (1048576 + 1))
        assert wire.reply()["errorCode"] == "FrameTooLarge"


def test_the_data_directory_is_in_the_home_directory_without_xdg_data_home(machine: Machine) -> None:
    machine.data.rename(machine.root / ".mini-kms")
    server = machine.start("--no-tcp", tcp_port=None, environment={"XDG_DATA_HOME": None})
    assert server.socket == machine.root / ".mini-kms" / "kms.sock"


def elsewhere(machine: Machine, name: str, token: bytes) -> dict[str, str]:
    """A directory with everything a server needs, none of it at its default place; what names each."""
    place = machine.root / name
    shutil.copytree(machine.data, place / "store")
    secrets = {"api": token + b" api\n", "admin": token + b" admin\n", "passphrase": PASSPHRASE.encode() + b"\n"}
    for secret, content in secrets.items():
        path = place / secret
        path.write_bytes(content)
        path.chmod(0o600)
    principals = place / "principals"
    principals.write_text(f"[principals.me]\nuids = [{os.getuid()}]\n", encoding="ascii")
    principals.chmod(0o600)
    (place / "run").mkdir()
    (place / "run").chmod(0o710)
    os.chown(place / "run", -1, os.getgid())
    return {
        "unix_socket": str(place / "run" / "k.sock"),
        "unix_socket_group": grp.getgrgid(os.getgid()).gr_name,
        "principals": str(principals),
        "keystore": str(place / "store" / "keystore.json"),
        "token_file": str(place / "api"),
        "admin_token_file": str(place / "admin"),
        "passphrase_file": str(place / "passphrase"),
        "tcp_port": "0",
        "max_frame_bytes": "2048",
        "idle_timeout_ms": "600",
        "max_connections": "2",
        "log_format": "json",
        "audit_log": str(place / "store" / "audit.log"),
        "audit_data": "refused",
        "metrics_port": "0",
    }


def observe(machine: Machine, flags: dict[str, str], environment: dict[str, str | None], name: str) -> None:
    """Start a server and see that each setting of `elsewhere(name)` is in force."""
    arguments = [text for flag, value in flags.items() for text in ("--" + flag.replace("_", "-"), value)]
    server = machine.start(*arguments, tcp_port=None, environment=environment)
    place = machine.root / name
    assert server.socket == place / "run" / "k.sock"
    assert stat.S_IMODE(server.socket.stat().st_mode) == 0o660
    with server.unix() as known_by_its_uid:
        assert known_by_its_uid.ask(type="Health")["status"] == "ok"
    assert server.port not in (0, 9123)
    assert "metrics on http://127.0.0.1:" in server.stderr
    assert (place / "store" / "keystore.json.lock").read_text(encoding="ascii").strip() == str(server.pid)
    with server.unix() as wire, server.tcp() as second:
        assert wire.ask(type="Health", token=f"{name} api")["status"] == "ok"
        assert second.ask(type="ListKeyGroups", token=f"{name} admin")["status"] == "ok"
        with server.tcp() as third:
            assert third.is_at_end()
        wire.sock.sendall(b"x" * 2049)
        assert wire.reply()["errorCode"] == "FrameTooLarge"
        start = time.monotonic()
        assert second.is_at_end()
        assert time.monotonic() - start < IDLE_TIMEOUT, "it has the idle time that there is by default"
    assert server.stop() == 0
    on_record = (place / "store" / "audit.log").read_text(encoding="ascii")
    assert '"errorCode":"FrameTooLarge"' in on_record
    assert '"operation":"Health"' not in on_record
    assert all(line.startswith('{"time"') for line in server.stderr.splitlines())


def test_each_variable_of_the_environment_goes_before_its_default(machine: Machine) -> None:
    places = elsewhere(machine, "env", b"env")
    environment: dict[str, str | None] = {ENVIRONMENT[name]: value for name, value in places.items()}
    observe(machine, {}, environment | {"MINIKMS_PASSPHRASE": None}, "env")


def test_each_flag_goes_before_its_variable(machine: Machine) -> None:
    wrong: dict[str, str | None] = dict.fromkeys(ENVIRONMENT.values(), "/absent/not-a-number")
    observe(machine, elsewhere(machine, "flag", b"flag"), wrong | {"MINIKMS_PASSPHRASE": None}, "flag")


def test_a_secret_in_the_environment_goes_before_its_file(machine: Machine) -> None:
    places = elsewhere(machine, "env", b"env")
    (machine.root / "env" / "passphrase").write_bytes(b"a wrong one")
    server = machine.start(
        environment={
            **{ENVIRONMENT[name]: places[name] for name in ("token_file", "admin_token_file", "passphrase_file")},
            "MINIKMS_API_TOKEN": "data",
            "MINIKMS_ADMIN_TOKEN": "control",
        }
    )
    with server.unix() as wire:
        assert wire.ask(type="Health", token="data")["status"] == "ok"
        assert wire.ask(type="ListKeyGroups", token="control")["status"] == "ok"
        assert wire.ask(type="Health", token="env api")["errorCode"] == "AuthFailed"


def test_the_passphrase_may_be_a_credential_of_the_service_manager(machine: Machine) -> None:
    credentials = machine.root / "credentials"
    credentials.mkdir(mode=0o700)
    passphrase = credentials / "passphrase"
    passphrase.write_text(PASSPHRASE, encoding="ascii")
    passphrase.chmod(0o600)
    machine.start(environment={"MINIKMS_PASSPHRASE": None, "CREDENTIALS_DIRECTORY": str(credentials)})


def test_tokens_that_do_not_differ_are_refused(machine: Machine) -> None:
    refused = machine.refused_start(environment={"MINIKMS_API_TOKEN": "same", "MINIKMS_ADMIN_TOKEN": "same"})
    assert refused.status == 64
    refused.said_one_line("kms-server")


def test_a_secret_that_nothing_gives_is_asked_for_and_without_a_terminal_refused(machine: Machine) -> None:
    refused = machine.refused_start(environment={"MINIKMS_PASSPHRASE": None})
    assert refused.status == 64
    assert "MINIKMS_PASSPHRASE" in refused.said_one_line("kms-server")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--tcp-port", "65536"),
        ("--tcp-port", "http"),
        ("--max-frame-bytes", "10"),
        ("--idle-timeout-ms", "0"),
        ("--max-connections", "-1"),
        ("--log-format", "xml"),
        ("--metrics-port", "65536"),
        ("--unix-socket", "/tmp/" + "x" * 103),
    ],
)
def test_a_setting_that_cannot_be_is_refused_and_named(machine: Machine, flag: str, value: str) -> None:
    refused = machine.refused_start(flag, value, tcp_port=None if flag == "--tcp-port" else "0")
    assert refused.status == 64
    assert flag in refused.said_one_line("kms-server")


def test_the_defaults_are_those_of_the_contract() -> None:
    config = resolve({}, {"HOME": "/home/somebody"})
    assert (config.tcp_port, config.max_frame_bytes, config.idle_timeout, config.max_connections) == (
        9123,
        1048576,
        30,
        256,
    )
    assert config.unix_socket == Path("/home/somebody/.mini-kms/kms.sock")
    assert config.keystore == Path("/home/somebody/.mini-kms/keystore.json")
    places = Places({}, {"HOME": "/home/somebody"})
    assert (places.token_file, places.admin_token_file, places.passphrase_file) == (None, None, None)

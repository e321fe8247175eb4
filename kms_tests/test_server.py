"""`kms-server` up to the point where the daemon takes over."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from kms.cli import prompt
from kms.cli.server import main
from kms.core.secret import Secret
from kms.errors import KeystoreLockedError
from kms.server import daemon
from kms.storage.lock import KeystoreLock

API, ADMIN = "an API token of some length", "an admin token of some length"


@pytest.fixture(autouse=True)
def environment(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MINIKMS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_DATA_HOME", str(data))
    monkeypatch.setattr(prompt, "TERMINAL", str(data / "no-tty"))
    for name, value in (("PASSPHRASE", "hunter2"), ("API_TOKEN", API), ("ADMIN_TOKEN", ADMIN)):
        monkeypatch.setenv(f"MINIKMS_{name}", value)
    (data / "mini-kms").mkdir(mode=0o700)
    for keystore in (data / "mini-kms" / "keystore.json", data / "ks.json"):
        keystore.touch(0o600)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the daemon was started with; it answers the status 7."""
    started: list[Any] = []

    def run(config: Any, *secrets: Secret, **more: Any) -> int:
        started.append(config)
        for secret in secrets:
            with secret.view() as view:
                started.append(bytes(view))
        started.append(signal.getsignal(signal.SIGTERM))
        more["say"]("ready on\nsomething")
        return 7

    monkeypatch.setattr(daemon, "run", run)
    return started


def test_the_daemon_gets_configuration_and_secrets_and_gives_the_status(
    started: list[Any], data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert main(["--tcp-port", "0", "--no-unix", "--keystore", str(data / "ks.json")]) == 7
    config, *rest = started
    assert (config.tcp_port, config.unix_socket, config.keystore) == (0, None, data / "ks.json")
    *secrets, handler = rest
    assert secrets == [b"hunter2", API.encode(), ADMIN.encode()]
    assert handler is before
    assert "kms-server: ready on\\nsomething\n" in capfd.readouterr().err


def test_flags_win_over_the_environment(started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIKMS_TCP_PORT", "1")
    monkeypatch.setenv("MINIKMS_MAX_CONNECTIONS", "5")
    assert main(["--tcp-port", "2"]) == 7
    assert (started[0].tcp_port, started[0].max_connections) == (2, 5)


@pytest.mark.parametrize("flags", [["--no-tcp", "--no-unix"], ["--tcp-port", "x"], ["--max-frame-bytes", "1"], ["extra"]])
def test_a_bad_configuration_is_one_line_and_64(
    flags: list[str], started: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 64
    assert capsys.readouterr().err.count("\n") == 1
    assert started == []


def test_equal_tokens_are_refused(
    started: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINIKMS_ADMIN_TOKEN", API)
    assert main([]) == 64
    assert "the same" in capsys.readouterr().err
    assert started == []


@pytest.mark.parametrize("exists", [True, False])
def test_the_passphrase_is_typed_twice_on_the_first_run_only(
    exists: bool, started: list[Any], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exists:
        (data / "ks.json").unlink()
    monkeypatch.delenv("MINIKMS_PASSPHRASE")
    asked: list[str] = []

    def typed(name: str, _remedy: str) -> tuple[bytearray, int]:
        asked.append(name)
        return bytearray(b"correct horse\n"), 14

    monkeypatch.setattr(prompt, "_typed", typed)
    assert main(["--tcp-port", "0", "--keystore", str(data / "ks.json")]) == 7
    assert asked == (["passphrase"] if exists else ["passphrase", "passphrase again"])


@pytest.mark.parametrize("how", ["environment", "file", "credential"])
def test_a_start_that_nobody_watches_makes_no_keystore(
    how: str, started: list[Any], data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "ks.json").unlink()
    if how != "environment":
        monkeypatch.delenv("MINIKMS_PASSPHRASE")
        (data / "passphrase").write_text("hunter2")
        (data / "passphrase").chmod(0o600)
        variable = "CREDENTIALS_DIRECTORY" if how == "credential" else "MINIKMS_PASSPHRASE_FILE"
        monkeypatch.setenv(variable, str(data if how == "credential" else data / "passphrase"))
    assert main(["--keystore", str(data / "ks.json")]) == 66
    assert "Is its disk mounted? For a first start make one: kms-admin init" in capsys.readouterr().err
    assert started == []
    assert not (data / "ks.json").exists()


def test_a_first_run_where_there_was_a_keystore_makes_none_either(
    started: list[Any], data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MINIKMS_PASSPHRASE")
    (data / "ks.json").unlink()
    (data / "ks.json.usage").touch()
    assert main(["--keystore", str(data / "ks.json")]) == 66
    assert "ks.json.usage is left of it" in capsys.readouterr().err
    assert started == []


def test_a_first_run_makes_the_tokens_that_nothing_gives_and_says_where(
    started: list[Any], data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (data / "ks.json").unlink()
    for name in ("PASSPHRASE", "API_TOKEN", "ADMIN_TOKEN"):
        monkeypatch.delenv(f"MINIKMS_{name}")
    monkeypatch.setattr(prompt, "_can_ask", lambda: True)
    monkeypatch.setattr(prompt, "_typed", lambda *_: (bytearray(b"correct horse battery\n"), 22))
    assert main(["--tcp-port", "0", "--keystore", str(data / "ks.json")]) == 7
    said = capfd.readouterr().err
    for token, name, article in zip(started[2:4], ("api.token", "admin.token"), ("API", "admin"), strict=True):
        path = data / "mini-kms" / name
        assert path.read_bytes() == token + b"\n"
        assert path.stat().st_mode & 0o777 == 0o600
        assert f"made an {article} token in {path}" in said


def test_a_token_that_has_to_be_typed_is_explained_and_a_short_one_told(
    started: list[Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MINIKMS_API_TOKEN")
    monkeypatch.setattr(prompt, "_can_ask", lambda: True)
    monkeypatch.setattr(prompt, "_typed", lambda *_: (bytearray(b"short\n"), 6))
    assert main(["--tcp-port", "0"]) == 7
    assert started[2] == b"short"
    said = capfd.readouterr().err
    assert "api.token: type the one that clients are to show. It is not kept" in said
    assert "the API token is short" in said


@pytest.mark.parametrize("taken", ["port", "keystore"])
def test_where_another_server_runs_nobody_is_asked_for_a_secret(
    taken: str, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MINIKMS_PASSPHRASE")

    def typed(*_: object) -> tuple[bytearray, int]:
        raise AssertionError("nobody is to be asked")

    monkeypatch.setattr(prompt, "_can_ask", lambda: True)
    monkeypatch.setattr(prompt, "_typed", typed)
    with socket.socket() as other, contextlib.ExitStack() as held:
        other.bind(("127.0.0.1", 0))
        port = 0
        if taken == "port":
            other.listen()
            port = other.getsockname()[1]
        else:
            held.enter_context(KeystoreLock(data / "ks.json"))
        assert main(["--tcp-port", str(port), "--keystore", str(data / "ks.json")]) in (64, 75)
    assert ("cannot listen" if taken == "port" else "is in use by process") in capsys.readouterr().err


def test_tokens_come_from_files(started: list[Any], data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINIKMS_API_TOKEN")
    (data / "token").write_text("from-file\n")
    (data / "token").chmod(0o600)
    assert main(["--token-file", str(data / "token")]) == 7
    assert started[2] == b"from-file"


def test_a_missing_secret_without_a_terminal_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MINIKMS_ADMIN_TOKEN")
    assert main(["--tcp-port", "0"]) == 64
    assert "set MINIKMS_ADMIN_TOKEN, or name a file with --admin-token-file" in capsys.readouterr().err


def test_a_daemon_that_cannot_start_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: object, **__: object) -> int:
        raise KeystoreLockedError("the keystore is in use by process 1; stop it first")

    monkeypatch.setattr(daemon, "run", run)
    assert main([]) == 75
    assert capsys.readouterr().err == "kms-server: error: the keystore is in use by process 1; stop it first\n"


def test_once_JSON_is_asked_for_an_error_is_JSON_and_a_flag_that_is_none_is_for_people(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINIKMS_LOG_FORMAT", "json")
    assert main(["--tcp-port", "x"]) == 64
    event = json.loads(capsys.readouterr().err)
    assert (event["level"], event["logger"]) == ("ERROR", "kms-server")
    assert event["message"].startswith("--tcp-port: ")
    assert main(["--no-such-flag"]) == 64
    assert capsys.readouterr().err.startswith("kms-server: error: ")


def test_what_the_daemon_says_is_JSON_when_that_is_asked_for(started: list[Any], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--log-format", "json"]) == 7
    event = json.loads(capfd.readouterr().err)
    assert (event["level"], event["logger"], event["message"]) == ("INFO", "kms-server", "ready on\nsomething")


def test_help_names_flags_and_environment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for word in ("--idle-timeout-ms", "MINIKMS_IDLE_TIMEOUT_MS", "MINIKMS_PASSPHRASE", "Examples:"):
        assert word in shown

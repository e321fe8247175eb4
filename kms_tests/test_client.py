"""`kms-client`, in process against a client that needs no server; and every exit status that the pages list."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import click
import pytest

from kms import errors
from kms.cli import prompt
from kms.cli.client import main
from kms.cli.signals import stop_signals_raise
from kms.client import blocking, files
from kms.client.environment import find_server
from kms.client.protocol import DataKey, WrappedDataKey
from kms.errors import ConfigError
from kms.limits import MAX_FRAME_BYTES

SEALED = b"\x02sealed:"


class FakeClient:
    """Answers like a server whose encryption is a prefix. `failure` is raised instead of an answer."""

    failure: BaseException | None = None
    addresses: list[Any]
    tokens: list[bytes]
    request_ids: list[str | None]
    server_users: list[str | None]

    @classmethod
    def connect_unix(cls, path: Path, *, token: Any, request_id: str | None, server_user: str | None) -> Self:
        cls.server_users.append(server_user)
        return cls._connect(path, token, request_id)

    @classmethod
    def connect_tcp(cls, host: str, port: int, *, token: Any, request_id: str | None, server_user: str | None) -> Self:
        cls.server_users.append(server_user)
        return cls._connect((host, port), token, request_id)

    @classmethod
    def _connect(cls, address: Any, token: Any, request_id: str | None) -> Self:
        cls.addresses.append(address)
        cls.request_ids.append(request_id)
        with token.view() as view:
            cls.tokens.append(bytes(view))
        return cls()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def health(self) -> str:
        if self.failure is not None:
            raise self.failure
        return "ok"

    def generate_data_key(
        self, key_id: str | None = None, aad: bytes = b"", *, length: int | None = None, also_key_ids: Sequence[str] = ()
    ) -> DataKey:
        also = tuple(SEALED + name.encode() for name in also_key_ids)
        return DataKey(b"k" * (length or 32), SEALED + aad + (key_id or "default").encode(), also)

    def generate_data_key_without_plaintext(
        self, key_id: str | None = None, aad: bytes = b"", *, length: int | None = None, also_key_ids: Sequence[str] = ()
    ) -> WrappedDataKey:
        return WrappedDataKey(SEALED + aad, tuple(SEALED + name.encode() for name in also_key_ids))

    def generate_random(self, length: int) -> bytes:
        return b"r" * length

    def encrypt(self, plaintext: bytes, key_id: str | None = None, aad: bytes = b"") -> bytes:
        return SEALED + plaintext

    def decrypt(self, ciphertext: bytes, aad: bytes = b"", *, source_key_id: str | None = None) -> bytes:
        return ciphertext.removeprefix(SEALED)


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch, data: Path) -> type[FakeClient]:
    fake = type("Fake", (FakeClient,), {"addresses": [], "tokens": [], "request_ids": [], "server_users": []})
    monkeypatch.setattr(blocking, "KmsClient", fake)
    for name in [name for name in os.environ if name.startswith("MINIKMS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_DATA_HOME", str(data))
    monkeypatch.setattr(prompt, "TERMINAL", str(data / "no-tty"))
    home = data / "mini-kms"
    home.mkdir(mode=0o700)
    (home / "api.token").write_bytes(b"the-token\n")
    (home / "api.token").chmod(0o600)
    return fake


def fail_with(fake: type[FakeClient], failure: BaseException) -> int:
    fake.failure = failure
    return main(["health"])


def type_in(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error."""
    seen = capsys.readouterr()
    assert seen.err.count("\n") == 1
    assert seen.err.startswith("kms-client: error: ")
    assert "Traceback" not in seen.err
    return seen.err


def test_a_requestId_goes_with_what_is_asked(fake: type[FakeClient]) -> None:
    assert main(["health"]) == 0
    assert main(["--request-id", "nightly 7", "--tcp", "127.0.0.1:1", "health"]) == 0
    assert fake.request_ids == [None, "nightly 7"]


# The exit statuses, row by row.


def test_0_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health"]) == 0
    assert capsys.readouterr() == ("ok\n", "")


def test_1_the_server_refused_the_operation(fake: type[FakeClient], capsys: pytest.CaptureFixture[str]) -> None:
    assert fail_with(fake, errors.InvalidRequestError("requestId: no")) == 1
    assert "--request-id: no" in error_line(capsys)


@pytest.mark.parametrize(
    ("more", "checked"), [([], False), (["--from-key", "billing"], True)], ids=["any key", "from one key group"]
)
def test_what_does_not_open_says_what_to_look_at(
    more: list[str], checked: bool, fake: type[FakeClient], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> bytes:
        raise errors.DecryptionFailedError

    fake.decrypt = fail  # type: ignore[method-assign]
    (data / "in").write_bytes(bytes([2, 1]))
    assert main(["decrypt", "--in", str(data / "in"), *more]) == 1
    line = error_line(capsys)
    assert "decryption failed; check that --aad is what it was encrypted with" in line
    assert "enabled and was not destroyed" in line
    assert ("--from-key" in line) is checked


def test_2_wrong_passphrase(fake: type[FakeClient], capsys: pytest.CaptureFixture[str]) -> None:
    assert fail_with(fake, errors.WrongPassphraseError("wrong passphrase")) == 2
    assert "wrong passphrase" in error_line(capsys)


@pytest.mark.parametrize("arguments", [[], ["bogus"], ["health", "--bogus"], ["encrypt-file"], ["--tcp", "x", "health"]])
def test_64_bad_usage_or_configuration(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 64
    line = error_line(capsys)
    assert "--help" in line or "--tcp" in line


def test_65_input_is_not_what_it_should_be(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "in").write_bytes(b"no ciphertext")
    assert main(["decrypt", "--in", str(data / "in")]) == 65
    assert "neither a ciphertext nor the base64" in error_line(capsys)


def test_66_an_input_file_does_not_exist(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encrypt", "--in", str(data / "missing")]) == 66
    assert str(data / "missing") in error_line(capsys)


def test_66_a_token_file_that_is_named_must_exist(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--token-file", str(data / "missing"), "health"]) == 66
    assert str(data / "missing") in error_line(capsys)


def test_69_server_not_reachable(fake: type[FakeClient], capsys: pytest.CaptureFixture[str]) -> None:
    assert fail_with(fake, errors.ServerUnreachableError("no server answers; is kms-server running?")) == 69
    assert "is kms-server running?" in error_line(capsys)


def test_70_internal_error_tells_its_kind_and_place_but_not_its_text(
    fake: type[FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail_with(fake, ValueError("hunter2")) == 70
    line = error_line(capsys)
    assert "ValueError at " in line
    assert "hunter2" not in line


def test_74_io_error(fake: type[FakeClient], capsys: pytest.CaptureFixture[str]) -> None:
    assert fail_with(fake, OSError(28, "No space left on device")) == 74
    assert "No space left on device" in error_line(capsys)


def test_74_an_output_that_cannot_be_written(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encrypt", "--text", "x", "--out", str(data / "no" / "out")]) == 74
    assert "cannot write" in error_line(capsys)


def test_75_keystore_is_locked_by_another_process(fake: type[FakeClient], capsys: pytest.CaptureFixture[str]) -> None:
    assert fail_with(fake, errors.KeystoreLockedError("in use by process 1")) == 75
    assert "process 1" in error_line(capsys)


def test_77_authentication_refused(fake: type[FakeClient], capsys: pytest.CaptureFixture[str]) -> None:
    assert fail_with(fake, errors.AuthFailedError("invalid API token")) == 77
    assert "mini-kms/api.token); kms-client shows the server's API token or a principal's, kms-admin" in error_line(capsys)


@pytest.mark.parametrize(
    ("flags", "variable", "origin"),
    [(["--token-file", "FILE"], "other", "FILE"), ([], "value", "MINIKMS_API_TOKEN")],
    ids=["a file that is named", "a variable"],
)
def test_of_a_wrong_token_it_is_told_where_it_is_from(
    flags: list[str],
    variable: str,
    origin: str,
    fake: type[FakeClient],
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MINIKMS_API_TOKEN", variable)
    token = data / "elsewhere"
    token.write_text("x" * 40)
    token.chmod(0o600)
    fake.failure = errors.AuthFailedError("invalid API token")
    assert main([*(str(token) if flag == "FILE" else flag for flag in flags), "health"]) == 77
    assert f"invalid API token (from {str(token) if origin == 'FILE' else origin});" in error_line(capsys)


def test_77_a_token_file_that_others_may_read_names_the_chmod(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token = data / "mini-kms" / "api.token"
    token.chmod(0o644)
    assert main(["health"]) == 77
    assert f"chmod 600 {token}" in error_line(capsys)


@pytest.mark.parametrize(("end", "word"), [(KeyboardInterrupt(), "interrupted"), (click.Abort(), "aborted")])
def test_130_interrupted(fake: type[FakeClient], end: BaseException, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fail_with(fake, end) == 130
    assert word in error_line(capsys)


def test_a_broken_pipe_is_quiet(fake: type[FakeClient], capsys: pytest.CaptureFixture[str]) -> None:
    assert fail_with(fake, BrokenPipeError(32, "Broken pipe")) == 141
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stop_signal_unwinds_the_stack(
    number: signal.Signals, fake: type[FakeClient], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unwound: list[str] = []
    before = signal.getsignal(number)

    def health(_self: FakeClient) -> str:
        try:
            signal.raise_signal(number)
        finally:
            unwound.append("yes")
        return "not reached"

    monkeypatch.setattr(fake, "health", health)
    assert main(["health"]) == 128 + number
    assert f"stopped by {number.name}" in error_line(capsys)
    assert unwound == ["yes"]
    assert signal.getsignal(number) is before


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals_raise():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_message_from_outside_cannot_add_a_line(fake: type[FakeClient], capsys: pytest.CaptureFixture[str]) -> None:
    assert fail_with(fake, errors.InvalidRequestError("odd\nname\x1b[2J")) == 1
    assert "odd\\nname\\x1b[2J" in error_line(capsys)


def test_the_rest_of_an_unquoted_text_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encrypt", "--text", "my", "hunter2"]) == 64
    assert "hunter2" not in error_line(capsys)


# The commands.


def test_health_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "health"]) == 0
    assert json.loads(capsys.readouterr().out) == {"detail": "ok"}


def test_a_data_key_is_printed_in_both_forms(capsys: pytest.CaptureFixture[str]) -> None:
    wrapped = base64.b64encode(SEALED + b"ctxbilling").decode()
    assert main(["generate-data-key", "--key", "billing", "--aad", "ctx"]) == 0
    plain = base64.b64encode(b"k" * 32).decode()
    assert capsys.readouterr().out == f"plaintextDataKey: {plain}\nwrappedDataKey: {wrapped}\n"
    assert main(["--json", "generate-data-key", "--key", "billing", "--aad", "ctx"]) == 0
    assert json.loads(capsys.readouterr().out) == {"plaintextDataKey": plain, "wrappedDataKey": wrapped}


def test_encrypt_prints_base64_that_decrypt_accepts(
    monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert main(["encrypt", "--text", "päss", "--out", "-"]) == 0
    printed = capsysbinary.readouterr().out
    assert base64.b64decode(printed) == SEALED + "päss".encode()
    type_in(monkeypatch, printed)
    assert main(["decrypt", "--in", "-"]) == 0
    assert capsysbinary.readouterr().out == "päss".encode()


def test_encrypt_and_decrypt_as_json(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "encrypt", "--text", "x"]) == 0
    ciphertext = json.loads(capsys.readouterr().out)["ciphertext"]
    (data / "in").write_text(ciphertext)
    assert main(["--json", "decrypt", "--in", str(data / "in")]) == 0
    assert json.loads(capsys.readouterr().out) == {"plaintext": base64.b64encode(b"x").decode()}


def test_encrypt_writes_raw_bytes_into_a_private_file_that_decrypt_accepts(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "in").write_bytes(b"\x00\xff")
    assert main(["encrypt", "--in", str(data / "in"), "--out", str(data / "out")]) == 0
    assert (data / "out").read_bytes() == SEALED + b"\x00\xff"
    assert (data / "out").stat().st_mode & 0o777 == 0o600
    assert main(["--json", "decrypt", "--in", str(data / "out"), "--out", str(data / "back")]) == 0
    assert (data / "back").read_bytes() == b"\x00\xff"
    assert json.loads(capsys.readouterr().out) == {"out": str(data / "back")}


def test_an_output_goes_into_a_pipe_and_never_in_its_place(data: Path) -> None:
    os.mkfifo(data / "pipe")
    # Open for reading, too: there is a reader then, and nobody waits for one.
    reader = os.open(data / "pipe", os.O_RDWR | os.O_NONBLOCK)
    assert main(["encrypt", "--text", "x", "--out", str(data / "pipe")]) == 0
    assert os.read(reader, 100) == SEALED + b"x"
    os.close(reader)
    assert (data / "pipe").is_fifo()


@pytest.mark.parametrize("choice", [[], ["--in", "-", "--text", "x"]])
def test_encrypt_takes_exactly_one_of_in_and_text(choice: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encrypt", *choice]) == 64
    assert "exactly one of --in and --text" in error_line(capsys)


def test_an_input_too_large_for_a_request_is_sent_to_encrypt_file(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "in").write_bytes(bytes(MAX_FRAME_BYTES // 4 * 3))
    assert main(["encrypt", "--in", str(data / "in")]) == 65
    assert "use encrypt-file" in error_line(capsys)
    assert main(["encrypt", "--text", "x" * MAX_FRAME_BYTES]) == 65
    assert "use encrypt-file" in error_line(capsys)


def test_a_container_is_sent_to_decrypt_file(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "in").write_bytes(b"MKE1....")
    assert main(["decrypt", "--in", str(data / "in")]) == 65
    assert "use decrypt-file" in error_line(capsys)


def test_a_directory_is_no_input(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encrypt", "--in", str(data)]) == 65
    assert "is a directory" in error_line(capsys)


def test_an_input_that_cannot_be_read(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "loop").symlink_to(data / "loop")
    assert main(["encrypt", "--in", str(data / "loop")]) == 74
    assert "cannot read" in error_line(capsys)


def test_the_base64_of_something_else_is_no_ciphertext(data: Path) -> None:
    (data / "in").write_bytes(base64.b64encode(b"\x01odd"))
    assert main(["decrypt", "--in", str(data / "in")]) == 65


def test_bad_base64_is_no_ciphertext(data: Path) -> None:
    (data / "in").write_bytes(b"Ag=")
    assert main(["decrypt", "--in", str(data / "in")]) == 65


def test_text_that_is_not_utf_8_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encrypt", "--text", "x", "--aad", "\udcff"]) == 64
    assert "--aad: not UTF-8" in error_line(capsys)


@pytest.mark.parametrize(
    ("command", "function", "more"),
    [
        ("encrypt-file", "encrypt_file", ["--key", "billing"]),
        ("decrypt-file", "decrypt_file", ["--from-key", "payroll"]),
        ("reencrypt", "reencrypt_file", ["--key", "billing", "--from-key", "payroll"]),
    ],
)
def test_file_commands_hand_paths_and_streams_on(
    command: str,
    function: str,
    more: list[str],
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls: list[tuple[Any, Any, dict[str, Any]]] = []
    monkeypatch.setattr(files, function, lambda _client, source, target, **named: calls.append((source, target, named)))
    keys = {"--key": "key_id", "--from-key": "source_key_id"}
    named = {
        "aad": b"ctx",
        "progress": None,
        **{keys[option]: name for option, name in zip(more[::2], more[1::2], strict=True)},
        **({"file_format": "mke2", "also_key_ids": ()} if command == "encrypt-file" else {}),
    }
    assert main([command, "--in", "-", "--out", "-", "--aad", "ctx", *more]) == 0
    assert calls.pop() == (None, None, named)
    out = str(data / "out")
    assert main(["--json", command, "--in", "./-", "--out", out, "--aad", "ctx", *more]) == 0
    assert calls.pop() == (Path("-"), Path(out), named)
    assert json.loads(capsys.readouterr().out) == {"out": out}
    assert main(["--json", command, "--in", "-", "--out", "-", *more]) == 64


# Where the server is.


def test_the_unix_socket_is_the_default_when_it_exists(fake: type[FakeClient], data: Path) -> None:
    (data / "mini-kms" / "kms.sock").touch()
    assert main(["health"]) == 0
    assert fake.addresses == [data / "mini-kms" / "kms.sock"]
    assert fake.tokens == [b"the-token"]


def test_the_unix_socket_is_the_default_when_it_does_not_exist_too(fake: type[FakeClient], data: Path) -> None:
    assert main(["health"]) == 0
    assert fake.addresses == [data / "mini-kms" / "kms.sock"]


def test_a_unix_socket_that_is_named_is_the_only_one_tried(fake: type[FakeClient], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIKMS_UNIX_SOCKET", "/nowhere/kms.sock")
    monkeypatch.setenv("MINIKMS_TCP_PORT", "7")
    assert main(["health"]) == 0
    assert fake.addresses == [Path("/nowhere/kms.sock")]


def test_who_may_be_the_server_comes_from_the_flag_and_then_from_the_environment(
    fake: type[FakeClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIKMS_SERVER_USER", "kms")
    assert main(["--tcp", "127.0.0.1:9", "health"]) == 0
    assert main(["--server-user", "any", "health"]) == 0
    monkeypatch.delenv("MINIKMS_SERVER_USER")
    assert main(["health"]) == 0
    assert fake.server_users == ["kms", "any", None]


def test_it_is_the_port_of_the_environment_on_loopback_where_that_is_told(
    fake: type[FakeClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIKMS_TCP_PORT", "7")
    assert main(["health"]) == 0
    monkeypatch.setenv("MINIKMS_TCP_PORT", "seven")
    assert main(["health"]) == 64
    assert fake.addresses == [("127.0.0.1", 7)]


@pytest.mark.parametrize(
    ("text", "address"),
    [("127.0.0.1:9", ("127.0.0.1", 9)), ("[::1]:9", ("::1", 9)), ("localhost:9", ("127.0.0.1", 9))],
)
def test_a_tcp_address_is_a_loopback_one(text: str, address: tuple[str, int], fake: type[FakeClient]) -> None:
    assert main(["--tcp", text, "health"]) == 0
    assert fake.addresses == [address]


@pytest.mark.parametrize("text", ["10.0.0.1:9", "example.org:9", "127.0.0.1", ":9", "127.0.0.1:0", "127.0.0.1:x"])
def test_any_other_tcp_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--tcp"):
        find_server(text, None, {})


def test_tcp_and_unix_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tcp", "127.0.0.1:9", "--unix", "/x", "health"]) == 64
    assert "exclude each other" in error_line(capsys)


def test_the_token_of_the_environment_wins(fake: type[FakeClient], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIKMS_API_TOKEN", "from-environment")
    assert main(["--unix", "/x", "health"]) == 0
    assert (fake.addresses, fake.tokens) == ([Path("/x")], [b"from-environment"])


def test_an_explicit_flag_wins_over_the_token_of_the_environment(
    fake: type[FakeClient], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIKMS_API_TOKEN", "from-environment")
    monkeypatch.setenv("MINIKMS_NO_TOKEN", "1")
    assert main(["--token-file", str(data / "mini-kms" / "api.token"), "health"]) == 0
    assert fake.tokens == [b"the-token"]


def test_who_has_no_token_is_known_by_the_user_id_over_a_unix_socket(fake: type[FakeClient], data: Path) -> None:
    (data / "mini-kms" / "api.token").unlink()
    assert main(["health"]) == 0
    assert fake.tokens == [b""]
    assert main(["--tcp", "127.0.0.1:1", "health"]) == 64, "and asked for it over TCP, where there is no terminal here"


def test_so_is_who_says_so_in_the_environment(
    fake: type[FakeClient], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINIKMS_NO_TOKEN", "1")
    monkeypatch.setenv("MINIKMS_API_TOKEN", "from-environment")
    assert main(["health"]) == 0
    assert fake.tokens == [b""]
    monkeypatch.setenv("MINIKMS_NO_TOKEN", "perhaps")
    assert main(["health"]) == 64
    assert "MINIKMS_NO_TOKEN: give 1 or 0" in error_line(capsys)


def test_a_user_id_that_the_server_does_not_know_is_told_what_helps(
    fake: type[FakeClient], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.failure = errors.AuthFailedError("invalid API token")
    assert main(["health", "--no-token"]) == 77
    line = error_line(capsys)
    assert f"the server does not know the user id {os.geteuid()}; name a token's file with --token-file" in line
    assert main(["health"]) == 77
    assert "the server does not know" not in error_line(capsys), "a token was shown, and is wrong"


def test_options_of_the_program_stand_behind_the_command_too(
    fake: type[FakeClient], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = str(data / "mini-kms" / "api.token")
    assert main(["health", "--json", "--unix", "/y", "--request-id", "n", "--server-user", "u", "--token-file", token]) == 0
    assert json.loads(capsys.readouterr().out) == {"detail": "ok"}
    assert (fake.addresses, fake.request_ids, fake.server_users) == ([Path("/y")], ["n"], ["u"])
    assert main(["--unix", "/x", "health", "--unix", "/y"]) == 0
    assert fake.addresses[-1] == Path("/y"), "the later one wins, as it does everywhere"


@pytest.mark.parametrize("arguments", [["-h"], ["health", "-h"]])
def test_h_is_short_for_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert "Usage: kms-client" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["", " ", "\t\n"])
@pytest.mark.parametrize("command", ["encrypt", "generate-data-key", "encrypt-file", "reencrypt", "decrypt"])
def test_a_blank_key_is_an_error_and_not_the_default_one(
    command: str, key: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    option = "--from-key" if command == "decrypt" else "--key"
    more = {"encrypt": ["--text", "x"], "generate-data-key": []}.get(command, ["--in", "a", "--out", "b"])
    assert main([command, option, key, *more]) == 64
    assert f"invalid value for '{option}': the name of a key group is not blank" in error_line(capsys)


def test_a_key_group_that_there_is_not_is_named(fake: type[FakeClient], capsys: pytest.CaptureFixture[str]) -> None:
    def unknown(*_: object) -> bytes:
        raise errors.InvalidRequestError("keyId: no such key group")

    fake.encrypt = unknown  # type: ignore[method-assign, assignment]
    assert main(["encrypt", "--text", "x", "--key", "odd\x1b"]) == 1
    assert "there is no key group odd\\x1b; kms-admin list-keys shows those there are\n" in error_line(capsys)
    assert main(["encrypt", "--text", "x"]) == 1
    assert "there is no key group default; kms-admin" in error_line(capsys)


def test_an_aad_that_is_no_text_comes_from_a_file(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "aad").write_bytes(b"\xff\x00")
    assert main(["--json", "generate-data-key", "--aad-file", str(data / "aad")]) == 0
    wrapped = base64.b64decode(json.loads(capsys.readouterr().out)["wrappedDataKey"])
    assert wrapped == SEALED + b"\xff\x00default"
    assert main(["generate-data-key", "--aad-file", str(data / "aad"), "--aad", "x"]) == 64
    assert "exclude each other" in error_line(capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        ["encrypt", "--in", "-", "--token-file", "-"],
        ["encrypt", "--in", "-", "--aad-file", "-"],
        ["decrypt-file", "--in", "-", "--out", "x", "--token-file", "-"],
    ],
)
def test_standard_input_is_for_one_reader(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 64
    assert "want standard input; give all but one a file" in error_line(capsys)


# The shell's side.


@pytest.mark.parametrize("command", ["", "encrypt", "decrypt", "encrypt-file", "reencrypt"])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"kms-client {command}".rstrip() in shown.partition("Examples:")[2]


def test_version_is_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    known: Callable[[str], str] = lambda _name: "1.2.3"  # noqa: E731
    monkeypatch.setattr(importlib.metadata, "version", known)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "kms-client 1.2.3\n"


def test_version_is_honest_when_not_installed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    def unknown(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", unknown)
    assert main(["--version"]) == 0
    assert "run from its source" in capsys.readouterr().out


@pytest.mark.parametrize("program", ["client", "admin", "server"])
def test_bash_completion_works(program: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import import_module

    monkeypatch.setenv(f"_KMS_{program.upper()}_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", f"kms-{program} --ver")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert import_module(f"kms.cli.{program}").main([]) == 0
    assert "--version" in capsys.readouterr().out


def python(code: str, **more: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", code], capture_output="stdout" not in more, check=False, **more)


def test_the_client_starts_without_trio_and_cryptography() -> None:
    code = "import sys; from kms.cli.client import main; main(['--help'])\n"
    loaded = python(code + "print([name for name in ('trio', 'cryptography', 'argon2') if name in sys.modules])")
    assert loaded.stdout.endswith(b"[]\n")


def test_a_full_disk_behind_standard_output_is_an_io_error_without_noise() -> None:
    code = "import sys; from kms.cli.start import client; sys.argv[1:] = ['--version']; sys.exit(client())"
    with Path("/dev/full").open("wb") as full:
        done = python(code, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 74
    assert done.stderr.count(b"\n") == 1


def test_no_token_is_asked_for_or_read_when_the_user_id_is_to_do(
    fake: type[FakeClient], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["--no-token", "--unix", "/run/kms.sock", "health"]) == 0
    assert (fake.addresses, fake.tokens) == ([Path("/run/kms.sock")], [b""])
    capsys.readouterr()
    assert main(["--no-token", "--tcp", "127.0.0.1:1", "health"]) == 64
    assert "only over a Unix socket" in error_line(capsys)
    assert main(["--no-token", "--unix", "/run/kms.sock", "--token-file", str(tmp_path / "t"), "health"]) == 64
    assert "exclude each other" in error_line(capsys)
    assert fake.tokens == [b""]


def test_no_command_at_all_is_one_line_that_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == errors.EXIT_USAGE
    assert capsys.readouterr().err == "kms-client: error: give a command; see kms-client --help\n"

"""A client that is told nothing finds the server and the token as the command lines do; and tokens that are in a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from kms.client.async_ import AsyncKmsClient
from kms.client.blocking import KmsClient
from kms.client.environment import ADMIN, API, Address, TokenFile, find_server, token
from kms.client.protocol import Requests
from kms.errors import ConfigError, InputMissingError, SecretFileError
from kms.wire.messages import decode_request
from kms_tests.test_links import Door, listening


def write(path: Path, text: str) -> Path:
    path.touch(0o600)
    path.write_text(text, encoding="utf-8")
    return path


def shown(requests: Requests) -> str:
    return decode_request(requests.health().line[:-1]).token


@pytest.fixture
def served(data: Path) -> Iterator[tuple[Door, dict[str, str]]]:
    (data / "mini-kms").mkdir(0o700)
    with listening(data / "mini-kms") as (door, path):
        Path(path).rename(data / "mini-kms" / "kms.sock")
        yield door, {"XDG_DATA_HOME": str(data)}


def test_it_connects_to_the_socket_of_the_data_directory_with_the_token_beside_it(
    served: tuple[Door, dict[str, str]], data: Path
) -> None:
    door, environ = served
    write(data / "mini-kms" / "api.token", "token\n")
    write(data / "mini-kms" / "admin.token", "other\n")
    with KmsClient.from_env(environ=environ, request_id="mine") as client:
        assert client.encrypt(b"ab") == b"ba"
    assert b'"requestId":"mine"' in door.asked[0]
    with KmsClient.from_env(environ=environ, admin=True) as client, pytest.raises(Exception, match="invalid API token"):
        client.health()


def test_the_async_client_does_so_too(served: tuple[Door, dict[str, str]]) -> None:
    async def work() -> None:
        async with await AsyncKmsClient.from_env(environ={**served[1], "MINIKMS_API_TOKEN": "token"}) as client:
            assert await client.encrypt(b"ab") == b"ba"

    trio.run(work)


def test_it_reads_the_environment_of_the_process(
    served: tuple[Door, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**served[1], "MINIKMS_API_TOKEN": "token"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MINIKMS_UNIX_SOCKET", raising=False)
    with KmsClient.from_env() as client:
        assert client.health() == "Health None"


UNIX = Address(Path("/run/kms.sock"))
TCP = Address(None)


def test_where_a_token_comes_from(data: Path) -> None:
    home = {"HOME": str(data)}
    file = write(data / "elsewhere", "of a file\n")
    assert token(API, UNIX, home) == ""
    with pytest.raises(ConfigError, match="there is no admin token; set MINIKMS_ADMIN_TOKEN"):
        token(ADMIN, TCP, home)
    (data / ".mini-kms").mkdir(0o700)
    write(data / ".mini-kms" / "api.token", "usual\n")
    for environ, expected in (
        (home, "usual"),
        ({**home, "MINIKMS_API_TOKEN_FILE": str(file)}, "of a file"),
        ({**home, "MINIKMS_API_TOKEN_FILE": str(file), "MINIKMS_API_TOKEN": "typed"}, "typed"),
    ):
        found = token(API, TCP, environ)
        assert (found if isinstance(found, str) else found()) == expected


def test_who_says_so_shows_no_token_over_a_unix_socket(data: Path) -> None:
    environ = {"HOME": str(data), "MINIKMS_API_TOKEN": "typed", "MINIKMS_NO_TOKEN": "1"}
    assert token(API, UNIX, environ) == ""
    assert token(API, TCP, environ) == "typed"
    assert token(API, UNIX, {**environ, "MINIKMS_NO_TOKEN": "0"}) == "typed"
    with pytest.raises(ConfigError, match="MINIKMS_NO_TOKEN: give 1 or 0"):
        token(API, UNIX, {**environ, "MINIKMS_NO_TOKEN": "sure"})


def test_a_token_of_the_environment_has_the_rule_of_a_file(data: Path) -> None:
    assert token(API, TCP, {"MINIKMS_API_TOKEN": "typed\r\n"}) == "typed"
    for value in ("  ", "a\tb", "\ufeffx", "x" * 4097):
        with pytest.raises(ConfigError, match=r"^MINIKMS_API_TOKEN "):
            token(API, TCP, {"MINIKMS_API_TOKEN": value})


def test_a_token_as_containers_mount_it_is_taken_where_the_environment_allows_it(data: Path) -> None:
    file = write(data / "..data", "mounted\n")
    file.chmod(0o440)
    (data / "token").symlink_to(file)
    environ = {"MINIKMS_API_TOKEN_FILE": str(data / "token")}
    with pytest.raises(SecretFileError, match="--allow-group-readable-secrets"):
        token(API, TCP, environ)
    found = token(API, TCP, {**environ, "MINIKMS_ALLOW_GROUP_READABLE_SECRETS": "1"})
    assert not isinstance(found, str)
    assert found() == "mounted"


def test_without_a_home_it_is_looked_for_only_where_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_cls: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", classmethod(nobody))
    assert find_server(None, None, {"MINIKMS_TCP_PORT": "7"}) == Address(None, port=7)
    assert find_server(None, "/x", {}) == Address(Path("/x"))
    assert token(API, UNIX, {}) == ""
    with pytest.raises(ConfigError, match="set XDG_DATA_HOME to a directory, or name each file"):
        find_server(None, None, {})


def test_a_token_may_be_a_path_of_its_file_or_what_gives_it(data: Path) -> None:
    file = write(data / "token", "of a file\r\n")
    assert shown(Requests(file)) == "of a file"
    tokens: Iterator[str | bytes] = iter(["first", b"second"])
    requests = Requests(lambda: next(tokens))
    assert [shown(requests), shown(requests)] == ["first", "second"]


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
@pytest.mark.parametrize("kind", [str, str.encode])
def test_a_token_that_was_read_from_a_file_may_have_its_line_end(kind: Any, end: str) -> None:
    assert shown(Requests(kind("t0ken" + end))) == "t0ken"


@pytest.mark.parametrize("token", ["t\n\n", "t\r", " t "])
def test_nothing_else_is_taken_from_a_token(token: str) -> None:
    assert shown(Requests(token)) == (token[:-1] if token.endswith("\n") else token)


def test_a_file_that_has_changed_is_read_again(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("kms.client.environment.time.monotonic", lambda: now)
    file = write(data / "token", "old\n")
    found = TokenFile(file)
    write(file, "newer\n")
    assert found() == "old", "it is not looked at for each request"
    now += 1
    assert found() == "newer"
    file.unlink()
    now += 1
    with pytest.raises(InputMissingError):
        found()


def test_a_file_that_others_may_read_is_none(data: Path) -> None:
    file = write(data / "token", "t\n")
    file.chmod(0o644)
    with pytest.raises(SecretFileError, match="chmod 600"):
        Requests(file)


@pytest.mark.parametrize("given", [b"\xff", "\ud800"])
def test_what_gives_no_text_is_refused_when_it_is_asked(given: Any) -> None:
    with pytest.raises(ConfigError, match="not UTF-8"):
        Requests(lambda: given).health()


@pytest.mark.parametrize("given", [None, 5, [b"x"]])
def test_what_gives_another_type_is_a_TypeError(given: Any) -> None:
    with pytest.raises(TypeError, match="token has to be str or bytes"):
        Requests(lambda: given).health()


def test_a_token_file_does_not_show_the_token(data: Path) -> None:
    found = TokenFile(write(data / "token", "hunter2\n"))
    assert "hunter2" not in repr(found)
    assert "hunter2" not in repr(Requests(found))

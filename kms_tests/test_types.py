"""Whatever is not of the type that a method takes is a TypeError, and nothing is sent: a wrong type is data altered unseen.

Text for bytes is the worst: `encrypt("password")` would take it for base64, and give six other bytes back.
"""

from __future__ import annotations

import inspect
import io
import json
import re
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import kms
import kms.errors
from kms.client.async_ import AsyncKmsClient
from kms.client.blocking import KmsClient
from kms.client.protocol import Requests
from kms.errors import ConfigError, InvalidRequestError
from kms_tests.keks import forged

BLOB = forged("default", 1)
NONE_OF_THEM = [1.5, [1], {}, object()]
WRONG: dict[str, list[Any]] = {
    "BytesLike": ["text", "", None, 1, True, [b"x"], *NONE_OF_THEM],
    "str": [b"x", bytearray(b"x"), None, 1, True, *NONE_OF_THEM],
    "str | None": [b"x", 1, True, *NONE_OF_THEM],
    "int": ["1", b"1", None, True, *NONE_OF_THEM],
    "int | None": ["1", b"1", True, *NONE_OF_THEM],
    "bool": [1, 0, "yes", None, *NONE_OF_THEM],
    "PathOrStream": [1, 1.5, b"path", [1], {}, object(), io.StringIO()],
    "Progress | None": [1, "yes", [1], {}],
    "Sequence[str]": ["text", b"bytes", None, 5, [None], [1], [b"x"], object()],
    "Iterable[BytesLike]": [5, None, "text", b"bytes", ["text"], [None], [1]],
}
RIGHT: dict[str, Any] = {
    "plaintext": b"x",
    "plaintexts": [b"x"],
    "ciphertext": BLOB,
    "ciphertexts": [BLOB],
    "key_id": "default",
    "version": 1,
    "length": 1,
    "source": "/nowhere/at/all",
    "target": "/nowhere/at/all",
}
METHODS = [
    name
    for name, member in inspect.getmembers(KmsClient, inspect.isfunction)
    if not name.startswith("_") and name not in ("close", "health")
]


def cases(kind: type) -> Iterator[tuple[str, str, Any]]:
    for name in METHODS:
        for parameter in list(inspect.signature(getattr(kind, name)).parameters.values())[1:]:
            for value in WRONG[str(parameter.annotation)]:
                yield name, parameter.name, value


def arguments(method: Callable[..., Any], parameter: str, value: Any) -> dict[str, Any]:
    needed = [
        one.name
        for one in list(inspect.signature(method).parameters.values())[1:]
        if one.default is inspect.Parameter.empty
    ]
    return {name: RIGHT[name] for name in needed} | {parameter: value}


def test_every_method_is_tried() -> None:
    assert set(METHODS) >= {"encrypt", "decrypt", "reencrypt", "encrypt_many", "iter_key_groups", "destroy_version"}
    names = {name for name, _ in inspect.getmembers(AsyncKmsClient, callable) if not name.startswith("_")}
    assert names - {"aclose", "connect_tcp", "connect_unix", "from_env", "health"} == set(METHODS)


@pytest.mark.parametrize(("name", "parameter", "value"), list(cases(KmsClient)))
def test_a_wrong_type_is_a_TypeError_and_nothing_is_sent(name: str, parameter: str, value: Any) -> None:
    near, far = socket.socketpair()
    with far, KmsClient(near, "test", token="t", timeout=1) as client:
        given = arguments(getattr(KmsClient, name), parameter, value)
        with pytest.raises(TypeError):
            (next if name.startswith("iter_") else lambda result: result)(getattr(client, name)(**given))
        far.settimeout(0)
        with pytest.raises(BlockingIOError):
            far.recv(1)


@pytest.mark.parametrize(("name", "parameter", "value"), list(cases(AsyncKmsClient)))
async def test_a_wrong_type_is_a_TypeError_for_the_other_client_too(name: str, parameter: str, value: Any) -> None:
    near, far = socket.socketpair()
    with far:
        async with AsyncKmsClient(near, "test", token="t", timeout=1) as client:
            made = getattr(client, name)(**arguments(getattr(AsyncKmsClient, name), parameter, value))
            with pytest.raises(TypeError):
                await (anext(made) if name.startswith("iter_") else made)


@pytest.mark.parametrize(
    "value", [b"abc", bytearray(b"abc"), memoryview(b"abc"), memoryview(b"xabcx")[1:4], memoryview(b"aabbcc")[::2]]
)
def test_bytes_may_be_in_any_buffer(value: Any) -> None:
    requests = Requests("t")
    assert requests.encrypt(value, None, value).line == requests.encrypt(b"abc", None, b"abc").line
    assert requests.decrypt(value, value).line == requests.decrypt(b"abc", b"abc").line
    assert requests.reencrypt(value, "k", value).line == requests.reencrypt(b"abc", "k", b"abc").line
    assert requests.generate_data_key(None, value).line == requests.generate_data_key(None, b"abc").line


@pytest.mark.parametrize("number", [1 << 63, -(1 << 63) - 1, 10**30])
def test_a_number_that_no_request_can_carry_is_refused(number: int) -> None:
    with pytest.raises(InvalidRequestError, match="version: out of range"):
        Requests("t").enable_version("default", number)
    with pytest.raises(InvalidRequestError, match="for_seconds: out of range"):
        Requests("t").disable_version("default", 1, number)


def test_the_message_says_what_to_do_and_not_what_was_given() -> None:
    with pytest.raises(TypeError, match=r'^plaintext has to be bytes, not str; encode it, as in "text"\.encode\(\)$'):
        Requests("t").encrypt("hunter2", None, b"")  # type: ignore[arg-type]


CONNECT: dict[str, list[Any]] = {
    "token": [None, 1, 1.5, [b"x"], memoryview(b"x")],
    "timeout": ["5", None, True, [5], b"5"],
    "request_id": [b"x", 1, True],
    "server_user": [1.5, True, b"root", ["root"]],
    "path": [None, 5.0, ["x"]],
    "host": [None, 2130706433, b"127.0.0.1", True],
    "port": ["9123", None, 1.5, b"9123"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in CONNECT.items() for value in values], ids=lambda one: repr(one)
)
@pytest.mark.parametrize("how", ["unix", "tcp"])
async def test_a_wrong_type_is_a_TypeError_where_a_client_connects(how: str, name: str, value: Any, data: Any) -> None:
    if name == ("path" if how == "tcp" else "host") or (name == "port" and how == "unix"):
        return
    with socket.socket(socket.AF_UNIX) as unix, socket.create_server(("127.0.0.1", 0)) as tcp:
        unix.bind(str(data / "kms.sock"))
        unix.listen()
        right: dict[str, Any] = {"path": data / "kms.sock"} if how == "unix" else {"port": tcp.getsockname()[1]}
        given = {**right, "token": "t", "server_user": "any", "timeout": 1, name: value}
        with pytest.raises(TypeError):
            getattr(KmsClient, f"connect_{how}")(**given).close()
        with pytest.raises(TypeError):
            await getattr(AsyncKmsClient, f"connect_{how}")(**given)


@pytest.mark.parametrize("port", [0, -1, 65536, 10**30])
def test_a_port_is_one_that_there_can_be(port: int) -> None:
    with pytest.raises(ConfigError, match="port"):
        KmsClient.connect_tcp(port=port, token="t")


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 1e9])
def test_a_timeout_is_more_than_nothing_and_less_than_for_ever(timeout: float) -> None:
    with pytest.raises(ConfigError, match="timeout"):
        KmsClient.connect_unix("/nowhere", token="t", timeout=timeout)


def test_what_is_public_is_listed_and_can_be_had() -> None:
    assert set(kms.__all__) <= set(dir(kms))
    for name in kms.__all__:
        assert getattr(kms, name) is not None
    assert re.match(r"\d+\.\d+\.\d+|\(run from its source\)", kms.__version__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kms.nothing  # noqa: B018 - that it cannot be had is the test


@pytest.mark.parametrize("kind", [KmsClient, AsyncKmsClient])
def test_whatever_a_method_returns_or_raises_is_exported(kind: type) -> None:
    text = " ".join(str(inspect.signature(member)) for _, member in inspect.getmembers(kind, inspect.isfunction))
    for name in {"DataKey", "KeyGroupView"}:
        assert name in text
        assert name in kms.__all__
    for name, error in inspect.getmembers(kms.errors, inspect.isclass):
        if issubclass(error, kms.WireError):
            assert name in kms.__all__


def test_a_state_is_an_enum_and_still_its_text_and_one_that_is_not_known_yet_is_unknown() -> None:
    versions = [{"version": 1, "status": status, "createdAtEpochSec": 1} for status in ("ACTIVE", "PENDING_DELETION")]
    reply = {"status": "ok", "keyGroup": {"keyId": "a", "activeVersion": 1, "versions": versions}}
    read = Requests("t").describe_key_group("a").read(json.dumps(reply).encode())
    known, later = (version.status for version in read.versions)
    assert known is kms.VersionState.ACTIVE
    assert (known, f"{known}") == ("ACTIVE", "ACTIVE")
    assert later is kms.VersionState.UNKNOWN

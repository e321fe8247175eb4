"""Which token opens which plane, and that nothing else is looked at before it."""

from __future__ import annotations

from typing import Any

import pytest

from kms_tests.in_memory import ADMIN, API, Server

DATA = ["GenerateDataKey", "Encrypt", "Decrypt", "ReEncrypt", "Health", "Ping"]
CONTROL = [
    "CreateKeyGroup",
    "RotateKeyGroup",
    "ListKeyGroups",
    "DescribeKeyGroup",
    "DisableVersion",
    "EnableVersion",
    "DestroyVersion",
]


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.mark.parametrize("token", ["", "wrong", ADMIN, API + "x", "\u00e9"])
@pytest.mark.parametrize("kind", DATA)
def test_AuthFailed_for_a_token_that_is_not_the_data_planes(server: Server, kind: str, token: str) -> None:
    assert server.ask(kind, token) == {"status": "error", "errorCode": "AuthFailed", "message": "invalid API token"}


@pytest.mark.parametrize("token", ["", "wrong", API])
@pytest.mark.parametrize("kind", CONTROL)
def test_AuthFailed_for_a_token_that_is_not_the_control_planes(server: Server, kind: str, token: str) -> None:
    assert server.ask(kind, token) == {"status": "error", "errorCode": "AuthFailed", "message": "invalid admin token"}


@pytest.mark.parametrize(
    "line", [b'{"type":"Encrypt"}', b'{"type":"Encrypt","token":7}', b'{"type":"Encrypt","token":null}']
)
def test_AuthFailed_for_a_missing_or_ill_typed_token(server: Server, line: bytes) -> None:
    assert server.line(line)["errorCode"] == "AuthFailed"


@pytest.mark.parametrize(
    "fields",
    [{}, {"plaintext": 7}, {"plaintext": "?"}, {"plaintext": "QR=="}, {"plaintext": "", "aad": []}],
    ids=["missing field", "ill-typed field", "bad base64", "non-canonical base64", "ill-typed aad"],
)
def test_authentication_comes_before_validation(server: Server, fields: dict[str, Any]) -> None:
    assert server.ask("Encrypt", "wrong", **fields)["errorCode"] == "AuthFailed"
    assert server.ask("Encrypt", API, **fields)["errorCode"] == "InvalidRequest"

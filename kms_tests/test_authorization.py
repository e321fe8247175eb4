"""Which operations on which key groups the policy is asked for."""

from __future__ import annotations

import pytest

from kms.core.policy import Operation
from kms_tests.in_memory import Only, Server


def test_Unauthorized_when_the_policy_forbids_the_group_or_the_operation() -> None:
    server = Server(Only((Operation.ENCRYPT, "default")))
    assert server.ask("Encrypt", plaintext="")["status"] == "ok"
    assert server.ask("Encrypt", plaintext="", keyId="other")["errorCode"] == "Unauthorized"
    assert server.ask("GenerateDataKey")["errorCode"] == "Unauthorized"
    assert server.ask("Health")["errorCode"] == "Unauthorized"
    assert server.admin("RotateKeyGroup", keyId="default")["errorCode"] == "Unauthorized"


def test_Unauthorized_never_comes_before_AuthFailed() -> None:
    assert Server(Only()).ask("Encrypt", "wrong", plaintext="")["errorCode"] == "AuthFailed"


@pytest.mark.parametrize(
    ("allowed", "outcome"),
    [
        ([(Operation.DECRYPT, "default"), (Operation.RE_ENCRYPT, "other")], "ok"),
        ([(Operation.DECRYPT, "default"), (Operation.RE_ENCRYPT, "default")], "error"),
        ([(Operation.DECRYPT, "other"), (Operation.RE_ENCRYPT, "other")], "error"),
        ([(Operation.RE_ENCRYPT, "default"), (Operation.RE_ENCRYPT, "other")], "error"),
    ],
)
def test_ReEncrypt_needs_DECRYPT_on_the_source_and_RE_ENCRYPT_on_the_destination(
    allowed: list[tuple[Operation, str | None]], outcome: str
) -> None:
    setup = [(Operation.ENCRYPT, "default"), (Operation.CREATE_KEY_GROUP, "other")]
    server = Server(Only(*allowed, *setup))
    server.admin("CreateKeyGroup", keyId="other")
    sealed = server.ask("Encrypt", plaintext="")["ciphertext"]
    assert server.ask("ReEncrypt", ciphertext=sealed, keyId="other")["status"] == outcome

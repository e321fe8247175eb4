"""Data keys of any length, under several key groups, and without a plaintext; and random bytes."""

from __future__ import annotations

from base64 import b64decode
from typing import Any

import pytest

from kms import ProtocolError
from kms.client.protocol import Requests
from kms.core.policy import Operation
from kms.core.usage import VersionUsage
from kms_tests.in_memory import API, Only, Server

GENERATE = Operation.GENERATE_DATA_KEY
BOTH = ("GenerateDataKey", "GenerateDataKeyWithoutPlaintext")


@pytest.fixture
def server() -> Server:
    server = Server()
    for name in ("archive", "billing"):
        assert server.admin("CreateKeyGroup", keyId=name)["status"] == "ok"
    return server


def _opened(server: Server, wrapped: str, group: str, **more: str) -> bytes:
    reply = server.ask("Decrypt", ciphertext=wrapped, sourceKeyId=group, **more)
    assert reply["status"] == "ok", reply
    return b64decode(reply["plaintext"])


@pytest.mark.parametrize("length", [1, 16, 32, 64, 1024])
@pytest.mark.parametrize("kind", BOTH)
def test_a_data_key_has_the_length_that_is_asked_for(server: Server, kind: str, length: int) -> None:
    reply = server.ask(kind, bytes=length)
    key = _opened(server, reply["wrappedDataKey"], "default")
    assert len(key) == length
    assert ("plaintextDataKey" in reply) == (kind == "GenerateDataKey")
    if kind == "GenerateDataKey":
        assert b64decode(reply["plaintextDataKey"]) == key


@pytest.mark.parametrize("kind", BOTH)
def test_a_data_key_is_wrapped_under_each_group_in_their_order(server: Server, kind: str) -> None:
    reply = server.ask(kind, keyId="billing", alsoKeyIds=["default", "archive"], aad="eA==")
    wrapped = [reply["wrappedDataKey"], *reply["wrappedDataKeys"]]
    groups = ("billing", "default", "archive")
    keys = {_opened(server, one, group, aad="eA==") for one, group in zip(wrapped, groups, strict=True)}
    assert len(keys) == 1


def test_what_nobody_asked_for_is_not_in_the_reply(server: Server) -> None:
    assert sorted(server.ask("GenerateDataKey")) == ["plaintextDataKey", "status", "wrappedDataKey"]
    assert server.ask("GenerateDataKey", alsoKeyIds=[])["wrappedDataKeys"] == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alsoKeyIds": ["absent"]}, "alsoKeyIds: no such key group"),
        ({"alsoKeyIds": ["archive", "absent"]}, "alsoKeyIds: no such key group"),
        ({"alsoKeyIds": ["default"]}, "alsoKeyIds: a key group is named twice"),
        ({"alsoKeyIds": [""]}, "alsoKeyIds: a key group is named twice"),
        ({"alsoKeyIds": ["archive", "archive"]}, "alsoKeyIds: a key group is named twice"),
        ({"alsoKeyIds": [f"g{number}" for number in range(16)]}, "alsoKeyIds"),
        ({"alsoKeyIds": "archive"}, "alsoKeyIds"),
        ({"alsoKeyIds": [1]}, "alsoKeyIds"),
        ({"bytes": 0}, "bytes"),
        ({"bytes": 1025}, "bytes"),
        ({"bytes": "32"}, "bytes"),
        ({"keyId": "absent"}, "keyId: no such key group"),
    ],
)
@pytest.mark.parametrize("kind", BOTH)
def test_what_cannot_be_made_is_refused_by_the_name_of_its_field(
    server: Server, kind: str, fields: dict[str, Any], message: str
) -> None:
    reply = server.ask(kind, **fields)
    assert (reply["errorCode"], message in reply["message"]) == ("InvalidRequest", True), reply
    assert not any("Key" in name and name != "errorCode" for name in reply)


@pytest.mark.parametrize("kind", BOTH)
def test_the_policy_is_asked_for_each_group(kind: str) -> None:
    operation = Operation(kind)
    allowed = [(Operation.CREATE_KEY_GROUP, "archive"), (operation, "default")]
    for policy, outcome in ((Only(*allowed), "Unauthorized"), (Only(*allowed, (operation, "archive")), None)):
        server = Server(policy)
        server.admin("CreateKeyGroup", keyId="archive")
        assert server.ask(kind)["status"] == "ok"
        assert server.ask(kind, alsoKeyIds=["archive"]).get("errorCode") == outcome
        # Whether there is such a group is not told to who may not use it.
        assert server.ask(kind, alsoKeyIds=["absent"])["errorCode"] == "Unauthorized"


def test_one_operation_does_not_grant_the_other() -> None:
    server = Server(Only((GENERATE, "default")))
    assert server.ask("GenerateDataKey")["status"] == "ok"
    assert server.ask("GenerateDataKeyWithoutPlaintext")["errorCode"] == "Unauthorized"
    assert server.ask("GenerateRandom", bytes=1)["errorCode"] == "Unauthorized"


def _usage(server: Server, group: str) -> VersionUsage:
    return server.usage.of(server.manager.current.groups[group].active)


def test_each_group_counts_the_use(server: Server) -> None:
    server.ask("GenerateDataKey", alsoKeyIds=["archive"])
    server.ask("GenerateDataKeyWithoutPlaintext", keyId="archive")
    assert _usage(server, "default").operations.generate_data_key == 1
    assert _usage(server, "archive").operations.generate_data_key == 2
    assert _usage(server, "archive").last_used_by == "api"
    assert _usage(server, "billing").operations.generate_data_key == 0


@pytest.mark.parametrize("length", [1, 24, 1024])
def test_random_bytes_are_as_many_as_were_asked_for(server: Server, length: int) -> None:
    drawn = [b64decode(server.ask("GenerateRandom", bytes=length)["plaintext"]) for _ in range(2)]
    assert [len(one) for one in drawn] == [length, length]
    assert length == 1 or drawn[0] != drawn[1]


@pytest.mark.parametrize("fields", [{}, {"bytes": 0}, {"bytes": 1025}, {"bytes": None}])
def test_random_bytes_have_a_bound(server: Server, fields: dict[str, Any]) -> None:
    reply = server.ask("GenerateRandom", **fields)
    assert (reply["errorCode"], "bytes" in reply["message"]) == ("InvalidRequest", True)


def test_a_client_notices_a_server_that_is_too_old() -> None:
    requests = Requests(API)
    old = b'{"status":"ok","plaintextDataKey":"' + b"A" * 43 + b'=","wrappedDataKey":"AAAA"}'
    assert requests.generate_data_key(None, b"").read(old).wrapped == b"\0\0\0"
    with pytest.raises(ProtocolError, match="several key groups"):
        requests.generate_data_key(None, b"", None, ["archive"]).read(old)
    with pytest.raises(ProtocolError, match="another length"):
        requests.generate_data_key(None, b"", 64).read(old)


def test_one_name_is_no_sequence_of_names() -> None:
    with pytest.raises(TypeError, match="also_key_ids has to be several str, not str"):
        Requests(API).generate_data_key(None, b"", None, "archive")

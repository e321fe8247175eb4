"""The chain, end to end over real handlers: each row of the table of error codes, and who comes before what."""

from __future__ import annotations

import gc
import json
import logging
import unittest.mock
import weakref
from base64 import b64decode
from typing import Any

import pytest

from kms.core import ciphertext
from kms.core.ciphertext import Purpose
from kms.core.kek import Kek
from kms.limits import MAX_FRAME_BYTES
from kms_tests.in_memory import ADMIN, API, PEER, Server, finish, text
from kms_tests.keks import earlier_header

FAILED = {"status": "error", "errorCode": "DecryptionFailed", "message": "decryption failed"}


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.mark.parametrize("kind", ["Health", "Ping"])
def test_Health_and_Ping_answer_ok(server: Server, kind: str) -> None:
    assert server.ask(kind) == {"status": "ok", "detail": "ok"}


@pytest.mark.parametrize("key", [{}, {"keyId": None}, {"keyId": ""}, {"keyId": "  "}, {"keyId": "default"}])
def test_an_omitted_null_or_blank_keyId_is_default(server: Server, key: dict[str, Any]) -> None:
    blob = b64decode(server.ask("Encrypt", plaintext=text(b"x"), **key)["ciphertext"])
    assert blob[:11] == b"\x03\x01\x07default" + b"\x00"


def test_Encrypt_then_Decrypt_returns_the_plaintext(server: Server) -> None:
    sealed = server.ask("Encrypt", plaintext=text(b"hello"), aad=text(b"ctx"))["ciphertext"]
    assert server.ask("Decrypt", ciphertext=sealed, aad=text(b"ctx")) == {"status": "ok", "plaintext": text(b"hello")}


def test_absent_and_empty_aad_are_the_same(server: Server) -> None:
    sealed = server.ask("Encrypt", plaintext="", aad="")["ciphertext"]
    assert server.ask("Decrypt", ciphertext=sealed) == {"status": "ok", "plaintext": ""}


def test_GenerateDataKey_returns_32_bytes_and_the_same_wrapped(server: Server) -> None:
    reply = server.ask("GenerateDataKey", aad=text(b"f"))
    assert len(b64decode(reply["plaintextDataKey"])) == 32
    assert (
        server.ask("Decrypt", ciphertext=reply["wrappedDataKey"], aad=text(b"f"))["plaintext"] == reply["plaintextDataKey"]
    )


def test_ReEncrypt_moves_a_ciphertext_and_shows_no_plaintext(server: Server) -> None:
    server.admin("CreateKeyGroup", keyId="other")
    sealed = server.ask("Encrypt", plaintext=text(b"hello"))["ciphertext"]
    moved = server.ask("ReEncrypt", ciphertext=sealed, keyId="other")
    assert set(moved) == {"status", "ciphertext"}
    assert b64decode(moved["ciphertext"])[3:8] == b"other"
    assert server.ask("Decrypt", ciphertext=moved["ciphertext"])["plaintext"] == text(b"hello")


def purpose_of(blob: str) -> int:
    return ciphertext.parse(b64decode(blob)).purpose


def test_what_a_ciphertext_was_made_for_stays_with_it_wherever_it_is_moved(server: Server) -> None:
    sealed, wrapped = server.ask("Encrypt", plaintext="")["ciphertext"], server.ask("GenerateDataKey")["wrappedDataKey"]
    key = server.manager.current.groups["default"].active.key
    assert key is not None
    with unittest.mock.patch.object(Kek, "open", return_value=b"opened"):
        header = earlier_header(ciphertext.kek_id("default", 1))
        moved = server.ask("ReEncrypt", ciphertext=text(header + b"\x01\x01" + bytes(40)))["ciphertext"]
    assert [purpose_of(blob) for blob in (sealed, wrapped, moved)] == [Purpose.ENCRYPT, Purpose.DATA_KEY, Purpose.UNKNOWN]
    for blob in (sealed, wrapped, moved):
        again = server.ask("ReEncrypt", ciphertext=blob)["ciphertext"]
        assert purpose_of(again) == purpose_of(blob)
        assert again != blob


def test_no_field_of_a_request_says_what_a_ciphertext_is_for(server: Server) -> None:
    assert purpose_of(server.ask("Encrypt", plaintext="", purpose=2)["ciphertext"]) == Purpose.ENCRYPT


def test_an_earlier_ciphertext_that_would_grow_too_long_is_refused_with_that_reason() -> None:
    server = Server(max_frame_bytes=4096)
    longest = 0
    for size in range(2500, 3000):
        reply = server.ask("Encrypt", plaintext=text(bytes(size)))
        if reply["status"] == "error":
            assert reply["message"] == "plaintext: its ciphertext would be too large for a request; use a data key"
            break
        longest = size
    earlier = earlier_header(ciphertext.kek_id("default", 1)) + b"\x01\x01" + bytes(28 + longest + 20)
    with unittest.mock.patch.object(Kek, "open", return_value=bytes(longest + 20)):
        reply = server.ask("ReEncrypt", ciphertext=text(earlier))
    assert reply["message"] == "ciphertext: re-encrypted it would be too large for a request; decrypt it instead"


def test_a_rotation_strands_nothing(server: Server) -> None:
    sealed = server.ask("Encrypt", plaintext=text(b"x"))["ciphertext"]
    group = server.admin("RotateKeyGroup", keyId="default")["keyGroup"]
    assert [(v["version"], v["status"]) for v in group["versions"]] == [(1, "ENABLED"), (2, "ACTIVE")]
    assert server.ask("Decrypt", ciphertext=sealed)["plaintext"] == text(b"x")


def test_version_operations_answer_with_a_detail(server: Server) -> None:
    server.admin("CreateKeyGroup", keyId="billing")
    server.admin("RotateKeyGroup", keyId="billing")
    for kind, word in (("DisableVersion", "disabled"), ("EnableVersion", "enabled"), ("DestroyVersion", "destroyed")):
        assert server.admin(kind, keyId="billing", version=1) == {"status": "ok", "detail": f"billing v1 {word}"}


def test_ListKeyGroups_shows_every_group(server: Server) -> None:
    groups = server.admin("ListKeyGroups")["keyGroups"]
    version = {"version": 1, "status": "ACTIVE", "createdAtEpochSec": 1}
    assert groups == [{"keyId": "default", "activeVersion": 1, "versions": [version]}]


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("Nonsense", {}, "type: unknown request type"),
        ("Encrypt", {}, "plaintext: missing"),
        ("Encrypt", {"plaintext": 7}, "plaintext: "),
        ("Encrypt", {"plaintext": "?"}, "plaintext: "),
        ("Encrypt", {"plaintext": "", "keyId": "nobody"}, "keyId: no such key group"),
        ("Encrypt", {"plaintext": "", "keyId": "Default"}, "keyId: no such key group"),
    ],
    ids=["unknown type", "missing field", "ill-typed field", "bad base64", "no such group", "names differ by case"],
)
def test_InvalidRequest_names_the_field(server: Server, kind: str, fields: dict[str, Any], message: str) -> None:
    reply = server.ask(kind, **fields)
    assert reply["errorCode"] == "InvalidRequest"
    assert reply["message"].startswith(message)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("RotateKeyGroup", {"keyId": "nobody"}, "no such key group"),
        ("RotateKeyGroup", {"keyId": " "}, "blank"),
        ("CreateKeyGroup", {"keyId": "default"}, "exists already"),
        ("CreateKeyGroup", {"keyId": "-x"}, "begins with a letter or digit"),
        ("DisableVersion", {"keyId": "default", "version": 1}, "rotate the key group first"),
        ("DestroyVersion", {"keyId": "default", "version": 1}, "rotate the key group first"),
        ("EnableVersion", {"keyId": "default", "version": 9}, "no such version"),
        ("EnableVersion", {"keyId": "default", "version": 0}, "version: "),
        ("EnableVersion", {"keyId": "default", "version": 1.0}, "version: "),
        ("EnableVersion", {"keyId": "default", "version": True}, "version: "),
        ("EnableVersion", {"keyId": "default", "version": 1 << 63}, "version: "),
        ("EnableVersion", {"keyId": "default"}, "version: missing"),
    ],
)
def test_InvalidRequest_for_a_refused_change(server: Server, kind: str, fields: dict[str, Any], message: str) -> None:
    reply = server.admin(kind, **fields)
    assert reply["errorCode"] == "InvalidRequest"
    assert message in reply["message"]


@pytest.mark.parametrize(
    "line",
    [b"nope", b"[]", b'"x"', b"{", b"\xff", b'{"type":"Ping"}{}', b'{"a":' * 5000, '{"type":"Ping"}'.encode("utf-16")],
)
def test_InvalidRequest_for_what_is_not_a_JSON_object(server: Server, line: bytes) -> None:
    assert server.line(line)["errorCode"] == "InvalidRequest"


def test_InvalidRequest_for_a_missing_type(server: Server) -> None:
    assert server.line(b"{}")["message"] == "type: missing"


def test_unknown_fields_are_ignored(server: Server) -> None:
    assert server.ask("Health", extra={"deep": [1, 2]})["status"] == "ok"


def test_no_refusal_echoes_what_was_sent(server: Server) -> None:
    canary = "canary-in-the-body"
    for fields in ({"plaintext": canary}, {"plaintext": "", "keyId": canary}, {"plaintext": "", "aad": canary}, {}):
        assert canary not in json.dumps(server.ask("Encrypt", **fields))
    assert canary not in json.dumps(server.ask(canary))


def every_failure_to_open(server: Server) -> dict[str, dict[str, Any]]:
    server.admin("CreateKeyGroup", keyId="k")
    disabled = server.ask("Encrypt", plaintext=text(b"x"), keyId="k")["ciphertext"]
    server.admin("RotateKeyGroup", keyId="k")
    destroyed = server.ask("Encrypt", plaintext=text(b"x"), keyId="k")["ciphertext"]
    server.admin("RotateKeyGroup", keyId="k")
    server.admin("DisableVersion", keyId="k", version=1)
    server.admin("DestroyVersion", keyId="k", version=2)
    good = b64decode(server.ask("Encrypt", plaintext=text(b"x"), aad=text(b"a"))["ciphertext"])
    return {
        "another purpose": {"ciphertext": text(b"\x03\x02" + good[2:]), "aad": text(b"a")},
        "no such purpose": {"ciphertext": text(b"\x03\x09" + good[2:]), "aad": text(b"a")},
        "as if it were an earlier one": {"ciphertext": text(b"\x02" + good[2:]), "aad": text(b"a")},
        "another commitment": {"ciphertext": text(good[:-32] + bytes(32)), "aad": text(b"a")},
        "wrong AAD": {"ciphertext": text(good), "aad": text(b"b")},
        "tampering": {"ciphertext": text(good[:-1] + bytes([good[-1] ^ 1])), "aad": text(b"a")},
        "wrong key": {"ciphertext": text(good.replace(b"\x07default", b"\x01k")), "aad": text(b"a")},
        "malformed blob": {"ciphertext": text(b"\x02"), "aad": text(b"a")},
        "empty": {"ciphertext": ""},
        "group name that is no UTF-8": {"ciphertext": text(b"\x03\x01\x01\xff" + good[10:])},
        "unknown group": {"ciphertext": text(good.replace(b"default", b"nobody!")), "aad": text(b"a")},
        "unknown version": {"ciphertext": text(good[:17] + b"\x09" + good[18:]), "aad": text(b"a")},
        "disabled version": {"ciphertext": disabled},
        "destroyed version": {"ciphertext": destroyed},
    }


@pytest.mark.parametrize("kind", ["Decrypt", "ReEncrypt"])
def test_DecryptionFailed_is_one_answer_to_every_failure(server: Server, kind: str) -> None:
    for why, fields in every_failure_to_open(server).items():
        assert server.ask(kind, **fields) == FAILED, why


def test_InternalError_tells_the_client_nothing_and_the_log_no_text(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.manager.fault = RuntimeError("canary")
    with caplog.at_level(logging.INFO):
        for reply in (server.admin("ListKeyGroups"), server.admin("RotateKeyGroup", keyId="default")):
            assert reply["errorCode"] == "InternalError"
            assert "canary" not in reply["message"]
    assert "RuntimeError" in caplog.text
    assert "canary" not in caplog.text.replace(API, "").replace(ADMIN, "")


def test_FrameTooLarge_names_the_limit(server: Server) -> None:
    reply = json.loads(server.pipeline.session(PEER).frame_too_large(1024))
    assert reply == {
        "status": "error",
        "errorCode": "FrameTooLarge",
        "message": "a request line has at most 1024 bytes",
    }


def test_control_operations_and_every_refusal_are_audited_without_a_secret(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "secret-canary"
    with caplog.at_level(logging.INFO):
        server.ask("Encrypt", plaintext=text(secret.encode()), aad=text(b"aad-canary"))
        assert caplog.text == "", "a data operation that succeeds is not logged"
        server.admin("RotateKeyGroup", keyId="default")
        server.ask("Encrypt", "token-canary", plaintext=text(secret.encode()))
        server.ask("Decrypt", ciphertext=text(b"ciphertext-canary"))
        server.line(b"nope-canary")
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split("outcome=")[1] for line in lines] == ["ok", "AuthFailed", "DecryptionFailed", "InvalidRequest"]
    for canary in (API, ADMIN, "canary", text(secret.encode()), text(b"ciphertext-canary"), text(b"aad-canary")):
        assert canary not in caplog.text


def test_a_line_of_the_log_says_which_request_of_which_connection_it_is_and_what_its_client_calls_it(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    session = server.pipeline.session(PEER)
    with caplog.at_level(logging.INFO):
        session.serve(f'{{"type":"Health","token":"{API}"}}'.encode())
        session.serve(f'{{"type":"Encrypt","token":"{API}","plaintext":"","keyId":"no","requestId":"a b"}}'.encode())
        session.frame_too_large(10)
    assert [record.getMessage() for record in caplog.records] == [
        "connection=3 request=2 transport=unix principal=api operation=Encrypt group='no' version=-"
        " outcome=InvalidRequest requestId='a b'",
        "connection=3 request=3 transport=unix principal=- operation=- group=- version=- outcome=FrameTooLarge",
    ]


def test_a_ciphertext_that_would_not_fit_its_own_Decrypt_is_not_handed_out(server: Server) -> None:
    fits = 1
    for size in (785_900, 786_000, 786_200):
        reply = server.ask("Encrypt", plaintext=text(bytes(size)))
        if reply["status"] == "ok":
            named = {"token": API, "requestId": "\U0001f511" * 64}
            line = json.dumps({"type": "Decrypt", "ciphertext": reply["ciphertext"], **named}, ensure_ascii=False).encode()
            assert len(line) <= MAX_FRAME_BYTES
            fits = size
        else:
            assert reply["message"].startswith("plaintext: ")
    assert fits == 786_000


def test_a_name_as_long_as_a_frame_does_not_fill_the_log(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        server.ask("Encrypt", "wrong", plaintext="", keyId="x" * 100_000)
    assert len(caplog.text) < 1000


@pytest.mark.parametrize("request_id", ["r", "invoice 7/é", "x" * 64])
def test_a_requestId_comes_back_in_every_reply(server: Server, request_id: str) -> None:
    named = {"requestId": request_id}
    replies = [
        server.ask("Health", **named),
        server.ask("Encrypt", plaintext="", **named),
        server.ask("Encrypt", "wrong", plaintext="", **named),
        server.ask("Encrypt", plaintext="", keyId="nobody", **named),
        server.ask("Encrypt", plaintext=1, **named),
        server.ask("Encrypt", plaintext="AB==", **named),
        server.ask("Decrypt", ciphertext="AA==", **named),
        server.ask("Nonsense", **named),
        server.admin("RotateKeyGroup", keyId="default", **named),
        server.admin("RotateKeyGroup", keyId="nobody", **named),
    ]
    assert {reply.pop("requestId") for reply in replies} == {request_id}
    assert "requestId" not in server.ask("Health"), "nor does one client's stick to a reply that others get too"


@pytest.mark.parametrize("request_id", ["", "x" * 65, "a\nb", "a\x1b[1m", "\u202egnp.exe", "\ud800"])
def test_a_requestId_that_a_log_should_not_hold_is_refused_and_not_repeated(server: Server, request_id: str) -> None:
    reply = server.ask("Health", requestId=request_id)
    assert reply["errorCode"] == "InvalidRequest"
    assert "requestId" not in reply
    assert "requestId" not in server.ask("Encrypt", requestId=request_id), "of a request with another fault, too"


def test_the_requestId_is_looked_at_after_the_token_is(server: Server) -> None:
    assert server.ask("Health", "wrong", requestId="")["errorCode"] == "AuthFailed"
    assert server.ask("Health", requestId=1)["message"].startswith("requestId: ")


def test_who_watches_is_told_of_every_request_once_and_in_order(server: Server) -> None:
    session = server.pipeline.session(PEER)
    token = f'"token":"{API}"'
    for line in (
        f'{{"type":"Encrypt",{token},"plaintext":"","requestId":"a"}}',
        f'{{"type":"Encrypt",{token}}}',
        '{"type":"Encrypt","plaintext":""}',
        "nonsense",
    ):
        session.serve(line.encode())
    session.frame_too_large(10)
    rotated = session.serve(f'{{"type":"RotateKeyGroup","token":"{ADMIN}","keyId":"default"}}'.encode())
    finish(rotated)
    assert [
        (
            served.number,
            served.kind and served.kind.operation.value,
            served.principal and served.principal.name,
            served.error and served.error.code,
            served.request_id,
        )
        for served in server.seen
    ] == [
        (1, "Encrypt", "api", None, "a"),
        (2, "Encrypt", "api", "InvalidRequest", None),
        (3, "Encrypt", None, "AuthFailed", None),
        (4, None, None, "InvalidRequest", None),
        (5, None, None, "FrameTooLarge", None),
        (6, "RotateKeyGroup", "admin", None, None),
    ]
    assert [(served.request is None, served.reply is None) for served in server.seen] == [
        (False, False),
        (True, True),
        (False, True),
        (True, True),
        (True, True),
        (False, False),
    ]
    assert {served.peer for served in server.seen} == {PEER}
    assert API not in repr(server.seen)


@pytest.mark.parametrize(
    "request_",
    [
        {"type": "Encrypt", "token": "wrong", "plaintext": ""},
        {"type": "Encrypt", "token": "wrong"},
        {"type": "Encrypt", "token": API},
        {"type": "Encrypt", "token": API, "plaintext": "", "keyId": "nobody"},
        {"type": "Decrypt", "token": API, "ciphertext": "AA=="},
        {"type": "Nonsense"},
        {"type": "RotateKeyGroup", "token": "wrong", "keyId": "default"},
        {"type": "RotateKeyGroup", "token": ADMIN, "keyId": "nobody"},
    ],
)
def test_a_refusal_leaves_nothing_behind_even_before_garbage_is_collected(server: Server, request_: dict[str, Any]) -> None:
    errors = []
    server.pipeline.observers = (lambda served: errors.append(weakref.ref(served.error)),)
    gc.disable()
    try:
        assert server.line(json.dumps(request_).encode())["status"] == "error"
        assert [error() for error in errors] == [None]
    finally:
        gc.enable()


def test_what_watchers_are_told_can_be_collected_whatever_circle_it_is_part_of(server: Server) -> None:
    server.ask("Encrypt")
    assert gc.is_tracked(server.seen[0])

"""The client without its sockets: requests out, replies in, errors told apart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms.client import protocol
from kms.client.protocol import Call, DataKey, Exchange, Requests
from kms.core.secret import Secret
from kms.errors import (
    ConfigError,
    DecryptionFailedError,
    FrameTooLargeError,
    InvalidRequestError,
    ProtocolError,
    ThrottledError,
    UnauthorizedError,
)
from kms.wire.messages import decode_request

TOKEN = "hidden-token"
REQUESTS = Requests(TOKEN)
DENIED = b'{"status":"error","errorCode":"Unauthorized","message":"no"}'
GROUP = '{"keyId":"g","activeVersion":1,"versions":[{"version":1,"status":"ACTIVE","createdAtEpochSec":5}]}'


def detail(text: str) -> bytes:
    return json.dumps({"status": "ok", "detail": text}).encode()


def send_all(exchange: Exchange[Any]) -> bytes:
    sent = b""
    while piece := exchange.outgoing():
        sent += piece
        exchange.sent(len(piece))
    return sent


@pytest.mark.parametrize(
    ("call", "kind", "fields"),
    [
        (REQUESTS.health(), "Health", {}),
        (REQUESTS.generate_data_key("g", b"a"), "GenerateDataKey", {"key_id": "g", "aad": b"a"}),
        (REQUESTS.encrypt(b"p", None, b""), "Encrypt", {"plaintext": b"p", "key_id": None, "aad": None}),
        (REQUESTS.decrypt(b"c", b"a"), "Decrypt", {"ciphertext": b"c", "aad": b"a"}),
        (REQUESTS.reencrypt(b"c", "g", b""), "ReEncrypt", {"ciphertext": b"c", "key_id": "g"}),
        (REQUESTS.create_key_group("g"), "CreateKeyGroup", {"key_id": "g"}),
        (REQUESTS.rotate_key_group("g"), "RotateKeyGroup", {"key_id": "g"}),
        (REQUESTS.list_key_groups(False), "ListKeyGroups", {"usage": False}),
        (REQUESTS.list_key_groups(True), "ListKeyGroups", {"usage": True}),
        (REQUESTS.describe_key_group("g"), "DescribeKeyGroup", {"key_id": "g"}),
        (REQUESTS.disable_version("g", 2, None), "DisableVersion", {"key_id": "g", "version": 2, "for_seconds": None}),
        (REQUESTS.disable_version("g", 2, 60), "DisableVersion", {"key_id": "g", "version": 2, "for_seconds": 60}),
        (REQUESTS.enable_version("g", 2), "EnableVersion", {"key_id": "g", "version": 2}),
        (REQUESTS.destroy_version("g", 2), "DestroyVersion", {"key_id": "g", "version": 2}),
    ],
)
def test_a_request_is_one_line_that_the_server_decodes(call: Call[object], kind: str, fields: dict[str, object]) -> None:
    assert call.line.endswith(b"\n")
    assert call.line.count(b"\n") == 1
    request = decode_request(call.line)
    assert type(request).__name__ == kind
    assert request.token == TOKEN
    assert {name: getattr(request, name) for name in fields} == fields


@pytest.mark.parametrize("token", ["t\u00f6ken", "t\u00f6ken".encode(), Secret(bytearray("t\u00f6ken".encode()))])
def test_a_token_may_be_text_bytes_or_a_secret(token: str | bytes | Secret) -> None:
    assert decode_request(Requests(token).health().line).token == "t\u00f6ken"


@pytest.mark.parametrize("token", ["\ud800", b"\xff", Secret(bytearray(b"\xff"))])
def test_a_token_that_is_not_utf_8_is_refused_and_not_shown(token: str | bytes | Secret) -> None:
    with pytest.raises(ConfigError, match="not UTF-8"):
        Requests(token)


def test_no_repr_shows_a_token_or_a_key() -> None:
    shown = repr([REQUESTS, REQUESTS.health(), DataKey(plaintext=b"hidden", wrapped=b"w")])
    assert "hidden" not in shown


def test_a_name_that_json_cannot_carry_is_an_invalid_request() -> None:
    with pytest.raises(InvalidRequestError, match="keyId"):
        REQUESTS.create_key_group("\ud800")


@pytest.mark.parametrize(
    ("call", "reply", "result"),
    [
        (REQUESTS.health(), '{"status":"ok","detail":"ok"}', "ok"),
        (
            REQUESTS.generate_data_key(None, b""),
            '{"status":"ok","plaintextDataKey":"cA==","wrappedDataKey":"dw=="}',
            DataKey(b"p", b"w"),
        ),
        (REQUESTS.encrypt(b"", None, b""), '{"status":"ok","ciphertext":"Yw=="}', b"c"),
        (REQUESTS.decrypt(b"", b""), '{"status":"ok","plaintext":"cA=="}', b"p"),
        (REQUESTS.reencrypt(b"", "g", b""), '{"status":"ok","ciphertext":"Yw=="}', b"c"),
    ],
)
def test_a_reply_becomes_the_result(call: Call[object], reply: str, result: object) -> None:
    assert call.read(reply.encode()) == result


def test_a_key_group_reply_becomes_a_view() -> None:
    view = REQUESTS.rotate_key_group("g").read(b'{"status":"ok","keyGroup":' + GROUP.encode() + b"}")
    assert (view.key_id, view.active_version, view.versions[0].created_at_epoch_sec) == ("g", 1, 5)
    (listed,) = REQUESTS.list_key_groups(False).read(b'{"status":"ok","keyGroups":[' + GROUP.encode() + b"]}")
    assert listed == view


def test_an_error_reply_is_raised_as_its_type() -> None:
    with pytest.raises(UnauthorizedError, match=r"^no$"):
        REQUESTS.health().read(DENIED)
    with pytest.raises(DecryptionFailedError, match=r"^decryption failed$"):
        REQUESTS.health().read(b'{"status":"error","errorCode":"DecryptionFailed","message":"because"}')


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 400 Bad Request",
        b"{}",
        b'{"status":"ok"}',
        b'{"status":"what"}',
        b'{"status":"ok","plaintext":"hidden!"}',
        b'{"status":"ok","detail":"\xff"}',
        b"\xff",
        b'{"status":"ok","x":' + b"[" * 100_000,
        b'{"status":"error","errorCode":"Novel","message":""}',
    ],
)
def test_a_reply_that_is_none_is_a_protocol_error(reply: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        REQUESTS.decrypt(b"", b"").read(reply)
    assert "hidden" not in str(caught.value)


def test_all_requests_of_a_client_have_the_requestId_it_was_given() -> None:
    named = Requests(TOKEN, "nightly 7")
    assert {decode_request(call.line).request_id for call in (named.health(), named.list_key_groups(False))} == {
        "nightly 7"
    }
    assert decode_request(REQUESTS.health().line).request_id is None


@pytest.mark.parametrize("request_id", ["", "x" * 65, "a\nb", "\ud800"])
def test_a_requestId_that_no_server_takes_is_refused_before_it_is_sent(request_id: str) -> None:
    with pytest.raises(ConfigError, match="requestId"):
        Requests(TOKEN, request_id)


@pytest.mark.parametrize("requests", [REQUESTS, Requests(TOKEN, "mine")])
@pytest.mark.parametrize(
    "reply",
    [
        b'{"status":"ok","detail":"ok","requestId":"another\'s"}',
        b'{"status":"error","errorCode":"Unauthorized","message":"no","requestId":"another\'s"}',
    ],
)
def test_a_reply_to_another_request_is_a_protocol_error(requests: Requests, reply: bytes) -> None:
    with pytest.raises(ProtocolError, match="another request"):
        requests.health().read(reply)


def test_a_server_that_knows_of_no_requestId_need_not_repeat_it() -> None:
    call = Requests(TOKEN, "mine").health()
    assert call.read(detail("ok")) == "ok"
    assert call.read(b'{"status":"ok","detail":"ok","requestId":"mine"}') == "ok"


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 40))
def test_replies_split_anywhere_match_their_requests_in_order(cuts: list[int], depth: int) -> None:
    exchange = Exchange((REQUESTS.health() for _ in range(20)), depth=depth)
    answered = 0
    while not exchange.is_done:
        lines = send_all(exchange).count(b"\n")
        assert lines <= depth
        stream = b"".join(detail(str(answered + i)) + b"\n" for i in range(lines))
        answered += lines
        for cut in cuts:
            exchange.received(stream[:cut])
            stream = stream[cut:]
        exchange.received(stream)
    assert exchange.results() == [str(i) for i in range(20)]


def test_an_exchange_of_nothing_is_done_once_it_was_asked() -> None:
    exchange: Exchange[str] = Exchange([])
    assert not exchange.outgoing()
    assert exchange.is_done
    assert exchange.results() == []


def test_large_requests_are_not_all_held_at_once() -> None:
    exchange = Exchange(REQUESTS.encrypt(bytes(100_000), None, b"") for _ in range(50))
    assert len(exchange.outgoing()) < 200_000


def test_a_refusal_drains_what_is_under_way_and_asks_for_nothing_more() -> None:
    exchange = Exchange((REQUESTS.health() for _ in range(100)), depth=3)
    send_all(exchange)
    exchange.received(detail("1") + b"\n" + DENIED + b"\n")
    assert not exchange.outgoing()
    assert not exchange.is_done
    exchange.received(DENIED.replace(b"no", b"later") + b"\n")
    assert exchange.is_done
    with pytest.raises(UnauthorizedError, match=r"^no$"):
        exchange.results()


def test_an_error_of_the_callers_iterable_waits_for_what_is_under_way() -> None:
    def calls() -> Iterator[Call[str]]:
        yield REQUESTS.health()
        raise LookupError("mine")

    exchange = Exchange(calls())
    assert send_all(exchange)
    assert not exchange.is_done
    exchange.received(detail("ok") + b"\n")
    assert exchange.is_done
    with pytest.raises(LookupError, match="mine"):
        exchange.results()


def test_frame_too_large_ends_the_exchange_but_not_before_an_earlier_refusal() -> None:
    too_large = b'{"status":"error","errorCode":"FrameTooLarge","message":"too large"}\n'
    exchange = Exchange(REQUESTS.health() for _ in range(5))
    send_all(exchange)
    exchange.received(too_large)
    assert exchange.is_done
    assert exchange.is_over
    with pytest.raises(FrameTooLargeError):
        exchange.results()
    exchange = Exchange(REQUESTS.health() for _ in range(5))
    send_all(exchange)
    exchange.received(DENIED + b"\n" + too_large)
    with pytest.raises(UnauthorizedError):
        exchange.results()


def throttled(milliseconds: int | None) -> bytes:
    after = "" if milliseconds is None else f',"retryAfterMs":{milliseconds}'
    return f'{{"status":"error","errorCode":"Throttled","message":"too often"{after}}}\n'.encode()


def test_what_is_throttled_is_sent_again_after_a_pause_and_its_result_keeps_its_place() -> None:
    exchange = Exchange((REQUESTS.health() for _ in range(4)), depth=4, patience=10)
    assert send_all(exchange).count(b"\n") == 4
    exchange.received(detail("0") + b"\n" + throttled(250) + detail("2") + b"\n")
    assert exchange.pause == 0, "another reply is on its way"
    exchange.received(throttled(500))
    assert exchange.pause == 0.5
    assert not exchange.outgoing()
    assert not exchange.is_done
    exchange.resume()
    assert exchange.pause == 0
    lines = send_all(exchange)
    assert lines.count(b"\n") == 2
    exchange.received(detail("1") + b"\n" + detail("3") + b"\n")
    assert not exchange.outgoing()
    assert exchange.is_done
    assert exchange.results() == ["0", "1", "2", "3"]


def test_after_what_was_throttled_half_as_many_are_under_way() -> None:
    exchange = Exchange((REQUESTS.health() for _ in range(100)), depth=8, patience=10)
    for expected in (8, 4, 2, 1, 1):
        assert send_all(exchange).count(b"\n") == expected
        exchange.received(throttled(10) * expected)
        exchange.resume()


def test_who_waits_longer_than_its_patience_with_nothing_done_is_refused() -> None:
    exchange = Exchange([REQUESTS.health()], patience=1)
    for _ in range(2):
        send_all(exchange)
        exchange.received(throttled(500))
        exchange.resume()
    send_all(exchange)
    exchange.received(throttled(1))
    assert exchange.is_done
    with pytest.raises(ThrottledError, match="too often") as refused:
        exchange.results()
    assert refused.value.retry_after == 0.001


def test_each_success_makes_who_waits_patient_again() -> None:
    exchange = Exchange((REQUESTS.health() for _ in range(5)), depth=1, patience=1)
    for number in range(5):
        send_all(exchange)
        exchange.received(throttled(900))
        exchange.resume()
        send_all(exchange)
        exchange.received(detail(str(number)) + b"\n")
    assert exchange.results() == [str(number) for number in range(5)]


def test_what_is_throttled_beside_a_refusal_is_not_sent_again() -> None:
    for replies in (DENIED + b"\n" + throttled(1), throttled(1) + DENIED + b"\n"):
        exchange = Exchange((REQUESTS.health() for _ in range(2)), patience=10)
        send_all(exchange)
        exchange.received(replies)
        assert exchange.is_done
        assert exchange.pause == 0
        with pytest.raises(UnauthorizedError):
            exchange.results()


def test_without_patience_it_is_refused_at_once() -> None:
    exchange = Exchange([REQUESTS.health()])
    send_all(exchange)
    exchange.received(throttled(None))
    with pytest.raises(ThrottledError):
        exchange.results()


@pytest.mark.parametrize("extra", [b'{"status"', b'{"status":"ok","detail":"ok"}\n'])
def test_more_replies_than_requests_are_a_protocol_error(extra: bytes) -> None:
    exchange = Exchange([REQUESTS.health()])
    send_all(exchange)
    with pytest.raises(ProtocolError, match="nobody asked"):
        exchange.received(detail("ok") + b"\n" + extra)


def test_an_endless_reply_is_a_protocol_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_REPLY_BYTES", 100)
    exchange = Exchange([REQUESTS.health()])
    send_all(exchange)
    exchange.received(bytes(100))
    with pytest.raises(ProtocolError, match="more than 100 bytes"):
        exchange.received(bytes(100))


def test_a_server_that_has_disabled_for_good_what_was_to_be_for_a_time_is_not_taken_at_its_word() -> None:
    with pytest.raises(ProtocolError, match=r"too old .* enable it again yourself"):
        REQUESTS.disable_version("g", 2, 60).read(b'{"status":"ok","detail":"g v2 disabled"}')
    assert REQUESTS.disable_version("g", 2, None).read(b'{"status":"ok","detail":"g v2 disabled"}') == "g v2 disabled"

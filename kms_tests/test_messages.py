"""Requests and replies: every rule of their form."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms.core.policy import Operation, Plane
from kms.limits import MAX_NESTING, MAX_VERSION
from kms.wire import messages
from kms.wire.messages import UndecodableRequestError, decode_request
from kms_tests.budget import within_budget

DATA: dict[str, dict[str, Any]] = {
    "Health": {},
    "Ping": {},
    "GenerateDataKey": {},
    "Encrypt": {"plaintext": "QQ=="},
    "Decrypt": {"ciphertext": "QQ=="},
    "ReEncrypt": {"ciphertext": "QQ=="},
}
CONTROL: dict[str, dict[str, Any]] = {
    "CreateKeyGroup": {"keyId": "a"},
    "RotateKeyGroup": {"keyId": "a"},
    "ListKeyGroups": {},
    "DescribeKeyGroup": {"keyId": "a"},
    "DisableVersion": {"keyId": "a", "version": 1},
    "EnableVersion": {"keyId": "a", "version": 1},
    "DestroyVersion": {"keyId": "a", "version": 1},
}
SMALLEST: dict[str, dict[str, Any]] = {**DATA, **CONTROL}
REQUIRED = [(kind, name) for kind, fields in SMALLEST.items() for name in fields]
BINARY = [
    ("GenerateDataKey", "aad"),
    ("Encrypt", "plaintext"),
    ("Encrypt", "aad"),
    ("Decrypt", "ciphertext"),
    ("Decrypt", "aad"),
    ("ReEncrypt", "ciphertext"),
    ("ReEncrypt", "aad"),
]
VERSIONED = ["DisableVersion", "EnableVersion", "DestroyVersion"]
OPTIONAL_KEY = ["GenerateDataKey", "Encrypt", "ReEncrypt"]


def _line(kind: str, **fields: Any) -> bytes:
    return json.dumps({"type": kind, **SMALLEST[kind], **fields}).encode("ascii")


def _refused(line: bytes) -> UndecodableRequestError:
    with pytest.raises(UndecodableRequestError) as caught:
        decode_request(line)
    return caught.value


def _reason(line: bytes) -> str:
    return str(_refused(line).reason)


@pytest.mark.parametrize("kind", SMALLEST)
def test_the_smallest_request_of_each_type_decodes(kind: str) -> None:
    request = decode_request(_line(kind, token="t"))
    assert type(request).__name__ == kind
    assert request.token == "t"


@pytest.mark.parametrize("kind", SMALLEST)
def test_each_type_is_of_the_plane_of_the_contract(kind: str) -> None:
    request = decode_request(_line(kind))
    assert request.plane is (Plane.DATA if kind in DATA else Plane.CONTROL)


@pytest.mark.parametrize("kind", SMALLEST)
def test_each_type_is_the_operation_of_its_name(kind: str) -> None:
    assert decode_request(_line(kind)).operation is Operation("Health" if kind == "Ping" else kind)


@pytest.mark.parametrize("kind", SMALLEST)
def test_what_a_client_encodes_a_server_decodes(kind: str) -> None:
    request = decode_request(_line(kind, token="t"))
    assert decode_request(messages.encode(request)) == request


@pytest.mark.parametrize(("kind", "field"), REQUIRED)
def test_a_missing_field_is_named(kind: str, field: str) -> None:
    fields = {name: value for name, value in SMALLEST[kind].items() if name != field}
    assert _reason(json.dumps({"type": kind, **fields}).encode()) == f"{field}: missing"


@pytest.mark.parametrize(("kind", "field"), REQUIRED)
def test_null_for_a_required_field_is_refused(kind: str, field: str) -> None:
    assert _reason(_line(kind, **{field: None})).startswith(f"{field}: ")


@pytest.mark.parametrize("value", [5, 1.5, True, [], {}])
@pytest.mark.parametrize(("kind", "field"), [*BINARY, *((kind, "keyId") for kind in [*OPTIONAL_KEY, "CreateKeyGroup"])])
def test_an_ill_typed_field_is_named(kind: str, field: str, value: object) -> None:
    assert _reason(_line(kind, **{field: value})).startswith(f"{field}: Expected ")


@pytest.mark.parametrize("value", [5, None, True, [], {}])
def test_an_ill_typed_token_is_no_token(value: object) -> None:
    error = _refused(_line("Health", token=value))
    assert error.token == ""
    assert error.kind is messages.Health


@pytest.mark.parametrize("kind", OPTIONAL_KEY)
@pytest.mark.parametrize("key", [None, "", "  "])
def test_a_data_operation_may_leave_its_key_null_or_blank(kind: str, key: str | None) -> None:
    request = decode_request(_line(kind, keyId=key))
    assert getattr(request, "key_id") == key  # noqa: B009 - one of several types


@pytest.mark.parametrize(("kind", "field"), [pair for pair in BINARY if pair[1] == "aad"])
def test_the_aad_may_be_null_or_absent(kind: str, field: str) -> None:
    assert decode_request(_line(kind, aad=None)) == decode_request(_line(kind))


@pytest.mark.parametrize("kind", VERSIONED)
@pytest.mark.parametrize("version", [1, 2, MAX_VERSION])
def test_a_version_in_its_range_decodes(kind: str, version: int) -> None:
    request = decode_request(_line(kind, version=version))
    assert isinstance(request, messages.VersionRequest)
    assert request.version == version


@pytest.mark.parametrize("kind", VERSIONED)
@pytest.mark.parametrize(
    "version",
    ["true", "false", "1.0", "1e0", "0", "-1", str(MAX_VERSION + 1), str(1 << 64), "9" * 400, "9" * 6000, '"1"', "[1]"],
)
def test_a_version_that_is_no_integer_in_its_range_is_refused(kind: str, version: str) -> None:
    line = f'{{"type":"{kind}","keyId":"a","version":{version}}}'.encode()
    assert _reason(line).startswith("version: ")


@pytest.mark.parametrize(("kind", "field"), BINARY)
@pytest.mark.parametrize("text", ["", "QQ==", "QUI=", "QUJD", "+/+/"])
def test_canonical_base64_is_accepted(kind: str, field: str, text: str) -> None:
    request = decode_request(_line(kind, **{field: text}))
    assert getattr(request, field) == b64decode(text)


@pytest.mark.parametrize(("kind", "field"), BINARY)
@pytest.mark.parametrize(
    "text", ["Q", "QQ", "QQ=", "QQ===", "QQ==QQ==", "Q Q==", "QQ==\n", " QQ==", "_-__", "=", "====", "Q=Q=", "QQé=", "%%%%"]
)
def test_what_is_not_base64_is_refused(kind: str, field: str, text: str) -> None:
    assert _reason(_line(kind, **{field: text})) == f"{field}: Invalid base64 encoded string"


@pytest.mark.parametrize(("kind", "field"), BINARY)
@pytest.mark.parametrize("text", ["QR==", "QUJ=", "//==", "QUJDQf=="])
def test_base64_that_is_not_canonical_is_refused(kind: str, field: str, text: str) -> None:
    assert _reason(_line(kind, **{field: text})) == f"{field}: not canonical base64"


@pytest.mark.parametrize("escaped", [b"QR\\u003d\\u003d", b"QR=\\u003d", b"Q\\u0052==", b"\\u0051R\\u003D="])
def test_base64_that_is_not_canonical_is_refused_however_it_is_escaped(escaped: bytes) -> None:
    assert _reason(b'{"type":"Encrypt","plaintext":"' + escaped + b'"}') == "plaintext: not canonical base64"


def test_canonical_base64_is_accepted_however_it_is_escaped() -> None:
    request = decode_request(b'{"type":"Encrypt","plaintext":"\\u0051Q\\u003d="}')
    assert isinstance(request, messages.Encrypt)
    assert request.plaintext == b"A"


@given(st.text(st.sampled_from('AQRgw4+/=\\" \n_é'), max_size=9))
def test_base64_decodes_exactly_when_encoding_gives_it_back(text: str) -> None:
    try:
        canonical = b64encode(b64decode(text, validate=True)).decode() == text
    except ValueError:
        canonical = False
    line = json.dumps({"type": "Encrypt", "plaintext": text}, ensure_ascii=False).encode("utf-8")
    try:
        request = decode_request(line)
    except UndecodableRequestError:
        assert not canonical
    else:
        assert isinstance(request, messages.Encrypt)
        assert canonical
        assert request.plaintext == b64decode(text)


@pytest.mark.parametrize("kind", SMALLEST)
def test_unknown_fields_are_ignored(kind: str) -> None:
    assert decode_request(_line(kind, x=1, nonce="==", y={"z": [None]})) == decode_request(_line(kind))


@pytest.mark.parametrize(
    "ignored", ["1" * 5000, "1e999", "[[1e999]]", '"\\n=="', "[" * 30 + "]" * 30, '{"plaintext":"QR=="}', "-0", "[1,2]"]
)
def test_no_value_of_an_unknown_field_disturbs_a_request_with_escapes(ignored: str) -> None:
    line = f'{{"type":"Encrypt","plaintext":"Q\\u0051==","x":{ignored}}}'.encode()
    request = decode_request(line)
    assert isinstance(request, messages.Encrypt)
    assert request.plaintext == b"A"


def test_a_binary_field_of_another_request_is_an_unknown_field() -> None:
    request = decode_request(b'{"type":"Decrypt","ciphertext":"Q\\u0051==","plaintext":1e999}')
    assert isinstance(request, messages.Decrypt)


@pytest.mark.parametrize("depth", [5_000, 100_000])
def test_deep_nesting_is_refused(depth: int) -> None:
    assert _reason(b'{"type":"Health","x":' + b"[" * depth + b"]" * depth + b"}") == "nested too deeply"


def test_nesting_up_to_the_bound_is_no_reason_to_refuse() -> None:
    inner = MAX_NESTING - 1
    decode_request(b'{"type":"Health","x":' + b"[" * inner + b"]" * inner + b"}")
    decode_request(b'{"type":"Health","x":[' + b"[],{}," * 1000 + b"0]}")
    decode_request(b'{"type":"Health","x":"' + b'[{\\"' * 1000 + b'"}')
    assert _reason(b'{"type":"Health","x":' + b"[" * MAX_NESTING + b"]" * MAX_NESTING + b"}") == "nested too deeply"


@pytest.mark.parametrize("opening", [b"[", b"{"])
@pytest.mark.parametrize("end", [b'"\\' * 50_000, b'\\"' * 50_000, b'"' + b"\\" * 50_001, b'"[\\' * 50_000])
def test_a_string_that_never_ends_does_not_cost_the_square_of_its_length(opening: bytes, end: bytes) -> None:
    line = b'{"type":"Health","x":' + opening * (MAX_NESTING + 1) + end
    within_budget(lambda: _refused(line))


@pytest.mark.parametrize("field", ["type", "token"])
def test_no_costly_number_is_built_for_a_stranger(field: str) -> None:
    # The slowest to convert that there are: near the smallest double.
    line = f'{{"type":"Health","{field}":[{"2.2250738585072011e-308," * 40_000}1]}}'.encode()
    within_budget(lambda: _refused(line))


@pytest.mark.parametrize("text", ['"', '\\"', "[", "\\\\", "\\n"])
def test_a_bracket_in_a_string_is_no_nesting_and_one_behind_it_is(text: str) -> None:
    string = json.dumps("[" * 50 + text)
    decode_request(f'{{"type":"Health","x":{string}}}'.encode())
    deep = "[" * MAX_NESTING + "]" * MAX_NESTING
    assert _reason(f'{{"type":"Health","x":{string},"y":{deep}}}'.encode()) == "nested too deeply"


@pytest.mark.parametrize(
    "line",
    [
        b'{"type":"Health","x":"\xff"}',
        b'{"type":"Health","x":"\xed\xa0\x80"}',
        b'{"type":"Health","\xc0\xaf":1}',
        b'{"type":"Health","token":"\xff"}',
        '{"type":"Health"}'.encode("utf-16"),
    ],
)
def test_what_is_not_strict_utf8_is_refused_even_where_it_is_ignored(line: bytes) -> None:
    assert _reason(line) == "not strict UTF-8"


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"x",
        b"{",
        b"[]",
        b'"Health"',
        b"1",
        b"null",
        b'{"type":"Health"} x',
        b'{"type":"Health"}{"type":"Health"}',
        b'{"type":"Health",}',
        b"{'type':'Health'}",
        b'\xef\xbb\xbf{"type":"Health"}',
        b'{"type":"Health","x":NaN}',
        '{"type":"Health"}'.encode("utf-16-le"),
        '{"type":"Health"}'.encode("utf-32-le"),
    ],
)
def test_what_is_not_a_json_object_is_refused(line: bytes) -> None:
    assert _reason(line) == "not a JSON object"


@pytest.mark.parametrize("field", ["token", "keyId", "plaintext", "x"])
def test_a_lone_surrogate_is_refused(field: str) -> None:
    error = _refused(b'{"type":"Encrypt","plaintext":"QQ==","%b":"\\ud800"}' % field.encode())
    assert str(error.reason) == "not a JSON object"


def test_a_pair_of_surrogates_is_one_character() -> None:
    assert decode_request(b'{"type":"Health","token":"\\ud83d\\ude00"}').token == "\N{GRINNING FACE}"


@pytest.mark.parametrize("line", [b"{}", b'{"type":null}', b'{"token":"t"}'])
def test_a_missing_type_is_named(line: bytes) -> None:
    assert _reason(line) == "type: missing"


@pytest.mark.parametrize("kind", ['"health"', '"Sign"', '""', "5", "true", "[]", '{"a":1}'])
def test_an_unknown_type_is_refused(kind: str) -> None:
    error = _refused(f'{{"type":{kind},"token":"t"}}'.encode())
    assert str(error.reason) == "type: unknown request type"
    assert error.kind is None
    assert error.token == "t"


@pytest.mark.parametrize(("kind", "field"), REQUIRED)
def test_of_a_request_that_does_not_decode_the_type_and_token_are_known(kind: str, field: str) -> None:
    error = _refused(_line(kind, token="t", **{field: []}))
    assert error.kind is not None
    assert error.kind.__name__ == kind
    assert error.token == "t"


def test_of_a_request_with_non_canonical_base64_the_type_and_token_are_known() -> None:
    error = _refused(_line("Decrypt", token="t", ciphertext="QR=="))
    assert error.kind is messages.Decrypt
    assert error.token == "t"


@pytest.mark.parametrize("field", ["type", "token", "keyId", "version", "plaintext", "ciphertext", "aad"])
@pytest.mark.parametrize("value", ["hunter2", ["hunter2"], {"hunter2": "hunter2"}])
@pytest.mark.parametrize("kind", SMALLEST)
def test_the_message_never_echoes_a_value(kind: str, field: str, value: object) -> None:
    try:
        decode_request(json.dumps({"type": kind, **SMALLEST[kind], field: value}).encode())
    except UndecodableRequestError as error:
        said = str(error) + str(error.reason)
    else:
        said = ""
    assert "hunter2" not in said


def test_a_type_that_is_given_twice_is_refused_without_an_echo_of_what_is_unknown() -> None:
    assert "hunter2" not in _reason(b'{"type":"Health","type":"hunter2"}')


@given(
    st.binary(max_size=60)
    | st.text(max_size=60).map(lambda text: b'{"type":"Encrypt","plaintext":"' + text.encode() + b'"}')
)
def test_no_line_whatsoever_raises_anything_else(line: bytes) -> None:
    try:
        decode_request(line)
    except UndecodableRequestError as error:
        reason = str(error.reason)
    else:
        reason = "it is a request"
    assert reason


@pytest.mark.parametrize("kind", SMALLEST)
def test_the_repr_of_a_request_says_its_type_alone(kind: str) -> None:
    assert repr(decode_request(_line(kind, token="hunter2"))) == f"<{kind}>"


GROUP = messages.KeyGroupView("billing", 2, [messages.VersionView(2, messages.VersionState.ACTIVE, 1_700_000_000)])


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (messages.DetailReply("ok"), '{"status":"ok","detail":"ok"}'),
        (messages.DataKeyReply(b"A", b"B"), '{"status":"ok","plaintextDataKey":"QQ==","wrappedDataKey":"Qg=="}'),
        (messages.CiphertextReply(b"A"), '{"status":"ok","ciphertext":"QQ=="}'),
        (messages.PlaintextReply(b"A"), '{"status":"ok","plaintext":"QQ=="}'),
        (
            messages.KeyGroupReply(GROUP),
            '{"status":"ok","keyGroup":{"keyId":"billing","activeVersion":2,'
            '"versions":[{"version":2,"status":"ACTIVE","createdAtEpochSec":1700000000}]}}',
        ),
        (
            messages.KeyGroupsReply([GROUP]),
            '{"status":"ok","keyGroups":[{"keyId":"billing","activeVersion":2,'
            '"versions":[{"version":2,"status":"ACTIVE","createdAtEpochSec":1700000000}]}]}',
        ),
        (
            messages.ErrorReply("AuthFailed", "invalid admin token"),
            '{"status":"error","errorCode":"AuthFailed","message":"invalid admin token"}',
        ),
    ],
)
def test_each_reply_is_the_line_of_the_contract(reply: messages.Reply, expected: str) -> None:
    assert messages.encode(reply).decode() == expected
    assert msgspec.json.decode(expected, type=type(reply)) == reply


def test_the_repr_of_a_reply_says_its_kind_alone() -> None:
    assert repr(messages.PlaintextReply(b"hunter2")) == "<PlaintextReply>"

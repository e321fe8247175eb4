"""Python's traps for whoever parses: what its JSON, integers, strings and base64 take that a stricter language would not.

Requests have theirs in `test_messages`; here are those of the keystore files, the frames, the configuration and the
names of key groups.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from base64 import b64decode, b64encode
from collections.abc import Callable
from typing import Any

import pytest

from kms.core.keyring import EMPTY, CreateGroup, KeyGroup, Keyring, KeyVersion, VersionStatus, apply
from kms.errors import ConfigError, InvalidRequestError, KeystoreError
from kms.limits import MAX_FRAME_BYTES
from kms.server.config import resolve
from kms.storage import format2, format3, format4
from kms.wire.framing import Framer
from kms.wire.messages import UndecodableRequestError, decode_request
from kms_tests.budget import within_budget
from kms_tests.fuzz import targets
from kms_tests.in_memory import Server, mint, text
from kms_tests.keks import group_of, slot

Opener = Callable[[bytes], Keyring]
Resealer = Callable[[dict[str, Any]], bytes]

KEYSTORES = [pytest.param(one.encode(), one.open, id=f"format {number}") for number, one in targets.KEYSTORES.items()]
RESEALED = [
    pytest.param(one.encode(), one.reseal, one.open, one.name, id=f"format {number}")
    for number, one in targets.KEYSTORES.items()
]
HUGE = "9" * 100_000
"""Past what Python converts at all (`sys.get_int_max_str_digits`)."""


def _replaced(raw: bytes, old: str, new: str) -> bytes:
    assert old.encode() in raw
    return raw.replace(old.encode(), new.encode(), 1)


@pytest.mark.parametrize(("raw", "open_"), KEYSTORES)
@pytest.mark.parametrize(
    "number",
    ["1.0", "1e0", "true", "null", '"1"', "NaN", "Infinity", "-Infinity", "01", "+1", "0x1", "1_0", "-0.0", "\uff11", HUGE],
)
@pytest.mark.parametrize("field", ["version", "createdAtEpochSec", "activeVersion"])
def test_a_number_of_a_keystore_is_an_integer_in_plain_digits(raw: bytes, open_: Opener, field: str, number: str) -> None:
    at = json.loads(raw)["keyGroups"][0]
    value = at[field] if field in at else at["versions"][0][field]
    with pytest.raises(KeystoreError, match="altered or damaged"):
        open_(_replaced(raw, f'"{field}":{value}', f'"{field}":{number}'))


@pytest.mark.parametrize(("raw", "open_"), KEYSTORES)
@pytest.mark.parametrize("number", ["2.0", "3.0", "true", '"3"', "NaN", HUGE, "-" + HUGE])
def test_the_format_of_a_keystore_is_an_integer(raw: bytes, open_: Opener, number: str) -> None:
    version = json.loads(raw)["formatVersion"]
    with pytest.raises(KeystoreError, match="altered or damaged"):
        open_(_replaced(raw, f'"formatVersion":{version}', f'"formatVersion":{number}'))


@pytest.mark.parametrize(("raw", "reseal", "open_", "_name"), RESEALED)
@pytest.mark.parametrize("field", ["version", "activeVersion"])
@pytest.mark.parametrize("number", [True, 1.0, -1, 0, 1 << 63, 1 << 64, 10**4000])
def test_no_other_number_is_a_version_even_with_a_right_mac(
    raw: bytes, reseal: Resealer, open_: Opener, _name: str, field: str, number: object
) -> None:
    tree = json.loads(raw)
    group = tree["keyGroups"][0]
    (group if field in group else group["versions"][0])[field] = number
    with pytest.raises(KeystoreError, match="altered or damaged"):
        open_(reseal(tree))


@pytest.mark.parametrize("number", [HUGE, "-" + HUGE, HUGE + ".0", "1e" + HUGE])
def test_a_version_of_a_hundred_thousand_digits_is_refused_at_once(number: str) -> None:
    line = f'{{"type":"DestroyVersion","keyId":"a","version":{number}}}'.encode()

    def refuse() -> None:
        with pytest.raises(UndecodableRequestError) as caught:
            decode_request(line)
        assert str(caught.value.reason).startswith("version: ")

    within_budget(refuse)


@pytest.mark.parametrize("number", [HUGE, "1.0", "1e3", "0x10", "NaN", "True", "\N{SUPERSCRIPT TWO}", "--1", "\ud800"])
def test_a_number_of_the_configuration_is_an_integer(number: str) -> None:
    with pytest.raises(ConfigError, match="MINIKMS_TCP_PORT"):
        resolve({}, {"HOME": "/nonexistent", "MINIKMS_TCP_PORT": number})


@pytest.mark.parametrize(("raw", "open_"), KEYSTORES)
@pytest.mark.parametrize("depth", [1_000, 100_000])
@pytest.mark.parametrize("bracket", ["[", '{"a":'])
def test_deep_nesting_in_a_keystore_is_refused(raw: bytes, open_: Opener, depth: int, bracket: str) -> None:
    with pytest.raises(KeystoreError, match="altered or damaged"):
        open_(_replaced(raw, '"keyGroups":[', '"keyGroups":[' + bracket * depth))


@pytest.mark.parametrize("room", [40, 400, 4_000])
def test_deep_nesting_is_refused_wherever_the_stack_ends(room: int) -> None:
    line = b'{"type":"Health","x":' + b"[" * 5_000 + b"]" * 5_000 + b"}"
    before, depth = sys.getrecursionlimit(), len(_frames())
    sys.setrecursionlimit(depth + room)
    try:
        with pytest.raises(UndecodableRequestError):
            decode_request(line)
    finally:
        sys.setrecursionlimit(before)


def _frames() -> list[object]:
    frame, frames = sys._getframe(), []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back  # type: ignore[assignment]
    return frames


@pytest.mark.parametrize(("raw", "open_"), KEYSTORES)
def test_a_field_given_twice_is_what_the_mac_was_made_of_or_is_refused(raw: bytes, open_: Opener) -> None:
    # JSON leaves open which of two counts. Whichever it is, the MAC covers it, so another value never gets in.
    other = '"keyGroups":[],'
    made = open_(raw)
    assert open_(_replaced(raw, '"keyGroups":', other + '"keyGroups":')) == made
    mac = raw.rindex(b',"mac')
    with pytest.raises(KeystoreError, match="altered or damaged"):
        open_(raw[:mac] + b',"keyGroups":[]' + raw[mac:])


@pytest.mark.parametrize(("raw", "open_"), KEYSTORES)
@pytest.mark.parametrize(
    "name", ["__proto__", "__class__", "__dict__", "constructor", "FORMATVERSION", "formatVersion ", ""]
)
def test_a_field_of_another_name_is_refused(raw: bytes, open_: Opener, name: str) -> None:
    with pytest.raises(KeystoreError, match="altered or damaged"):
        open_(_replaced(raw, "{", "{" + json.dumps(name) + ":1,"))


@pytest.mark.parametrize("name", ["__class__", "__init__", "__dict__", "__struct_fields__", "operation", "plane"])
def test_no_field_of_a_request_reaches_the_object_behind_it(name: str) -> None:
    request = decode_request(json.dumps({"type": "Health", name: "DestroyVersion"}).encode())
    assert request == decode_request(b'{"type":"Health"}')
    assert request.operation.value == "Health"


@pytest.mark.parametrize(("raw", "open_"), KEYSTORES)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_keystore_in_another_encoding_is_refused(raw: bytes, open_: Opener, encoding: str) -> None:
    with pytest.raises(KeystoreError, match="altered or damaged"):
        open_(raw.decode().encode(encoding))


def _parse4(raw: bytes) -> format4.Sealed:
    return format4.Sealed(raw, None)


@pytest.mark.parametrize(
    ("raw", "parse", "surrogate"),
    [
        *(
            (raw, parse, surrogate)
            for raw, parse in [(targets.encode4(), _parse4), (targets.encode3(), format3.Sealed)]
            for surrogate in (b"\\ud800", b"\\udc00\\ud800")
        ),
        *(
            (raw, parse, surrogate)
            for raw, parse in [
                (targets.encode4(), _parse4),
                (targets.encode3(), format3.Sealed),
                (targets.encode2(), format2.Sealed),
            ]
            for surrogate in (b"\xed\xa0\x80", b"\xff", b"\xc1\xa1", b"\xf4\x90\x80\x80")
        ),
    ],
)
def test_a_lone_surrogate_is_refused_raw_or_escaped_before_any_mac(
    raw: bytes, parse: Callable[[bytes], object], surrogate: bytes
) -> None:
    with pytest.raises(KeystoreError, match="altered or damaged"):
        parse(raw.replace(b'"default"', b'"default' + surrogate + b'"'))


def test_a_stream_in_utf_16_is_lines_that_are_refused() -> None:
    stream = '{"type":"Health"}\n{"type":"Health"}\n'.encode("utf-16")
    framer = Framer(MAX_FRAME_BYTES)
    for frame in framer.feed(stream) + framer.finish():
        with pytest.raises(UndecodableRequestError):
            decode_request(frame)


@pytest.mark.parametrize("space", ["\u00a0", "\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c"])
def test_only_a_line_feed_ends_a_line(space: str) -> None:
    line = f'{{"type":"Health",{space}"token":"a"}}'.encode()
    assert Framer(MAX_FRAME_BYTES).feed(line + b"\n") == [line]
    with pytest.raises(UndecodableRequestError):
        decode_request(line)


def _loosened(value: str) -> list[str]:
    """Other spellings of the same bytes that a lenient reader takes."""
    last = value.rstrip("=")[-1]
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    loose = value.rstrip("=")[:-1] + alphabet[alphabet.index(last) + 1] + "=" * value.count("=")
    assert b64decode(loose) == b64decode(value)
    return [loose, value + "=", value[:4] + "\n" + value[4:], " " + value, value[:4] + "=" + value[4:], value + "AA=="]


@pytest.mark.parametrize(("raw", "open_"), KEYSTORES)
def test_a_keystore_whose_base64_is_spelled_otherwise_is_refused(raw: bytes, open_: Opener) -> None:
    tree = json.loads(raw)
    values = [tree["mac"], tree["rootCheck"], tree["kdf"]["salt"]] if "mac" in tree else []
    values += [tree[name] for name in ("macBase64", "rootVerificationTokenBase64", "saltBase64") if name in tree]
    values.append(next(v for v in tree["keyGroups"][0]["versions"][0].values() if isinstance(v, str) and len(v) > 40))
    for value in values:
        for other in _loosened(value) if value.endswith("=") else [value + "=", " " + value, value + "\n"]:
            with pytest.raises(KeystoreError, match="altered or damaged"):
                open_(_replaced(raw, value, json.dumps(other)[1:-1]))


LOOKALIKES = [
    "billing",
    "Billing",
    "BILLING",
    " billing",
    "billing ",
    "billing\t",
    "bill\u200bing",
    "billing\0",
    "billing\0\0",
    "b\u0131lling",
    "\uff42\uff49\uff4c\uff4c\uff49\uff4e\uff47",
    "caf\u00e9",
    "cafe\u0301",
    "\u00c5",
    "A\u030a",
    "\u212b",
    "stra\u00dfe",
    "strasse",
    "..",
    "../billing",
    "%62illing",
]
"""Names that some part of a system is apt to take for one another."""


def _lookalikes() -> Keyring:
    keyring = EMPTY
    groups: dict[str, KeyGroup] = {}
    for name in LOOKALIKES:
        key, wrapped = mint(slot(name))
        version = KeyVersion.build(name, 1, VersionStatus.ACTIVE, 1, wrapped, key)
        groups[name] = group_of(name, {1: version}, created_at=1)
    return Keyring(keyring.generation, groups)


def test_the_lookalikes_are_ones() -> None:
    folded = {unicodedata.normalize("NFKC", name).casefold().strip("\0 \t\u200b") for name in LOOKALIKES}
    assert len(folded) < len(LOOKALIKES) == len(set(LOOKALIKES))


@pytest.mark.parametrize("name", LOOKALIKES)
def test_a_name_is_only_itself(name: str) -> None:
    server = Server()
    server.manager.current = _lookalikes()
    sealed = b64decode(server.ask("Encrypt", keyId=name, plaintext=text(name.encode()))["ciphertext"])
    assert sealed[3 : 3 + sealed[2]] == name.encode()
    assert server.ask("Decrypt", ciphertext=b64encode(sealed).decode())["plaintext"] == text(name.encode())
    for other in LOOKALIKES:
        if other != name:
            renamed = bytes((3, 1, len(other.encode()))) + other.encode() + sealed[3 + sealed[2] :]
            assert server.ask("Decrypt", ciphertext=text(renamed))["errorCode"] == "DecryptionFailed"


@pytest.mark.parametrize("name", [name for name in LOOKALIKES if not name.isascii() or not name.isalpha()])
def test_no_group_is_made_under_a_name_that_could_be_taken_for_another(name: str) -> None:
    with pytest.raises(InvalidRequestError, match="keyId"):
        apply(EMPTY, CreateGroup(name), now=1, mint=mint)


@pytest.mark.parametrize("name", ["billing\n", "billing\r\n", "\nbilling", "bill\ning", "billing\u2028"])
def test_a_line_end_is_no_part_of_a_new_name(name: str) -> None:
    # `$` of a regular expression matches before a last line feed.
    with pytest.raises(InvalidRequestError, match="keyId"):
        apply(EMPTY, CreateGroup(name), now=1, mint=mint)


@pytest.mark.parametrize(("raw", "reseal", "open_", "name_field"), RESEALED)
@pytest.mark.parametrize("name", [" \t\n", "\x1c", ""])
def test_a_keystore_with_a_blank_name_is_refused_even_with_a_right_mac(
    raw: bytes, reseal: Resealer, open_: Opener, name_field: str, name: str
) -> None:
    tree = json.loads(raw)
    tree["keyGroups"][0][name_field] = name
    with pytest.raises(KeystoreError, match="altered or damaged"):
        open_(reseal(tree))

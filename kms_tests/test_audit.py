"""The audit log's format: what a line is, what its MAC is over, and how a log's end is read."""

from __future__ import annotations

import copy
import hmac
import json
import pickle
from base64 import b64decode, b64encode

import pytest
from cryptography.exceptions import AlreadyFinalized
from hypothesis import given
from hypothesis import strategies as st

from kms.core.audit import (
    NEW_CHAIN,
    AuditKeys,
    Chain,
    EventRecord,
    Head,
    OperationRecord,
    Torn,
    decode_head,
    is_torn,
    parse,
    read_tail,
    seal,
    to_text,
)
from kms.core.secret import Secret
from kms.errors import DecryptionFailedError
from kms.limits import (
    AUDIT_HEAD_SLOT_BYTES,
    MAX_AUDIT_HEAD_BYTES,
    MAX_AUDIT_LINE_BYTES,
    MAX_GROUP_NAME_BYTES,
    MAX_REQUEST_ID_CHARACTERS,
    MAX_VERSION,
)
from kms_tests.audit_logs import TIME, Writer, audit_keys, lines, operation
from kms_tests.strategies import stored_names


def test_a_record_is_a_line_of_json_with_its_mac_at_the_end() -> None:
    data, _ = seal([operation(7)], NEW_CHAIN, audit_keys())
    assert data.startswith(
        b'{"seq":1,"time":"2026-01-31T12:00:00.000001Z","connection":3,"request":7,"principal":"billing","uid":1001,"pid":4711,'
        b'"operation":"Encrypt","group":"billing","version":2,"outcome":"ok","generation":5,"mac":"'
    )
    assert data.endswith(b'"}\n')
    assert data.count(b"\n") == 1


def test_what_does_not_apply_is_left_out_and_a_generation_of_0_is_not() -> None:
    record = OperationRecord(time=TIME, connection=1, request=1, operation="-", outcome="refused", generation=0)
    data, _ = seal([record], NEW_CHAIN, audit_keys())
    assert list(json.loads(data)) == ["seq", "time", "connection", "request", "operation", "outcome", "generation", "mac"]


def test_the_mac_is_over_the_mac_before_and_the_line_without_its_own() -> None:
    data, chain = seal([operation(1), operation(2)], NEW_CHAIN, audit_keys(3))
    previous = bytes(32)
    for line in data.splitlines():
        mac = json.loads(line)["mac"]
        body = line.replace(b',"mac":"' + mac.encode() + b'"', b"")
        previous = hmac.digest(b"\3" * 32, previous + body, "sha256")
        assert mac == b64encode(previous).decode()
    assert chain == Chain(2, previous)


def test_sealing_takes_nothing_over() -> None:
    chain = Chain(9, b"m" * 32)
    one = seal([operation()], chain, audit_keys())
    assert seal([operation()], chain, audit_keys()) == one
    assert one[1].seq == 10


def test_a_batch_is_what_its_records_are_one_by_one() -> None:
    keys = audit_keys()
    together = seal([operation(number) for number in range(5)], NEW_CHAIN, keys)
    chain, apart = NEW_CHAIN, b""
    for number in range(5):
        data, chain = seal([operation(number)], chain, keys)
        apart += data
    assert (apart, chain) == together


def test_no_record_is_longer_than_a_line_may_be() -> None:
    name = "\x01" * MAX_GROUP_NAME_BYTES
    record = OperationRecord(
        time=TIME,
        connection=MAX_VERSION,
        request=MAX_VERSION,
        request_id="\U0001f511" * MAX_REQUEST_ID_CHARACTERS,
        principal="x" * 64,
        uid=(1 << 32) - 1,
        pid=1 << 31,
        port=65535,
        operation="GenerateDataKey",
        group=name,
        version=MAX_VERSION,
        from_group=name,
        from_version=MAX_VERSION,
        outcome="refused",
        error_code="DecryptionFailed",
        generation=MAX_VERSION,
    )
    data, chain = seal([record], Chain(MAX_VERSION - 1, bytes(32)), audit_keys())
    assert len(data) < MAX_AUDIT_LINE_BYTES / 2
    line = parse(data)
    assert line is not None
    assert line.is_after(bytes(32), audit_keys())
    head = Head(chain.seq, MAX_VERSION, to_text(chain.mac).decode()).encode(audit_keys())
    assert len(head) == AUDIT_HEAD_SLOT_BYTES == MAX_AUDIT_HEAD_BYTES / 2


@given(stored_names, st.text(max_size=64), st.integers(0, MAX_VERSION))
def test_every_record_is_taken_apart_as_it_was_sealed(group: str, principal: str, generation: int) -> None:
    record = OperationRecord(
        time=TIME,
        connection=1,
        request=2,
        principal=principal,
        operation="Decrypt",
        group=group,
        outcome="ok",
        generation=generation,
    )
    data, chain = seal([record], Chain(41, b"p" * 32), audit_keys())
    line = parse(data)
    assert line is not None
    assert (line.mac, line.claims.seq, line.claims.generation) == (chain.mac, 42, generation)
    assert json.loads(line.body)["group"] == group
    assert line.is_after(b"p" * 32, audit_keys())
    assert not line.is_after(b"q" * 32, audit_keys())
    assert not line.is_after(b"p" * 32, audit_keys(2))


@given(st.data())
def test_no_flipped_bit_leaves_a_line_authentic(data: st.DataObject) -> None:
    sealed, _ = seal([operation()], NEW_CHAIN, audit_keys())
    line = bytearray(sealed[:-1])
    bit = data.draw(st.integers(0, 8 * len(line) - 1))
    line[bit // 8] ^= 1 << bit % 8
    altered = parse(bytes(line))
    assert altered is None or not altered.is_after(bytes(32), audit_keys())


def test_a_mac_has_one_text() -> None:
    # Two bits of the last character decode to nothing.
    data, chain = seal([operation()], NEW_CHAIN, audit_keys())
    text = to_text(chain.mac)
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    position = alphabet.index(text[42])
    twins = [text[:42] + alphabet[position ^ bits : (position ^ bits) + 1] + b"=" for bits in (1, 2, 3)]
    assert all(b64decode(twin) == chain.mac for twin in twins)
    assert [parse(data.replace(text, twin)) for twin in twins] == [None] * 3


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b'{"seq":1,"mac":"' + b"A" * 43 + b'="}',
        b'{"seq":1,"time":"","generation":1,"mac":"' + b"A" * 44 + b'"}',
        b'{"seq":1,"time":"","generation":1,"mac":"' + b"A" * 42 + b'*="}',
        b'{"seq":"1","time":"","generation":1,"mac":"' + b"A" * 43 + b'="}',
        b'{"seq":1,"time":"\xff","generation":1,"mac":"' + b"A" * 43 + b'="}',
        b'{"a":' + b"[" * 8000 + b',"mac":"' + b"A" * 43 + b'="}',
        b'{"seq":1,"time":"","generation":1,"mac":"' + b"A" * 43 + b'="} ',
    ],
)
def test_what_has_not_the_form_of_a_record_is_none(line: bytes) -> None:
    assert parse(line) is None


def test_previous_is_given_as_a_mac_or_as_nothing_at_all() -> None:
    def previous(text: str | None) -> bytes | None:
        data, _ = seal([EventRecord(time=TIME, event="Start", previous=text, generation=1)], NEW_CHAIN, audit_keys())
        line = parse(data)
        assert line is not None
        return line.previous

    assert previous(None) is None
    assert previous("") == bytes(32)
    assert previous(to_text(b"m" * 32).decode()) == b"m" * 32
    assert previous("nonsense") is None


# The keys


def test_keys_say_nothing_and_are_neither_copied_nor_pickled() -> None:
    keys = audit_keys()
    assert repr(keys) == "<AuditKeys>"
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError):
            attempt(keys)


def test_wiped_keys_do_nothing_more() -> None:
    keys = audit_keys()
    keys.wipe()
    keys.wipe()
    with pytest.raises(AlreadyFinalized):
        keys.mac(b"")
    with pytest.raises(DecryptionFailedError):
        audit_keys(2).sealed_for(keys)
    with keys._material.view() as view:
        assert bytes(view) == bytes(64)


def test_keys_are_opened_by_those_they_were_sealed_for_alone() -> None:
    sealed = audit_keys(1).sealed_for(audit_keys(2))
    assert audit_keys(2).open_predecessor(sealed).mac(b"m") == audit_keys(1).mac(b"m")
    for other in (audit_keys(1), audit_keys(3)):
        with pytest.raises(DecryptionFailedError):
            other.open_predecessor(sealed)
    with pytest.raises(DecryptionFailedError):
        audit_keys(2).open_predecessor(b"")


def test_keys_are_joined_of_the_two_sub_keys() -> None:
    mac, wrap = Secret(bytearray(b"m" * 32)), Secret(bytearray(b"w" * 32))
    joined = AuditKeys.join(mac, wrap)
    assert joined.mac(b"x") == hmac.digest(b"m" * 32, b"x", "sha256")
    assert joined.open_predecessor(audit_keys().sealed_for(joined)).mac(b"x") == audit_keys().mac(b"x")


# The head


@given(st.integers(0, MAX_VERSION), st.integers(0, MAX_VERSION), st.binary(min_size=32, max_size=32))
def test_a_head_is_decoded_under_its_own_keys_alone(seq: int, generation: int, mac: bytes) -> None:
    head = Head(seq, generation, to_text(mac).decode())
    raw = head.encode(audit_keys())
    assert decode_head(raw, audit_keys()) == head
    assert head.chain == Chain(seq, mac)
    assert decode_head(raw, audit_keys(2)) is None


def test_no_altered_head_is_decoded() -> None:
    raw = Head(5, 1, to_text(bytes(32)).decode()).encode(audit_keys())
    for bit in range(8 * len(raw)):
        altered = bytearray(raw)
        altered[bit // 8] ^= 1 << bit % 8
        assert decode_head(bytes(altered), audit_keys()) is None
    for length in range(len(raw)):
        assert decode_head(raw[:length], audit_keys()) is None
    assert decode_head(raw + b"\n", audit_keys()) is None


def test_of_two_slots_the_later_counts_and_of_one_that_a_crash_has_cut_short_the_other() -> None:
    slots = [Head(seq, 1, to_text(bytes(32)).decode()).encode(audit_keys()) for seq in (5, 6)]
    for one, other in (slots, reversed(slots)):
        head = decode_head(one + other, audit_keys())
        assert head is not None
        assert head.seq == 6
    for length in range(AUDIT_HEAD_SLOT_BYTES):
        for cut in (slots[1][:length].ljust(AUDIT_HEAD_SLOT_BYTES, b"\0"), slots[1][:length] + bytes(512 - length)):
            for raw in (slots[0] + cut, cut + slots[0]):
                head = decode_head(raw, audit_keys())
                assert head is not None
                assert head.seq == 5


def test_a_head_of_one_line_as_earlier_versions_wrote_it_is_read() -> None:
    line = Head(5, 1, to_text(bytes(32)).decode()).encode(audit_keys()).rstrip() + b"\n"
    head = decode_head(line, audit_keys())
    assert head is not None
    assert head.seq == 5
    assert decode_head(line[:-1], audit_keys()) is None
    assert decode_head(line + b"\n", audit_keys()) is None


def test_a_line_is_no_head_nor_a_head_a_line() -> None:
    head = Head(5, 1, to_text(bytes(32)).decode())
    body = head.encode(audit_keys()).rstrip()[:-53] + b"}"
    as_line = body[:-1] + b',"mac":"' + to_text(audit_keys().mac(bytes(32) + body)) + b'"}\n'
    assert decode_head(as_line, audit_keys()) is None


# The end of a file


def _log(*debris: bytes) -> tuple[Writer, bytes]:
    log = Writer()
    log.begin_file()
    log.add(*(operation(number) for number in range(5)))
    return log, bytes(log.files[0]) + b"".join(debris)


def test_a_log_ends_with_its_last_record() -> None:
    log, raw = _log()
    tail = read_tail(raw, log.keys)
    assert tail is not None
    assert (tail.chain, tail.generation, tail.rest, tail.is_closed, tail.predecessor) == (log.chain, 5, b"", True, None)


def test_a_part_of_a_log_is_enough_to_tell_its_end() -> None:
    log, raw = _log()
    tail = read_tail(b"".join(lines(raw)[-2:]), log.keys)
    assert tail is not None
    assert tail.chain == log.chain
    with pytest.raises(DecryptionFailedError):
        read_tail(b"".join(lines(raw)[-1:]), log.keys)


@pytest.mark.parametrize("debris", [b"{", b'{"seq":', b"\0" * 4096, b"{\n", b"{\n{", b"\n"])
def test_what_stands_behind_the_last_record_is_torn(debris: bytes) -> None:
    log, raw = _log(debris)
    tail = read_tail(raw, log.keys)
    assert tail is not None
    assert (tail.chain, tail.rest) == (log.chain, debris)


def test_a_last_record_without_its_line_end_is_whole() -> None:
    log, raw = _log()
    tail = read_tail(raw[:-1], log.keys)
    assert tail is not None
    assert (tail.chain, tail.rest, tail.is_closed) == (log.chain, b"", False)


@pytest.mark.parametrize("raw", [b"", b"{", b"{}\n{}\n"])
def test_where_there_is_no_record_there_is_no_end(raw: bytes) -> None:
    assert read_tail(raw, audit_keys()) is None


def test_an_altered_end_is_refused() -> None:
    log, raw = _log()
    content = lines(raw)
    for altered in (
        [*content[:-1], content[-1].replace(b'"ok"', b'"refused"')],
        [*content[:-2], content[-1]],
        [*content[:-1], content[-1], content[-1]],
        [*content[:-1], b"{}\n", content[-1]],
    ):
        with pytest.raises(DecryptionFailedError):
            read_tail(b"".join(altered), log.keys)
    with pytest.raises(DecryptionFailedError):
        read_tail(raw, audit_keys(2))


def test_a_last_record_that_names_what_is_torn_before_it_is_the_end() -> None:
    log, raw = _log(b'{"se\n')
    log.files[0] = bytearray(raw)
    torn = Torn.of(b'{"se')
    log.add(EventRecord(event="Recover", torn=torn.length, torn_sha256=torn.digest))
    tail = read_tail(bytes(log.files[0]), log.keys)
    assert tail is not None
    assert tail.chain == log.chain


def test_a_log_that_hands_over_is_read_with_the_keys_behind() -> None:
    log, _ = _log()
    log.add(EventRecord(event="ChangePassphrase", sealed_key=log.keys.sealed_for(audit_keys(2))))
    tail = read_tail(bytes(log.files[0]), audit_keys(2))
    assert tail is not None
    assert tail.predecessor is not None
    assert tail.predecessor.mac(b"") == log.keys.mac(b"")
    tail = read_tail(bytes(log.files[0]), log.keys)
    assert tail is not None
    assert tail.predecessor is None
    with pytest.raises(DecryptionFailedError):
        read_tail(bytes(log.files[0]), audit_keys(3))


def test_an_altered_record_that_hands_over_is_no_end() -> None:
    log, _ = _log()
    log.add(EventRecord(event="ChangePassphrase", sealed_key=log.keys.sealed_for(audit_keys(2))))
    altered = bytes(log.files[0]).replace(
        b'"event":"ChangePassphrase","generation":5', b'"event":"ChangePassphrase","generation":1'
    )
    assert altered != log.files[0]
    with pytest.raises(DecryptionFailedError):
        read_tail(altered, audit_keys(2))


@pytest.mark.parametrize("rest", [b"", b"{", b'{"seq":', b'{"seq":7', b'{"seq":7,', b'{"seq":7,"time":"2026', b"\0" * 4096])
def test_a_crash_leaves_one_unfinished_line_that_begins_as_the_next_record_would_or_zeros(rest: bytes) -> None:
    assert is_torn(rest, 7)
    assert is_torn(rest + b"\0\0", 7)


@pytest.mark.parametrize(
    "rest",
    [
        b"\n",
        b"{\n",
        b"x",
        b'{"seq":7,"event":"Stop"}',
        b'{"seq":8,',
        b'{"seq":77',
        b'{"seq":7}',
        b'{"seq":7,"time":"2026"}\n',
    ],
)
def test_a_crash_leaves_nothing_else(rest: bytes) -> None:
    assert not is_torn(rest, 7)


@pytest.mark.parametrize("field", ["seq", "generation", "torn", "count"])
@pytest.mark.parametrize("number", ["9" * 4299, "9" * 5000, "9223372036854775808", "-5", "1e400", "1.5"])
def test_a_number_beyond_its_bounds_is_no_record(field: str, number: str) -> None:
    log, raw = _log()
    line = json.loads(lines(raw)[-1])
    mac = line.pop("mac")
    line[field] = 0
    body = json.dumps(line, separators=(",", ":")).replace(f'"{field}":0', f'"{field}":{number}')
    assert parse(f'{body[:-1]},"mac":"{mac}"}}'.encode()) is None
    assert log.chain.seq == 6

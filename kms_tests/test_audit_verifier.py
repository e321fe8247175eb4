"""Verifying a log: whatever is done to one is found, and what happens to a sound one is not taken for it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms.core.audit import NEW_CHAIN, AuditKeys, Chain, EventRecord, Head, Torn, seal, to_text
from kms.core.audit_verifier import Verifier
from kms.core.secret import Secret
from kms.limits import MAX_AUDIT_LINE_BYTES, MAX_FINDINGS_SHOWN
from kms_tests.audit_logs import TIME, Writer, audit_keys, lines, operation, three_files, told, verified

EDITS = 1000


@pytest.fixture(scope="module")
def log() -> Writer:
    return three_files()


def test_a_sound_log_of_three_files_is_authentic(log: Writer) -> None:
    report = verified(log.files, head=log.head)
    assert (report.count, told(report)) == (0, [])
    assert [(span.first, span.last, span.records) for span in report.spans] == [(1, 20, 20), (21, 40, 20), (41, 60, 20)]
    assert (report.spans[0].begins, report.seq, report.generation) == (TIME, 60, 8)


# One edit


def _flip(files: list[list[bytes]], choose: random.Random, _: list[bytes]) -> str:
    file = choose.choice(files)
    number = choose.randrange(len(file))
    line = bytearray(file[number])
    position = choose.randrange(len(line))
    line[position] ^= 1 << choose.randrange(8)
    file[number] = bytes(line)
    return f"bit of byte {position} of line {number + 1}"


def _change(files: list[list[bytes]], choose: random.Random, _: list[bytes]) -> str:
    file = choose.choice(files)
    number = choose.randrange(len(file))
    for old, new in ((b'"ok"', b'"refused"'), (b'"refused"', b'"ok"'), (b'"generation":', b'"generation":1')):
        if old in file[number]:
            file[number] = file[number].replace(old, new)
            return f"{old!r} of line {number + 1}"
    raise AssertionError


def _remove(files: list[list[bytes]], choose: random.Random, _: list[bytes]) -> str:
    file = choose.choice(files)
    number = choose.randrange(len(file))
    del file[number]
    return f"line {number + 1} removed"


def _repeat(files: list[list[bytes]], choose: random.Random, _: list[bytes]) -> str:
    file = choose.choice(files)
    number = choose.randrange(len(file))
    file.insert(choose.randrange(number, len(file)) + 1, file[number])
    return f"line {number + 1} again"


def _swap(files: list[list[bytes]], choose: random.Random, _: list[bytes]) -> str:
    file = choose.choice(files)
    one, other = choose.sample(range(len(file)), 2)
    file[one], file[other] = file[other], file[one]
    return f"lines {one + 1} and {other + 1} swapped"


def _insert(files: list[list[bytes]], choose: random.Random, _: list[bytes]) -> str:
    file = choose.choice(files)
    number = choose.randrange(len(file) + 1)
    file.insert(number, choose.choice((b"\n", b"{}\n", choose.randbytes(90).replace(b"\n", b"") + b"\n")))
    return f"a line inserted at {number + 1}"


def _splice(files: list[list[bytes]], choose: random.Random, other: list[bytes]) -> str:
    file = choose.choice(files)
    number = choose.randrange(len(file))
    if choose.random() < 0.5:
        file.insert(number, choose.choice(other))
        return f"a line of another log inserted at {number + 1}"
    file[number] = other[number]
    return f"line {number + 1} replaced by that of another log"


def _cut_lines(files: list[list[bytes]], choose: random.Random, _: list[bytes]) -> str:
    file = choose.choice(files)
    number = choose.randrange(len(file))
    del file[number:]
    return f"lines {number + 1} and on cut off"


def _cut_within(files: list[list[bytes]], choose: random.Random, _: list[bytes]) -> str:
    file = choose.choice(files)
    number = choose.randrange(len(file))
    keep = choose.randrange(1, len(file[number]) - 1)
    file[number:] = [file[number][:keep]]
    return f"cut off in line {number + 1}"


def _cut_begin(files: list[list[bytes]], choose: random.Random, _: list[bytes]) -> str:
    file = choose.choice(files)
    # Of the whole of the oldest it is said that it is not here.
    number = choose.randrange(1, len(file))
    del file[:number]
    return f"lines up to {number} cut off"


def _join(files: list[list[bytes]], choose: random.Random, _: list[bytes]) -> str:
    at = choose.randrange(len(files) - 1)
    files[at : at + 2] = [files[at] + files[at + 1]]
    return f"files {at + 1} and {at + 2} joined"


def _join_other(files: list[list[bytes]], choose: random.Random, other: list[bytes]) -> str:
    file = choose.choice(files)
    file[0:0] = other[: choose.randrange(1, len(other))]
    return "the beginning of another log in front"


def _old_prefix(files: list[list[bytes]], choose: random.Random, _: list[bytes]) -> str:
    source, target = choose.sample(range(len(files)), 2)
    count = choose.randrange(1, len(files[source]))
    files[target][:count] = files[source][:count]
    return f"{count} lines of file {source + 1} over those of file {target + 1}"


def _reorder_files(files: list[list[bytes]], choose: random.Random, _: list[bytes]) -> str:
    one, other = choose.sample(range(len(files)), 2)
    files[one], files[other] = files[other], files[one]
    return f"files {one + 1} and {other + 1} swapped"


def _move_line_to_the_file_before(files: list[list[bytes]], choose: random.Random, _: list[bytes]) -> str:
    at = choose.randrange(1, len(files))
    files[at - 1].append(files[at].pop(0))
    return f"the first line of file {at + 1} moved to the one before"


def _split(files: list[list[bytes]], choose: random.Random, _: list[bytes]) -> str:
    at = choose.randrange(len(files))
    number = choose.randrange(1, len(files[at]))
    files[at : at + 1] = [files[at][:number], files[at][number:]]
    return f"file {at + 1} split at line {number + 1}"


def _remove_file(files: list[list[bytes]], choose: random.Random, _: list[bytes]) -> str:
    at = choose.randrange(1, len(files))
    del files[at]
    return f"file {at + 1} removed"


ONE_EDIT: list[Callable[[list[list[bytes]], random.Random, list[bytes]], str]] = [
    _flip,
    _change,
    _remove,
    _repeat,
    _swap,
    _insert,
    _splice,
    _cut_lines,
    _cut_within,
    _cut_begin,
    _join,
    _split,
    _join_other,
    _old_prefix,
    _reorder_files,
    _move_line_to_the_file_before,
    _remove_file,
]


def _unfound(log: Writer, verify: Callable[[list[bytes]], Verifier]) -> list[str]:
    """Which of a thousand edits `verify` does not find. Lines of another log are under the same keys."""
    other = Writer(log.keys)
    other.begin_file()
    other.add(*(operation(number, "GenerateDataKey") for number in range(40)))
    choose = random.Random(20260131)
    missed = []
    for number in range(EDITS):
        files = [lines(content) for content in log.files]
        edit = ONE_EDIT[number % len(ONE_EDIT)](files, choose, lines(other.files[0]))
        content = [b"".join(file) for file in files]
        if content == log.files:
            continue
        if not verify(content).count:
            missed.append(edit)
    return missed


def test_each_of_a_thousand_random_edits_is_found(log: Writer) -> None:
    assert _unfound(log, lambda files: verified(files, head=log.head)) == []


def test_a_single_edit_is_a_few_findings_and_not_one_for_each_line_behind_it(log: Writer) -> None:
    choose = random.Random(7)
    for edit in (_flip, _change, _remove, _repeat, _insert):
        for _ in range(40):
            files = [lines(content) for content in log.files]
            what = edit(files, choose, [])
            assert 1 <= verified([b"".join(file) for file in files], head=log.head).count <= 3, what


def test_without_the_head_it_is_only_missed_what_was_cut_off_the_end(log: Writer) -> None:
    missed = _unfound(log, verified)
    assert missed
    assert {edit for edit in missed if "cut off" not in edit} <= {"line 20 removed", "file 3 removed"}


# Tests of the tests: a verifier that lacks one of its guards misses some of the thousand.


class _Unchained(AuditKeys):
    """Their MAC is over the line alone."""

    def mac(self, message: bytes) -> bytes:
        return super().mac(message[32:])


def test_without_the_chain_an_edit_would_be_missed(log: Writer) -> None:
    keys = _Unchained(Secret(bytearray(64)))
    unchained = three_files(keys)
    assert verified(unchained.files, [keys], unchained.head).count == 0
    missed = _unfound(unchained, lambda files: verified(files, [keys], unchained.head))
    assert any("replaced by that of another log" in edit for edit in missed)


def test_with_debris_excused_anywhere_an_edit_would_be_missed(log: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Verifier, "_report_debris", lambda self: setattr(self, "_debris", None))
    assert any("inserted" in edit for edit in _unfound(log, lambda files: verified(files, head=log.head)))


# What is found, in words


def _one(files: Sequence[bytes | bytearray], head: Head | None = None) -> str:
    report = verified(files, head=head)
    assert report.count == 1, told(report)
    return told(report)[0]


def _edited(log: Writer, file: int, line: int, *new: bytes) -> list[bytes]:
    files = [bytes(content) for content in log.files]
    content = lines(files[file - 1])
    content[line - 1 : line] = new
    files[file - 1] = b"".join(content)
    return files


def test_a_changed_record_is_named(log: Writer) -> None:
    line = lines(log.files[1])[4]
    files = _edited(log, 2, 5, line.replace(b"billing", b"payroll"))
    assert _one(files) == "log.2:5: record 25 was altered, or one before it"


def test_missing_records_are_named(log: Writer) -> None:
    assert _one(_edited(log, 2, 5)) == "log.2:5: record 25 is missing before record 26"
    files = [bytes(log.files[0]), bytes(log.files[2])]
    assert _one(files) == "log.2:1: record 41 begins a file, but not the one that goes on from record 20"


def test_a_record_that_stands_twice_is_named(log: Writer) -> None:
    line = lines(log.files[0])[3]
    assert _one(_edited(log, 1, 4, line, line)) == (
        "log.1:5: record 4 stands here again, or in the wrong place: record 5 was to follow"
    )


def test_older_files_that_were_not_given_are_named_and_are_no_finding(log: Writer) -> None:
    report = verified(log.files[1:], head=log.head)
    assert report.count == 0
    assert told(report) == ["log.1:1: records 1 to 20 are not here: to verify them too, give the older files first"]


def test_a_file_that_lost_its_beginning_is_not_taken_for_a_newer_one(log: Writer) -> None:
    rest = b"".join(lines(log.files[1])[6:])
    assert "log.1:1: does not begin with the first record of a file: what stood before record 27 is gone" in told(
        verified([rest, log.files[2]])
    )


def test_a_log_that_was_cut_short_is_found_by_its_head(log: Writer) -> None:
    files = _edited(log, 3, 20)
    assert _one(files, log.head) == "log.3:0: was cut short: it ends with record 59, and record 60 was in it"


def test_a_log_without_any_record_is_found_by_its_head(log: Writer) -> None:
    assert "ends with record 0" in _one([b""], log.head)


def test_a_head_may_name_an_earlier_record_of_the_log_but_no_other(log: Writer) -> None:
    mac = lines(log.files[2])[-3][-47:-3].decode()
    assert verified(log.files, head=Head(58, 7, mac)).count == 0
    assert _one([bytes(file) for file in log.files], Head(57, 7, mac)) == (
        "log.3:17: record 57 is not the one that the head file names"
    )


def test_of_many_findings_the_first_are_shown_and_all_are_counted(log: Writer) -> None:
    report = verified([b"".join(reversed(lines(content))) for content in log.files])
    assert len(report.findings) == MAX_FINDINGS_SHOWN
    assert report.count > 40


def test_under_other_keys_nothing_is_authentic(log: Writer) -> None:
    report = verified(log.files, [audit_keys(2)], log.head)
    assert report.count >= 60
    assert [span.records for span in report.spans] == [0, 0, 0]


def test_records_out_of_number_are_findings_even_where_the_chain_is_right() -> None:
    log = Writer()
    log.begin_file()
    log.chain = Chain(7, log.chain.mac)
    log.add(operation())
    log.chain = Chain(2, log.chain.mac)
    log.add(operation())
    assert told(verified(log.files)) == [
        "log.1:2: records 2 to 7 are missing before record 8",
        "log.1:3: record 3 stands here again, or in the wrong place: record 9 was to follow",
    ]


def test_a_chain_begins_with_record_1() -> None:
    data, _ = seal(
        [EventRecord(event="Start", previous="", time=TIME, generation=0)], Chain(4, NEW_CHAIN.mac), audit_keys()
    )
    assert _one([data]) == "log.1:1: records 1 to 4 are missing before record 5"


def test_a_generation_goes_down_only_where_a_rollback_was_accepted() -> None:
    log = Writer()
    log.begin_file()
    log.generation = 3
    log.add(EventRecord(event="Start", accepted_rollback=True), operation())
    assert verified(log.files).count == 0
    log.generation = 2
    log.add(operation())
    assert _one([bytes(file) for file in log.files]) == (
        "log.1:4: record 4 was written at generation 2 of the keystore, behind one at 3: an older keystore was put back"
    )


# Torn writes


def _torn(log: Writer, debris: bytes, **changes: object) -> EventRecord:
    named = Torn.of(debris)
    event = EventRecord(event="Recover", torn=named.length, torn_sha256=named.digest)
    for name, value in changes.items():
        setattr(event, name, value)
    return event


def test_one_unfinished_line_at_the_very_end_is_tolerated_and_told(log: Writer) -> None:
    files = [*log.files[:2], log.files[2] + b'{"seq":61,"ti']
    report = verified(files, head=log.head)
    assert report.count == 0
    assert told(report) == [
        "log.3:21: the last line is torn: 13 bytes of a record that a crash cut short, or is being written"
    ]


@pytest.mark.parametrize("debris", [b"{\n", b"{\n{", b"x" * (MAX_AUDIT_LINE_BYTES + 1), b"\n"])
def test_nothing_else_at_the_end_is(log: Writer, debris: bytes) -> None:
    assert verified([*log.files[:2], log.files[2] + debris], head=log.head).count == 1


def test_an_unfinished_line_at_the_end_of_an_older_file_is_a_finding(log: Writer) -> None:
    assert _one([log.files[0] + b'{"seq"', *log.files[1:]], log.head) == "log.1:21: is not a record"


def test_a_record_at_the_end_may_lack_its_line_end(log: Writer) -> None:
    report = verified([*log.files[:2], log.files[2][:-1]], head=log.head)
    assert (report.count, told(report)) == (0, [])


@pytest.mark.parametrize("debris", [b'{"seq":2', b'{"seq":2\n', b'{"se\n{"seq":2,', b"\0" * 5000, b"x" * 20000])
def test_a_torn_write_is_excused_by_the_record_that_names_it(debris: bytes) -> None:
    log = Writer()
    log.begin_file()
    log.files[-1] += debris + b"\n"
    log.add(_torn(log, debris), operation())
    report = verified(log.files)
    assert report.count == 0
    assert f"follows a write that was cut short: {len(debris)} bytes of it are left" in told(report)[0]


@pytest.mark.parametrize("debris", [b'{"seq":2', b'{"seq":2\n', b"x" * 20000])
def test_so_is_one_at_the_end_of_the_file_before(debris: bytes) -> None:
    log = Writer()
    log.begin_file()
    log.files[-1] += debris
    previous = to_text(log.chain.mac).decode()
    log.files.append(bytearray())
    log.add(_torn(log, debris, event="Continue", previous=previous), operation())
    assert verified(log.files).count == 0


def test_so_is_one_before_the_first_record_of_a_file() -> None:
    log = Writer()
    log.files.append(bytearray(b"{\n"))
    log.add(_torn(log, b"{", event="Start", previous=""))
    assert verified(log.files).count == 0


@pytest.mark.parametrize(
    "found", [b"", b"{\n", b'{"sex":2\n', b'{"seq":2\n\n', b'{"seq":2,\n', b'{"seq":2\n{}\n', b' {"seq":2\n']
)
def test_other_bytes_than_those_it_names_are_not_excused(found: bytes) -> None:
    log = Writer()
    log.begin_file()
    log.files[-1] += found
    log.add(_torn(log, b'{"seq":2'), operation())
    assert verified(log.files).count >= 1


def test_a_record_that_is_no_authentic_one_excuses_nothing() -> None:
    log = Writer()
    log.begin_file()
    stranger = Writer(audit_keys(2))
    stranger.files.append(bytearray(b"{\n"))
    stranger.chain = log.chain
    stranger.add(_torn(log, b"{"))
    log.files[-1] += stranger.files[0]
    assert verified(log.files).count == 2


# Changes of the passphrase


def _hand_over(log: Writer, successor: AuditKeys) -> None:
    log.add(EventRecord(event="ChangePassphrase", sealed_key=log.keys.sealed_for(successor)))


def test_records_go_on_under_the_next_keys_behind_the_record_that_hands_over() -> None:
    keys = [audit_keys(number) for number in (1, 2, 3)]
    log = Writer(keys[0])
    for successor in (*keys[1:], None):
        log.begin_file()
        log.add(operation())
        if successor is not None:
            _hand_over(log, successor)
            log.keys = successor
    report = verified(log.files, keys, log.head)
    assert (report.count, report.seq) == (0, 8)
    # With the keys of the second alone, what was under the first is not authentic.
    assert verified(log.files, keys[1:]).count >= 3


def test_behind_a_change_that_was_not_made_they_go_on_under_the_old_ones() -> None:
    log = Writer()
    log.begin_file()
    _hand_over(log, audit_keys(9))
    log.add(operation(), EventRecord(event="Stop"))
    _hand_over(log, audit_keys(2))
    assert not verified(log.files).handed_over
    report = verified(log.files, [audit_keys(), audit_keys(2)])
    assert (report.count, report.handed_over) == (0, True)


def test_behind_a_change_that_was_made_the_old_passphrase_makes_no_records() -> None:
    log = Writer()
    log.begin_file()
    _hand_over(log, audit_keys(2))
    log.add(operation())
    assert verified(log.files, [audit_keys(), audit_keys(2)]).count == 1


@given(st.lists(st.integers(0, 59), max_size=6, unique=True), st.data())
def test_in_whatever_pieces_a_log_is_rotated_it_is_authentic(cuts: list[int], data: st.DataObject) -> None:
    log = Writer()
    log.begin_file()
    for number in range(60):
        if number in cuts:
            log.begin_file()
        log.add(operation(number))
    report = verified(log.files, head=log.head)
    assert (report.count, told(report), sum(span.records for span in report.spans)) == (0, [], 61 + len(cuts))
    removed = data.draw(st.integers(1, len(log.files))) - 1
    files = [*log.files[:removed], *log.files[removed + 1 :]]
    assert removed == 0 or verified(files, head=log.head).count

"""Lines of a whole megabyte that aim at slow algorithms: each is decoded or refused within its budget.

The server has one thread and anyone who reaches its socket may send such a line, so each shape costs every client what
it costs here. The mutants of the fuzzer show that the budget is kept by measuring and not by luck.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kms.errors import KeystoreError, WrongPassphraseError
from kms.limits import MAX_FRAME_BYTES
from kms.wire.framing import Framer
from kms_tests.budget import BUDGET, SlowError, within_budget
from kms_tests.fuzz.targets import (
    API,
    KEYSTORES,
    LONG_LINES,
    check_long_line,
    check_request,
    stretch,
)

TOKENS = [b'"', b"\\", b"[", b"]", b"{", b"}", b":", b",", b"0", b"9", b".", b"e", b"-", b"=", b"A", b"g", b"\\u0051", b"a"]
TOKENS += ["\N{GRINNING FACE}".encode(), b" ", b"null", b"1e999", b'"token":', b'"type":', b'"Health"', b'"plaintext":"']

IN_FRONT = [
    b"",
    b'{"type":"Health","x":',
    b'{"type":"Health","token":',
    b'{"type":"Encrypt","plaintext":"',
    b'{"type":"Encrypt","plaintext":"\\u0051Q==","x":"',
    b'{"type":"Health","x":[1,',
    b'{"type":"DestroyVersion","keyId":"a","version":',
    b'{"type":',
    b'{"',
]

KEYSTORE_SHAPES = [
    b'{"formatVersion":%d,"generation":\xff9\xff}',
    b'{"formatVersion":\xff9\xff}',
    b'{"formatVersion":%d,"keyGroups":[\xff{},\xff{}]}',
    b'{"formatVersion":%d,"keyGroups":\xff[\xff',
    b'{"formatVersion":%d\xff,"mac":""\xff}',
    b'{"formatVersion":%d,"\xffa\xff":1}',
    b'{"formatVersion":%d,"x":[\xff1.5e-300,\xff1]}',
    b'{"formatVersion":%d,"kdf":"\xff\\u0051\xff"}',
]


@pytest.mark.parametrize("shape", LONG_LINES)
def test_a_long_line_is_answered_in_time(shape: bytes) -> None:
    within_budget(lambda: check_long_line(shape))


@pytest.mark.parametrize("shape", LONG_LINES)
def test_a_long_line_with_the_right_token_is_answered_in_time(shape: bytes) -> None:
    line = stretch(shape.replace(b'{"type"', b'{"token":"%s","type"' % API.encode(), 1))
    within_budget(lambda: check_request(line))


@settings(max_examples=40)
@given(
    st.sampled_from(IN_FRONT),
    st.lists(st.sampled_from(TOKENS), min_size=1, max_size=4).map(b"".join),
    st.lists(st.sampled_from(TOKENS), max_size=3).map(b"".join),
)
def test_no_piece_of_a_line_becomes_slow_by_being_repeated(front: bytes, unit: bytes, end: bytes) -> None:
    within_budget(lambda: check_long_line(front + b"\xff" + unit + b"\xff" + end))


@pytest.mark.parametrize("unit", [b"\n", b"\r\n", b" \n", b"a\n", b"{}\n", b"\r"])
def test_a_megabyte_of_short_lines_is_taken_apart_in_time(unit: bytes) -> None:
    within_budget(lambda: Framer(MAX_FRAME_BYTES).feed(unit * (MAX_FRAME_BYTES // len(unit))))


@pytest.mark.parametrize("piece", [1 << 16, 4096])
def test_a_frame_in_many_pieces_is_put_together_in_time(piece: int) -> None:
    frame = b"x" * MAX_FRAME_BYTES

    def feed() -> None:
        framer = Framer(MAX_FRAME_BYTES)
        frames = [f for at in range(0, len(frame), piece) for f in framer.feed(frame[at : at + piece])]
        assert frames + framer.feed(b"\n") == [frame]

    within_budget(feed)


@pytest.mark.parametrize(("number", "open_", "made"), [(n, one.open, one.encode()) for n, one in KEYSTORES.items()])
@pytest.mark.parametrize("shape", KEYSTORE_SHAPES)
def test_a_megabyte_that_is_no_keystore_is_refused_in_time(
    number: int, open_: Callable[[bytes], object], made: bytes, shape: bytes
) -> None:
    raw = stretch(shape.replace(b"%d", str(number).encode()))
    assert open_(made)

    def refuse() -> None:
        with pytest.raises((KeystoreError, WrongPassphraseError)):
            open_(raw)

    within_budget(refuse)


def test_the_budget_catches_what_is_slow() -> None:
    with pytest.raises(SlowError, match="more than 1 ms"):
        within_budget(lambda: sum(range(1_000_000)), budget=0.001)
    assert within_budget(lambda: None) < BUDGET

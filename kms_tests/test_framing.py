"""Lines out of a byte stream, bounded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms.wire.framing import Framer
from kms_tests.strategies import splits

LIMIT = 8


def _run(pieces: list[bytes], limit: int = LIMIT) -> tuple[list[bytes], bool]:
    """The frames of a whole stream, and whether the limit was passed."""
    framer = Framer(limit)
    frames: list[bytes] = []
    for piece in pieces:
        frames += framer.feed(piece)
        if framer.too_large:
            return frames, True
    return frames + framer.finish(), framer.too_large


def _by_the_rules(stream: bytes, limit: int) -> tuple[list[bytes], bool]:
    """The same, from the rules alone: with the whole stream in hand."""
    frames: list[bytes] = []
    for line in stream.split(b"\n"):
        frame = line[:-1] if line.endswith(b"\r") else line
        if len(frame) > limit:
            return frames, True
        if frame.strip():
            frames.append(frame)
    return frames, False


streams = st.lists(st.sampled_from([b"a", b"bc", b"\n", b"\r\n", b"\r", b" ", b"1234567", b"\xff"]), max_size=24).map(
    b"".join
)


@given(streams, st.data())
def test_any_split_of_a_stream_gives_the_same_frames(stream: bytes, data: st.DataObject) -> None:
    assert _run(data.draw(splits(stream))) == _by_the_rules(stream, LIMIT)


@given(streams)
def test_a_stream_that_comes_byte_by_byte_gives_the_same_frames(stream: bytes) -> None:
    assert _run([stream[i : i + 1] for i in range(len(stream))]) == _by_the_rules(stream, LIMIT)


@given(
    st.lists(st.binary(min_size=1, max_size=LIMIT).filter(lambda f: bool(f.strip()) and b"\n" not in f and f[-1:] != b"\r"))
)
def test_frames_that_were_joined_come_out_in_order(frames: list[bytes]) -> None:
    assert _run([b"".join(frame + b"\n" for frame in frames)]) == (frames, False)


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_frame_of_exactly_the_limit_passes(end: bytes) -> None:
    assert Framer(LIMIT).feed(b"x" * LIMIT + end) == [b"x" * LIMIT]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_frame_of_one_byte_more_does_not(end: bytes) -> None:
    framer = Framer(LIMIT)
    assert framer.feed(b"x" * (LIMIT + 1) + end) == []
    assert framer.too_large


def test_a_line_end_of_two_bytes_cut_in_the_middle_at_the_limit_passes() -> None:
    framer = Framer(LIMIT)
    assert framer.feed(b"x" * LIMIT + b"\r") == []
    assert not framer.too_large
    assert framer.feed(b"\n") == [b"x" * LIMIT]


def test_the_byte_of_grace_is_for_a_carriage_return_alone() -> None:
    framer = Framer(LIMIT)
    framer.feed(b"x" * (LIMIT + 1))
    assert framer.too_large


def test_a_carriage_return_does_not_excuse_a_line_that_is_longer_by_more() -> None:
    framer = Framer(LIMIT)
    framer.feed(b"x" * (LIMIT + 1) + b"\r")
    assert framer.too_large


def test_an_endless_line_is_cut_off_before_its_end_comes() -> None:
    framer = Framer(LIMIT)
    framer.feed(b"x" * LIMIT)
    assert not framer.too_large
    framer.feed(b"x")
    assert framer.too_large
    assert not framer.is_mid_frame


def test_the_frames_before_one_that_is_too_large_are_delivered() -> None:
    framer = Framer(LIMIT)
    assert framer.feed(b"one\ntwo\n" + b"x" * 99 + b"\nthree\n") == [b"one", b"two"]
    assert framer.too_large


def test_nothing_is_read_after_a_frame_that_is_too_large() -> None:
    framer = Framer(LIMIT)
    framer.feed(b"x" * 99)
    assert framer.feed(b"\nthree\n") == []
    assert framer.finish() == []


@pytest.mark.parametrize("blank", [b"", b"\r", b" ", b"\t", b"  \r", b" \t "])
def test_a_blank_line_is_no_frame(blank: bytes) -> None:
    assert Framer(LIMIT).feed(b"a\n" + blank + b"\nb\n") == [b"a", b"b"]


def test_a_blank_line_longer_than_the_limit_is_too_large_all_the_same() -> None:
    framer = Framer(LIMIT)
    assert framer.feed(b" " * (LIMIT + 1) + b"\n") == []
    assert framer.too_large


def test_what_remains_at_the_end_of_the_stream_is_a_frame() -> None:
    framer = Framer(LIMIT)
    framer.feed(b"a\nrest")
    assert framer.finish() == [b"rest"]


def test_a_remainder_ending_in_a_carriage_return_loses_it() -> None:
    framer = Framer(LIMIT)
    framer.feed(b"x" * LIMIT + b"\r")
    assert framer.finish() == [b"x" * LIMIT]


@pytest.mark.parametrize("rest", [b"", b"\r", b"  "])
def test_a_blank_remainder_is_no_frame(rest: bytes) -> None:
    framer = Framer(LIMIT)
    framer.feed(b"a\n" + rest)
    assert framer.finish() == []


def test_the_stream_is_finished_once() -> None:
    framer = Framer(LIMIT)
    framer.feed(b"rest")
    framer.finish()
    assert framer.finish() == []


def test_it_tells_whether_a_frame_has_begun() -> None:
    framer = Framer(LIMIT)
    assert not framer.is_mid_frame
    framer.feed(b"a")
    assert framer.is_mid_frame
    framer.feed(b"\n")
    assert not framer.is_mid_frame

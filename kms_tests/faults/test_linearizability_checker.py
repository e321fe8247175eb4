"""The checker itself: what it accepts, what it objects to, and that it agrees with trying every order."""

from __future__ import annotations

from itertools import permutations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms_tests.faults.linearizability import (
    Call,
    Done,
    Group,
    Kind,
    Operation,
    Refused,
    Reply,
    Saw,
    Sealed,
    apply,
    objection,
)

CREATE, ROTATE, LIST, ENCRYPT = Call(Kind.CREATE), Call(Kind.ROTATE), Call(Kind.LIST), Call(Kind.ENCRYPT)
ONE: Group = ("ACTIVE",)
TWO: Group = ("ENABLED", "ACTIVE")
THREE: Group = ("ENABLED", "ENABLED", "ACTIVE")
MADE = Operation(0, 1, CREATE, Saw(ONE))


@pytest.mark.parametrize(
    ("group", "call", "after", "reply"),
    [
        ((), CREATE, ONE, Saw(ONE)),
        ((), ROTATE, (), Refused()),
        ((), ENCRYPT, (), Refused()),
        ((), LIST, (), Saw(())),
        (ONE, CREATE, ONE, Refused()),
        (ONE, ROTATE, TWO, Saw(TWO)),
        (TWO, ENCRYPT, TWO, Sealed(2)),
        (TWO, Call(Kind.DISABLE, 1), ("DISABLED", "ACTIVE"), Done()),
        (TWO, Call(Kind.DISABLE, 2), TWO, Refused()),
        (TWO, Call(Kind.DISABLE, 3), TWO, Refused()),
        (TWO, Call(Kind.ENABLE, 2), TWO, Done()),
        (TWO, Call(Kind.DESTROY, 2), TWO, Refused()),
        (TWO, Call(Kind.DESTROY, 1), ("DESTROYED", "ACTIVE"), Done()),
        (("DISABLED", "ACTIVE"), Call(Kind.ENABLE, 1), TWO, Done()),
        (("DESTROYED", "ACTIVE"), Call(Kind.ENABLE, 1), ("DESTROYED", "ACTIVE"), Refused()),
        (("DESTROYED", "ACTIVE"), Call(Kind.DISABLE, 1), ("DESTROYED", "ACTIVE"), Refused()),
        (("DESTROYED", "ACTIVE"), Call(Kind.DESTROY, 1), ("DESTROYED", "ACTIVE"), Done()),
        (("DESTROYED", "ACTIVE"), ROTATE, ("DESTROYED", "ENABLED", "ACTIVE"), Saw(("DESTROYED", "ENABLED", "ACTIVE"))),
    ],
)
def test_the_rules(group: Group, call: Call, after: Group, reply: Reply) -> None:
    assert apply(group, call) == (after, reply)


def test_what_happened_one_after_another_is_accepted() -> None:
    assert objection([MADE, Operation(2, 3, ROTATE, Saw(TWO)), Operation(4, 5, LIST, Saw(TWO))]) is None


def test_what_overlaps_may_have_happened_in_either_order() -> None:
    for seen in (ONE, TWO):
        assert objection([MADE, Operation(2, 9, ROTATE, Saw(TWO)), Operation(3, 8, LIST, Saw(seen))]) is None


def test_a_stale_read_is_objected_to() -> None:
    assert objection([MADE, Operation(2, 3, ROTATE, Saw(TWO)), Operation(4, 5, LIST, Saw(ONE))]) is not None


def test_a_stale_read_is_objected_to_beside_one_that_takes_long() -> None:
    history = [
        MADE,
        Operation(2, 3, ROTATE, Saw(TWO)),
        Operation(2, 100, LIST, Saw(TWO)),
        Operation(50, 60, LIST, Saw(ONE)),
    ]
    assert objection(history) is not None


def test_what_begins_in_the_instant_in_which_another_ends_overlaps_it() -> None:
    assert objection([MADE, Operation(2, 4, ROTATE, Saw(TWO)), Operation(4, 5, LIST, Saw(ONE))]) is None


def test_two_reads_that_go_back_in_time_are_objected_to() -> None:
    history = [
        MADE,
        Operation(2, 9, ROTATE, Saw(TWO)),
        Operation(3, 4, LIST, Saw(TWO)),
        Operation(5, 6, LIST, Saw(ONE)),
    ]
    assert objection(history) is not None


def test_a_lost_update_is_objected_to() -> None:
    assert objection([MADE, Operation(2, 9, ROTATE, Saw(TWO)), Operation(3, 8, ROTATE, Saw(TWO))]) is not None


def test_an_answer_that_a_crash_undid_is_objected_to() -> None:
    assert objection([MADE, Operation(2, 3, ROTATE, Saw(TWO)), Operation(9, 10, ENCRYPT, Sealed(1))]) is not None


def test_a_number_used_again_is_objected_to() -> None:
    destroyed = Operation(4, 5, Call(Kind.DESTROY, 1), Done())
    again = Operation(6, 7, ROTATE, Saw(("ACTIVE", "ENABLED")))
    assert objection([MADE, Operation(2, 3, ROTATE, Saw(TWO)), destroyed, again]) is not None


@pytest.mark.parametrize("seen", [ONE, TWO])
def test_what_was_cut_off_has_happened_or_not(seen: Group) -> None:
    assert objection([MADE, Operation(2, 3, ROTATE, None), Operation(4, 5, LIST, Saw(seen))]) is None


def test_what_was_cut_off_happens_at_most_once() -> None:
    assert objection([MADE, Operation(2, 3, ROTATE, None), Operation(4, 5, LIST, Saw(THREE))]) is not None


def test_what_was_cut_off_does_not_happen_after_its_servers_end() -> None:
    history = [
        MADE,
        Operation(2, 3, ROTATE, None),
        Operation(4, 5, LIST, Saw(ONE)),
        Operation(6, 7, LIST, Saw(TWO)),
    ]
    assert objection(history) is not None


def test_an_objection_shows_where_the_search_ended() -> None:
    said = objection([MADE, Operation(2, 3, ROTATE, Saw(TWO)), Operation(4, 5, LIST, Saw(ONE))])
    assert said is not None
    assert "2 of 3" in said
    assert "('ENABLED', 'ACTIVE')" in said
    assert "list" in said


def test_a_long_history_of_many_clients_is_checked_in_no_time() -> None:
    # Eight rotations at a time, each of which overlaps all others of its round.
    history = [MADE]
    versions = 1
    for round_number in range(1, 100):
        for _ in range(8):
            versions += 1
            seen = ("ENABLED",) * (versions - 1) + ("ACTIVE",)
            history.append(Operation(round_number * 10, round_number * 10 + 5, ROTATE, Saw(seen)))
    assert objection(history) is None


def test_an_impossible_history_is_objected_to_without_trying_every_order() -> None:
    # Twelve reads at once have half a billion orders, but only four thousand sets of those done.
    reads = [Operation(2, 9, LIST, Saw(ONE)) for _ in range(12)]
    assert objection([MADE, *reads, Operation(10, 11, LIST, Saw(TWO))]) is not None


calls = st.sampled_from(
    [CREATE, ROTATE, LIST, ENCRYPT, *(Call(kind, 1) for kind in (Kind.DISABLE, Kind.ENABLE, Kind.DESTROY))]
)


@st.composite
def histories(draw: st.DrawFn) -> list[Operation]:
    """Up to five operations that overlap as they like, with the replies of some order, of which some are cut off."""
    group: Group = ()
    history = []
    for moment, call in enumerate(draw(st.lists(calls, max_size=5))):
        group, reply = apply(group, call)
        before, after = draw(st.integers(0, 30)), draw(st.integers(0, 30))
        is_cut_off = draw(st.booleans())
        history.append(Operation(moment * 10 - before, moment * 10 + after, call, None if is_cut_off else reply))
    return history


def _some_order_explains(history: list[Operation]) -> bool:
    """The definition, word for word."""
    for order in permutations(history):
        if any(late.ended < early.invoked for n, early in enumerate(order) for late in order[n + 1 :]):
            continue
        for skipped in product([False, True], repeat=len(order)):
            if all(operation.reply is None for operation, skip in zip(order, skipped, strict=True) if skip):
                group: Group = ()
                for operation, skip in zip(order, skipped, strict=True):
                    if not skip:
                        group, reply = apply(group, operation.call)
                        if operation.reply not in (None, reply):
                            break
                else:
                    return True
    return False


@given(histories())
def test_the_replies_of_any_order_that_keeps_real_time_are_accepted(history: list[Operation]) -> None:
    assert objection(history) is None


@given(histories(), st.data())
def test_it_agrees_with_trying_every_order(history: list[Operation], data: st.DataObject) -> None:
    replies = data.draw(st.permutations([operation.reply for operation in history]))
    shuffled = [
        Operation(operation.invoked, operation.ended, operation.call, reply)
        for operation, reply in zip(history, replies, strict=True)
    ]
    assert (objection(shuffled) is None) == _some_order_explains(shuffled)

"""Token buckets: never more than the capacity and what was refilled meanwhile."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms.core.bucket import Bucket


def test_a_new_bucket_is_full_and_an_empty_one_says_for_how_long() -> None:
    bucket = Bucket(3, 2, 100.0)
    assert bucket.is_full(100.0)
    assert [bucket.take(100.0) for _ in range(3)] == [0, 0, 0]
    assert bucket.take(100.0) == pytest.approx(0.5)
    assert bucket.take(100.25) == pytest.approx(0.25), "nothing was taken by asking"
    assert bucket.take(100.5) == 0


def test_what_is_put_back_can_be_taken_again_and_never_makes_it_more_than_full() -> None:
    bucket = Bucket(1, 0.001, 0.0)
    assert not bucket.take(0.0)
    assert bucket.take(0.0)
    bucket.put_back()
    bucket.put_back()
    assert not bucket.take(0.0)
    assert bucket.take(0.0)


def test_one_that_holds_nothing_is_never_waited_for() -> None:
    assert math.isinf(Bucket(0, 0, 0.0).take(1e9))


def test_with_other_bounds_what_was_taken_stays_taken() -> None:
    bucket = Bucket(5, 1, 0.0)
    for _ in range(4):
        bucket.take(0.0)
    bucket.resize(10, 1, 0.0)
    assert sum(not bucket.take(0.0) for _ in range(20)) == 6
    bucket.resize(5, 1, 0.0)
    assert bucket.take(0.0) == pytest.approx(6)


@given(
    st.floats(1, 50),
    st.floats(0.01, 50),
    st.lists(st.floats(0, 3), max_size=200),
)
def test_over_any_time_no_more_is_taken_than_it_held_and_was_refilled(
    capacity: float, per_second: float, pauses: list[float]
) -> None:
    bucket, now, taken = Bucket(capacity, per_second, 0.0), 0.0, 0
    for pause in pauses:
        now += pause
        wait = bucket.take(now)
        taken += not wait
        assert taken <= capacity + now * per_second + 1e-6
        if wait:
            now += wait + 1e-9
            assert not bucket.take(now), "it is refilled when it says"
            taken += 1

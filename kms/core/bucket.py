"""A token bucket: how much of something there may be in a time.

It holds at most its capacity, is refilled steadily, and each thing done takes one out. So in any stretch of time there is
no more than the capacity and what was refilled meanwhile. (Turner, "New directions in communications", 1986.)
"""

from __future__ import annotations


class Bucket:
    """`capacity` at most, `per_second` more each second. It begins full; times are seconds of one clock."""

    __slots__ = ("_capacity", "_level", "_per_second", "_since")

    def __init__(self, capacity: float, per_second: float, now: float) -> None:
        self._capacity = capacity
        self._per_second = per_second
        self._level = capacity
        self._since = now

    def take(self, now: float) -> float:
        """Take one out: 0. Where there is none nothing is taken, and it is the seconds until there will be one."""
        level = self._refilled(now)
        self._level, self._since = level, now
        if level >= 1:
            self._level = level - 1
            return 0.0
        return (1 - level) / self._per_second if self._per_second else float("inf")

    def put_back(self) -> None:
        """What was taken was not needed."""
        self._level = min(self._capacity, self._level + 1)

    def is_full(self, now: float) -> bool:
        """Whether it is as a new one."""
        return self._refilled(now) >= self._capacity

    def resize(self, capacity: float, per_second: float, now: float) -> None:
        """Other bounds from now on: what was taken stays taken."""
        self._level = self._refilled(now) + capacity - self._capacity
        self._capacity, self._per_second, self._since = capacity, per_second, now

    def _refilled(self, now: float) -> float:
        return min(self._capacity, self._level + (now - self._since) * self._per_second)

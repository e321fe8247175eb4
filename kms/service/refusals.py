"""Refusals that are put on record one by one, and those that are only counted.

Whoever can connect can be refused as fast as the server answers: 35 GB of records an hour, until the disk is full and
nobody is answered any more. So of who is not authenticated the first refusal of a kind is on record before its answer;
those of the same kind that follow are answered and counted, and their number goes on record after a second. A crash
takes that second's number with it, and nothing else. Who is known has a bucket of refusals to spend before it is so.

A kind is who was refused, what they asked for, and the code they were told. A stranger is the user of a process, or TCP
as a whole: a new connection or another text makes nobody another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from kms.core.bucket import Bucket
from kms.limits import (
    MAX_REFUSAL_KINDS,
    REFUSALS_OF_A_PRINCIPAL,
    REFUSALS_OF_A_PRINCIPAL_PER_SECOND,
)
from kms.service.served import Served

Clock = Callable[[], float]


class Kind(NamedTuple):
    """Who was refused what, and how they were told; None and `-` where it is not told apart any more."""

    principal: str | None
    uid: int | None
    transport: str
    operation: str
    code: str


Repeats = tuple[Kind, int]
"""How often a kind was refused beyond what is on record."""


_OTHERS: Final = Kind(None, None, "-", "-", "-")


class Refusals:
    """Says of each refusal whether it is to be put on record by itself, and counts the rest."""

    def __init__(self, monotonic: Clock) -> None:
        self._monotonic = monotonic
        self._counts: dict[Kind, int] = {}
        self._buckets: dict[str, Bucket] = {}

    def is_first(self, served: Served) -> bool:
        """Whether `served`, which was refused, is to be put on record; if not, it is counted.

        Call `forget` when that could not be done after all.
        """
        kind = kind_of(served)
        if kind.principal is not None and self._spends(kind.principal):
            return True
        if kind not in self._counts and len(self._counts) >= MAX_REFUSAL_KINDS:
            kind = _OTHERS
        if kind in self._counts:
            self._counts[kind] += 1
            return False
        self._counts[kind] = 0
        return True

    def count(self, served: Served) -> None:
        """It was a first, and there is no space to put that on record: it is counted, too."""
        kind = kind_of(served)
        if kind in self._counts:
            self._counts[kind] += 1

    def forget(self, served: Served) -> None:
        """The first of its kind is not on record: the next one is to be."""
        kind = kind_of(served)
        if not self._counts.get(kind, 1):
            del self._counts[kind]

    def take(self) -> list[Repeats]:
        """What was counted since the last time. A kind of which nothing came is forgotten: its next one is a first."""
        repeats = [(kind, count) for kind, count in self._counts.items() if count]
        self._counts = {kind: 0 for kind, _ in repeats}
        # One that is full again is as one that was never begun.
        now = self._monotonic()
        self._buckets = {name: bucket for name, bucket in self._buckets.items() if not bucket.is_full(now)}
        return repeats

    def _spends(self, principal: str) -> bool:
        now = self._monotonic()
        bucket = self._buckets.get(principal)
        if bucket is None:
            bucket = Bucket(REFUSALS_OF_A_PRINCIPAL, REFUSALS_OF_A_PRINCIPAL_PER_SECOND, now)
            self._buckets[principal] = bucket
        return not bucket.take(now)


def kind_of(served: Served) -> Kind:
    """Which of the refusals `served` is one of. It holds no text that a stranger chose."""
    operation = "-" if served.kind is None else served.kind.operation.value
    code = "-" if served.error is None else served.error.code
    if served.principal is not None:
        return Kind(served.principal.name, None, "-", operation, code)
    credentials = served.peer.credentials
    return Kind(None, None if credentials is None else credentials.uid, served.peer.transport, operation, code)

"""Is a history of one key group linearizable?

A history is what clients saw: each operation with the time of its invocation, the time of its response, and its reply.
It is linearizable (Herlihy and Wing, 1990) when the operations have an order that keeps real time (one that ended
before another began comes first) and in which a group that does one thing at a time would have given these replies.

An operation that was cut off has no reply. It ended when its server was known to be dead, and was applied or not: a
server that is started afterwards must not apply it any more.

Linearizability is local: all groups together are linearizable when each group is. So each is checked alone, which keeps
the search small. The search is Wing and Gong's, with Lowe's memory of where it has been: which operations are done, and
the state they led to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

Group = tuple[str, ...]
"""The states of versions 1, 2, ... of a group, which is all there is to know of it; of a group that is not there, ()."""


class Kind(Enum):
    CREATE = "create"
    ROTATE = "rotate"
    DISABLE = "disable"
    ENABLE = "enable"
    DESTROY = "destroy"
    LIST = "list"
    ENCRYPT = "encrypt"


class Call(NamedTuple):
    """What was asked of the group; `version` only where the operation takes one."""

    kind: Kind
    version: int = 0


@dataclass(frozen=True)
class Saw:
    """A reply that shows the group: all of it, or () when it is not there."""

    group: Group


@dataclass(frozen=True)
class Sealed:
    """A reply that shows which version encrypts."""

    version: int


@dataclass(frozen=True)
class Done:
    """A reply that says no more than that it was done."""


@dataclass(frozen=True)
class Refused:
    """A reply that says that the rules forbid it."""


Reply = Saw | Sealed | Done | Refused


@dataclass(frozen=True)
class Operation:
    """One operation as its client saw it. `reply` is None when it was cut off."""

    invoked: int
    ended: int
    call: Call
    reply: Reply | None


_BECOMES = {Kind.DISABLE: "DISABLED", Kind.ENABLE: "ENABLED", Kind.DESTROY: "DESTROYED"}


def apply(group: Group, call: Call) -> tuple[Group, Reply]:
    """What a group that does one thing at a time answers, and what it is afterwards.

    The rules, written down a second time on purpose: a version's number is its place in the row, so none is ever used
    twice; the last version is the ACTIVE one, since only a rotation makes a version active.
    """
    if call.kind is Kind.LIST:
        return group, Saw(group)
    if call.kind is Kind.CREATE:
        return (group, Refused()) if group else (("ACTIVE",), Saw(("ACTIVE",)))
    if not group:
        return group, Refused()
    if call.kind is Kind.ENCRYPT:
        return group, Sealed(len(group))
    if call.kind is Kind.ROTATE:
        rotated = (*group[:-1], "ENABLED", "ACTIVE")
        return rotated, Saw(rotated)
    return _with_status(group, call)


def _with_status(group: Group, call: Call) -> tuple[Group, Reply]:
    if not 1 <= call.version <= len(group):
        return group, Refused()
    before, after = group[call.version - 1], _BECOMES[call.kind]
    if before == "ACTIVE":
        return group, Done() if after == "ENABLED" else Refused()
    if before == "DESTROYED" != after:
        return group, Refused()
    return (*group[: call.version - 1], after, *group[call.version :]), Done()


def _outcomes(group: Group, operation: Operation) -> set[Group]:
    """What the group may be after `operation`; empty when its reply cannot have been given here."""
    after, reply = apply(group, operation.call)
    if operation.reply is None:
        return {group, after}
    return {after} if operation.reply == reply else set()


class _Place(NamedTuple):
    """Where the search is: all operations before `first` are done, and those in `others`; `group` is what they made."""

    first: int
    others: frozenset[int]
    group: Group


def objection(history: Sequence[Operation]) -> str | None:
    """Why `history`, of one group that was not there at first, is not linearizable; None when it is."""
    operations = sorted(history, key=lambda operation: operation.invoked)
    furthest = start = _Place(0, frozenset(), ())
    seen = {start}
    ways = [start]
    while ways:
        place = ways.pop()
        if place.first == len(operations):
            return None
        if _progress(place) > _progress(furthest):
            furthest = place
        for index in _possible_next(operations, place):
            for group in _outcomes(place.group, operations[index]):
                after = _after(place, index, group)
                if after not in seen:
                    seen.add(after)
                    ways.append(after)
    return _describe(operations, furthest)


def _possible_next(operations: Sequence[Operation], place: _Place) -> list[int]:
    """Those not done of which no other that is not done had ended before they began."""
    possible: list[int] = []
    earliest_end: float = float("inf")
    for index in range(place.first, len(operations)):
        operation = operations[index]
        if operation.invoked > earliest_end:
            break
        if index not in place.others:
            possible.append(index)
            earliest_end = min(earliest_end, operation.ended)
    # The search takes the last one first: most often the order in which they began is the right one.
    possible.reverse()
    return possible


def _after(place: _Place, index: int, group: Group) -> _Place:
    first, others = place.first, place.others | {index}
    while first in others:
        others -= {first}
        first += 1
    return _Place(first, others, group)


def _progress(place: _Place) -> int:
    return place.first + len(place.others)


def _describe(operations: Sequence[Operation], furthest: _Place) -> str:
    stuck = [operations[index] for index in reversed(_possible_next(operations, furthest))]
    return "\n".join(
        [
            f"no order explains the replies; {_progress(furthest)} of {len(operations)} could be explained, which lead to",
            f"  {furthest.group}",
            "after which one of these would have to come:",
            *(f"  {o.call.kind.value} {o.call.version or ''} [{o.invoked}..{o.ended}] {o.reply}" for o in stuck),
        ]
    )

"""A log message that is made of named values, for people and for programs that collect logs.

`log.info(Event({"connection": 3, "group": "billing"}))`: what is logged is the object itself, as logging allows. Its text
is `connection=3 group='billing'`, which any formatter writes; one that knows it takes `fields`. So the two cannot differ.

Not `extra=`: its keys land among the record's own attributes, where a formatter cannot tell them apart, and the text
would have to be written a second time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_CLIENTS_WORDS: Final = frozenset({"group", "requestId"})
"""The text of these may be any that a client chose: it is quoted, so that it cannot pass for another field."""


class Event:
    """Named values in order; None is one that is not known, or that this kind of event has not."""

    __slots__ = ("fields",)

    def __init__(self, fields: Mapping[str, str | int | None]) -> None:
        self.fields = fields

    def __str__(self) -> str:
        return " ".join(f"{name}={_shown(name, value)}" for name, value in self.fields.items())


def _shown(name: str, value: str | int | None) -> str:
    if value is None:
        return "-"
    return repr(value) if name in _CLIENTS_WORDS else str(value)

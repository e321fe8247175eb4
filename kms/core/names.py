"""Names of key groups: which may be given, which may be there, and how one is shown."""

from __future__ import annotations

import re
from typing import Final

from kms.errors import InvalidRequestError
from kms.limits import MAX_GROUP_NAME_BYTES

_NEW: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_new_name(name: str) -> None:
    """Raise `InvalidRequestError` unless `name` may be given to a group made here."""
    if _NEW.fullmatch(name) is None:
        raise InvalidRequestError("keyId: a name has 1 to 64 of A-Z a-z 0-9 . _ - and begins with a letter or digit")


NO_SUCH_GROUP: Final = "keyId: no such key group"
"""The refusal of a request that names one that there is not. It does not repeat the name: none holds what was sent."""

NO_SUCH_VERSION: Final = "version: no such version in this key group"


def is_blank(name: str) -> bool:
    """Whether `name` is none: empty, or ASCII's blanks alone.

    Not `str.isspace`: what else is blank differs between languages, and in Java U+0085 and the no-break spaces are names.
    """
    return not name or (name.isascii() and name.isspace())


def is_possible_name(name: str) -> bool:
    """Whether a keystore may hold this name: any that is not blank, since migrated ones keep working."""
    return not is_blank(name) and _LONE_SURROGATE.search(name) is None


def is_nameable(name: str) -> bool:
    """Whether a ciphertext can say that it is under the group of this name, whose length it has in one byte."""
    return len(name.encode("utf-8")) <= MAX_GROUP_NAME_BYTES


def shown(name: str) -> str:
    """A name as a request or a keystore has it, for people: bounded, as a line of a log must not cost a frame.

    What moves a terminal's cursor, or turns its text around, would do so to whoever reads it, so it is escaped.
    """
    if len(name) > MAX_GROUP_NAME_BYTES:
        name = f"{name[:MAX_GROUP_NAME_BYTES]}..."
    return name if name.isprintable() else "".join(one if one.isprintable() else _escaped(one) for one in name)


def without_surrogates(name: str) -> str:
    """`name` with each lone surrogate escaped: it is no character, and cannot be written as UTF-8."""
    return _LONE_SURROGATE.sub(lambda found: _escaped(found[0]), name)


_LONE_SURROGATE: Final = re.compile("[\ud800-\udfff]")


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")

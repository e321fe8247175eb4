"""Lines for people, broken between words where a terminal would break them anywhere."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Final

_NARROWEST: Final = 20
_INDENT: Final = 2
_SIMILAR: Final = 0.6


def one_line(text: str) -> str:
    """`text` with whatever is not printable escaped: it can neither add a line nor speak to the terminal."""
    return "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode("ascii") for mark in text)


def closest(typed: str, names: Iterable[str]) -> str | None:
    """The one of `names` that is most like what was typed; None where none is like it."""
    found = get_close_matches(typed, list(names), n=1, cutoff=_SIMILAR)
    return found[0] if found else None


def fitted(line: str, descriptor: int, indent: int | None = None) -> str:
    """`line` without its end, broken between words if `descriptor` is a terminal on which it is too long.

    What follows is indented, by `indent` columns if that is given. A word that alone is too long, such as a path, stays
    whole: somebody may want to copy it.
    """
    width = _width(descriptor)
    if width is None or len(line) < width:
        return line
    if indent is None:
        indent = len(line) - len(line.lstrip()) + _INDENT
    return textwrap.fill(
        line,
        width - 1,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )


def _width(descriptor: int) -> int | None:
    try:
        width = os.get_terminal_size(descriptor).columns
    except OSError:
        return None
    return width if width >= _NARROWEST else None

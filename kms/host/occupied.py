"""Descriptors 0, 1 and 2, occupied: imported first of all, and for that alone.

Where one was closed, the next file to be opened would take its number, and what is printed would be written into a
keystore. In its place stands a descriptor that can be neither read nor written (O_PATH), so that who uses it is told.
"""

from __future__ import annotations

import os
from typing import Final

_STANDARD: Final = (0, 1, 2)


def occupy() -> None:
    """Do so for this process."""
    for number in _STANDARD:
        try:
            os.fstat(number)
        except OSError:
            _take_lowest()


def _take_lowest() -> None:
    # Those below are open, so the lowest number that is free is the one in question. A container may have no /dev.
    try:
        number = os.open(os.devnull, os.O_PATH)
    except OSError:
        number = os.open("/", os.O_PATH)
    # For a program that is started from here it is as true.
    os.set_inheritable(number, True)  # noqa: FBT003 - it has no name

"""The C library of this process, for the calls that Python has no function for.

Opened once: ctypes makes a class each time, which takes longer than most of the calls.
"""

from __future__ import annotations

import ctypes
from typing import Final

LIBC: Final = ctypes.CDLL(None, use_errno=True)

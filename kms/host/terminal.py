"""The controlling terminal of this process."""

from __future__ import annotations

import os
from typing import Final

PATH: Final = "/dev/tty"


def has_terminal() -> bool:
    """Whether there is one; it is gone once its window was closed, or the connection that it came by."""
    try:
        descriptor = os.open(PATH, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False
    os.close(descriptor)
    return True

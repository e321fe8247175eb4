"""How an unexpected exception is logged, wherever one is contained."""

from __future__ import annotations

import logging
import traceback
from typing import Final

log: Final = logging.getLogger(__name__)


def log_bug(what: str, error: BaseException) -> None:
    """Log where `error` was raised and its kind, never its text: that could quote a request."""
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            log_bug(what, part)
        return
    where = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s: %s\n%s", what, type(error).__name__, where)

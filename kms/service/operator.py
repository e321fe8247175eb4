"""What is asked of the server itself, not of its keys: how it is, and to reload.

How it is only who composes the server can tell, and what to reload, too; so both are put in here when that is known.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from time import monotonic

from kms.errors import InvalidRequestError
from kms.wire.messages import ServerView


async def _nothing_to_reload() -> str:
    raise InvalidRequestError("this server has nothing to reload")


class Operator:
    """The server's own affairs, for its handlers."""

    def __init__(self, version: str = "", clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self.version = version
        self.report: Callable[[], ServerView] | None = None
        """How the server is; asked in the event loop, so it does not block."""
        self.reload: Callable[[], Awaitable[str]] = _nothing_to_reload
        """Reload, and say what came of it; raises a `WireError` that says it."""

    @property
    def uptime(self) -> int:
        """Whole seconds."""
        return int(self._clock() - self._began)

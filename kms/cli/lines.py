"""Lines to standard error that never hold up whoever says them.

Standard error may be a pipe that nobody reads, or a terminal where somebody pressed Ctrl-S. A server that wrote to it
from its event loop would then stop for everybody. So a thread writes, from a queue with a bound; what does not fit is
counted, and the count is said once there is room.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from kms.host.streams import write_all
from kms.limits import MAX_QUEUED_LINES
from kms.service.threads import start

_CLOSE_SECONDS = 1.0


class BackgroundLines:
    """Writes to a descriptor from a thread of its own. It has what `logging.StreamHandler` needs of a stream."""

    def __init__(self, descriptor: int, line: Callable[[str], str]) -> None:
        """`line` makes a line, with its end, of what this has to say itself: that lines were dropped."""
        self._descriptor = descriptor
        self._line = line
        self._dropped = 0
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_QUEUED_LINES)
        # A daemon: a write that nobody takes must not keep the process from ending.
        self._writer = threading.Thread(target=self._run, name="lines", daemon=True)

    def write(self, text: str) -> None:
        """Take whole lines, or drop them when too many wait."""
        try:
            self._lines.put_nowait(text)
        except queue.Full:
            self._dropped += 1

    def flush(self) -> None:
        """Nothing: the writer does not wait for more."""

    def __enter__(self) -> Self:
        start(self._writer)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Give what was said last a moment to be written."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
        self._writer.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        while (text := self._lines.get()) is not None:
            dropped, self._dropped = self._dropped, 0
            if dropped:
                text = self._line(f"{dropped} lines were dropped, as nobody read standard error") + text
            self._put(text.encode("utf-8", "backslashreplace"))

    def _put(self, data: bytes) -> None:
        # Not through sys.stderr: blocked in it, this thread would hold the lock that the interpreter needs to end.
        with contextlib.suppress(OSError):  # whoever read it has gone; the server stays
            write_all(self._descriptor, data)

"""Lines out of a byte stream, bounded.

Rules: a frame ends with LF, or CR LF; blank lines are no frames; a frame longer than the limit (without its line end)
ends the stream: the frames before it are still delivered, nothing after it is read. What remains at the end of the
stream without LF is a frame too.

The framer holds at most one unfinished frame, and each `feed` returns at most what one read brought.
"""

from __future__ import annotations


class Framer:
    """Feed it what was read, get the whole lines. `too_large` says that the limit was passed: stop reading then."""

    __slots__ = ("_limit", "_partial", "too_large")

    def __init__(self, limit: int) -> None:
        """`limit` is the longest frame, in bytes."""
        self._limit = limit
        self._partial = bytearray()
        self.too_large = False

    @property
    def is_mid_frame(self) -> bool:
        return bool(self._partial)

    def feed(self, data: bytes) -> list[bytes]:
        """The frames that `data` completes, in order, without line ends."""
        if self.too_large:
            return []
        lines = data.split(b"\n")
        tail = lines.pop()
        if self._partial and lines:
            self._partial += lines[0]
            lines[0] = bytes(self._partial)
            self._partial.clear()
        frames: list[bytes] = []
        limit = self._limit
        for line in lines:
            frame = line.removesuffix(b"\r")
            if len(frame) > limit:
                self.too_large = True
                return frames
            if frame and not frame.isspace():
                frames.append(frame)
        if tail:
            self._partial += tail
            # One byte of grace: it may be the CR of a frame of exactly the limit.
            if len(self._partial) > limit + 1 or (len(self._partial) > limit and not self._partial.endswith(b"\r")):
                self.too_large = True
                self._partial.clear()
        return frames

    def finish(self) -> list[bytes]:
        """At the end of the stream: the last frame, if the stream was cut before its line end."""
        rest = bytes(self._partial).removesuffix(b"\r")
        self._partial.clear()
        return [rest] if rest and not rest.isspace() else []

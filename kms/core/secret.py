"""Buffers that can be wiped, and whose `repr` says nothing.

What CPython cannot promise: `bytes` and `str` are immutable and may be copied by the interpreter, so a secret that
once was one of them can linger in freed memory. Therefore secrets are *born* in a `bytearray` (read from a file
descriptor, drawn from the system, derived into it by Argon2 or HKDF) and only ever handed on as a view of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self


class Secret:
    """A mutable buffer that owns secret bytes until `wipe`. Use it as a context manager to wipe it for certain."""

    __slots__ = ("_buffer",)

    def __init__(self, buffer: bytearray) -> None:
        """Take ownership of `buffer`; it is not copied, and the caller must not keep it."""
        self._buffer = buffer

    def view(self) -> memoryview:
        """The bytes, without a copy. Release it (`with`) before the secret is wiped."""
        return memoryview(self._buffer)

    def __len__(self) -> int:
        return len(self._buffer)

    def wipe(self) -> None:
        """Overwrite the bytes with zeros; the length stays. Wiping twice does nothing more."""
        self._buffer[:] = bytes(len(self._buffer))

    def take(self) -> bytearray:
        """The buffer itself, for who makes another secret of it; this one has none any more."""
        buffer, self._buffer = self._buffer, bytearray()
        return buffer

    def is_same(self, other: Secret) -> bool:
        """Whether the bytes are the same. For what one person has given twice: it takes as long as they are alike."""
        with self.view() as left, other.view() as right:
            return left == right

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.wipe()

    def __repr__(self) -> str:
        return "<Secret>"

    def __reduce__(self) -> str:
        raise TypeError("a Secret is not pickled or copied")


class Passphrase(Secret):
    """A passphrase in the form that is used, and the forms in which an earlier release would have used it."""

    __slots__ = ("complaint", "earlier_forms")

    def __init__(self, buffer: bytearray, earlier_forms: Sequence[Secret] = (), complaint: str | None = None) -> None:
        """`complaint` says why it may not be a new one. All forms are wiped with it."""
        super().__init__(buffer)
        self.earlier_forms = tuple(earlier_forms)
        self.complaint = complaint

    def wipe(self) -> None:
        super().wipe()
        for form in self.earlier_forms:
            form.wipe()

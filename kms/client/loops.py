"""What the async client needs of an event loop, of whichever library runs it: trio or asyncio.

Only the one that runs is asked for, so that a program of asyncio does not import trio, nor the other way round.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Event(Protocol):
    """What tasks wait for."""

    def set(self) -> object: ...

    async def wait(self) -> object: ...


class Loop(Protocol):
    """An event loop that runs."""

    @property
    def identity(self) -> object:
        """The same object for as long as it is the same loop."""
        ...

    async def wait(self, link: socket.socket, seconds: float, *, to_send: bool) -> bool:
        """Until `link` is readable, or, with `to_send`, writable. False when so many seconds have passed first."""
        ...

    async def sleep(self, seconds: float) -> None: ...

    def event(self) -> Event: ...

    async def in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        """What `function` returns, which runs in a thread."""
        ...

    def from_thread(self, function: Callable[..., Awaitable[T]], *arguments: object) -> T:
        """What `function` returns, which runs in the loop. For such a thread."""
        ...


def current() -> Loop:
    """The loop that runs this; raises `RuntimeError` where there is none."""
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_task():
        from kms.client.on_trio import TrioLoop

        return TrioLoop()
    from kms.client.on_asyncio import AsyncioLoop

    return AsyncioLoop()

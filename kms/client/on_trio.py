"""The async client's event loop, where trio runs."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

T = TypeVar("T")


class TrioLoop:
    """See `kms.client.loops.Loop`."""

    @property
    def identity(self) -> object:
        return trio.lowlevel.current_trio_token()

    async def wait(self, link: socket.socket, seconds: float, *, to_send: bool) -> bool:
        with trio.move_on_after(seconds) as limit:
            if to_send:
                await _either(link)
            else:
                await trio.lowlevel.wait_readable(link)
        return not limit.cancelled_caught

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)

    def event(self) -> trio.Event:
        return trio.Event()

    async def in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        return await trio.to_thread.run_sync(function, *arguments)

    def from_thread(self, function: Callable[..., Awaitable[T]], *arguments: object) -> T:
        return trio.from_thread.run(function, *arguments)


async def _either(link: socket.socket) -> None:
    """Until `link` is readable or writable."""

    async def first(wait: Callable[[socket.socket], Awaitable[None]]) -> None:
        await wait(link)
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(first, trio.lowlevel.wait_readable)
        nursery.start_soon(first, trio.lowlevel.wait_writable)

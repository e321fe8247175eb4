"""The async client's event loop, where asyncio runs, or another loop of its kind (uvloop)."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


class AsyncioLoop:
    """See `kms.client.loops.Loop`."""

    def __init__(self) -> None:
        """Raises `RuntimeError` where no loop runs."""
        self._loop = asyncio.get_running_loop()

    @property
    def identity(self) -> object:
        return self._loop

    async def wait(self, link: socket.socket, seconds: float, *, to_send: bool) -> bool:
        loop = self._loop
        came: asyncio.Future[bool] = loop.create_future()
        descriptor = link.fileno()

        def ready(is_there: bool) -> None:  # noqa: FBT001 - what the loop calls
            if not came.done():
                came.set_result(is_there)

        limit = loop.call_later(seconds, ready, False)  # noqa: FBT003 - likewise
        loop.add_reader(descriptor, ready, True)  # noqa: FBT003
        if to_send:
            loop.add_writer(descriptor, ready, True)  # noqa: FBT003
        try:
            return await came
        finally:
            limit.cancel()
            loop.remove_reader(descriptor)
            if to_send:
                loop.remove_writer(descriptor)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def event(self) -> asyncio.Event:
        return asyncio.Event()

    async def in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.to_thread(function, *arguments)

    def from_thread(self, function: Callable[..., Awaitable[T]], *arguments: object) -> T:
        async def call() -> T:
            return await function(*arguments)

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result()

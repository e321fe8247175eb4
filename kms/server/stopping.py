"""What the signals ask of a server: to stop, or to reload."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Awaitable, Callable

import trio


async def until_stopped(
    stops: AsyncIterator[int],
    hangups: AsyncIterator[int],
    reload: Callable[[], Awaitable[object]],
    hangup_stops: Callable[[], bool],
) -> int:
    """The number of the first signal that stops the server; until then, reload at each SIGHUP.

    A SIGHUP stops it where `hangup_stops`: the terminal that it was started at is gone, and nobody would see it again.
    """
    number = 0

    async def heed_stops() -> None:
        nonlocal number
        number = await anext(stops)
        nursery.cancel_scope.cancel()

    async def heed_hangups() -> None:
        nonlocal number
        async for _ in hangups:
            if hangup_stops():
                number = signal.SIGHUP
                nursery.cancel_scope.cancel()
                return
            await reload()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(heed_stops)
        nursery.start_soon(heed_hangups)
    return number

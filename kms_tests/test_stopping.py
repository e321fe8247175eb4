"""What the signals ask of a server."""

from __future__ import annotations

import signal

import trio
import trio.testing

from kms.server.stopping import until_stopped


class Told:
    """Signals that are sent by a test."""

    def __init__(self) -> None:
        self.send, self.signals = trio.open_memory_channel[int](10)


async def test_each_hangup_reloads_until_a_signal_stops() -> None:
    stops, hangups, reloads = Told(), Told(), 0

    async def reload() -> None:
        nonlocal reloads
        reloads += 1

    numbers: list[int] = []

    async def run() -> None:
        numbers.append(await until_stopped(stops.signals, hangups.signals, reload, lambda: False))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        for count in (1, 2):
            hangups.send.send_nowait(signal.SIGHUP)
            await trio.testing.wait_all_tasks_blocked()
            assert (reloads, numbers) == (count, [])
        stops.send.send_nowait(signal.SIGTERM)
    assert (reloads, numbers) == (2, [signal.SIGTERM])


async def test_a_hangup_stops_once_the_terminal_is_gone() -> None:
    stops, hangups, is_gone = Told(), Told(), False
    reloads: list[int] = []

    async def reload() -> None:
        nonlocal is_gone
        reloads.append(1)
        is_gone = True

    for _ in range(2):
        hangups.send.send_nowait(signal.SIGHUP)
    with trio.fail_after(10):
        assert await until_stopped(stops.signals, hangups.signals, reload, lambda: is_gone) == signal.SIGHUP
    assert reloads == [1]


async def test_a_stop_does_not_wait_for_a_reload_that_hangs() -> None:
    stops, hangups = Told(), Told()
    hangups.send.send_nowait(signal.SIGHUP)
    stops.send.send_nowait(signal.SIGINT)
    with trio.fail_after(10):
        assert await until_stopped(stops.signals, hangups.signals, trio.sleep_forever, lambda: False) == signal.SIGINT

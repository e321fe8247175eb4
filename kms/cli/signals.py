"""Signals that end a command: before there is anything to undo they end it at once, later they unwind the stack."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Final, NoReturn

_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP)


class StoppedError(BaseException):
    """A signal asks this process to end.

    No `Exception`, so that nothing between the work and the boundary takes it for a failure of the work.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def leave_on_signals() -> None:
    """Have SIGINT, SIGTERM and SIGHUP end the process without a word, as they do before a program has begun.

    Not by their default action alone: to process 1, which the server is in a container, the kernel does not apply it. And
    not by an exception, which while modules are loaded nobody would catch. One that is ignored stays so.
    """
    for number in (signal.SIGINT, *_STOP_SIGNALS):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    # By the signal itself, as whoever waits for it expects: to systemd that is no failure, a status would be.
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # process 1 is still here


@contextlib.contextmanager
def stop_signals_raise() -> Iterator[None]:
    """Make SIGINT, SIGTERM and SIGHUP unwind the stack, so that temp files are removed and a terminal's echo comes back.

    SIGINT raises `KeyboardInterrupt`, the others `StoppedError`. One that is ignored stays ignored: nohup(1) means it.
    """
    handlers = dict.fromkeys(_STOP_SIGNALS, _raise_stopped) | {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.getsignal(number) for number in handlers}
    heeded = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    try:
        for number in heeded:
            signal.signal(number, handlers[number])
        yield
    finally:
        for number, handler in heeded.items():
            signal.signal(number, handler)


def _raise_stopped(number: int, _frame: FrameType | None) -> None:
    raise StoppedError(number)

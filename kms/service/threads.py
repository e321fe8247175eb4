"""Threads, where the system may not have one more: its address space, its processes, or a limit of either is used up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import trio

from kms.errors import MemoryShortError

T = TypeVar("T")


async def in_thread(function: Callable[..., T], *arguments: object, limiter: trio.CapacityLimiter | None = None) -> T:
    """As `trio.to_thread.run_sync`. Raises `MemoryShortError` where no thread can be had, and then nothing has begun."""
    try:
        return await trio.to_thread.run_sync(function, *arguments, limiter=limiter)
    except RuntimeError as error:
        raise _translated(error) from None


def start(thread: threading.Thread) -> None:
    """Start `thread`, or raise `MemoryShortError`."""
    try:
        thread.start()
    except RuntimeError as error:
        raise _translated(error) from None


def _translated(error: RuntimeError) -> Exception:
    # CPython has no class of its own for it.
    if str(error) != "can't start new thread":
        return error
    return MemoryShortError(
        "the system has no thread for it, and nothing was changed; free memory, or raise the limit (ulimit -v, ulimit -u)"
    )

"""What must not suffer while a server is abused: an honest client beside, and what the server holds afterwards."""

from __future__ import annotations

import base64
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from threading import Event, Thread
from types import TracebackType
from typing import Any, Final, Self

import pytest

from kms_tests.integration.processes import Server

MAX_P99: Final = 1.0
"""Seconds, on a machine that nobody else uses."""
BUSY: Final = 20
"""For each second that a mere echo takes, a request may take so many more: it has as many times the work."""
TURNS: Final = 100
TICK: Final = 0.02
MAX_DRIFT: Final = 10 << 20
"""Bytes of memory by which a server may differ from what it was before."""
SETTLE: Final = 20.0
"""Seconds in which it has to come back to that."""
MEASURED: Final = 300
"""Requests of an honest client, from which on there is a percentile to speak of."""
PAUSE: Final = 0.005
"""Seconds between two requests of an honest client."""
SIGNS_OF_A_BUG: Final = ("Traceback", "unexpected error", "a connection failed", "never awaited", "Warning")


def wait_for(server: Server, what: str, condition: Callable[[], bool], after: float = 0.0) -> None:
    """Return once `condition` holds; fail, naming `what`, when it does not by the end of TURNS turns of the server's loop.

    They are counted from `after` seconds on: what is due then is done at its next turn. How many seconds that takes is up
    to the machine, and to those who use it beside this test.
    """
    due = time.monotonic() + after
    while time.monotonic() < due:
        if condition():
            return
        time.sleep(TICK)
    with server.unix() as wire:
        for _ in range(TURNS):
            if condition():
                return
            wire.ask(type="Health", token=server.machine.api_token)
            time.sleep(TICK)
    assert condition(), f"{after:g} s and {TURNS} turns later it never came to this: {what}"


class Bystander:
    """A process that echoes lines, and whoever asks it as often as an honest client asks the server.

    How long that takes is what the machine takes from everybody, however good the server is.
    """

    def __init__(self) -> None:
        near, far = socket.socketpair()
        with far:
            self._process = subprocess.Popen([sys.executable, "-S", "-c", _ECHO], stdin=far.fileno(), stdout=far.fileno())
        self._sock = near
        self._stop = Event()
        self._thread = Thread(target=self._work)
        self._latencies: list[float] = []

    def _work(self) -> None:
        while not self._stop.wait(PAUSE):
            begin = time.perf_counter()
            self._sock.sendall(b"x\n")
            self._sock.recv(16)
            self._latencies += _with_those_left_out(time.perf_counter() - begin)

    @property
    def p99(self) -> float:
        return statistics.quantiles(self._latencies, n=100)[98] if len(self._latencies) > 1 else 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._sock.close()
        self._process.wait()


_ECHO: Final = """
import os
while data := os.read(0, 16):
    os.write(1, data)
"""


def _with_those_left_out(latency: float) -> Iterator[float]:
    """`latency`, and those of the requests that were not made meanwhile.

    Who waits asks less often, and would count a long stall as one slow request.
    """
    while latency > 0:
        yield latency
        latency -= PAUSE


@dataclass(frozen=True)
class Usage:
    """What a process holds: descriptors, bytes of memory, and the most bytes it ever had."""

    descriptors: int
    rss: int
    peak: int

    @classmethod
    def of(cls, server: Server) -> Usage:
        process = Path(f"/proc/{server.pid}")
        try:
            descriptors = len(list((process / "fd").iterdir()))
        except PermissionError:
            # The server is not dumpable, so it is not enough to be its user.
            pytest.fail("counting the server's descriptors needs root, or CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH")
        lines = (line.split() for line in (process / "status").read_text(encoding="ascii").splitlines())
        status = {words[0]: words[1] for words in lines if len(words) > 1}
        return cls(descriptors, int(status["VmRSS:"]) << 10, int(status["VmHWM:"]) << 10)

    @staticmethod
    def forget_peak(server: Server) -> None:
        """Let the peak be counted from now on (proc(5), clear_refs)."""
        Path(f"/proc/{server.pid}/clear_refs").write_text("5", encoding="ascii")


class HonestClient:
    """Encrypts and decrypts on one connection, and keeps old ciphertexts, which have to open for ever."""

    def __init__(self, server: Server, *, size: int = 30, is_new: bool = False) -> None:
        """`size` is what each plaintext has; with `is_new` each request comes on a connection of its own."""
        self._server = server
        self._size = size
        self._is_new = is_new
        self._wire = server.tcp()
        self._token = server.machine.api_token
        self._chance = Random(0)
        self._sealed: list[tuple[str, str]] = []
        self._stop = Event()
        self._failure: BaseException | None = None
        self._thread = Thread(target=self._work)
        self.answered = 0
        self.latencies: list[float] = []

    def _work(self) -> None:
        try:
            while not self._stop.wait(PAUSE):
                self.once()
        except (AssertionError, OSError) as failure:
            self._failure = failure

    def once(self) -> None:
        """Encrypt something, and open that or something older."""
        text = base64.b64encode(self._chance.randbytes(self._size)).decode()
        self._sealed.append((text, self._ask(type="Encrypt", plaintext=text)["ciphertext"]))
        if len(self._sealed) > 100:
            self._sealed.pop(self._chance.randrange(100))
        text, ciphertext = self._chance.choice(self._sealed)
        opened = self._ask(type="Decrypt", ciphertext=ciphertext)["plaintext"]
        assert opened == text, f"{ciphertext} opened as {opened}"

    def _ask(self, **request: Any) -> dict[str, Any]:
        begin = time.perf_counter()
        if self._is_new:
            self._wire.close()
            self._wire = self._server.tcp()
        reply = self._wire.ask(token=self._token, **request)
        self.answered += 1
        self.latencies += _with_those_left_out(time.perf_counter() - begin)
        assert reply["status"] == "ok", f"an honest client was answered {reply}"
        return reply

    @property
    def is_measured(self) -> bool:
        """Whether it has asked often enough to speak of a percentile, or will not ask any more."""
        return self.answered >= MEASURED or self._failure is not None

    @property
    def p99(self) -> float:
        return statistics.quantiles(self.latencies, n=100)[98]

    def check(self, echo: float) -> None:
        """Fail unless every request was answered as it should, and in time; `echo` is a bystander's p99."""
        if self._failure is not None:
            raise AssertionError(f"an honest client was harmed: {self._failure!r}") from self._failure
        assert self.p99 < MAX_P99 + BUSY * echo, f"an honest client's p99 was {self.p99:.2f} s, an echo's {echo:.3f} s"

    def __enter__(self) -> Self:
        for _ in range(200):
            self.once()
        self.answered = 0
        self.latencies.clear()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._wire.close()


def until_measured(server: Server, honest: Sequence[HonestClient]) -> None:
    """Return once there is a percentile of each to speak of, however long that takes, as long as they go on."""
    while waiting := [one for one in honest if not one.is_measured]:
        answered = [one.answered for one in waiting]

        def go_on(waiting: list[HonestClient] = waiting, answered: list[int] = answered) -> bool:
            return all(one.is_measured or one.answered > before for one, before in zip(waiting, answered, strict=True))

        wait_for(server, "honest clients are answered", go_on)


@contextmanager
def unharmed(
    server: Server,
    *,
    clients: int = 1,
    settle: float = SETTLE,
    size: int = 30,
    is_new: bool = False,
    most_memory: int | None = None,
) -> Iterator[list[HonestClient]]:
    """Honest clients work while the body runs; after it neither they nor the server may show any harm.

    `size` and `is_new` are those of the clients; `most_memory` is by how many bytes the server may grow meanwhile.
    """
    with ExitStack() as beside:
        bystander = beside.enter_context(Bystander())
        honest = [beside.enter_context(HonestClient(server, size=size, is_new=is_new)) for _ in range(clients)]
        before = Usage.of(server)
        Usage.forget_peak(server)
        yield honest
        until_measured(server, honest)
        _check_came_back(server, before, settle)
        after = Usage.of(server)
    for client in honest:
        client.check(bystander.p99)
    assert most_memory is None or after.peak - before.rss <= most_memory, f"it grew to {after.peak >> 20} MiB"
    for sign in SIGNS_OF_A_BUG:
        assert sign not in server.stderr, f"the server's log has: {sign}"
    latencies = [latency for client in honest for latency in client.latencies]
    p99, slowest = (1000 * seconds for seconds in (max(client.p99 for client in honest), max(latencies)))
    memory = f"memory {before.rss >> 20} MiB before, {after.peak >> 20} at most, {after.rss >> 20} after"
    asked = sum(client.answered for client in honest)
    echo = 1000 * bystander.p99
    print(f"{asked} honest requests, p99 {p99:.1f} ms, slowest {slowest:.0f} ms; an echo's p99 {echo:.1f} ms; {memory}")


def _check_came_back(server: Server, before: Usage, within: float) -> None:
    def descriptors() -> bool:
        return Usage.of(server).descriptors == before.descriptors

    def memory() -> bool:
        return abs(Usage.of(server).rss - before.rss) <= MAX_DRIFT

    wait_for(server, f"the server has its {before.descriptors} descriptors again", descriptors, within)
    wait_for(server, f"the server has its {before.rss >> 20} MiB of memory again", memory, within)

"""What must not suffer while a server is abused: an honest client beside, and what the server holds afterwards."""

from __future__ import annotations

import base64
import statistics
import time
from collections.abc import Callable, Iterator
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
"""Seconds."""
MAX_DRIFT: Final = 10 << 20
"""Bytes of memory by which a server may differ from what it was before."""
SETTLE: Final = 20.0
"""Seconds in which it has to come back to that."""
PAUSE: Final = 0.005
"""Seconds between two requests of an honest client."""
SIGNS_OF_A_BUG: Final = ("Traceback", "unexpected error", "a connection failed", "never awaited", "Warning")


def wait_for(what: str, condition: Callable[[], bool], within: float) -> None:
    """Return once `condition` holds; fail, naming `what`, when it does not in so many seconds."""
    end = time.monotonic() + within
    while not condition():
        assert time.monotonic() < end, f"in {within} s it never came to this: {what}"
        time.sleep(0.02)


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

    def __init__(self, server: Server) -> None:
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
        text = base64.b64encode(self._chance.randbytes(30)).decode()
        self._sealed.append((text, self._ask(type="Encrypt", plaintext=text)["ciphertext"]))
        if len(self._sealed) > 100:
            self._sealed.pop(self._chance.randrange(100))
        text, ciphertext = self._chance.choice(self._sealed)
        opened = self._ask(type="Decrypt", ciphertext=ciphertext)["plaintext"]
        assert opened == text, f"{ciphertext} opened as {opened}"

    def _ask(self, **request: Any) -> dict[str, Any]:
        begin = time.perf_counter()
        reply = self._wire.ask(token=self._token, **request)
        latency = time.perf_counter() - begin
        self.answered += 1
        # Who waits asks less often, and would count a long stall as one slow request. Those it left out count too.
        while latency > 0:
            self.latencies.append(latency)
            latency -= PAUSE
        assert reply["status"] == "ok", f"an honest client was answered {reply}"
        return reply

    @property
    def is_measured(self) -> bool:
        """Whether it has asked often enough to speak of a percentile, or will not ask any more."""
        return self.answered >= 100 or self._failure is not None

    @property
    def p99(self) -> float:
        return statistics.quantiles(self.latencies, n=100)[98]

    def check(self) -> None:
        """Fail unless every request was answered as it should, and in time."""
        if self._failure is not None:
            raise AssertionError(f"an honest client was harmed: {self._failure!r}") from self._failure
        assert self.p99 < MAX_P99, f"an honest client's p99 was {self.p99:.2f} s"

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


@contextmanager
def unharmed(server: Server, *, clients: int = 1, settle: float = SETTLE) -> Iterator[None]:
    """Honest clients work while the body runs; after it neither they nor the server may show any harm."""
    with ExitStack() as beside:
        honest = [beside.enter_context(HonestClient(server)) for _ in range(clients)]
        before = Usage.of(server)
        Usage.forget_peak(server)
        yield
        wait_for("honest clients were asked often enough", lambda: all(client.is_measured for client in honest), settle)
        _check_came_back(server, before, settle)
        after = Usage.of(server)
    for client in honest:
        client.check()
    for sign in SIGNS_OF_A_BUG:
        assert sign not in server.stderr, f"the server's log has: {sign}"
    latencies = [latency for client in honest for latency in client.latencies]
    p99, slowest = (1000 * seconds for seconds in (max(client.p99 for client in honest), max(latencies)))
    memory = f"memory {before.rss >> 20} MiB before, {after.peak >> 20} at most, {after.rss >> 20} after"
    asked = sum(client.answered for client in honest)
    print(f"{asked} honest requests, p99 {p99:.1f} ms, slowest {slowest:.0f} ms; {memory}")


def _check_came_back(server: Server, before: Usage, within: float) -> None:
    def descriptors() -> bool:
        return Usage.of(server).descriptors == before.descriptors

    def memory() -> bool:
        return abs(Usage.of(server).rss - before.rss) <= MAX_DRIFT

    wait_for(f"the server has its {before.descriptors} descriptors again", descriptors, within)
    wait_for(f"the server has its {before.rss >> 20} MiB of memory again", memory, within)

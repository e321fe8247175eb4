"""Prometheus asks here: `GET /metrics` over HTTP, on a loopback port of its own.

Rules:

- GET and HEAD of /metrics are answered, all else is refused; one request a connection;
- MAX_SCRAPES connections at once; for one more, the one that came first makes room;
- the head of a request has at most MAX_SCRAPE_REQUEST_BYTES and has to be whole within SCRAPE_REQUEST_TIMEOUT, and the
  answer has to be taken within SCRAPE_ANSWER_TIMEOUT;
- one text at a time is made, in a thread, and serves all who ask for EXPOSITION_LIFETIME: asking often costs the event loop
  no more than connections do;
- the Host header has to be a name of this machine's loopback. Else a page that somebody's browser has open could read the
  metrics, once its own name was made to point here (DNS rebinding);
- nothing that goes wrong here ends the server, or is noticed by those whom it serves.

h11 reads the HTTP. `start_http_server` of prometheus_client was rejected: it starts a thread for each connection, without a
bound on how many or on how long each may take.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import h11
import trio
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from kms.errors import ConfigError, MemoryShortError
from kms.limits import (
    DEFAULT_TCP_HOST,
    EXPOSITION_LIFETIME,
    MAX_SCRAPE_REQUEST_BYTES,
    MAX_SCRAPES,
    METRICS_RETRY_SECONDS,
    READ_BYTES,
    SCRAPE_ANSWER_TIMEOUT,
    SCRAPE_REQUEST_TIMEOUT,
)
from kms.server.listeners import open_tcp
from kms.service.bugs import log_bug
from kms.service.threads import in_thread

log: Final = logging.getLogger(__name__)

PATH: Final = b"/metrics"
_OPENMETRICS: Final = "application/openmetrics-text"
_LOOPBACK: Final = re.compile(rb"(?i:127\.0\.0\.1|localhost|\[::1\])(?::[0-9]{1,5})?")
_LINGER_READS: Final = 8


class Page(NamedTuple):
    """An answer's content, and what it is."""

    content_type: str
    body: bytes


class Exposition:
    """The text of the metrics, in the format that is asked for: made when it is needed, and lives for a while."""

    def __init__(self, collector: Collector) -> None:
        """`collector` collects in a thread."""
        self._collector = collector
        self._pages: dict[str, tuple[Page, float]] = {}
        self._one_at_a_time = trio.Lock()

    async def page(self, accept: str) -> Page:
        """The page for who sends this Accept header."""
        # The library would take a version out of the header, and put it into the answer as it is.
        wanted = f"{_OPENMETRICS}; version=1.0.0" if _OPENMETRICS in accept else ""
        async with self._one_at_a_time:
            page, expires = self._pages.get(wanted, (None, 0.0))
            if page is None or expires <= trio.current_time():
                try:
                    page = await in_thread(self._make, wanted)
                except MemoryShortError:
                    page = self._make(wanted)
                self._pages[wanted] = (page, trio.current_time() + EXPOSITION_LIFETIME)
            return page

    def _make(self, accept: str) -> Page:
        encode, content_type = choose_encoder(accept)
        return Page(content_type, encode(self._collector))


class Answer(NamedTuple):
    """A response: its status, its page, and headers beside the usual ones."""

    status: int
    page: Page
    headers: tuple[tuple[str, str], ...] = ()


@dataclass
class Scrapes:
    """All connections of those who ask for metrics."""

    page: Callable[[str], Awaitable[Page]]
    """From an Accept header; see `Exposition.page`."""
    _open: dict[trio.CancelScope, None] = field(default_factory=dict)
    """The one that connected first in front."""

    async def serve(self, stream: trio.abc.HalfCloseableStream) -> None:
        """Answer one request and close `stream`. A failure ends here."""
        async with stream:
            if len(self._open) >= MAX_SCRAPES:
                # Who sends byte by byte, or does not hang up, has had the time that Prometheus takes.
                first = next(iter(self._open))
                del self._open[first]
                first.cancel()
            with trio.CancelScope() as scope:
                self._open[scope] = None
                try:
                    await self._converse(stream)
                except (trio.BrokenResourceError, trio.TooSlowError):
                    pass
                except Exception as error:
                    log_bug("a request for metrics failed", error)
                finally:
                    self._open.pop(scope, None)

    async def _converse(self, stream: trio.abc.HalfCloseableStream) -> None:
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_SCRAPE_REQUEST_BYTES)
        request = None
        try:
            with trio.fail_after(SCRAPE_REQUEST_TIMEOUT):
                request = await _request(http, stream)
        except h11.RemoteProtocolError as error:
            answer = _refusal(error.error_status_hint, "this is not a request, or too long a one")
        else:
            if request is None:
                return
            answer = _refused(request) or Answer(200, await self.page(_accept(request)))
        data = _encode(http, answer, with_body=request is None or request.method != b"HEAD")
        with trio.fail_after(SCRAPE_ANSWER_TIMEOUT):
            await stream.send_all(data)
            await _linger(stream)


async def _request(http: h11.Connection, stream: trio.abc.ReceiveStream) -> h11.Request | None:
    """The head of a request; None when its sender has left. Raises `h11.RemoteProtocolError`."""
    while (event := http.next_event()) is h11.NEED_DATA:
        http.receive_data(bytes(await stream.receive_some(READ_BYTES)))
    return event if isinstance(event, h11.Request) else None


def _refused(request: h11.Request) -> Answer | None:
    host = next((value for name, value in request.headers if name == b"host"), b"")
    if _LOOPBACK.fullmatch(host) is None:
        return _refusal(421, "ask for 127.0.0.1 or localhost")
    if request.target.partition(b"?")[0] != PATH:
        return _refusal(404, "there is only /metrics")
    if request.method not in (b"GET", b"HEAD"):
        return _refusal(405, "there is only GET", ("Allow", "GET, HEAD"))
    return None


def _refusal(status: int, text: str, *headers: tuple[str, str]) -> Answer:
    return Answer(status, Page("text/plain; charset=utf-8", f"{text}\n".encode("ascii")), headers)


def _accept(request: h11.Request) -> str:
    return ",".join(value.decode("latin-1") for name, value in request.headers if name == b"accept")


def _encode(http: h11.Connection, answer: Answer, *, with_body: bool) -> bytes:
    headers = [
        ("Content-Type", answer.page.content_type),
        ("Content-Length", str(len(answer.page.body))),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        ("Connection", "close"),
        *answer.headers,
    ]
    data = http.send(h11.Response(status_code=answer.status, headers=headers)) or b""
    return data + answer.page.body if with_body else data


async def _linger(stream: trio.abc.HalfCloseableStream) -> None:
    """Read on for a moment: closing with unread bytes resets, and could take the answer along."""
    await stream.send_eof()
    for _ in range(_LINGER_READS):
        if not await stream.receive_some(READ_BYTES):
            return


class MetricsListener:
    """Listens on a loopback port, as soon as it can have it.

    A server without its metrics serves: whoever takes the port before it must not keep it from that.
    """

    def __init__(self, port: int, collector: Collector) -> None:
        """Port 0 is any free one."""
        self._port = port
        self._scrapes = Scrapes(Exposition(collector).page)
        self._listener: trio.SocketListener | None = None
        self.state = ""
        """Where it listens, or why it does not yet; for people."""
        self._try()

    def _try(self) -> bool:
        try:
            self._listener, number = open_tcp(self._port, "--metrics-port")
        except ConfigError as error:
            self.state = f"no metrics: {error}"
            return False
        self.state = f"metrics on http://{DEFAULT_TCP_HOST}:{number}{PATH.decode()}"
        return True

    async def run(self) -> None:
        """Answer whoever connects, until it is cancelled. Whatever else ends it, ends nothing but this."""
        try:
            while self._listener is None:
                await trio.sleep(METRICS_RETRY_SECONDS)
                if self._try():
                    log.info("%s", self.state)
            await trio.serve_listeners(self._scrapes.serve, [self._listener])
        except* Exception as errors:
            log_bug("metrics are no longer answered", errors)

    def close(self) -> None:
        """Give the port back."""
        if self._listener is not None:
            self._listener.socket.close()

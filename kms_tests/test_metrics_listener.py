"""The HTTP that Prometheus talks to: what is answered, what is refused, and every bound. The clock jumps; no test waits."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import trio
from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from trio.testing import MockClock, memory_stream_pair, wait_all_tasks_blocked

from kms.limits import MAX_SCRAPE_REQUEST_BYTES, MAX_SCRAPES, METRICS_RETRY_SECONDS
from kms.server.metrics_listener import Exposition, MetricsListener, Page, Scrapes

GET = b"GET /metrics HTTP/1.1\r\nHost: localhost:9124\r\n\r\n"
Stream = trio.StapledStream[trio.testing.MemorySendStream, trio.testing.MemoryReceiveStream]


class Pages:
    """Makes pages that say what was asked for; waits for `gate` when that is closed."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.gate = trio.Event()
        self.gate.set()
        self.fault: Exception | None = None

    async def page(self, accept: str) -> Page:
        self.asked.append(accept)
        await self.gate.wait()
        if self.fault is not None:
            raise self.fault
        return Page("text/x", b"the page\n")


@asynccontextmanager
async def connected(scrapes: Scrapes) -> AsyncIterator[Stream]:
    client, server = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(scrapes.serve, server)
        yield client
        await client.aclose()


async def read_to_end(client: Stream) -> bytes:
    received = b""
    async for chunk in client:
        received += chunk
    return received


async def ask(request: bytes, pages: Pages | None = None) -> tuple[int, str, bytes]:
    """The status of the answer, its headers and its body."""
    async with connected(Scrapes((pages or Pages()).page)) as client:
        await client.send_all(request)
        head, _, body = (await read_to_end(client)).partition(b"\r\n\r\n")
    line, _, headers = head.decode("ascii").partition("\r\n")
    return int(line.split()[1]), headers.lower(), body


async def test_get_metrics_is_answered_once_and_the_connection_closed(autojump_clock: MockClock) -> None:
    pages = Pages()
    status, headers, body = await ask(GET + GET, pages)
    assert (status, body) == (200, b"the page\n")
    assert "content-type: text/x\r\n" in headers
    assert "content-length: 9\r\n" in headers
    assert "connection: close" in headers
    assert pages.asked == [""], "one request a connection"


async def test_head_has_the_headers_alone(autojump_clock: MockClock) -> None:
    status, headers, body = await ask(GET.replace(b"GET", b"HEAD"))
    assert (status, body) == (200, b"")
    assert "content-length: 9\r\n" in headers


async def test_the_accept_header_is_passed_on(autojump_clock: MockClock) -> None:
    pages = Pages()
    await ask(GET.replace(b"\r\n\r\n", b"\r\nAccept: a/b\r\nACCEPT: c/d;q=0.5\r\n\r\n"), pages)
    assert pages.asked == ["a/b,c/d;q=0.5"]


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (GET.replace(b"/metrics", b"/"), 404),
        (GET.replace(b"/metrics", b"/metrics/"), 404),
        (GET.replace(b"/metrics", b"http://localhost/metrics"), 404),
        (GET.replace(b"/metrics", b"/metrics?name[]=x"), 200),
        (GET.replace(b"GET", b"POST"), 405),
        (GET.replace(b"GET", b"get"), 405),
        (b"POST /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello", 405),
        (b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n", 200),
        (b"GET /metrics HTTP/1.1\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.0\r\n\r\n", 421),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b'{"type":"Health"}\n\r\n\r\n', 400),
        (b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nX: \x00\r\n\r\n", 400),
    ],
)
async def test_all_else_is_refused(request_: bytes, status: int, autojump_clock: MockClock) -> None:
    pages = Pages()
    told, headers, _ = await ask(request_, pages)
    assert told == status
    assert bool(pages.asked) == (status == 200)
    assert ("allow: get, head" in headers) == (status == 405)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"127.0.0.1", 200),
        (b"127.0.0.1:9124", 200),
        (b"LocalHost:1", 200),
        (b"[::1]", 200),
        (b"[::1]:65535", 200),
        (b"", 421),
        (b"evil.example", 421),
        (b"evil.example:9124", 421),
        (b"localhost.evil.example", 421),
        (b"127.0.0.1.evil.example", 421),
        (b"evil.example@localhost", 421),
        (b"localhost:80:80", 421),
        (b"localhost:http", 421),
        (b"127x0y0z1", 421),
        (b"0.0.0.0:9124", 421),
    ],
)
async def test_only_who_asks_for_this_machines_loopback_is_answered(
    host: bytes, status: int, autojump_clock: MockClock
) -> None:
    pages = Pages()
    assert (await ask(GET.replace(b"localhost:9124", host), pages))[0] == status
    assert bool(pages.asked) == (status == 200), "who is refused makes no work"


async def test_a_head_that_is_too_long_is_refused_before_it_is_whole(autojump_clock: MockClock) -> None:
    status, _, _ = await ask(GET[:-2] + b"X: " + b"x" * MAX_SCRAPE_REQUEST_BYTES)
    assert status == 431


async def test_the_longest_head_is_taken(autojump_clock: MockClock) -> None:
    longest = GET[:-2] + b"X: "
    status, _, _ = await ask(longest + b"x" * (MAX_SCRAPE_REQUEST_BYTES - len(longest) - 4) + b"\r\n\r\n")
    assert status == 200


@pytest.mark.parametrize("sent", [b"", GET[:20]])
async def test_a_request_has_to_be_whole_in_time(sent: bytes, autojump_clock: MockClock) -> None:
    start = trio.current_time()
    assert await _cut_off(sent) == b""
    assert trio.current_time() - start == pytest.approx(5)


async def _cut_off(sent: bytes) -> bytes:
    async with connected(Scrapes(Pages().page)) as client:
        if sent:
            await client.send_all(sent)
        return await read_to_end(client)


async def _send_until_closed(client: Stream, parts: list[bytes], *, pause: float) -> None:
    for part in parts:
        try:
            await client.send_all(part)
        except trio.BrokenResourceError:
            return
        await trio.sleep(pause)
    pytest.fail("it was read to the end")


async def test_one_byte_a_second_does_not_help(autojump_clock: MockClock) -> None:
    start = trio.current_time()
    async with connected(Scrapes(Pages().page)) as client:
        await _send_until_closed(client, [bytes([byte]) for byte in GET], pause=1)
    assert trio.current_time() - start == pytest.approx(5, abs=1)


async def test_an_answer_has_to_be_taken_in_time(autojump_clock: MockClock) -> None:
    async def never() -> None:
        await trio.sleep_forever()

    client, server = memory_stream_pair()
    server.send_stream.send_all_hook = never
    await client.send_all(GET)
    start = trio.current_time()
    await Scrapes(Pages().page).serve(server)
    assert trio.current_time() - start == pytest.approx(5)


async def test_one_that_stays_after_its_answer_is_closed_in_time(autojump_clock: MockClock) -> None:
    client, server = memory_stream_pair()
    await client.send_all(GET)
    start = trio.current_time()
    await Scrapes(Pages().page).serve(server)
    assert trio.current_time() - start == pytest.approx(5)


async def test_one_that_sends_on_and_on_is_not_read_for_ever(autojump_clock: MockClock) -> None:
    async with connected(Scrapes(Pages().page)) as client:
        await _send_until_closed(client, [GET * 1000] * 1000, pause=0.001)


async def test_one_connection_too_many_is_closed_as_it_comes_and_a_free_place_is_given_again(
    autojump_clock: MockClock,
) -> None:
    pages = Pages()
    pages.gate = trio.Event()
    scrapes = Scrapes(pages.page)
    async with trio.open_nursery() as nursery:
        clients = []
        for _ in range(MAX_SCRAPES):
            client, server = memory_stream_pair()
            nursery.start_soon(scrapes.serve, server)
            await client.send_all(GET)
            clients.append(client)
        await wait_all_tasks_blocked()
        async with connected(scrapes) as one_more:
            await one_more.send_all(GET)
            await wait_all_tasks_blocked()
            assert await read_to_end(clients[0]) == b"", "the first of them made room"
            pages.gate.set()
            for client in (one_more, *clients[1:]):
                assert b"the page" in await read_to_end(client)
                await client.aclose()
    async with connected(scrapes) as client:
        await client.send_all(GET)
        assert b"the page" in await read_to_end(client)


async def test_an_honest_scrape_gets_through_beside_any_number_that_send_byte_by_byte(autojump_clock: MockClock) -> None:
    scrapes = Scrapes(Pages().page)
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            for _ in range(2 * MAX_SCRAPES):
                client, server = memory_stream_pair()
                nursery.start_soon(scrapes.serve, server)
                await client.send_all(GET[:1])
            await wait_all_tasks_blocked()
            start = trio.current_time()
            async with connected(scrapes) as honest:
                await honest.send_all(GET)
                assert b"the page" in await read_to_end(honest)
            assert trio.current_time() - start < 1
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("sent", [b"", GET[:20], GET])
async def test_one_that_leaves_is_an_end_like_any_other(
    sent: bytes, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    client, server = memory_stream_pair()
    await client.send_all(sent or b"\r\n")
    await client.aclose()
    await Scrapes(Pages().page).serve(server)
    assert caplog.records == []


async def test_a_fault_ends_one_answer_and_is_logged_without_its_text(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    pages = Pages()
    scrapes = Scrapes(pages.page)
    for fault, expected in ((RuntimeError("canary"), b""), (None, b"the page")):
        pages.fault = fault
        async with connected(scrapes) as client:
            await client.send_all(GET)
            assert (await read_to_end(client)).endswith(expected + b"\n" if expected else b"")
    assert "a request for metrics failed: RuntimeError" in caplog.text
    assert "canary" not in caplog.text


class Counting:
    """A collector that counts how often, and in which thread, it is asked."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []
        self.gate = threading.Event()
        self.gate.set()
        self.at_once = 0
        self.most_at_once = 0

    def collect(self) -> Iterator[Metric]:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        assert self.gate.wait(10)
        self.threads.append(threading.current_thread())
        self.at_once -= 1
        yield GaugeMetricFamily("asked", "how often", len(self.threads))


async def test_a_text_is_made_in_a_thread_and_serves_whoever_asks_within_a_second(autojump_clock: MockClock) -> None:
    collector = Counting()
    exposition = Exposition(collector)
    pages = [await exposition.page("text/plain") for _ in range(5)]
    assert {page.body.splitlines()[-1] for page in pages} == {b"asked 1.0"}
    assert threading.current_thread() not in collector.threads
    await trio.sleep(1)
    assert b"asked 2.0" in (await exposition.page("")).body


async def test_those_who_ask_at_once_share_one_text() -> None:
    collector = Counting()
    collector.gate.clear()
    exposition = Exposition(collector)
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(exposition.page, "")
            nursery.start_soon(exposition.page, "application/openmetrics-text")
        await wait_all_tasks_blocked()
        collector.gate.set()
    assert len(collector.threads) == 2
    assert collector.most_at_once == 1


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text",
        "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3",
        "application/openmetrics-text;version=nonsense",
        "application/openmetrics-text;version=" + "9" * 5000,
        "application/openmetrics-text;version=7.7.7;escaping=canary",
    ],
)
async def test_openmetrics_is_given_to_who_takes_it_and_nothing_of_the_header_comes_back(accept: str) -> None:
    page = await Exposition(Counting()).page(accept)
    assert page.content_type.startswith("application/openmetrics-text; version=1.0.0; charset=utf-8")
    assert page.body.endswith(b"# EOF\n")


@pytest.mark.parametrize("accept", ["", "*/*", "text/plain;version=0.0.4", "text/plain;version=" + "9" * 5000, ";;,=,\x7f"])
async def test_all_others_get_the_text_that_every_Prometheus_reads(accept: str) -> None:
    page = await Exposition(Counting()).page(accept)
    assert page.content_type == "text/plain; version=0.0.4; charset=utf-8"
    assert page.body.endswith(b"asked 1.0\n")


async def test_a_real_connection_is_answered() -> None:
    listener = MetricsListener(0, Counting())
    port = int(listener.state.removeprefix("metrics on http://127.0.0.1:").removesuffix("/metrics"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.run)
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            await client.send_all(GET)
            answer = b"".join([chunk async for chunk in client])
        nursery.cancel_scope.cancel()
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"asked 1.0\n")
    listener.close()
    with socket.socket() as late:
        assert late.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


async def test_a_port_that_is_taken_is_tried_again_until_it_is_free(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        listener = MetricsListener(port, Counting())
        assert listener.state.startswith("no metrics: cannot listen on")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.run)
        await trio.sleep(METRICS_RETRY_SECONDS + 1)
        assert listener.state == f"metrics on http://127.0.0.1:{port}/metrics"
        assert listener.state in caplog.text
        nursery.cancel_scope.cancel()
    listener.close()


async def test_a_listener_that_fails_ends_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    text = "canary"

    async def broken(*_: object, **__: object) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(trio, "serve_listeners", broken)
    listener = MetricsListener(0, Counting())
    await listener.run()
    listener.close()
    assert "metrics are no longer answered: RuntimeError" in caplog.text
    assert text not in caplog.text

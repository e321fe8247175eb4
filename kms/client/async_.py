"""The client for trio programs: `KmsClient`'s methods, awaited."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from functools import partial
from types import TracebackType
from typing import Self

import trio

from kms.client.known_server import KnownServer, has_not_spoken, loopback, pauses
from kms.client.protocol import BytesLike, Call, DataKey, Exchange, Requests, T, Token
from kms.client.transport import advance, closed, ended, port_number, refused, seconds, silent
from kms.errors import ServerUnreachableError
from kms.limits import CONNECT_TIMEOUT, DEFAULT_TCP_HOST, DEFAULT_TCP_PORT, MAX_LIST_LIMIT, REPLY_TIMEOUT, THROTTLE_PATIENCE
from kms.wire.messages import KeyGroupView


class AsyncKmsClient:
    """One connection to a server, for any number of tasks, which take turns. Make it with `connect_unix` or `connect_tcp`.

    Errors, bytes, `key_id` and `request_id` are as for `KmsClient`. A call that is cancelled in the middle of its exchange
    closes the connection, as its reply may still come and would be taken for that of the next.
    """

    def __init__(
        self,
        link: socket.socket,
        address: str,
        *,
        token: Token,
        timeout: float = REPLY_TIMEOUT,
        request_id: str | None = None,
    ) -> None:
        """A client on a connected socket, which it owns from now on. `address` is for messages, `timeout` in seconds."""
        self._requests = Requests(token, request_id)
        self._address = address
        self._timeout = seconds("timeout", timeout)
        self._lock = trio.Lock()
        link.settimeout(0)
        self._link: socket.socket | None = link

    @classmethod
    async def connect_unix(
        cls,
        path: str | os.PathLike[str],
        *,
        token: Token = "",
        timeout: float = REPLY_TIMEOUT,  # noqa: ASYNC109 (it is for each reply, not for this call)
        request_id: str | None = None,
        server_user: str | int | None = None,
    ) -> Self:
        """As `KmsClient.connect_unix`."""
        known, address = KnownServer(server_user), os.fsdecode(path)

        async def identify(link: socket.socket) -> None:
            known.check_unix(link, address)

        return await cls._connect(partial(trio.open_unix_socket, address), identify, address, token, timeout, request_id)

    @classmethod
    async def connect_tcp(
        cls,
        host: str = DEFAULT_TCP_HOST,
        port: int = DEFAULT_TCP_PORT,
        *,
        token: Token,
        timeout: float = REPLY_TIMEOUT,  # noqa: ASYNC109 (it is for each reply, not for this call)
        request_id: str | None = None,
        server_user: str | int | None = None,
    ) -> Self:
        """As `KmsClient.connect_tcp`."""
        known, host, address = KnownServer(server_user), loopback(host), f"{host}:{port_number(port)}"

        async def identify(link: socket.socket) -> None:
            for pause in pauses():
                if known.is_tcp_known(link, address):
                    return
                await trio.sleep(pause)

        return await cls._connect(partial(trio.open_tcp_stream, host, port), identify, address, token, timeout, request_id)

    @classmethod
    async def _connect(
        cls,
        opened: Callable[[], Awaitable[trio.SocketStream]],
        identify: Callable[[socket.socket], Awaitable[None]],
        address: str,
        token: Token,
        reply_timeout: float,
        request_id: str | None,
    ) -> Self:
        connect_timeout = min(seconds("timeout", reply_timeout), CONNECT_TIMEOUT)
        with contextlib.ExitStack() as unless_known:
            try:
                with trio.fail_after(connect_timeout):
                    stream = await opened()
                    link = unless_known.enter_context(socket.socket(fileno=stream.socket.detach()))
                    await identify(link)
            except OSError as error:
                raise ServerUnreachableError(refused(address, error)) from error
            except trio.TooSlowError:
                raise ServerUnreachableError(silent(address, connect_timeout)) from None
            client = cls(link, address, token=token, timeout=reply_timeout, request_id=request_id)
            unless_known.pop_all()
            return client

    async def aclose(self) -> None:
        """Close the connection; a call under way in another task fails. Closing twice does nothing more."""
        self._close()
        await trio.lowlevel.checkpoint()

    def _close(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            trio.lowlevel.notify_closing(link)
            link.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<AsyncKmsClient {self._address}>"

    async def health(self) -> str:
        """As `KmsClient.health`."""
        return await self._one(self._requests.health())

    async def generate_data_key(self, key_id: str | None = None, aad: BytesLike = b"") -> DataKey:
        """As `KmsClient.generate_data_key`."""
        return await self._one(self._requests.generate_data_key(key_id, aad))

    async def encrypt(self, plaintext: BytesLike, key_id: str | None = None, aad: BytesLike = b"") -> bytes:
        """As `KmsClient.encrypt`."""
        return await self._one(self._requests.encrypt(plaintext, key_id, aad))

    async def decrypt(self, ciphertext: BytesLike, aad: BytesLike = b"", *, source_key_id: str | None = None) -> bytes:
        """As `KmsClient.decrypt`."""
        return await self._one(self._requests.decrypt(ciphertext, aad, source_key_id))

    async def reencrypt(
        self, ciphertext: BytesLike, key_id: str, aad: BytesLike = b"", *, source_key_id: str | None = None
    ) -> bytes:
        """As `KmsClient.reencrypt`."""
        return await self._one(self._requests.reencrypt(ciphertext, key_id, aad, source_key_id))

    async def encrypt_many(
        self, plaintexts: Iterable[BytesLike], key_id: str | None = None, aad: BytesLike = b""
    ) -> list[bytes]:
        """As `KmsClient.encrypt_many`."""
        return await self._run(self._requests.encrypt(plaintext, key_id, aad) for plaintext in plaintexts)

    async def decrypt_many(
        self, ciphertexts: Iterable[BytesLike], aad: BytesLike = b"", *, source_key_id: str | None = None
    ) -> list[bytes]:
        """As `KmsClient.decrypt_many`."""
        return await self._run(self._requests.decrypt(ciphertext, aad, source_key_id) for ciphertext in ciphertexts)

    async def create_key_group(self, key_id: str) -> KeyGroupView:
        """As `KmsClient.create_key_group`."""
        return await self._one(self._requests.create_key_group(key_id))

    async def rotate_key_group(self, key_id: str) -> KeyGroupView:
        """As `KmsClient.rotate_key_group`."""
        return await self._one(self._requests.rotate_key_group(key_id))

    async def list_key_groups(self, *, usage: bool = False) -> list[KeyGroupView]:
        """As `KmsClient.list_key_groups`."""
        return await self._one(self._requests.list_key_groups(usage))

    async def iter_key_groups(
        self, *, usage: bool = False, page_size: int = MAX_LIST_LIMIT
    ) -> AsyncGenerator[KeyGroupView, None]:
        """As `KmsClient.iter_key_groups`: `async for group in client.iter_key_groups()`."""
        token: str | None = None
        while True:
            page = await self._one(self._requests.page_of_key_groups(usage, page_size, token))
            for group in page.groups:
                yield group
            token = page.next_token
            if token is None:
                return

    async def describe_key_group(self, key_id: str) -> KeyGroupView:
        """As `KmsClient.describe_key_group`."""
        return await self._one(self._requests.describe_key_group(key_id))

    async def disable_version(self, key_id: str, version: int, *, for_seconds: int | None = None) -> str:
        """As `KmsClient.disable_version`."""
        return await self._one(self._requests.disable_version(key_id, version, for_seconds))

    async def enable_version(self, key_id: str, version: int) -> str:
        """As `KmsClient.enable_version`."""
        return await self._one(self._requests.enable_version(key_id, version))

    async def destroy_version(self, key_id: str, version: int) -> str:
        """As `KmsClient.destroy_version`."""
        return await self._one(self._requests.destroy_version(key_id, version))

    async def _one(self, call: Call[T]) -> T:
        return (await self._run((call,)))[0]

    async def _run(self, calls: Iterable[Call[T]]) -> list[T]:
        async with self._lock:
            if self._link is None:
                raise ServerUnreachableError(closed(self._address))
            exchange = Exchange(calls, patience=min(self._timeout, THROTTLE_PATIENCE))
            try:
                has_not_spoken(self._link, self._address)
                await self._drive(self._link, exchange)
            except ServerUnreachableError as error:
                self._close()
                raise ended(error, exchange) from error.__cause__
            except BaseException:
                self._close()
                raise
            if exchange.is_over:
                self._close()
            return exchange.results()

    async def _drive(self, link: socket.socket, exchange: Exchange[T]) -> None:
        try:
            while True:
                waits_to_send = advance(link, exchange, self._address)
                if exchange.is_done:
                    return
                if exchange.pause:
                    await trio.sleep(exchange.pause)
                    if self._link is None:
                        raise trio.ClosedResourceError
                    exchange.resume()
                    continue
                with trio.fail_after(self._timeout):
                    await _wait(link, to_send=waits_to_send)
        except trio.TooSlowError:
            raise ServerUnreachableError(silent(self._address, self._timeout)) from None
        except trio.ClosedResourceError:
            raise ServerUnreachableError(closed(self._address)) from None


async def _wait(link: socket.socket, *, to_send: bool) -> None:
    """Until `link` is readable, or, with `to_send`, writable."""
    if not to_send:
        await trio.lowlevel.wait_readable(link)
        return

    closing = False

    async def first(wait: Callable[[socket.socket], Awaitable[None]]) -> None:
        nonlocal closing
        try:
            await wait(link)
        except trio.ClosedResourceError:
            # Passed on by hand, as the nursery would wrap it in a group.
            closing = True
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(first, trio.lowlevel.wait_readable)
        nursery.start_soon(first, trio.lowlevel.wait_writable)
    if closing:
        raise trio.ClosedResourceError

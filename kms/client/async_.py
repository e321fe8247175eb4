"""The client for async programs, of trio or of asyncio: `KmsClient`'s methods, awaited."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Self

from kms.client.environment import ADMIN, API, found
from kms.client.known_server import KnownServer, loopback, pauses
from kms.client.links import Links
from kms.client.loops import Event, Loop, current
from kms.client.protocol import (
    BytesLike,
    Call,
    DataKey,
    Exchange,
    Requests,
    T,
    Token,
    WrappedDataKey,
    check_text,
    texts,
)
from kms.client.transport import advance, closed, ended, port_number, refused, seconds, silent
from kms.errors import ServerUnreachableError
from kms.limits import (
    CONNECT_TIMEOUT,
    DEFAULT_TCP_HOST,
    DEFAULT_TCP_PORT,
    MAX_LIST_LIMIT,
    RECONNECT_SECONDS,
    REPLY_TIMEOUT,
    THROTTLE_PATIENCE,
)
from kms.wire.messages import KeyGroupView, StatusView

if TYPE_CHECKING:
    from kms.client.file_io import Progress
    from kms.client.files import PathOrStream

Connect = Callable[[Loop, float], Awaitable[socket.socket]]
"""Makes a connection within so many seconds, to a server that is known."""


class AsyncKmsClient:
    """A client for any number of tasks, under trio or asyncio. Make it with `from_env`, `connect_unix`, `connect_tcp`.

    Errors, bytes, `key_id` and `request_id` are as for `KmsClient`, and so are connections. A call that is cancelled in the
    middle of its exchange ends its connection, as its reply may still come and would be taken for that of the next. In
    another event loop, and in the child of a fork, it begins anew.
    """

    def __init__(
        self,
        link: socket.socket,
        address: str,
        *,
        token: Token,
        timeout: float = REPLY_TIMEOUT,
        request_id: str | None = None,
        connect: Connect | None = None,
    ) -> None:
        """A client on a connected socket, which it owns from now on. `address` is for messages, `timeout` in seconds.

        Without `connect`, which makes others, it is the only one.
        """
        self._requests = Requests(token, request_id)
        self._address = address
        self._timeout = seconds("timeout", timeout)
        self._connect = connect
        self._links = Links(address, None, link, timeout=self._timeout, has_others=connect is not None)
        self._identity: object = None
        self._waiting: list[Event] = []
        self._connecting = 0

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
        address = os.fsdecode(path)
        return await cls._connected(partial(_unix, address, KnownServer(server_user)), address, token, timeout, request_id)

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
        return await cls._connected(partial(_tcp, host, port, known, address), address, token, timeout, request_id)

    @classmethod
    async def from_env(
        cls,
        *,
        admin: bool = False,
        timeout: float = REPLY_TIMEOUT,  # noqa: ASYNC109 (it is for each reply, not for this call)
        request_id: str | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Self:
        """As `KmsClient.from_env`."""
        address, token, user = found(ADMIN if admin else API, environ)
        if address.unix is not None:
            return await cls.connect_unix(
                address.unix, token=token, timeout=timeout, request_id=request_id, server_user=user
            )
        return await cls.connect_tcp(
            address.host, address.port, token=token, timeout=timeout, request_id=request_id, server_user=user
        )

    @classmethod
    async def _connected(
        cls, connect: Connect, address: str, token: Token, reply_timeout: float, request_id: str | None
    ) -> Self:
        link = await connect(current(), seconds("timeout", reply_timeout))
        try:
            return cls(link, address, token=token, timeout=reply_timeout, request_id=request_id, connect=connect)
        except BaseException:
            link.close()
            raise

    async def aclose(self) -> None:
        """Close all connections; a call under way in another task fails. Closing twice does nothing more."""
        self._close()
        await current().sleep(0)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Without a checkpoint, so that it is closed also where this was cancelled.
        self._close()

    def _close(self) -> None:
        self._links.close()
        while self._waiting:
            self._waiting.pop().set()

    def __repr__(self) -> str:
        return f"<AsyncKmsClient {self._address}>"

    async def health(self) -> str:
        """As `KmsClient.health`."""
        return await self._one(self._requests.health())

    async def generate_data_key(
        self,
        key_id: str | None = None,
        aad: BytesLike = b"",
        *,
        length: int | None = None,
        also_key_ids: Sequence[str] = (),
    ) -> DataKey:
        """As `KmsClient.generate_data_key`."""
        return await self._one(self._requests.generate_data_key(key_id, aad, length, also_key_ids))

    async def generate_data_key_without_plaintext(
        self,
        key_id: str | None = None,
        aad: BytesLike = b"",
        *,
        length: int | None = None,
        also_key_ids: Sequence[str] = (),
    ) -> WrappedDataKey:
        """As `KmsClient.generate_data_key_without_plaintext`."""
        return await self._one(self._requests.generate_data_key_without_plaintext(key_id, aad, length, also_key_ids))

    async def generate_random(self, length: int) -> bytes:
        """As `KmsClient.generate_random`."""
        return await self._one(self._requests.generate_random(length))

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

    async def encrypt_file(
        self,
        source: PathOrStream,
        target: PathOrStream,
        *,
        key_id: str | None = None,
        aad: BytesLike = b"",
        progress: Progress | None = None,
        file_format: str = "mke2",
        also_key_ids: Sequence[str] = (),
    ) -> None:
        """As `KmsClient.encrypt_file`, in a thread; `progress` is called there. It is not cancelled before its end."""
        # Here, since who has no files does not pay for the ciphers that they take.
        from kms.client.files import Arguments, encrypt_file, format_named

        check_text("key_id", key_id, is_optional=True)
        given = Arguments.of(source, target, aad, progress)
        loop = current()
        form = format_named(file_format)
        encrypt = partial(
            encrypt_file,
            key_id=key_id,
            aad=given.aad,
            progress=given.progress,
            file_format=form,
            also_key_ids=texts("also_key_ids", also_key_ids),
        )
        await loop.in_thread(partial(encrypt, _FromThread(self, loop), given.source, given.target))

    async def decrypt_file(
        self,
        source: PathOrStream,
        target: PathOrStream,
        *,
        aad: BytesLike = b"",
        source_key_id: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        """As `KmsClient.decrypt_file`, likewise."""
        from kms.client.files import Arguments, decrypt_file

        check_text("source_key_id", source_key_id, is_optional=True)
        given = Arguments.of(source, target, aad, progress)
        loop = current()
        decrypt = partial(decrypt_file, source_key_id=source_key_id, aad=given.aad, progress=given.progress)
        await loop.in_thread(partial(decrypt, _FromThread(self, loop), given.source, given.target))

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

    async def status(self) -> StatusView:
        """As `KmsClient.status`."""
        return await self._one(self._requests.status())

    async def reload(self) -> str:
        """As `KmsClient.reload`."""
        return await self._one(self._requests.reload())

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
        loop = current()
        self._begin_in(loop)
        exchange = Exchange(calls, patience=min(self._timeout, THROTTLE_PATIENCE))
        deadline = time.monotonic() + self._timeout
        link = await self._ready(loop, deadline, anew=False)
        while True:
            try:
                await self._drive(loop, link, exchange, deadline)
            except TimeoutError:
                self._let_go(link, is_whole=False)
                raise ended(ServerUnreachableError(silent(self._address, self._timeout)), exchange) from None
            except ServerUnreachableError as error:
                self._let_go(link, is_whole=False)
                if self._links.is_closed:
                    raise ended(ServerUnreachableError(closed(self._address)), exchange) from None
                if not (self._links.has_others and exchange.begin_again()):
                    raise ended(error, exchange) from error.__cause__
            except BaseException:
                self._let_go(link, is_whole=False)
                raise
            else:
                break
            link = await self._ready(loop, deadline, anew=True)
        self._let_go(link, is_whole=not exchange.is_over)
        return exchange.results()

    def _begin_in(self, loop: Loop) -> None:
        identity = loop.identity
        if identity is not self._identity:
            # Not those that are in use: another loop may run in another thread.
            if self._identity is not None and self._links.has_others:
                self._links.drop_idle()
            self._identity = identity
            self._waiting, self._connecting = [], 0

    async def _ready(self, loop: Loop, deadline: float, *, anew: bool) -> socket.socket:
        while True:
            link = self._links.ready(anew=anew)
            if link is not None:
                return link
            if self._links.has_room(self._connecting):
                break
            # Not a semaphore, whose every use would be a trip through the scheduler.
            freed = loop.event()
            self._waiting.append(freed)
            await freed.wait()
            if time.monotonic() >= deadline:
                raise ServerUnreachableError(f"all connections to {self._address} are in use")
        self._connecting += 1
        try:
            return self._links.add(await self._reconnected(loop, deadline))
        finally:
            self._connecting -= 1

    def _let_go(self, link: socket.socket, *, is_whole: bool) -> None:
        if is_whole:
            self._links.give_back(link)
        else:
            self._links.drop(link)
        while self._waiting:
            self._waiting.pop().set()

    async def _reconnected(self, loop: Loop, deadline: float) -> socket.socket:
        if self._connect is None:
            raise ServerUnreachableError(closed(self._address))
        give_up = min(deadline, time.monotonic() + RECONNECT_SECONDS)
        for pause in pauses():
            try:
                return await self._connect(loop, max(0.001, deadline - time.monotonic()))
            except ServerUnreachableError:
                if time.monotonic() + pause >= give_up or self._links.is_closed:
                    raise
            await loop.sleep(pause)
        raise AssertionError("pauses never end")

    async def _drive(self, loop: Loop, link: socket.socket, exchange: Exchange[T], deadline: float) -> None:
        answered = 0
        while True:
            waits_to_send = advance(link, exchange, self._address)
            if exchange.is_done:
                return
            if exchange.answered != answered:
                # Of many, each next one has its time.
                answered, deadline = exchange.answered, time.monotonic() + self._timeout
            if exchange.pause:
                await loop.sleep(exchange.pause)
                exchange.resume()
                deadline = time.monotonic() + self._timeout
                if self._links.is_closed:
                    raise ServerUnreachableError(closed(self._address))
                continue
            left = deadline - time.monotonic()
            if left <= 0 or not await loop.wait(link, left, to_send=waits_to_send):
                raise TimeoutError


class _FromThread:
    """What files need of a client, for a thread of its loop."""

    def __init__(self, client: AsyncKmsClient, loop: Loop) -> None:
        self._client = client
        self._loop = loop

    def generate_data_key(
        self, key_id: str | None = None, aad: bytes = b"", *, also_key_ids: Sequence[str] = ()
    ) -> DataKey:
        return self._loop.from_thread(partial(self._client.generate_data_key, key_id, aad, also_key_ids=also_key_ids))

    def decrypt(self, ciphertext: bytes, aad: bytes = b"", *, source_key_id: str | None = None) -> bytes:
        return self._loop.from_thread(partial(self._client.decrypt, ciphertext, aad, source_key_id=source_key_id))

    def reencrypt(self, ciphertext: bytes, key_id: str, aad: bytes = b"", *, source_key_id: str | None = None) -> bytes:
        return self._loop.from_thread(partial(self._client.reencrypt, ciphertext, key_id, aad, source_key_id=source_key_id))


async def _unix(path: str, known: KnownServer, loop: Loop, within: float) -> socket.socket:
    """A connection to the Unix socket at `path`."""
    connect_timeout = min(within, CONNECT_TIMEOUT)
    deadline = time.monotonic() + connect_timeout
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        link.settimeout(0)
        for pause in pauses():
            try:
                link.connect(path)
                break
            except BlockingIOError:
                # As many wait as may: there is nothing to wait for but that one is taken up.
                if time.monotonic() + pause >= deadline:
                    raise ServerUnreachableError(silent(path, connect_timeout)) from None
            await loop.sleep(pause)
        known.check_unix(link, path)
        return link
    except OSError as error:
        link.close()
        raise ServerUnreachableError(refused(path, error)) from error
    except BaseException:
        link.close()
        raise


async def _tcp(host: str, port: int, known: KnownServer, address: str, loop: Loop, within: float) -> socket.socket:
    """A connection over TCP."""
    connect_timeout = min(within, CONNECT_TIMEOUT)
    deadline = time.monotonic() + connect_timeout
    link = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        link.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            link.connect((host, port))
        if not await loop.wait(link, connect_timeout, to_send=True):
            raise ServerUnreachableError(silent(address, connect_timeout))
        failed = link.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failed:
            raise OSError(failed, os.strerror(failed))
        for pause in pauses():
            if known.is_tcp_known(link, address):
                break
            if time.monotonic() + pause >= deadline:
                raise ServerUnreachableError(silent(address, connect_timeout))
            await loop.sleep(pause)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return link
    except OSError as error:
        link.close()
        raise ServerUnreachableError(refused(address, error)) from error
    except BaseException:
        link.close()
        raise

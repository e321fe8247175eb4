"""The client for ordinary programs: plain sockets, no event loop, no trio."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Self

from kms.client.environment import ADMIN, API, found
from kms.client.known_server import KnownServer, loopback, pauses
from kms.client.links import Connect, Links
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
from kms.errors import KmsError, ServerUnreachableError
from kms.limits import (
    CONNECT_TIMEOUT,
    DEFAULT_TCP_HOST,
    DEFAULT_TCP_PORT,
    MAX_LIST_LIMIT,
    READ_BYTES,
    REPLY_TIMEOUT,
    THROTTLE_PATIENCE,
)
from kms.wire.messages import KeyGroupView, StatusView

if TYPE_CHECKING:
    from kms.client.file_io import Progress
    from kms.client.files import PathOrStream


class KmsClient:
    """A client for any number of threads, before and after a fork. Make it with `from_env`, `connect_unix`, `connect_tcp`.

    Every method raises the `WireError` the server answers with (`AuthFailedError`, `InvalidRequestError`, ...), and
    `ServerUnreachableError` when the server cannot be reached, or has not answered within `timeout` seconds, which is for
    the whole call (of many, for each next one); `ProtocolError` for a reply that is none. A call that the server throttles
    is sent again when it says; `ThrottledError` when that takes longer than 20 s, or `timeout`.

    Connections are made as they are needed, kept, looked at before they are used, and left when they were idle for 25
    seconds. When one breaks, what was not answered is sent again once, on a new one; it may be counted and recorded twice.
    A change of keys is only if nothing of it was sent: else `OutcomeUnknownError`.

    Plaintexts, ciphertexts and `aad` are raw bytes. `aad` is authenticated, not stored: decryption needs the same.
    A `key_id` of None is the group `default`. `request_id`, 1 to 64 printable characters, is what all that the client asks
    for is called in the server's logs.
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
        self._links = Links(address, connect, link, timeout=self._timeout)

    @classmethod
    def connect_unix(
        cls,
        path: str | os.PathLike[str],
        *,
        token: Token = "",
        timeout: float = REPLY_TIMEOUT,
        request_id: str | None = None,
        server_user: str | int | None = None,
    ) -> Self:
        """Connect to the Unix socket at `path`. `timeout` in seconds. Raises `ServerUnreachableError`, `ConfigError`.

        `token` is the token, or a path of the private file that holds it, or a function that gives it; without one the
        server may know this process by its user id. `UnknownServerError` when the server's process
        is not one of this user, of root, of the owner of the socket's directory, or of `server_user` (name or uid;
        `any` believes whoever it is).
        """
        address = os.fsdecode(path)
        return cls._connected(partial(_unix, address, KnownServer(server_user)), address, token, timeout, request_id)

    @classmethod
    def connect_tcp(
        cls,
        host: str = DEFAULT_TCP_HOST,
        port: int = DEFAULT_TCP_PORT,
        *,
        token: Token,
        timeout: float = REPLY_TIMEOUT,
        request_id: str | None = None,
        server_user: str | int | None = None,
    ) -> Self:
        """Connect over TCP, on loopback alone. `timeout` in seconds. Raises `ServerUnreachableError`, `ConfigError`.

        `UnknownServerError` when the server's process is not one of this user, of root, or of `server_user` (name or
        uid; `any` believes whoever it is), or when that cannot be known.
        """
        known, host, address = KnownServer(server_user), loopback(host), f"{host}:{port_number(port)}"
        return cls._connected(partial(_tcp, host, port, known, address), address, token, timeout, request_id)

    @classmethod
    def from_env(
        cls,
        *,
        admin: bool = False,
        timeout: float = REPLY_TIMEOUT,
        request_id: str | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Self:
        """Connect as the command lines do: to the server and with the token that the environment names.

        `MINIKMS_UNIX_SOCKET`, else `<data>/kms.sock`, else loopback at `MINIKMS_TCP_PORT`; `MINIKMS_API_TOKEN`, else the
        file `MINIKMS_API_TOKEN_FILE`, else `<data>/api.token`, which is read again when it changes; with `admin` those of
        the admin token. Without a token the server may know this process by its user id. `environ` is `os.environ`.
        """
        address, token, user = found(ADMIN if admin else API, environ)
        if address.unix is not None:
            return cls.connect_unix(address.unix, token=token, timeout=timeout, request_id=request_id, server_user=user)
        return cls.connect_tcp(
            address.host, address.port, token=token, timeout=timeout, request_id=request_id, server_user=user
        )

    @classmethod
    def _connected(cls, connect: Connect, address: str, token: Token, timeout: float, request_id: str | None) -> Self:
        # Now, so that a server which is not there is known to whoever makes the client, and not to its first call.
        link = connect(seconds("timeout", timeout))
        try:
            return cls(link, address, token=token, timeout=timeout, request_id=request_id, connect=connect)
        except BaseException:
            link.close()
            raise

    def close(self) -> None:
        """Close all connections; a call under way in another thread fails. Closing twice does nothing more."""
        self._links.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<KmsClient {self._address}>"

    def health(self) -> str:
        """`ok` when the server is at work and the token is right."""
        return self._one(self._requests.health())

    def generate_data_key(
        self,
        key_id: str | None = None,
        aad: BytesLike = b"",
        *,
        length: int | None = None,
        also_key_ids: Sequence[str] = (),
    ) -> DataKey:
        """A fresh data key, in the clear and wrapped under the group's active version.

        It has `length` bytes, 1 to 1024, or 32. With `also_key_ids` it is wrapped under each of these groups as well, up to
        15 of them, or under none: whoever may use one of them can open it.
        """
        return self._one(self._requests.generate_data_key(key_id, aad, length, also_key_ids))

    def generate_data_key_without_plaintext(
        self,
        key_id: str | None = None,
        aad: BytesLike = b"",
        *,
        length: int | None = None,
        also_key_ids: Sequence[str] = (),
    ) -> WrappedDataKey:
        """The same, wrapped alone: for who stores it now, and has it opened later or elsewhere."""
        return self._one(self._requests.generate_data_key_without_plaintext(key_id, aad, length, also_key_ids))

    def generate_random(self, length: int) -> bytes:
        """So many bytes, 1 to 1024, from the server's generator of random numbers."""
        return self._one(self._requests.generate_random(length))

    def encrypt(self, plaintext: BytesLike, key_id: str | None = None, aad: BytesLike = b"") -> bytes:
        """The ciphertext of a small secret (the whole request is at most 1 MiB by default)."""
        return self._one(self._requests.encrypt(plaintext, key_id, aad))

    def decrypt(self, ciphertext: BytesLike, aad: BytesLike = b"", *, source_key_id: str | None = None) -> bytes:
        """The plaintext; `DecryptionFailedError` whatever is wrong.

        A ciphertext names its key group itself. From somebody who might have chosen another one than was meant, take it
        with `source_key_id`, the only group that it may name.
        """
        return self._one(self._requests.decrypt(ciphertext, aad, source_key_id))

    def reencrypt(
        self, ciphertext: BytesLike, key_id: str, aad: BytesLike = b"", *, source_key_id: str | None = None
    ) -> bytes:
        """The same plaintext under `key_id`'s active version; the plaintext never leaves the server.

        With `source_key_id` only if it was under that group: else whoever wrote it could have the secret of another moved
        to where they may read it.
        """
        return self._one(self._requests.reencrypt(ciphertext, key_id, aad, source_key_id))

    def encrypt_many(self, plaintexts: Iterable[BytesLike], key_id: str | None = None, aad: BytesLike = b"") -> list[bytes]:
        """`encrypt` of each, in order and pipelined. On an error in one nothing is returned; the client stays usable."""
        return self._run(self._requests.encrypt(plaintext, key_id, aad) for plaintext in plaintexts)

    def decrypt_many(
        self, ciphertexts: Iterable[BytesLike], aad: BytesLike = b"", *, source_key_id: str | None = None
    ) -> list[bytes]:
        """`decrypt` of each, in order and pipelined; as `encrypt_many`."""
        return self._run(self._requests.decrypt(ciphertext, aad, source_key_id) for ciphertext in ciphertexts)

    def encrypt_file(
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
        """Encrypt a file of any size under a data key of its own, in constant memory; it never goes to the server.

        `source` and `target` are paths, open binary files (they stay open), or None for standard input and output. The
        container is MKE2, or with `file_format="mke1"` MKE1, of up to 64 GiB, for programs that read nothing else.
        With `also_key_ids` it can be opened by way of each of these key groups, too, up to 15 (MKE2 only).
        `progress` is called with the number of bytes that were read since. Raises `InputError`, `InputMissingError` and
        `FileAccessError` too; an existing target is as it was then.
        """
        # Here, since who has no files does not pay for the ciphers that they take.
        from kms.client.files import Arguments, encrypt_file, format_named

        check_text("key_id", key_id, is_optional=True)
        given = Arguments.of(source, target, aad, progress)
        encrypt_file(
            self,
            given.source,
            given.target,
            key_id=key_id,
            aad=given.aad,
            progress=given.progress,
            file_format=format_named(file_format),
            also_key_ids=texts("also_key_ids", also_key_ids),
        )

    def decrypt_file(
        self,
        source: PathOrStream,
        target: PathOrStream,
        *,
        aad: BytesLike = b"",
        source_key_id: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Decrypt what `encrypt_file` made. `DecryptionFailedError` whatever was altered, and nothing is at `target` then.

        But a stream has got an authentic beginning when it is `CutOffError`. With `source_key_id` only what is under that
        group.
        """
        from kms.client.files import Arguments, decrypt_file

        check_text("source_key_id", source_key_id, is_optional=True)
        given = Arguments.of(source, target, aad, progress)
        decrypt_file(self, given.source, given.target, source_key_id=source_key_id, aad=given.aad, progress=given.progress)

    def create_key_group(self, key_id: str) -> KeyGroupView:
        """Make a key group with version 1 active. Needs the admin token, as do all below."""
        return self._one(self._requests.create_key_group(key_id))

    def rotate_key_group(self, key_id: str) -> KeyGroupView:
        """Make a new active version; the one before still decrypts."""
        return self._one(self._requests.rotate_key_group(key_id))

    def list_key_groups(self, *, usage: bool = False) -> list[KeyGroupView]:
        """All key groups with their versions; with `usage`, also how each is used, where the caller may know."""
        return self._one(self._requests.list_key_groups(usage))

    def iter_key_groups(self, *, usage: bool = False, page_size: int = MAX_LIST_LIMIT) -> Iterator[KeyGroupView]:
        """The same one by one. They are asked for in pages of at most `page_size` (1 to 1000), each when it is needed.

        The client may be used meanwhile. A key group that is made meanwhile may be among them.
        """
        token: str | None = None
        while True:
            page = self._one(self._requests.page_of_key_groups(usage, page_size, token))
            yield from page.groups
            token = page.next_token
            if token is None:
                return

    def describe_key_group(self, key_id: str) -> KeyGroupView:
        """One key group with its versions, how each is used, and who was refused one that is disabled for a time."""
        return self._one(self._requests.describe_key_group(key_id))

    def status(self) -> StatusView:
        """Who this client is to the server and what it may do, and, for who may see that, how the server is."""
        return self._one(self._requests.status())

    def reload(self) -> str:
        """Have the server read its file of principals again, and go on in a new audit log where that was renamed.

        Returns what came of it, in words; `InvalidRequestError` says what went wrong, and that all stays as it was.
        """
        return self._one(self._requests.reload())

    def disable_version(self, key_id: str, version: int, *, for_seconds: int | None = None) -> str:
        """Disable a version that is not active, until it is enabled again. Returns what was done, in words.

        With `for_seconds` (1 s to 30 days) the server enables it again by itself. `ProtocolError` from a server that is
        too old for that, and has disabled it for good.
        """
        return self._one(self._requests.disable_version(key_id, version, for_seconds))

    def enable_version(self, key_id: str, version: int) -> str:
        """Let a disabled version decrypt again. Returns what was done, in words."""
        return self._one(self._requests.enable_version(key_id, version))

    def destroy_version(self, key_id: str, version: int) -> str:
        """Destroy a version's key for good, and with it all that only it opens. Returns what was done, in words."""
        return self._one(self._requests.destroy_version(key_id, version))

    def _one(self, call: Call[T]) -> T:
        """The result of one call, which mostly takes one send and one receive."""
        deadline = time.monotonic() + self._timeout
        link = self._links.take(deadline, looks=call.changes)
        sent, data = 0, b""
        try:
            try:
                sent = link.send(call.line)
                if sent == len(call.line):
                    data = link.recv(READ_BYTES)
                    if data.find(b"\n") == len(data) - 1 and data:
                        result = call.read(data[:-1])
                        self._links.give_back(link)
                        return result
            except (OSError, KmsError):
                pass  # whoever goes on finds out again, and tells
            exchange = self._exchange((call,))
            exchange.outgoing()
            exchange.sent(sent)
            if data:
                exchange.received(data)
        except BaseException:
            self._links.drop(link)
            raise
        return self._finished(link, exchange, deadline)[0]

    def _run(self, calls: Iterable[Call[T]]) -> list[T]:
        exchange, deadline = self._exchange(calls), time.monotonic() + self._timeout
        return self._finished(self._links.take(deadline), exchange, deadline)

    def _exchange(self, calls: Iterable[Call[T]]) -> Exchange[T]:
        return Exchange(calls, patience=min(self._timeout, THROTTLE_PATIENCE))

    def _finished(self, link: socket.socket, exchange: Exchange[T], deadline: float) -> list[T]:
        """The results of `exchange`, which is on `link`, or on another should that end."""
        while True:
            try:
                self._drive(link, exchange, deadline)
            except TimeoutError:
                self._links.drop(link)
                raise ended(ServerUnreachableError(silent(self._address, self._timeout)), exchange) from None
            except ServerUnreachableError as error:
                self._links.drop(link)
                if self._links.is_closed:
                    raise ended(ServerUnreachableError(closed(self._address)), exchange) from None
                if not (self._links.has_others and exchange.begin_again()):
                    raise ended(error, exchange) from error.__cause__
            except BaseException:
                # Replies may still come, KeyboardInterrupt included: the next exchange would take them for its own.
                self._links.drop(link)
                raise
            else:
                break
            link = self._links.take(deadline, anew=True)
        if exchange.is_over:
            self._links.drop(link)
        else:
            self._links.give_back(link)
        return exchange.results()

    def _drive(self, link: socket.socket, exchange: Exchange[T], deadline: float) -> None:
        poll, answered = select.poll(), 0
        poll.register(link, select.POLLIN)
        while True:
            waits_to_send = advance(link, exchange, self._address)
            if exchange.is_done:
                return
            if exchange.answered != answered:
                # Of many, each next one has its time.
                answered, deadline = exchange.answered, time.monotonic() + self._timeout
            if exchange.pause:
                time.sleep(exchange.pause)
                exchange.resume()
                deadline = time.monotonic() + self._timeout
                continue
            poll.modify(link, select.POLLIN | (select.POLLOUT if waits_to_send else 0))
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise TimeoutError


def _unix(path: str, known: KnownServer, within: float) -> socket.socket:
    """A connection to the Unix socket at `path`."""
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        link.settimeout(min(within, CONNECT_TIMEOUT))
        link.connect(path)
        known.check_unix(link, path)
        return link
    except OSError as error:
        link.close()
        raise ServerUnreachableError(refused(path, error)) from error
    except BaseException:
        link.close()
        raise


def _tcp(host: str, port: int, known: KnownServer, address: str, within: float) -> socket.socket:
    """A connection over TCP."""
    connect_timeout = min(within, CONNECT_TIMEOUT)
    deadline = time.monotonic() + connect_timeout
    try:
        link = socket.create_connection((host, port), connect_timeout)
    except OSError as error:
        raise ServerUnreachableError(refused(address, error)) from error
    try:
        for pause in pauses():
            if known.is_tcp_known(link, address):
                break
            if time.monotonic() + pause >= deadline:
                raise ServerUnreachableError(silent(address, connect_timeout))
            time.sleep(pause)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return link
    except OSError as error:
        link.close()
        raise ServerUnreachableError(refused(address, error)) from error
    except BaseException:
        link.close()
        raise

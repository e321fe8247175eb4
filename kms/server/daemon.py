"""The daemon: start, supervise, drain, stop.

Supervision, outer to inner: signals -> actor -> connections -> accepting. Stopping walks it from the inside out: stop
accepting, wake the idle connections, give those at work five seconds, close the actor's channel, wipe every key.

SIGHUP stops nothing: it reads the file of principals again, and goes on in a new file where the audit log was renamed.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import os
import signal
import socket
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from kms.core.derive import KdfParameters
from kms.core.keyring import Keyring
from kms.core.policy import AllowAll
from kms.core.secret import Secret
from kms.errors import EXIT_INTERNAL, EXIT_OK, KmsError, SaveOutcomeUnknownError
from kms.host import hardening, package
from kms.keystore import usage_file
from kms.keystore.file import Keystore, KeystoreLock, initialise, load
from kms.limits import DRAIN_TIMEOUT, KEY_BYTES
from kms.server.actor import KeyringActor
from kms.server.audit_keeper import AuditedStore, AuditKeeper
from kms.server.config import ServerConfig
from kms.server.connection import Connection, ConnectionBounds, Session
from kms.server.handlers import Handlers
from kms.server.listeners import UnixListener, open_tcp
from kms.server.local_provider import KeyringHolder, LocalMasterKeyProvider
from kms.server.middleware import Authenticator, RequestPipeline, log_bug
from kms.server.outbox import Outbox
from kms.server.served import Credentials, Observer, Peer
from kms.server.team import Access, Clock, load_access
from kms.server.trials import ScheduleAuthenticator, Trials
from kms.server.usage import Usage
from kms.server.usage import load as load_usage

if TYPE_CHECKING:
    from kms.server.metrics import Meters
    from kms.server.metrics_listener import MetricsListener

log: Final = logging.getLogger(__name__)
Say = Callable[[str], None]

MEMORY_LOCKED: Final = "memory is locked: no key is written to swap"
MEMORY_NOT_LOCKED: Final = "memory is not locked (raise RLIMIT_MEMLOCK to keep keys out of swap)"


def run(
    config: ServerConfig,
    passphrase: Secret,
    api_token: Secret,
    admin_token: Secret,
    *,
    parameters: KdfParameters,
    say: Say,
) -> int:
    """Run the server until SIGINT or SIGTERM; returns the exit status. The three secrets are wiped.

    `parameters` are the KDF costs of a keystore that has yet to be made; `say` takes a line for the person who started
    it. Raises a `KmsError` when it cannot start.
    """
    return trio.run(_main, config, passphrase, api_token, admin_token, parameters, say)


async def _main(
    config: ServerConfig, passphrase: Secret, api_token: Secret, admin_token: Secret, parameters: KdfParameters, say: Say
) -> int:
    received = trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    with received as signals, passphrase, api_token, admin_token:
        authenticator = Authenticator(api_token, admin_token)
        # It knows them by their digests from here on.
        api_token.wipe()
        admin_token.wipe()
        access = load_access(config, authenticator, time.time)
        hardening.give_memory_back()
        memory = MEMORY_LOCKED if hardening.lock_memory() else MEMORY_NOT_LOCKED
        meters = _meters(config)
        lock = KeystoreLock(config.keystore)
        with lock:
            keystore, keyring = await trio.to_thread.run_sync(_unlock, lock, passphrase, parameters, say)
            passphrase.wipe()
            keeper = AuditKeeper(config, keystore.audit_keys)
            store = keystore if meters is None else meters.metered(keystore)
            actor = KeyringActor(keyring, AuditedStore(store, keeper), clock=lambda: int(time.time()))
            path = usage_file.path_of(config.keystore)
            usage = Usage(keyring, await trio.to_thread.run_sync(load_usage, path), path, time.time)
            try:
                open_log = partial(keeper.open, keyring.generation, has_principals=access.is_from_file)
                await trio.to_thread.run_sync(open_log)
                return await _serve(config, actor, usage, authenticator, access, keeper, meters, signals, say, memory)
            finally:
                keeper.close()
                _wipe(actor.current, keystore)


def _unlock(lock: KeystoreLock, passphrase: Secret, parameters: KdfParameters, say: Say) -> tuple[Keystore, Keyring]:
    if os.path.lexists(lock.keystore):
        return load(lock, passphrase)
    say(f"making a new keystore at {lock.keystore}")
    return initialise(lock, passphrase, now=int(time.time()), parameters=parameters)


def _wipe(keyring: Keyring, keystore: Keystore) -> None:
    for key in keyring.live_keys():
        key.wipe()
    keystore.wipe()


async def _serve(
    config: ServerConfig,
    actor: KeyringActor,
    usage: Usage,
    shared: Authenticator,
    access: Access,
    keeper: AuditKeeper,
    meters: Meters | None,
    signals: AsyncIterator[int],
    say: Say,
    memory: str,
) -> int:
    provider = LocalMasterKeyProvider(actor)
    # A data key leaves in a reply, which is immutable: a buffer that can be wiped would only add a copy, and 13 us.
    new_data_key = partial(os.urandom, KEY_BYTES)
    trials = Trials(actor, usage, keeper.sync)
    handlers = Handlers(provider, trials, trials, new_data_key=new_data_key, max_frame_bytes=config.max_frame_bytes)
    observers: Sequence[Observer] = () if meters is None else meters.observers()
    pipeline = RequestPipeline(handlers, access.authenticator, access.policy, observers, keeper.trail, usage)
    schedule = RequestPipeline(handlers, ScheduleAuthenticator(), AllowAll(), observers, keeper.trail)
    bounds = ConnectionBounds(max_frame_bytes=config.max_frame_bytes, idle_timeout=config.idle_timeout)
    crowd = Crowd(pipeline.session, bounds, Outbox(pipeline.commit), config.max_connections)
    status = EXIT_OK
    try:
        with _listening(config) as (listeners, addresses), _metrics(config, meters, actor, crowd, keeper) as metrics:
            async with trio.open_nursery() as supervisor:
                supervisor.start_soon(actor.run)
                supervisor.start_soon(keeper.run)
                try:
                    async with trio.open_nursery() as connections:
                        async with trio.open_nursery() as accepting:
                            for listener, transport in listeners:
                                accepting.start_soon(_accept, crowd, listener, transport, connections)
                            if metrics is not None:
                                accepting.start_soon(metrics.run)
                            accepting.start_soon(usage.run)
                            accepting.start_soon(trials.run, schedule)
                            # What start-up made lives for good; the collector need not walk it again.
                            gc.freeze()
                            # Not before: a server that is refused says one line, why.
                            say(memory)
                            if access.is_from_file:
                                say(access.origin)
                            if keeper.log is not None:
                                say(f"audit log {keeper.log.path}, of the data plane: {config.audit_data}")
                            if metrics is not None:
                                say(f"metrics on {metrics.url}")
                            say(f"ready on {' and '.join(addresses)} (pid {os.getpid()})")
                            notify("READY=1")
                            reload = Reload(config, shared, access, pipeline, schedule, keeper, actor, time.time)
                            number = await _until_stopped(signals, reload)
                            say(f"stopping on {signal.Signals(number).name}")
                            notify("STOPPING=1")
                            accepting.cancel_scope.cancel()
                        connections.cancel_scope.deadline = trio.current_time() + DRAIN_TIMEOUT
                        crowd.drain()
                    await usage.flush()
                finally:
                    # However this ends: the actor is shielded, and would keep a broken daemon alive for ever.
                    actor.close()
                    supervisor.cancel_scope.cancel()
    except* SaveOutcomeUnknownError:
        # The actor has logged it. What is on disk is not known, so nothing more may be answered from memory.
        status = EXIT_INTERNAL
    return status


async def _until_stopped(signals: AsyncIterator[int], reload: Reload) -> int:
    """The first signal that stops; what SIGHUP asks for is done until then."""
    async for number in signals:
        if number != signal.SIGHUP:
            return number
        await reload()
    raise AssertionError("signals do not end")


@dataclass
class Reload:
    """Puts the file of principals in force as it is now, and goes on in a new file where the audit log was renamed.

    A file of principals that cannot be used leaves everything as it was.
    """

    config: ServerConfig
    shared: Authenticator
    access: Access
    pipeline: RequestPipeline
    schedule: RequestPipeline
    """What the server asks of itself: it goes on record, too."""
    keeper: AuditKeeper
    keyring: KeyringHolder
    clock: Clock

    async def __call__(self) -> None:
        self.keeper.reopen()
        try:
            self.access = await trio.to_thread.run_sync(self._load)
        except KmsError as error:
            log.error("principals not reloaded, all stays as it was: %s", error)  # noqa: TRY400 - the message says it all
        except Exception as error:  # a bug must cost the reload, not the server
            log_bug("principals not reloaded, all stays as it was", error)
        else:
            self.pipeline.admit(self.access.authenticator, self.access.policy, self.keeper.trail)
            self.schedule.admit(self.schedule.authenticator, self.schedule.policy, self.keeper.trail)
            log.info("reloaded: %s", self.access.origin)

    def _load(self) -> Access:
        access = load_access(self.config, self.shared, self.clock, needs_file=self.access.is_from_file)
        self.keeper.open(self.keyring.current.generation, has_principals=access.is_from_file)
        return access


@contextlib.contextmanager
def _listening(config: ServerConfig) -> Iterator[tuple[list[tuple[trio.SocketListener, str]], list[str]]]:
    """Bind what is configured; the listeners with their transport, and the addresses as people write them."""
    listeners: list[tuple[trio.SocketListener, str]] = []
    addresses: list[str] = []
    with contextlib.ExitStack() as cleanup:
        if config.tcp_port is not None:
            tcp, port = open_tcp(config.tcp_port)
            cleanup.callback(tcp.socket.close)
            listeners.append((tcp, "tcp"))
            addresses.append(f"127.0.0.1:{port}")
        if config.unix_socket is not None:
            unix = UnixListener(config.unix_socket, config.unix_socket_gid)
            cleanup.callback(unix.remove)
            cleanup.callback(unix.listener.socket.close)
            listeners.append((unix.listener, "unix"))
            addresses.append(str(config.unix_socket))
        yield listeners, addresses


def _meters(config: ServerConfig) -> Meters | None:
    if config.metrics_port is None:
        return None
    # Here, since it is an extra, and 50 ms and 3 MiB that those without metrics need not pay.
    from kms.server.metrics import Meters

    return Meters(groups=config.metrics_groups)


@contextlib.contextmanager
def _metrics(
    config: ServerConfig, meters: Meters | None, actor: KeyringActor, crowd: Crowd, keeper: AuditKeeper
) -> Iterator[MetricsListener | None]:
    if meters is None or config.metrics_port is None:
        yield None
        return
    from kms.server.metrics_listener import MetricsListener

    collector = meters.collector(package.version(), actor, crowd, lambda: keeper.log)
    with contextlib.closing(MetricsListener(config.metrics_port, collector)) as listener:
        yield listener


async def _accept(crowd: Crowd, listener: trio.SocketListener, transport: str, connections: trio.Nursery) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        # The connection works on the bare socket; the stream around it is let go.
        sock = socket.socket(fileno=stream.socket.detach())
        sock.settimeout(0)
        await crowd.serve(sock, transport)

    # It pauses on EMFILE and goes on, which is what a server that ran out of descriptors has to do.
    await trio.serve_listeners(serve, [listener], handler_nursery=connections)


@dataclass
class Crowd:
    """All connections together: numbered, capped, and drained as one."""

    session: Callable[[Peer], Session]
    bounds: ConnectionBounds
    outbox: Outbox
    max_connections: int
    open: Counter[str] = field(default_factory=Counter)
    """How many are served now, by transport."""
    accepted: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    """How many there were too many."""
    _open: set[Connection] = field(default_factory=set)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _draining: bool = False

    async def serve(self, sock: socket.socket, transport: str) -> None:
        """Serve one accepted socket, or close it at once when there are too many. A failure ends here."""
        with sock:
            if self._draining:
                return
            if len(self._open) >= self.max_connections:
                self.refused[transport] += 1
                return
            self.accepted[transport] += 1
            self.open[transport] += 1
            try:
                peer = peer_of(sock, next(self._numbers), transport)
                await self._serve(Connection(sock, self.session(peer), self.bounds, self.outbox))
            except* Exception as errors:
                log_bug("a connection failed", errors)
            finally:
                self.open[transport] -= 1

    async def _serve(self, connection: Connection) -> None:
        self._open.add(connection)
        try:
            await connection.serve()
        finally:
            self._open.discard(connection)

    def drain(self) -> None:
        """Let each connection finish what it is at, and take no more."""
        self._draining = True
        for connection in self._open:
            connection.drain()


_UCRED: Final = struct.Struct("=iII")
"""struct ucred of unix(7)."""


def peer_of(sock: socket.socket, number: int, transport: str) -> Peer:
    """Who connected `sock`: which process over a Unix socket; over TCP, where the kernel does not tell, from which port."""
    if sock.family != socket.AF_UNIX:
        try:
            return Peer(number, transport, port=sock.getpeername()[1])
        except OSError:
            return Peer(number, transport)  # it has gone already
    credentials = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return Peer(number, transport, Credentials._make(credentials))


def notify(state: str) -> None:
    """Tell systemd (sd_notify(3)), when it listens: `state` to the datagram socket in NOTIFY_SOCKET."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(state.encode("ascii"), address)
        except OSError as error:
            log.warning("cannot tell the service manager: %s", error.strerror)

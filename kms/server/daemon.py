"""The daemon: start, supervise, drain, stop.

Supervision, outer to inner: signals -> actor -> connections -> accepting. Stopping walks it from the inside out: stop
accepting, wake the idle connections, give those at work five seconds, close the actor's channel, wipe every key.

SIGHUP reads the file of principals again, and goes on in a new file where the audit log was renamed. It stops the server
only where the terminal is gone that it was started at.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from kms.core.derive import KdfParameters
from kms.core.keyring import Keyring
from kms.core.secret import Secret
from kms.errors import EXIT_INTERNAL, EXIT_OK, EXIT_TEMPFAIL, KeystoreReplacedError, SaveOutcomeUnknownError
from kms.host import hardening, package
from kms.limits import DRAIN_TIMEOUT
from kms.server import stopping
from kms.server.config import ServerConfig
from kms.server.connection import ConnectionBounds
from kms.server.crowd import Crowd
from kms.server.listeners import Endpoint, listening
from kms.server.outbox import Outbox
from kms.server.reload import Reload
from kms.server.report import Report
from kms.server.service_manager import notify
from kms.service.actor import KeyringActor
from kms.service.audit_keeper import AuditedStore, AuditKeeper
from kms.service.authentication import Authenticator
from kms.service.service import Service
from kms.service.team import Access, AccessSource
from kms.service.threads import in_thread
from kms.service.usage import Usage
from kms.service.usage import load as load_usage
from kms.storage import usage_file
from kms.storage.audit_log import is_kept
from kms.storage.file import Keystore, initialise, load, raise_costs
from kms.storage.lock import KeystoreLock
from kms.storage.passphrases import opening_form

if TYPE_CHECKING:
    from kms.server.metrics_listener import MetricsListener
    from kms.service.metrics import Meters

Say = Callable[[str], None]

MEMORY_LOCKED: Final = "memory is locked: no key is written to swap"
MEMORY_NOT_LOCKED: Final = "memory is not locked (raise RLIMIT_MEMLOCK to keep keys out of swap)"


def run(
    config: ServerConfig,
    passphrase: Secret,
    api_token: Secret,
    admin_token: Secret,
    *,
    say: Say,
    makes_with: KdfParameters | None = None,
    hangup_stops: Callable[[], bool] = lambda: False,
) -> int:
    """Run the server until SIGINT or SIGTERM; returns the exit status. The three secrets are wiped.

    A keystore that is missing is made, at the KDF costs `makes_with`, only where these are given; `say` takes a line for
    the person who started it. SIGHUP reloads, or stops where `hangup_stops`. Raises a `KmsError` when it cannot start.

    Until it is ready, SIGINT and SIGTERM do what the caller had them do: nothing is begun yet that must be ended in order.
    """
    return trio.run(_main, config, passphrase, api_token, admin_token, say, makes_with, hangup_stops)


def check_free(config: ServerConfig) -> None:
    """Raise what would keep a server from starting because another is there, before anybody is asked for a secret."""
    trio.run(_check_free, config)


async def _check_free(config: ServerConfig) -> None:
    with KeystoreLock(config.keystore), listening(config):
        pass


async def _main(
    config: ServerConfig,
    passphrase: Secret,
    api_token: Secret,
    admin_token: Secret,
    say: Say,
    makes_with: KdfParameters | None,
    hangup_stops: Callable[[], bool],
) -> int:
    # From the start: what a file said that was read before it came is not what is to be in force.
    with trio.open_signal_receiver(signal.SIGHUP) as hangups, passphrase, api_token, admin_token:
        shared = Authenticator(api_token, admin_token)
        # It knows them by their digests from here on.
        api_token.wipe()
        admin_token.wipe()
        source = AccessSource(
            config.principals,
            shared,
            time.time,
            is_needed=config.principals_named,
            witness=None if config.no_principals else config.audit.path,
        )
        access = source.load(is_start=True)
        hardening.give_memory_back()
        memory = MEMORY_LOCKED if hardening.lock_memory() else MEMORY_NOT_LOCKED
        meters = _meters(config)
        lock = KeystoreLock(config.keystore)
        with lock:
            keystore, keyring = await in_thread(_unlock, config, lock, passphrase, say, makes_with)
            passphrase.wipe()
            try:
                service = await _service(config, keystore, keyring, access, meters)
                try:
                    await service.admit(access)
                    service.operator.reload = reload = Reload(service, source)
                    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as stops:
                        until_stopped = partial(stopping.until_stopped, stops, hangups, reload.on_hangup, hangup_stops)
                        return await Daemon(config, service, meters, memory, say).serve(until_stopped)
                finally:
                    service.close()
            finally:
                keystore.wipe()


def _unlock(
    config: ServerConfig, lock: KeystoreLock, passphrase: Secret, say: Say, makes_with: KdfParameters | None
) -> tuple[Keystore, Keyring]:
    if makes_with is None or os.path.lexists(lock.keystore):
        passphrase = opening_form(lock.keystore, passphrase)
        log = config.audit.path if is_kept(config.audit.path) else None
        notes = raise_costs(lock, passphrase, parameters=KdfParameters(), audit_log=log)
        keystore, keyring = load(lock, passphrase)
        for note in [*notes, *keystore.notes]:
            say(note)
        earlier = keystore.replaces
        if earlier is not None:
            # Before the first request: what is answered must not rest on a file that cannot be written.
            keyring = keystore.migrate()
            say(
                f"keystore: of format {earlier} until now, which is kept as {config.keystore.name}.v{earlier}; "
                "remove that when all is well, since it holds the keys of what is destroyed from now on"
            )
        return keystore, keyring
    say(f"making a new keystore at {lock.keystore}")
    return initialise(lock, passphrase, now=int(time.time()), parameters=makes_with)


def _meters(config: ServerConfig) -> Meters | None:
    if config.metrics_port is None:
        return None
    # Here, since it is an extra, and 50 ms and 3 MiB that those without metrics need not pay.
    from kms.service.metrics import Meters

    return Meters(groups=config.metrics_groups)


async def _service(
    config: ServerConfig, keystore: Keystore, keyring: Keyring, access: Access, meters: Meters | None
) -> Service:
    keeper = AuditKeeper(config.audit, keystore.audit_keys)
    store = keystore if meters is None else meters.metered(keystore)
    usage_path = usage_file.path_of(config.keystore)
    counted = await in_thread(load_usage, usage_path)
    return Service(
        KeyringActor(keyring, AuditedStore(store, keeper), clock=lambda: int(time.time())),
        keeper,
        Usage(keyring, counted, usage_path, time.time, look=keystore.look),
        access,
        observers=() if meters is None else meters.observers(),
        max_frame_bytes=config.max_frame_bytes,
        version=package.version(),
    )


class Daemon:
    """A service behind its listeners."""

    def __init__(self, config: ServerConfig, service: Service, meters: Meters | None, memory: str, say: Say) -> None:
        """`memory` is the line about memory, which `say` is told with the others."""
        self._config = config
        self._service = service
        self._meters = meters
        self._memory = memory
        self._say = say
        bounds = ConnectionBounds(max_frame_bytes=config.max_frame_bytes, idle_timeout=config.idle_timeout)
        outbox = Outbox(service.pipeline.commit)
        self._crowd = Crowd(service.pipeline.session, bounds, outbox, config.max_connections)

    async def serve(self, until_stopped: Callable[[], Awaitable[int]]) -> int:
        """Serve until a signal stops it, whose number `until_stopped` returns; returns the exit status."""
        status = EXIT_OK
        try:
            with listening(self._config) as endpoints, self._metrics() as metrics:
                async with trio.open_nursery() as supervisor:
                    self._service.start_core(supervisor)
                    try:
                        await self._serve(endpoints, metrics, until_stopped)
                        await self._service.save_usage()
                    finally:
                        # However this ends: the actor is shielded, and would keep a broken daemon alive for ever.
                        self._service.take_no_more_changes()
                        supervisor.cancel_scope.cancel()
        except* SaveOutcomeUnknownError:
            # The actor has logged it. What is on disk is not known, so nothing more may be answered from memory.
            status = EXIT_INTERNAL
        except* KeystoreReplacedError:
            # Logged, too. Whose keys are on disk now is for a person to find out.
            status = EXIT_TEMPFAIL
        return status

    async def _serve(
        self, endpoints: Sequence[Endpoint], metrics: MetricsListener | None, until_stopped: Callable[[], Awaitable[int]]
    ) -> None:
        async with trio.open_nursery() as connections:
            async with trio.open_nursery() as accepting:
                for endpoint in endpoints:
                    accepting.start_soon(self._crowd.accept, endpoint, connections)
                if metrics is not None:
                    accepting.start_soon(metrics.run)
                self._service.start_background(accepting)
                # What start-up made lives for good; the collector need not walk it again.
                gc.freeze()
                self._announce(endpoints, metrics)
                notify("READY=1")
                number = await until_stopped()
                self._say(f"stopping on {signal.Signals(number).name}")
                notify("STOPPING=1")
                accepting.cancel_scope.cancel()
            connections.cancel_scope.deadline = trio.current_time() + DRAIN_TIMEOUT
            self._crowd.drain()

    def _announce(self, endpoints: Sequence[Endpoint], metrics: MetricsListener | None) -> None:
        # Not before it serves: a server that is refused says one line, why.
        say, service = self._say, self._service
        service.operator.report = Report(
            service,
            self._config.keystore,
            self._memory,
            self._memory == MEMORY_LOCKED,
            endpoints,
            self._config.audit.data,
            lambda: "" if metrics is None else metrics.state,
        )
        say(self._memory)
        if service.access.is_from_file:
            say(service.access.origin)
        if service.keeper.log is not None:
            say(f"audit log {service.keeper.log.path}, of the data plane: {self._config.audit.data}")
        if metrics is not None:
            say(metrics.state)
        say(f"ready on {' and '.join(endpoint.address for endpoint in endpoints)} (pid {os.getpid()})")

    @contextlib.contextmanager
    def _metrics(self) -> Iterator[MetricsListener | None]:
        port = self._config.metrics_port
        if self._meters is None or port is None:
            yield None
            return
        from kms.server.metrics_listener import MetricsListener

        keeper = self._service.keeper
        collector = self._meters.collector(package.version(), self._service.keyring, self._crowd, lambda: keeper.log)
        with contextlib.closing(MetricsListener(port, collector)) as listener:
            yield listener

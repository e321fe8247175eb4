"""What the server can tell of itself, as Prometheus metrics.

While it serves, these are plain integers: an observer of the pipeline counts requests, a wrapper around the keystore counts
saves, and the connections are counted where they are accepted. Only a scrape makes metric families of them, in a thread
of its own. They are in no registry: the library's global one holds whatever else was imported.

The sets of labels are closed: operations, planes and outcomes are those of the protocol, and nothing that a client sends
becomes a label. Key groups have names that people chose; they are shown only when that is asked for, only once a request
on them has succeeded, and only MAX_METERED_GROUPS of them. Principals are never shown.

Whoever does not want metrics imports neither this module nor `prometheus_client`.
"""

from __future__ import annotations

import resource
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from time import perf_counter
from typing import Final, Protocol

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from kms.core import ciphertext
from kms.core.keyring import KeyGroup, Keyring, Mint, VersionStatus
from kms.core.provider import KeyringHolder
from kms.errors import SaveFailedError, WireError
from kms.limits import MAX_METERED_GROUPS
from kms.service.actor import KeyringStore
from kms.service.served import Observer, Served
from kms.wire.messages import AnyRequest, Decrypt, Encrypt, GenerateDataKey, GroupRequest, ReEncrypt, Request, group_of

UNKNOWN: Final = "unknown"
"""Operation and plane of a request whose type could not be told."""
OK: Final = "ok"
OUTCOMES: Final = (OK, *sorted(error.code for error in WireError.__subclasses__()))
TRANSPORTS: Final = ("tcp", "unix")
BUCKETS: Final = (
    *(0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005),
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5),
)
"""Upper bounds in seconds: from a Health request, of 10 us, to a save on a disk that is ill."""

_PAUSE_SECONDS: Final = 0.0002
_VERSIONS_AT_ONCE: Final = 1000


class Durations:
    """A histogram over BUCKETS."""

    __slots__ = ("counts", "seconds")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.seconds = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.seconds += seconds

    def add_to(self, family: HistogramMetricFamily, labels: tuple[str, ...] = ()) -> None:
        """What was counted so far, as samples of `family`."""
        below = accumulate(list(self.counts))
        bounds = (*map(floatToGoString, BUCKETS), "+Inf")
        family.add_metric(labels, list(zip(bounds, below, strict=True)), self.seconds)


class _OperationMeter:
    __slots__ = ("durations", "labels", "outcomes")

    def __init__(self, operation: str, plane: str) -> None:
        self.labels = (operation, plane)
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        self.durations = Durations()


class RequestMeter:
    """Counts requests and what they take; an observer of the pipeline."""

    def __init__(self) -> None:
        self._unknown = _OperationMeter(UNKNOWN, UNKNOWN)
        by_operation: dict[str, _OperationMeter] = {}
        self._by_kind: dict[type[Request] | None, _OperationMeter] = {None: self._unknown}
        for kind in AnyRequest.__args__:
            name = kind.operation.value
            self._by_kind[kind] = by_operation.setdefault(name, _OperationMeter(name, kind.plane.value))
        self.operations = (*by_operation.values(), self._unknown)

    def observe(self, served: Served) -> None:
        """Count one request; it takes 0.3 us."""
        meter = self._by_kind[served.kind]
        meter.outcomes[OK if served.error is None else served.error.code] += 1
        meter.durations.add(perf_counter() - served.began)


class GroupMeter:
    """Counts the successful requests on each key group; an observer of the pipeline.

    Of a request that failed nobody knows whether its group exists: clients could make labels of names that they invent.
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[str, type[Request]], int] = {}
        self._groups: set[str] = set()

    def observe(self, served: Served) -> None:
        """Count one request, if it was on a group and succeeded."""
        request = served.request
        if request is None or served.error is not None:
            return
        group = _group(request)
        if group is None:
            return
        if group not in self._groups:
            if len(self._groups) < MAX_METERED_GROUPS:
                self._groups.add(group)
            else:
                group = ""  # no group's name is blank, so this one stands for the others
        # Not by the operation's name, as an enum's `value` takes 0.1 us.
        key = (group, type(request))
        self._counts[key] = self._counts.get(key, 0) + 1

    def counts(self) -> Mapping[tuple[str, str], int]:
        """How many requests each (group, operation) has had so far."""
        return {(group, kind.operation.value): count for (group, kind), count in self._counts.copy().items()}


def _group(request: Request) -> str | None:
    match request:
        case Decrypt():
            return ciphertext.group(request.ciphertext)
        case Encrypt() | GenerateDataKey() | ReEncrypt():
            return group_of(request.key_id)
        case GroupRequest():
            return request.key_id
        case _:
            return None


class SaveMeter:
    """How many saves there were, by what became of them, and what they took."""

    def __init__(self) -> None:
        self.outcomes = {OK: 0, "failed": 0, "unknown": 0}
        self.durations = Durations()


class MeteredStore:
    """A `KeyringStore` that has the saves of another counted."""

    def __init__(self, store: KeyringStore, meter: SaveMeter) -> None:
        self._store = store
        self._meter = meter

    @property
    def mint(self) -> Mint:
        return self._store.mint

    def commit(self, expected_generation: int, changed: Sequence[KeyGroup]) -> None:
        """Raises what the other's `commit` raises."""
        began = perf_counter()
        outcome = "unknown"
        try:
            self._store.commit(expected_generation, changed)
            outcome = OK
        except SaveFailedError:
            outcome = "failed"
            raise
        finally:
            self._meter.outcomes[outcome] += 1
            self._meter.durations.add(perf_counter() - began)

    def settle(self) -> None:
        self._store.settle()


class Connections(Protocol):
    """The counts of connections, by transport."""

    @property
    def open(self) -> Mapping[str, int]: ...

    @property
    def accepted(self) -> Mapping[str, int]: ...

    @property
    def refused(self) -> Mapping[str, int]: ...

    @property
    def evicted(self) -> Mapping[str, int]: ...


class AuditLag(Protocol):
    """What is known of an audit log."""

    @property
    def is_failing(self) -> bool: ...

    @property
    def written(self) -> int:
        """The number of the last record."""
        ...

    @property
    def unsynced(self) -> int:
        """Records that are written but not yet durable."""
        ...

    @property
    def unsynced_age(self) -> float:
        """Seconds since the oldest of those was written; 0 when there is none."""
        ...


class ServerCollector(Collector):
    """Makes metric families of all that is counted, at each scrape.

    It runs in a thread, beside an event loop that serves. Whenever that has called the system, it has to wait for the
    interpreter's lock: 5 ms each time, while a thread works on. So this one sleeps for a moment after every family, and
    in between when it counts many versions. With 30,000 of them the longest turn of the loop was 12 ms without, and is 1.2.
    """

    def __init__(
        self,
        *,
        version: str,
        requests: RequestMeter,
        saves: SaveMeter,
        keyring: KeyringHolder,
        connections: Connections,
        audit: Callable[[], AuditLag | None],
        groups: GroupMeter | None = None,
    ) -> None:
        """`audit` gives the audit log if one is kept by now."""
        self._version = version
        self._requests = requests
        self._saves = saves
        self._keyring = keyring
        self._connections = connections
        self._groups = groups
        self._audit = audit
        self._started = time.time()
        self._counted: tuple[Keyring | None, dict[VersionStatus, int]] = (None, {})

    def collect(self) -> Iterator[Metric]:
        """All families, live."""
        for family in self._families():
            yield family
            # Here its text has been made, which takes longer than the family itself.
            time.sleep(_PAUSE_SECONDS)

    def _families(self) -> Iterator[Metric]:
        yield InfoMetricFamily("minikms_build", "The version of mini-kms.", {"version": self._version})
        yield from self._request_families()
        yield from self._connection_families()
        yield from self._save_families()
        yield from self._keyring_families()
        audit = self._audit()
        if audit is not None:
            yield from _audit_families(audit)
        yield from self._process_families()

    def _request_families(self) -> Iterator[Metric]:
        labels = ("operation", "plane")
        total = CounterMetricFamily(
            "minikms_requests", "Requests answered, by what became of them.", labels=(*labels, "outcome")
        )
        durations = HistogramMetricFamily(
            "minikms_request_duration_seconds", "From when a request is taken up until its answer is known.", labels=labels
        )
        for meter in self._requests.operations:
            for outcome, count in meter.outcomes.items():
                total.add_metric((*meter.labels, outcome), count)
            meter.durations.add_to(durations, meter.labels)
        yield total
        yield durations
        if self._groups is not None:
            by_group = CounterMetricFamily(
                "minikms_group_requests",
                "Requests that succeeded, by key group; an empty one is all others.",
                labels=("group", "operation"),
            )
            for key, count in self._groups.counts().items():
                by_group.add_metric(key, count)
            yield by_group

    def _connection_families(self) -> Iterator[Metric]:
        counts = self._connections
        labels = ("transport",)
        now_open = GaugeMetricFamily("minikms_connections_open", "Connections that are served now.", labels=labels)
        accepted = CounterMetricFamily("minikms_connections_accepted", "Connections that were served.", labels=labels)
        refused = CounterMetricFamily("minikms_connections_refused", "Connections over the cap, closed.", labels=labels)
        evicted = CounterMetricFamily("minikms_connections_evicted", "Strangers' that made room.", labels=labels)
        for transport in TRANSPORTS:
            now_open.add_metric((transport,), counts.open.get(transport, 0))
            accepted.add_metric((transport,), counts.accepted.get(transport, 0))
            refused.add_metric((transport,), counts.refused.get(transport, 0))
            evicted.add_metric((transport,), counts.evicted.get(transport, 0))
        yield from (now_open, accepted, refused, evicted)

    def _save_families(self) -> Iterator[Metric]:
        saves = CounterMetricFamily("minikms_saves", "Saves of the keystore.", labels=("outcome",))
        for outcome, count in self._saves.outcomes.items():
            saves.add_metric((outcome,), count)
        yield saves
        durations = HistogramMetricFamily("minikms_save_duration_seconds", "What a save of the keystore takes.")
        self._saves.durations.add_to(durations)
        yield durations

    def _keyring_families(self) -> Iterator[Metric]:
        keyring = self._keyring.current
        yield GaugeMetricFamily("minikms_key_groups", "Key groups.", len(keyring.groups))
        if self._counted[0] is not keyring:
            self._counted = (keyring, _versions_by_status(keyring))
        versions = GaugeMetricFamily("minikms_key_versions", "KEK versions, by their state.", labels=("state",))
        for status, count in self._counted[1].items():
            versions.add_metric((status.value,), count)
        yield versions
        yield GaugeMetricFamily(
            "minikms_keyring_generation", "How many times the keystore has been saved in its life.", keyring.generation
        )

    def _process_families(self) -> Iterator[Metric]:
        # Not the library's ProcessCollector: it needs /proc/stat, for the start alone, and tells nothing at all without it.
        # The systemd unit has ProcSubset=pid, which hides it.
        size, resident = Path("/proc/self/statm").read_text(encoding="ascii").split()[:2]
        page = resource.getpagesize()
        yield CounterMetricFamily("process_cpu_seconds", "User and system CPU time.", time.process_time())
        yield GaugeMetricFamily("process_resident_memory_bytes", "Memory in use.", int(resident) * page)
        yield GaugeMetricFamily("process_virtual_memory_bytes", "Address space in use.", int(size) * page)
        yield GaugeMetricFamily("process_start_time_seconds", "When the server started, since 1970.", self._started)
        yield GaugeMetricFamily(
            "process_open_fds", "Open file descriptors.", sum(1 for _ in Path("/proc/self/fd").iterdir())
        )
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        yield GaugeMetricFamily("process_max_fds", "File descriptors that may be open.", most)


def _versions_by_status(keyring: Keyring) -> dict[VersionStatus, int]:
    counts = dict.fromkeys(VersionStatus, 0)
    seen = 0
    for group in keyring.groups.values():
        for version in group.versions.values():
            counts[version.status] += 1
            seen += 1
            if seen % _VERSIONS_AT_ONCE == 0:
                time.sleep(_PAUSE_SECONDS)
    return counts


def _audit_families(audit: AuditLag) -> Iterator[Metric]:
    yield CounterMetricFamily("minikms_audit_records", "Audit records written: the number of the last.", audit.written)
    yield GaugeMetricFamily("minikms_audit_unsynced_records", "Audit records not yet durable.", audit.unsynced)
    yield GaugeMetricFamily(
        "minikms_audit_unsynced_seconds", "Age of the oldest audit record not yet durable.", audit.unsynced_age
    )
    yield GaugeMetricFamily("minikms_audit_failing", "1 while the audit log cannot be written.", int(audit.is_failing))


class Meters:
    """All that counts while the server serves."""

    def __init__(self, *, groups: bool) -> None:
        """`groups` says whether key groups are named."""
        self._requests = RequestMeter()
        self._groups = GroupMeter() if groups else None
        self._saves = SaveMeter()

    def observers(self) -> tuple[Observer, ...]:
        """What has to be told of every request."""
        return (self._requests.observe,) if self._groups is None else (self._requests.observe, self._groups.observe)

    def metered(self, store: KeyringStore) -> KeyringStore:
        """`store`, with its saves counted."""
        return MeteredStore(store, self._saves)

    def collector(
        self, version: str, keyring: KeyringHolder, connections: Connections, audit: Callable[[], AuditLag | None]
    ) -> ServerCollector:
        """What a scrape reads; `audit` gives the audit log if one is kept by then."""
        return ServerCollector(
            version=version,
            requests=self._requests,
            groups=self._groups,
            saves=self._saves,
            keyring=keyring,
            connections=connections,
            audit=audit,
        )

"""What is counted, and how it is shown: closed labels, nothing secret, and every metric written down."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from kms import errors
from kms.core.keyring import (
    EMPTY,
    CreateGroup,
    DestroyVersion,
    DisableVersion,
    KeyGroup,
    Keyring,
    KeySlot,
    NewKey,
    RotateGroup,
    VersionStatus,
    apply,
)
from kms.core.policy import Operation, Principal
from kms.core.specs import AES_256
from kms.errors import SaveFailedError, SaveOutcomeUnknownError, UnauthorizedError
from kms.limits import MAX_METERED_GROUPS
from kms.server.metrics_listener import Exposition
from kms.service import metrics
from kms.service.metrics import BUCKETS, Meters
from kms.service.served import Peer, Served
from kms.wire.messages import CiphertextReply, Encrypt
from kms_tests.in_memory import Server, mint, text
from kms_tests.keks import group_of

ROOT = Path(__file__).parent.parent
Labels = frozenset[tuple[str, str]]
SLOT = KeySlot("g", bytes(16), AES_256, 1)


class Store:
    """Where saves fail when they are told to."""

    failure: Exception | None = None

    is_settled = False

    def mint(self, slot: KeySlot) -> NewKey:
        return mint(slot)

    def commit(self, expected_generation: int, changed: Sequence[KeyGroup]) -> None:
        if self.failure is not None:
            raise self.failure

    def settle(self) -> None:
        self.is_settled = True


class Audit:
    is_failing = True
    written = 7
    unsynced = 3
    unsynced_age = 1.5


class Connections:
    def __init__(self) -> None:
        self.open = Counter(unix=2)
        self.accepted = Counter(unix=9, tcp=1)
        self.refused = Counter(tcp=4)
        self.evicted = Counter(tcp=7)


class World:
    """A pipeline whose meters can be read."""

    def __init__(self, *, groups: bool = False, audit: Audit | None = None) -> None:
        self.server = Server()
        self.meters = Meters(groups=groups)
        self.server.pipeline.observers = self.meters.observers()
        self.store = Store()
        self.metered = self.meters.metered(self.store)
        self.collector = self.meters.collector("1.2.3", self.server.manager, Connections(), lambda: audit)

    def samples(self) -> dict[tuple[str, Labels], float]:
        """Every sample that Prometheus would take, by its name and labels."""
        families = parse_text(generate_latest(self.collector).decode())
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for sample in chain.from_iterable(family.samples for family in families)
        }

    def value(self, name: str, **labels: str) -> float:
        return self.samples()[name, frozenset(labels.items())]

    def changed(self, before: Mapping[tuple[str, Labels], float], name: str) -> dict[tuple[str, ...], float]:
        """Which samples of `name` have grown since `before`: the values of their labels, and by how much."""
        return {
            tuple(value for _, value in sorted(labels)): now - before.get((metric, labels), 0)
            for (metric, labels), now in self.samples().items()
            if metric == name and now != before.get((metric, labels), 0)
        }


def test_each_request_is_counted_once_by_operation_plane_and_outcome() -> None:
    world = World()
    before = world.samples()
    server = world.server
    sealed = server.ask("Encrypt", plaintext=text(b"x"))["ciphertext"]
    server.ask("Decrypt", ciphertext=sealed)
    server.ask("Decrypt", ciphertext=sealed, aad=text(b"another"))
    server.ask("Encrypt", "wrong", plaintext=text(b"x"))
    server.ask("Encrypt")
    server.ask("Health")
    server.ask("Ping")
    server.ask("Nonsense")
    server.line(b"not JSON")
    server.pipeline.session(Peer(1, "tcp")).frame_too_large(10)
    server.admin("RotateKeyGroup", keyId="default")
    server.admin("RotateKeyGroup", keyId="absent")
    assert world.changed(before, "minikms_requests_total") == {
        ("Encrypt", "ok", "data"): 1,
        ("Decrypt", "ok", "data"): 1,
        ("Decrypt", "DecryptionFailed", "data"): 1,
        ("Encrypt", "AuthFailed", "data"): 1,
        ("Encrypt", "InvalidRequest", "data"): 1,
        ("Health", "ok", "data"): 2,
        ("unknown", "InvalidRequest", "unknown"): 2,
        ("unknown", "FrameTooLarge", "unknown"): 1,
        ("RotateKeyGroup", "ok", "control"): 1,
        ("RotateKeyGroup", "InvalidRequest", "control"): 1,
    }
    assert world.changed(before, "minikms_request_duration_seconds_count") == {
        ("Encrypt", "data"): 3,
        ("Decrypt", "data"): 2,
        ("Health", "data"): 2,
        ("unknown", "unknown"): 3,
        ("RotateKeyGroup", "control"): 2,
    }


def test_every_operation_and_outcome_has_its_series_before_it_happens_so_that_the_first_one_is_a_rise() -> None:
    shown = {dict(labels)["operation"] for name, labels in World().samples() if name == "minikms_requests_total"}
    assert shown == {*map(str, Operation), "unknown"}
    codes = {
        kind.code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.WireError) and kind is not errors.WireError
    }
    assert set(metrics.OUTCOMES) == {"ok", *codes}


def test_nothing_that_a_client_sends_becomes_a_label() -> None:
    world = World()
    before = world.samples().keys()
    for kind in ("canary", "Encrypt", "RotateKeyGroup", "", 'x"} 1\n'):
        for token in ("canary", "api-token-canary", "admin-token-canary"):
            world.server.ask(kind, token, keyId="canary", plaintext=text(b"canary"), requestId="canary")
    assert world.samples().keys() == before
    assert b"canary" not in generate_latest(world.collector)


def served(seconds: float, error: errors.WireError | None = None) -> Served:
    request = Encrypt(plaintext=b"x")
    reply = CiphertextReply(b"x")
    began = time.perf_counter() - seconds
    return Served(Peer(1, "unix"), 1, request, Encrypt, Principal("canary"), reply, error, began, None)


def test_a_duration_falls_into_every_bucket_that_is_not_below_it() -> None:
    world = World()
    (observe,) = world.meters.observers()
    observe(served(0.02))
    observe(served(0.3))
    observe(served(100))
    family = "minikms_request_duration_seconds"
    labels = {"operation": "Encrypt", "plane": "data"}
    counts = [world.value(f"{family}_bucket", le=le, **labels) for le in ("0.01", "0.025", "0.25", "0.5", "2.5", "+Inf")]
    assert counts == [0, 1, 1, 2, 2, 3]
    assert world.value(f"{family}_count", **labels) == 3
    assert world.value(f"{family}_sum", **labels) == pytest.approx(100.32, abs=0.05)


def test_a_bucket_includes_its_upper_bound() -> None:
    durations = metrics.Durations()
    for bound in BUCKETS:
        durations.add(bound)
    assert durations.counts == [1] * len(BUCKETS) + [0]


def test_groups_are_named_only_when_that_is_asked_for() -> None:
    world = World()
    world.server.ask("Encrypt", plaintext=text(b"x"))
    assert not [name for name, _ in world.samples() if "group_requests" in name]


def test_a_group_is_counted_by_what_succeeded_on_it_and_no_name_that_a_client_made_up_is_shown() -> None:
    world = World(groups=True)
    server = world.server
    server.admin("CreateKeyGroup", keyId="billing")
    sealed = server.ask("Encrypt", keyId="billing", plaintext=text(b"x"))["ciphertext"]
    server.ask("Decrypt", ciphertext=sealed)
    server.ask("ReEncrypt", ciphertext=sealed, keyId=" ")
    server.ask("GenerateDataKey", keyId="invented")
    server.ask("Encrypt", "wrong", keyId="invented", plaintext=text(b"x"))
    server.admin("RotateKeyGroup", keyId="invented")
    server.ask("Health")
    server.admin("ListKeyGroups")
    assert world.changed({}, "minikms_group_requests_total") == {
        ("billing", "CreateKeyGroup"): 1,
        ("billing", "Encrypt"): 1,
        ("billing", "Decrypt"): 1,
        ("default", "ReEncrypt"): 1,
    }


def test_only_so_many_groups_have_series_of_their_own_and_the_others_share_one() -> None:
    meter = metrics.GroupMeter()
    for number in range(MAX_METERED_GROUPS + 3):
        request = Encrypt(plaintext=b"x", key_id=f"g{number}")
        done = Served(Peer(1, "unix"), 1, request, Encrypt, None, CiphertextReply(b"x"), None, 0.0, None)
        meter.observe(done)
        meter.observe(done)
    counts = meter.counts()
    assert len(counts) == MAX_METERED_GROUPS + 1
    assert counts["", "Encrypt"] == 6
    assert set(counts.values()) == {2, 6}


def test_a_group_is_not_counted_for_a_refusal() -> None:
    meter = metrics.GroupMeter()
    meter.observe(served(0, UnauthorizedError("no")))
    assert meter.counts() == {}


@pytest.mark.parametrize(
    ("failure", "outcome"),
    [
        (None, "ok"),
        (SaveFailedError("the disk is full"), "failed"),
        (SaveOutcomeUnknownError("who knows"), "unknown"),
        (ValueError("a bug"), "unknown"),
    ],
)
def test_a_save_is_counted_by_its_outcome_and_fails_as_it_did(failure: Exception | None, outcome: str) -> None:
    world = World()
    before = world.samples()
    world.store.failure = failure
    if failure is None:
        world.metered.commit(0, ())
    else:
        with pytest.raises(type(failure)):
            world.metered.commit(0, ())
    assert world.changed(before, "minikms_saves_total") == {(outcome,): 1}
    assert world.value("minikms_save_duration_seconds_count") == 1
    assert world.metered.mint(SLOT).wrapped == b"wrapped"
    world.metered.settle()
    assert world.store.is_settled


def test_the_keyring_is_shown_as_it_is_now() -> None:
    world = World()
    states = ("ACTIVE", "ENABLED", "DISABLED", "DESTROYED")
    keyring = apply(EMPTY, CreateGroup("other"), now=1, mint=mint)
    for _ in range(4):
        keyring = apply(keyring, RotateGroup("other"), now=1, mint=mint)
    keyring = apply(keyring, DisableVersion("other", 1), now=1, mint=mint)
    keyring = apply(keyring, DestroyVersion("other", 2), now=1, mint=mint).next_generation()
    for current, expected in ((world.server.manager.current, [1, 0, 0, 0]), (keyring, [1, 2, 1, 1])):
        world.server.manager.current = current
        assert [world.value("minikms_key_versions", state=state) for state in states] == expected
        assert world.value("minikms_key_groups") == 1
        assert world.value("minikms_keyring_generation") == current.generation
    assert set(states) == set(map(str, VersionStatus))


def test_versions_are_counted_again_only_when_the_keyring_has_changed() -> None:
    class Watched(dict[str, KeyGroup]):
        walks = 0

        def values(self) -> Any:
            self.walks += 1
            return super().values()

    world = World()
    watched = Watched(world.server.manager.current.groups)
    world.server.manager.current = Keyring(1, watched)
    for _ in range(3):
        assert world.value("minikms_key_versions", state="ACTIVE") == 1
    assert watched.walks == 1


def test_a_large_keyring_is_counted_with_pauses_in_which_the_event_loop_can_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    version = World().server.manager.current.groups["default"].active
    group = group_of("g", dict.fromkeys(range(1, 5001), version))
    world = World()
    families = len(list(world.collector.collect()))
    assert len(pauses) == families
    world.server.manager.current = Keyring(1, {"g": group})
    assert world.value("minikms_key_versions", state="ACTIVE") == 5000
    assert len(pauses) == 2 * families + 5


def test_connections_are_shown_by_transport() -> None:
    world = World()
    assert world.value("minikms_connections_open", transport="unix") == 2
    assert world.value("minikms_connections_open", transport="tcp") == 0
    assert world.value("minikms_connections_accepted_total", transport="unix") == 9
    assert world.value("minikms_connections_refused_total", transport="tcp") == 4
    assert world.value("minikms_connections_evicted_total", transport="tcp") == 7


def test_the_audit_log_is_shown_when_there_is_one() -> None:
    assert not [name for name, _ in World().samples() if "audit" in name]
    world = World(audit=Audit())
    assert world.value("minikms_audit_records_total") == 7
    assert world.value("minikms_audit_unsynced_records") == 3
    assert world.value("minikms_audit_unsynced_seconds") == 1.5
    assert world.value("minikms_audit_failing") == 1


def test_the_process_is_shown_without_what_the_systemd_unit_hides(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    read = Path.read_text

    def watched(path: Path, *arguments: Any, **options: Any) -> str:
        opened.append(str(path))
        return read(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", watched)
    world = World()
    assert world.value("process_cpu_seconds_total") == pytest.approx(time.process_time(), abs=1)
    assert 1 << 23 < world.value("process_resident_memory_bytes") < world.value("process_virtual_memory_bytes")
    assert world.value("process_start_time_seconds") == pytest.approx(time.time(), abs=60)
    assert 3 <= world.value("process_open_fds") < world.value("process_max_fds")
    assert set(opened) == {"/proc/self/statm"}, "under ProcSubset=pid there is nothing but processes"


def test_the_version_is_shown() -> None:
    assert World().value("minikms_build_info", version="1.2.3") == 1


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
def test_both_formats_say_the_same(accept: str) -> None:
    world = World(groups=True, audit=Audit())
    world.server.ask("Encrypt", plaintext=text(b"x"))
    page = Exposition(world.collector)._make(accept)
    parse = parse_openmetrics if accept else parse_text
    samples = {sample.name for family in parse(page.body.decode()) for sample in family.samples}
    assert samples == {name for name, _ in world.samples()}


# What is written down about the metrics.


@pytest.fixture(scope="module")
def everything() -> World:
    """A world that shows all there is."""
    world = World(groups=True, audit=Audit())
    world.server.ask("Encrypt", plaintext=text(b"x"))
    return world


@pytest.fixture(scope="module")
def exposed(everything: World) -> set[str]:
    """Every name that a query may use."""
    return {name for name, _ in everything.samples()}


def used(source: str) -> set[str]:
    return set(re.findall(r"\b(?:minikms|process)_[a-z_]+\b", source))


def families(exposed: set[str]) -> set[str]:
    return {re.sub(r"_(?:bucket|sum|count)$", "", name) for name in exposed}


def test_every_metric_is_documented_and_every_documented_one_exists(exposed: set[str]) -> None:
    # From the list on: the command at the beginning names only what many names begin with.
    documented = used((ROOT / "docs" / "metrics.rst").read_text(encoding="utf-8").partition("\nWhat there is\n")[2])
    assert families(documented) == families(exposed)
    assert documented <= exposed | families(exposed)


def expressions(dashboard: Any) -> Iterator[str]:
    if isinstance(dashboard, dict):
        for key, value in dashboard.items():
            if key in ("expr", "query", "definition") and isinstance(value, str):
                yield value
            else:
                yield from expressions(value)
    elif isinstance(dashboard, list):
        for part in dashboard:
            yield from expressions(part)


def test_the_dashboard_asks_only_for_metrics_and_labels_that_exist(everything: World, exposed: set[str]) -> None:
    dashboard = json.loads((ROOT / "docs" / "grafana.json").read_text(encoding="utf-8"))
    assert dashboard["schemaVersion"] >= 39
    queries = [query for query in expressions(dashboard) if "_" in query]
    assert len(queries) >= 10
    labels = {label for _, found in everything.samples() for label, _ in found} | {"job", "instance"}
    for query in queries:
        assert used(query), query
        assert used(query) <= exposed, query
        selected = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", query))
        grouped = {label.strip() for listed in re.findall(r"by\s*\(([^)]*)\)", query) for label in listed.split(",")}
        assert selected | grouped <= labels, query


def test_every_panel_of_the_dashboard_takes_the_data_source_that_is_chosen(exposed: set[str]) -> None:
    dashboard = json.loads((ROOT / "docs" / "grafana.json").read_text(encoding="utf-8"))
    (source,) = dashboard["__inputs"]
    chosen = {"type": "prometheus", "uid": f"${{{source['name']}}}"}
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    for panel in panels:
        assert panel["datasource"] == chosen, panel["title"]
        assert all(target["datasource"] == chosen for target in panel["targets"]), panel["title"]
    shown = used(" ".join(expressions(dashboard)))
    important = {name for name in families(exposed) if name.startswith("minikms_") and not name.endswith("_info")}
    assert important - families(shown) <= {"minikms_group_requests_total", "minikms_connections_accepted_total"}
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(numbers) == len(set(numbers))

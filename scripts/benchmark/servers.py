"""A server beside another: what a team's configuration costs, and what changed since an earlier checkout."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Final, NamedTuple

from kms_tests.integration.processes import DEADLINE, ROOT, Machine, Server
from scripts.benchmark.processes import Bench, BenchmarkError
from scripts.benchmark.turns import Row, Shape, Side, compare, prepare

PATIENCE: Final = 3
"""So many times the rounds of the other measurements: the two sides differ by little, and one round's ratio by a tenth."""

TEAM_SHAPE: Final = Shape(32, 1)
TEAM: Final = (
    ("principals", ("--audit-data", "none"), None),
    ("principals, audit", ("--audit-data", "all"), None),
    ("principals, audit, metrics", ("--audit-data", "all", "--metrics-port", "0"), 0.6),
)
"""Each step adds one thing, by these flags; the last has everything, and the least ratio that it should have."""
MOST_CONTROL_RECORDS: Final = 100
"""An audit log without data operations has not nearly as many."""

BASELINE_ROWS: Final = (
    ("Encrypt 32 B", Shape(1, 1), None),
    ("Encrypt 32 B", Shape(32, 1), 0.97),
    ("Encrypt 32 B", Shape(32, 16), None),
    ("Decrypt 32 B", Shape(32, 1), 0.97),
)
"""What is measured beside the other checkout, and the least ratio that it should have."""


def require_metrics() -> None:
    """Raise `BenchmarkError` unless the server could have metrics."""
    if not all(map(find_spec, ("prometheus_client", "h11"))):
        raise BenchmarkError("a team's server has metrics: install mini-kms[metrics], or leave this part out with --only")


def team(bench: Bench, *, rounds: int, seconds: float, said: Callable[[str], None]) -> list[Row]:
    """Encrypt 32 B on a server that knows its clients, records what they do and has metrics, beside one without."""
    rows = []
    with bench.server() as plain:
        theirs = Side.of("default", plain, prepare(plain)["Encrypt 32 B"])
        for name, flags, target in TEAM:
            said(f"Encrypt 32 B {TEAM_SHAPE.connections}x{TEAM_SHAPE.depth}, {name}")
            with _team_server(bench, *flags) as member:
                ours = Side.of(name, member.server, prepare(member.server, member.token)["Encrypt 32 B"])
                row = compare(bench, ours, theirs, TEAM_SHAPE, rounds=PATIENCE * rounds, seconds=seconds, target=target)
                _check_records(member.server, row.replies, is_audited="audit" in name)
                if "metrics" in name:
                    _check_metrics(member.server, row.replies)
            rows.append(row)
    return rows


class _Member(NamedTuple):
    """A team's server, and the token of the principal that has a grant there."""

    server: Server
    token: str


@contextlib.contextmanager
def _team_server(bench: Bench, *flags: str) -> Iterator[_Member]:
    with bench.machine() as machine:
        made = machine.admin("new-token", "billing")
        if made.status != 0:
            raise BenchmarkError(made.stderr)
        principals = machine.file(
            "principals.toml",
            f"""
            [shared]
            api_token = false
            [principals.billing]
            {made.stderr}
            [[principals.billing.allow]]
            groups = ["default"]
            operations = ["Encrypt", "Decrypt", "GenerateDataKey"]
            """.encode(),
        )
        principals.chmod(0o600)
        yield _Member(_started(machine, "--principals", str(principals), *flags), made.stdout.decode().strip())


def _started(machine: Machine, *flags: str) -> Server:
    try:
        return machine.start(*flags)
    except AssertionError as error:
        raise BenchmarkError(f"the server did not start: {error}") from error


def _check_records(server: Server, replies: int, *, is_audited: bool) -> None:
    """Raise `BenchmarkError` unless there is a record of each reply, or, when it is not audited, of none."""
    records, path = 0, server.machine.data / "audit.log"
    if path.exists():
        with path.open("rb") as log:
            records = sum(1 for _ in log)
    if (records < replies) if is_audited else (records > MOST_CONTROL_RECORDS):
        raise BenchmarkError(f"{replies} replies have {records} records in the audit log")


def _check_metrics(server: Server, replies: int) -> None:
    """Raise `BenchmarkError` unless the metrics have counted each reply."""
    from prometheus_client.parser import text_string_to_metric_families

    found = re.search(r"metrics on (http://\S+)", server.stderr)
    if found is None:
        raise BenchmarkError(f"the server does not say where its metrics are: {server.stderr}")
    with urllib.request.urlopen(found[1], timeout=DEADLINE) as answer:
        text = answer.read().decode()
    counted = sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "minikms_requests_total"
        and (sample.labels["operation"], sample.labels["outcome"]) == ("Encrypt", "ok")
    )
    if counted < replies:
        raise BenchmarkError(f"the metrics counted {counted:.0f} of {replies} replies")


def baseline(bench: Bench, source: Path, *, rounds: int, seconds: float, said: Callable[[str], None]) -> list[Row]:
    """The data plane of this checkout beside that of the checkout at `source`, both as they are by default."""
    if not (source / "kms").is_dir():
        raise BenchmarkError(f"{source} is no checkout of mini-kms; make one with: git worktree add PATH COMMIT")
    name = source.resolve().name
    rows = []
    with bench.server() as server, bench.server(source=source) as earlier:
        _check_source(server.machine, ROOT)
        _check_source(earlier.machine, source)
        works, earlier_works = prepare(server), prepare(earlier)
        for operation, shape, target in BASELINE_ROWS:
            said(f"{operation} {shape.connections}x{shape.depth} beside {name}")
            ours = Side.of("this checkout", server, works[operation])
            theirs = Side.of(name, earlier, earlier_works[operation])
            rows.append(compare(bench, ours, theirs, shape, rounds=PATIENCE * rounds, seconds=seconds, target=target))
    return rows


def _check_source(machine: Machine, source: Path) -> None:
    """Raise `BenchmarkError` unless the programs of `machine` are those of the checkout at `source`."""
    where = "import os, kms; print(os.path.dirname(kms.__file__))"
    ran = subprocess.run(
        [sys.executable, "-c", where], env=machine.environment, cwd=machine.root, capture_output=True, check=True, text=True
    )
    if not (source / "kms").samefile(ran.stdout.strip()):
        raise BenchmarkError(f"what runs is {ran.stdout.strip()}, not {source / 'kms'}")

"""Fixtures that several tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from kms.core.derive import KdfParameters
from kms_tests.integration.processes import Machine, Server
from kms_tests.strategies import PROFILE

settings.load_profile(PROFILE)


def pytest_configure() -> None:
    # A build that was started in the background ignores Ctrl-C, and so would every program that a test sends it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="hours instead of a minute, where a test has a long form")


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    """Whether the long form of a test was asked for."""
    return bool(request.config.getoption("--long"))


@pytest.fixture
def tiny() -> KdfParameters:
    """The cheapest Argon2id there is: a derivation costs microseconds instead of a tenth of a second."""
    return KdfParameters(memory_kib=8, iterations=1, parallelism=1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """An empty private data directory."""
    path = tmp_path / "data"
    path.mkdir(mode=0o700)
    path.chmod(0o700)
    return path


@pytest.fixture
def foreign_uid(monkeypatch: pytest.MonkeyPatch) -> int:
    """From here on this process believes to be a user who owns no file, not even root's: `os.geteuid` answers this."""
    uid = 4242
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    return uid


@pytest.fixture(scope="session")
def template() -> Iterator[Path]:
    """A data directory as `kms-admin init` makes it, to be copied: a real init for each test would take too long."""
    machine = Machine()
    try:
        made = machine.admin("init")
        assert made.status == 0, made.stderr
        yield machine.data
    finally:
        machine.dispose()


@pytest.fixture
def bare() -> Iterator[Machine]:
    """A machine where nothing has run yet."""
    machine = Machine()
    yield machine
    machine.dispose()


@pytest.fixture
def machine(template: Path) -> Iterator[Machine]:
    """A machine after `kms-admin init`. Servers that still run at its end must stop on SIGTERM with status 0."""
    machine = Machine(template)
    yield machine
    machine.dispose()


@pytest.fixture
def server(machine: Machine) -> Server:
    """A server on any free port and on a Unix socket."""
    return machine.start()

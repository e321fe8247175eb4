"""Fixtures that run the real programs, and the mark of all tests here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kms_tests.integration.processes import Machine, Server

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.integration)


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

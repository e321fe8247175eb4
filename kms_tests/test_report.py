"""What a server tells of itself."""

from __future__ import annotations

from pathlib import Path

from kms.server.report import Report
from kms_tests.in_memory import Server


def _warnings(keystore: Path, *, is_locked: bool = True) -> list[str]:
    report = Report(Server().service, keystore, "memory is not locked", is_locked, [], "all", lambda: "")
    return report().warnings


def test_there_is_nothing_to_warn_of_where_all_is_well(data: Path) -> None:
    assert _warnings(data / "keystore.json") == []


def test_memory_that_is_not_locked_is_warned_of(data: Path) -> None:
    assert _warnings(data / "keystore.json", is_locked=False) == ["memory is not locked"]


def test_what_was_kept_of_before_a_migration_is_told_until_it_is_removed(data: Path) -> None:
    kept = [data / "keystore.json.v2", data / "keystore.json.v3.1"]
    for path in kept:
        path.touch()
    (warning,) = _warnings(data / "keystore.json")
    assert warning.startswith("keystore.json.v2, keystore.json.v3.1: of before a migration")
    for path in kept:
        path.unlink()
    assert _warnings(data / "keystore.json") == []

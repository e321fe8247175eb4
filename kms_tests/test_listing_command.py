"""`kms-admin list-keys`: which groups, in which order, in how many columns."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kms.cli import listing
from kms.core.usage import Operations, VersionUsage
from kms.wire.messages import KeyGroupView, VersionState, VersionView

NOW = 1_800_000_000


def _group(name: str, *states: VersionState, made: int = NOW, used: int | None = None) -> KeyGroupView:
    usage = VersionUsage(since_epoch_sec=made, operations=Operations(), last_used_epoch_sec=used, last_used_by="api")
    versions = [VersionView(number, state, made + number, usage) for number, state in enumerate(states, 1)]
    return KeyGroupView(name, len(states), versions)


A, E, D = VersionState.ACTIVE, VersionState.ENABLED, VersionState.DISABLED
GROUPS = [
    _group("billing", E, A, made=NOW - 300, used=NOW - 5),
    _group("Archive", D, E, A, made=NOW - 100),
    _group("billing-eu", A, made=NOW - 200, used=NOW - 9),
]


def _names(*patterns: str, state: str | None = None, order: str = "made", limit: int | None = None) -> list[str]:
    return [group.key_id for group in listing.chosen(GROUPS, patterns, state, order, limit)]


def test_without_a_glob_all_are_listed_in_the_order_in_which_they_were_made() -> None:
    assert _names() == ["billing", "Archive", "billing-eu"]
    assert _names(limit=2) == ["billing", "Archive"]


def test_a_glob_is_of_the_whole_name_and_its_case_counts() -> None:
    assert _names("billing*") == ["billing", "billing-eu"]
    assert _names("billing") == ["billing"]
    assert _names("archive") == []
    assert _names("A*", "*-eu") == ["Archive", "billing-eu"]


def test_a_state_is_that_of_any_version() -> None:
    assert _names(state="DISABLED") == ["Archive"]
    assert _names(state="ACTIVE", limit=1) == ["billing"]


@pytest.mark.parametrize(
    ("order", "names"),
    [
        ("name", ["Archive", "billing", "billing-eu"]),
        ("rotated", ["Archive", "billing-eu", "billing"]),
        ("used", ["billing", "billing-eu", "Archive"]),
        ("versions", ["Archive", "billing", "billing-eu"]),
    ],
)
def test_the_latest_and_the_most_come_first(order: str, names: list[str]) -> None:
    assert _names(order=order) == names


def _drawn(table: Any, width: int = 80) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_five_hundred_groups_have_a_line_each_in_eighty_columns() -> None:
    groups = [_group(f"service-{number}", E, D, A) for number in range(500)]
    for usage in (False, True):
        lines = _drawn(listing._group_table(groups, usage=usage)).splitlines()
        assert max(map(len, lines)) <= 80
        assert sum("service-" in line for line in lines) == 500
        assert len(lines) < 510


@given(st.lists(st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True), min_size=1, max_size=5, unique=True))
def test_a_name_is_whole_however_narrow_the_terminal_is(names: list[str]) -> None:
    for table in (listing._group_table, listing._version_table):
        drawn = _drawn(table([_group(name, A) for name in names], usage=True), width=60)
        first = [line.split("  ")[0].strip() if line[:3].strip() else "" for line in drawn.splitlines()[3:]]
        assert "".join(re.sub(r"\s", "", "".join(first))) == "".join(names)
        assert "\u2026" not in drawn


def test_a_row_of_versions_tells_state_and_use_and_a_name_is_not_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: float(NOW))
    used = VersionUsage(
        since_epoch_sec=0, operations=Operations(encrypt=3), last_used_epoch_sec=NOW - 90, last_used_by="b\x1bx"
    )
    group = KeyGroupView("[red]odd\x1b\n", 2, [VersionView(1, D, 0, used), VersionView(2, A, 1 << 62)])
    drawn = _drawn(listing._version_table([group], usage=True))
    for told in ("[red]odd\\x1b\\n", "v1", "DISABLED", "1 minute ago", "b\\x1bx", "3 Encrypt", "not known"):
        assert told in drawn
    assert drawn.count("odd") == 1
    assert "2027-01-15" not in drawn
    assert "@4611686018427387904" in _drawn(listing._version_table([group], usage=False))

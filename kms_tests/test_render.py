"""What is printed: tables for people, plain text for pipes, JSON for programs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kms.cli import listing, render
from kms.core.usage import Operations, Refusals, TimedDisable, VersionUsage
from kms.wire.messages import KeyGroupView, VersionState, VersionView

GROUPS = [
    KeyGroupView(
        "billing", 2, [VersionView(1, VersionState.DESTROYED, 1700000000), VersionView(2, VersionState.ACTIVE, 1700000100)]
    ),
    KeyGroupView("[red]odd\x1b\n", 1, [VersionView(1, VersionState.ACTIVE, 1 << 62)]),
]


@pytest.fixture
def at_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "is_terminal", lambda _stream: True)


def test_a_pipe_gets_tab_separated_lines(capsys: pytest.CaptureFixture[str]) -> None:
    for group in GROUPS:
        listing.print_lines(group, usage=False)
    assert capsys.readouterr().out.splitlines() == [
        "billing\tv1\tDESTROYED\t2023-11-14T22:13:20Z",
        "billing\tv2\tACTIVE\t2023-11-14T22:15:00Z",
        "[red]odd\\x1b\\n\tv1\tACTIVE\t@4611686018427387904",
    ]


def test_a_json_document_holds_structs_and_base64(capsys: pytest.CaptureFixture[str]) -> None:
    render.document(keyGroup=GROUPS[0], ciphertext=b"\x02")
    document = json.loads(capsys.readouterr().out)
    assert document["ciphertext"] == "Ag=="
    assert document["keyGroup"]["versions"][1] == {"version": 2, "status": "ACTIVE", "createdAtEpochSec": 1700000100}


def test_there_is_no_progress_bar_in_a_pipe(tmp_path: Path) -> None:
    with render.progress(tmp_path, tmp_path) as progress:
        assert progress is None


@pytest.mark.usefixtures("at_terminal")
def test_there_is_no_progress_bar_on_the_terminal_that_takes_the_output() -> None:
    with render.progress(None, None) as progress:
        assert progress is None


@pytest.mark.usefixtures("at_terminal")
def test_a_progress_bar_is_on_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich looks at the stream itself
    monkeypatch.setenv("TERM", "xterm")
    source = tmp_path / "[big]"
    source.write_bytes(bytes(1000))
    stdout = sys.stdout
    with render.progress(source, tmp_path / "out") as progress:
        assert progress is not None
        assert sys.stdout is stdout
        progress(1000)
    seen = capsys.readouterr()
    assert seen.out == ""
    assert "[big]" in seen.err


@pytest.mark.usefixtures("at_terminal")
def test_a_progress_bar_needs_no_size(tmp_path: Path) -> None:
    with render.progress(None, tmp_path / "out") as progress:
        assert progress is not None
        progress(5)


NOW = 1_800_000_000
TRIAL = TimedDisable("admin", NOW - 100, NOW - 40, {"b": Refusals(1, NOW - 60), "a": Refusals(2, NOW - 50)}, NOW - 40)
USED = VersionUsage(
    since_epoch_sec=NOW - 200,
    operations=Operations(encrypt=3, decrypt=1),
    last_used_epoch_sec=NOW - 90,
    last_used_by="billing",
    timed_disable=TRIAL,
)
UNUSED = VersionUsage(since_epoch_sec=NOW - 200, operations=Operations())
DESCRIBED = KeyGroupView(
    "odd\x1b",
    3,
    [
        VersionView(1, VersionState.ENABLED, NOW - 300, USED),
        VersionView(2, VersionState.DISABLED, 0, UNUSED),
        VersionView(3, VersionState.ACTIVE, 0),
    ],
)


def test_a_pipe_gets_the_use_in_four_more_fields(capsys: pytest.CaptureFixture[str]) -> None:
    listing.print_lines(DESCRIBED, usage=True)
    assert [line.split("\t")[4:] for line in capsys.readouterr().out.splitlines()] == [
        ["2027-01-15T07:56:40Z", "2027-01-15T07:58:30Z", "billing", "Encrypt=3 Decrypt=1"],
        ["2027-01-15T07:56:40Z", "", "", ""],
        ["", "", "", ""],
    ]


def test_a_group_is_described_whole(capsys: pytest.CaptureFixture[str]) -> None:
    render.key_group(DESCRIBED, NOW)
    assert capsys.readouterr().out.splitlines() == [
        "odd\\x1b: version 3 is active",
        "",
        "version 1 is ENABLED",
        "    created    5 minutes ago (2027-01-15 07:55:00 UTC)",
        "    used       3 Encrypt, 1 Decrypt since 2027-01-15 07:56:40 UTC",
        "    last used  1 minute ago (2027-01-15 07:58:30 UTC) by billing",
        "    disabled   for a time, 1 minute ago (2027-01-15 07:58:20 UTC) by admin",
        "    ended      40 seconds ago (2027-01-15 07:59:20 UTC)",
        "    refused    a: 2 requests, last 50 seconds ago (2027-01-15 07:59:10 UTC)",
        "    refused    b: 1 request, last 1 minute ago (2027-01-15 07:59:00 UTC)",
        "",
        "version 2 is DISABLED",
        "    created    20833 days ago (1970-01-01 00:00:00 UTC)",
        "    used       never (counted since 2027-01-15 07:56:40 UTC)",
        "",
        "version 3 is ACTIVE",
        "    created    20833 days ago (1970-01-01 00:00:00 UTC)",
    ]


def test_a_trial_that_is_not_over_says_when_it_will_be() -> None:
    trial = TimedDisable("admin", NOW, NOW + 7200)
    assert render.timed_disable(trial, "DISABLED", NOW)[1:] == [
        "enabled    in 2 hours (2027-01-15 10:00:00 UTC)",
        "refused    nobody",
    ]
    assert render.timed_disable(trial, "DISABLED", NOW + 6902)[1] == (
        "enabled    in 4 minutes 58 seconds (2027-01-15 10:00:00 UTC)"
    )


def test_a_version_that_was_disabled_for_good_meanwhile_is_told_so() -> None:
    trial = TimedDisable("admin", NOW - 100, NOW + 7200, {}, NOW - 40)
    assert render.timed_disable(trial, "DISABLED", NOW)[1].startswith("ended      40 seconds ago (")
    assert render.timed_disable(trial, "DISABLED", NOW)[1].endswith("; it is disabled for good")
    assert render.timed_disable(trial, "DESTROYED", NOW)[1].endswith("; it is destroyed")
    assert render.timed_disable(trial, "ENABLED", NOW)[1].endswith(" UTC)")


def test_json_escapes_what_a_terminal_would_obey_and_what_is_no_utf_8(capsys: pytest.CaptureFixture[str]) -> None:
    odd = "a\x9b\u202e\udcff\U000e0001b"
    render.document(out=Path(odd), files=[{"file": odd}], keyGroup=KeyGroupView("c\x9b\u2028", 1, []))
    printed = capsys.readouterr().out
    assert printed.rstrip("\n").isprintable()
    document = json.loads(printed)
    assert document["out"] == document["files"][0]["file"] == "a\x9b\u202e\\udcff\U000e0001b"
    assert document["keyGroup"]["keyId"] == "c\x9b\u2028"


@pytest.mark.usefixtures("at_terminal")
def test_the_name_of_a_file_cannot_speak_to_the_terminal_from_the_progress_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    source = tmp_path / "[b]a\x1b]0;PWNED\x1b\\\u202e.mke"
    source.touch()
    with render.progress(source, tmp_path / "out") as progress:
        assert progress is not None
    err = capsys.readouterr().err
    assert "\x1b]0;" not in err
    assert "\u202e" not in err
    assert "[b]a\\x1b]0;PWNED" in err

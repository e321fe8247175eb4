"""What is printed: tables for people, plain text for pipes, JSON for programs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kms.cli import render
from kms.wire.messages import KeyGroupView, VersionView

GROUPS = [
    KeyGroupView("billing", 2, [VersionView(1, "DESTROYED", 1700000000), VersionView(2, "ACTIVE", 1700000100)]),
    KeyGroupView("[red]odd\x1b\n", 1, [VersionView(1, "ACTIVE", 1 << 62)]),
]


@pytest.fixture
def at_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "_is_terminal", lambda _stream: True)


def test_a_pipe_gets_tab_separated_lines(capsys: pytest.CaptureFixture[str]) -> None:
    render.key_groups(GROUPS)
    assert capsys.readouterr().out.splitlines() == [
        "billing\tv1\tDESTROYED\t2023-11-14T22:13:20Z",
        "billing\tv2\tACTIVE\t2023-11-14T22:15:00Z",
        "[red]odd\\x1b\\n\tv1\tACTIVE\t@4611686018427387904",
    ]


@pytest.mark.usefixtures("at_terminal")
def test_a_terminal_gets_a_table_where_a_name_is_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    render.key_groups(GROUPS)
    out = capsys.readouterr().out
    assert "created (UTC)" in out
    assert "[red]odd\\x1b\\n" in out
    assert "2023-11-14 22:13:20" in out
    assert out.count("billing") == 1


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

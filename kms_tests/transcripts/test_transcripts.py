"""What the transcripts show is what happens; and what one shows that does not happen is found."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent

import pytest

from kms_tests.integration.processes import ROOT, Machine
from kms_tests.transcripts import transcript
from kms_tests.transcripts.transcript import Line, difference, parse, run

FILES = sorted(Path(__file__).parent.glob("*.txt"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_happens_as_it_is_shown(path: Path, request: pytest.FixtureRequest) -> None:
    shown = parse(path.name, path.read_text(encoding="utf-8"))
    machine: Machine = request.getfixturevalue("machine" if shown.is_initialised else "bare")
    run(shown, machine)


def complaint(machine: Machine, text: str) -> list[str]:
    """The lines of what is said of a transcript that does not hold."""
    with pytest.raises(AssertionError) as failure:
        run(parse("lie.txt", text), machine)
    return str(failure.value).splitlines()


@pytest.mark.parametrize(
    ("shown", "number", "diff"),
    [
        pytest.param("$ printf 'a\\nb\\n'\na\nB", 4, [" a", "-B", "+b"], id="a lying line"),
        pytest.param("$ printf 'a\\nb\\n'\nb", 3, ["+a", " b"], id="a line that is missing from the transcript"),
        pytest.param("$ printf 'a\\nb\\n'\na", 3, [" a", "+b"], id="the last line, which is missing from the transcript"),
        pytest.param("$ echo a", 2, ["+a"], id="the only line, which is missing from the transcript"),
        pytest.param("$ echo a\na\nb", 4, [" a", "-b"], id="a line too many in the transcript"),
        pytest.param("$ true\na", 3, ["-a"], id="a line where nothing is printed"),
        pytest.param("$ printf 'a\\n\\nb\\n'\na\nb", 4, [" a", "+", " b"], id="a blank line"),
        pytest.param("$ printf 'b\\na\\n'\na\nb", 3, ["+b", " a", "-b"], id="another order"),
        pytest.param("$ echo a b\n…c", 3, ["-…c", "+a b"], id="what may begin in any way"),
        pytest.param("$ echo a >&2\n! b", 3, ["-b", "+a"], id="a lying line of standard error"),
        pytest.param("$ echo a >&2", 2, ["+a"], id="standard error, which is missing from the transcript"),
        pytest.param("% echo a\nb", 3, ["-b", "+a"], id="a lying line at a terminal"),
        pytest.param("% stty -echo; printf 'x? '; read x\nx?\n< a\na", 5, ["-a"], id="an echo"),
        pytest.param("% true\nx?\n< a\na", 3, ["-x?"], id="a question that nobody asks"),
    ],
)
def test_output_that_is_not_as_it_is_shown_is_found(bare: Machine, shown: str, number: int, diff: list[str]) -> None:
    first, where, *rest = complaint(bare, f"# A lie.\n{shown}\n")
    assert first == f"lie.txt:2: {shown.splitlines()[0]}"
    assert where.startswith(f"line {number}: ")
    assert rest == diff


def test_output_on_the_wrong_stream_is_found_on_both(bare: Machine) -> None:
    assert complaint(bare, "# A lie.\n$ echo a >&2\na\n") == [
        "lie.txt:2: $ echo a >&2",
        "line 3: standard output is not so (- shown, + real):",
        "-a",
        "line 2: standard error is not so (- shown, + real):",
        "+a",
    ]


@pytest.mark.parametrize(
    ("shown", "said"),
    [
        ("$ exit 3", "it ended with 3; shown is [exit 0]"),
        ("$ true\n[exit 1]", "it ended with 0; shown is [exit 1]"),
        ("% exit 3\n[exit 1]", "it ended with 3; shown is [exit 1]"),
        ("$ kill %1", "list index out of range"),
    ],
)
def test_another_exit_status_is_found(bare: Machine, shown: str, said: str) -> None:
    assert complaint(bare, f"# A lie.\n{shown}\n") == [f"lie.txt:2: {shown.splitlines()[0]}", said]


@pytest.mark.parametrize("shown", ["$ sleep 60", "% sleep 60", "% printf 'x? '; read x\ny?\n< a"])
def test_what_does_not_end_is_ended_and_found(bare: Machine, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcript, "DEADLINE", 0.2)
    first, why, *_ = complaint(bare, f"# A lie.\n{shown}\n")
    assert first == f"lie.txt:2: {shown.splitlines()[0]}"
    assert "timed out" in why or "is not so" in why


def test_a_server_that_does_not_start_is_found(bare: Machine) -> None:
    first, where, *_ = complaint(bare, "# A lie.\n$ kms-server --tcp-port 99999 &\n")
    assert first == "lie.txt:2: $ kms-server --tcp-port 99999 &"
    assert "99999 is outside" in where


def test_a_server_that_says_or_prints_something_else_is_found(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "# A lie.\n$ kms-server &\n! …\n! kms-server: ready …\n$ kill %1\nbye\n! kms-server: good bye\n[exit 1]\n"
    monkeypatch.setattr(transcript, "eventually", lambda _, condition: condition())
    assert complaint(machine, text) == [
        "lie.txt:5: $ kill %1",
        "line 6: standard output is not so (- shown, + real):",
        "-bye",
        "line 7: standard error is not so (- shown, + real):",
        "-kms-server: good bye",
        "+kms-server: stopping on SIGTERM",
        "it ended with 0; shown is [exit 1]",
    ]


def test_a_server_that_did_not_stop_as_it_should_is_found(machine: Machine) -> None:
    with pytest.raises(AssertionError, match=r"^lie\.txt:2: "):
        run(parse("lie.txt", "# A lie.\n$ kms-server &\n$ kill -KILL %1\n"), machine)
    # So that the machine does not complain as well.
    machine._servers.clear()


def test_an_answer_waits_for_its_question(bare: Machine) -> None:
    text = "# Much is said before.\n% seq 3000; printf 'name? '; read x; echo hi $x\n…\n3000\nname?\n< you\nyou\nhi you\n"
    run(parse("a.txt", text), bare)


@pytest.mark.parametrize(
    ("shown", "real"),
    [
        (["…"], []),
        (["…"], ["a", "b"]),
        (["…", "b", "…"], ["a", "b"]),
        (["a…"], ["a"]),
        (["a…c…"], ["abcd"]),
        (["(a.*)"], ["(a.*)"]),
        (["", "a"], ["", "a"]),
    ],
)
def test_three_dots_stand_for_any_text_or_any_lines(shown: list[str], real: list[str]) -> None:
    assert difference([Line(n, text) for n, text in enumerate(shown, 1)], real) is None


@pytest.mark.parametrize(
    ("shown", "real", "number"),
    [
        (["…", "b"], ["b", "a"], 2),
        (["a…"], ["ba"], 1),
        (["a…", "c"], ["a", "b", "c"], 2),
        (["a", "…", "d"], ["b", "c", "d"], 1),
        (["(a.*)"], ["(aa)"], 1),
    ],
)
def test_three_dots_stand_for_nothing_else(shown: list[str], real: list[str], number: int) -> None:
    found = difference([Line(n, text) for n, text in enumerate(shown, 1)], real)
    assert found is not None
    assert found[0] == number


def test_a_transcript_is_read_as_it_is_written() -> None:
    read = parse(
        "a.txt", "# Prose.\nwith: nothing\n\n$ one <<E\n> two\n>\n> E\n\na\n\nb\n! c\n\n% d\ne:\n< f\n\ng\n[exit 2]\n"
    )
    assert not read.is_initialised
    first, second = read.steps
    assert (first.command, first.is_at_terminal, first.status) == ("one <<E\ntwo\n\nE", False, 0)
    assert first.screens == [[Line(8, ""), Line(9, "a"), Line(10, ""), Line(11, "b")]]
    assert first.stderr == [Line(12, "c")]
    assert (second.command, second.is_at_terminal, second.status) == ("d", True, 2)
    assert second.screens == [[Line(15, "e:")], [Line(17, ""), Line(18, "g")]]
    assert second.typed == [Line(16, "f")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("$ true\n", "a.txt:1: a transcript begins with prose"),
        ("# Prose.\na\n", "a.txt:2: this belongs to no command"),
        ("# Prose.\n$ true\n[exit 1]\na\n", "a.txt:4: this belongs to no command"),
        ("# Prose.\n$ true\n# More.\na\n", "a.txt:4: this belongs to no command"),
        ("# Prose.\n$ true\n# More.\nwith: init\n", "a.txt:4: this belongs to no command"),
        ("# Prose.\nwith: everything\n$ true\n", "a.txt:2: this belongs to no command"),
        ("# Prose.\n$ true\n< a\n", "a.txt:3: `< ` is not for what begins with `$ `"),
        ("# Prose.\n% true\n! a\n", "a.txt:3: `! ` is not for what begins with `% `"),
    ],
)
def test_what_is_no_transcript_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError) as refusal:
        parse("a.txt", text)
    assert str(refusal.value) == said


def test_the_tour_of_the_readme_happens_as_it_is_shown(machine: Machine) -> None:
    tour = (ROOT / "README.rst").read_text(encoding="utf-8").partition("\nA tour\n------\n")[2].partition("\n\n\n")[0]
    shown = dedent("\n".join(re.findall(r"^(?: {4}.*)?$", tour, re.MULTILINE)))
    # It shows what a person sees: at a terminal a list is a table, with a blank line below it.
    shown = shown.replace("$ kms-admin list-keys", "% kms-admin list-keys")
    shown = re.sub(r"\d{4}-\d\d-\d\d(\n\n)?", lambda found: "…\n…\n\n" if found[1] else "…", shown)
    read = parse("README.rst", f"# A tour.\n$ kms-server &\n$ mkdir .dev\n{shown}\n")
    assert len(read.steps) > 10
    run(read, machine)

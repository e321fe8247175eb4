"""What the server says, for people and as JSON."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kms.cli.logs import HumanFormatter, JsonFormatter, Voice
from kms.limits import MAX_GROUP_NAME_BYTES
from kms.service.event import Event

ANY_TEXT = st.text(st.characters(codec=None, categories=None), max_size=50)
"""Line ends, escapes and lone surrogates too."""
LONGEST_LINE = 48 * 1024
"""What journald takes."""


def record(message: object, *arguments: object, name: str = "kms.audit", error: Any = None) -> logging.LogRecord:
    made = logging.LogRecord(name, logging.INFO, __file__, 1, message, arguments, error)
    made.created = 1_800_000_000.000_25
    return made


def as_json(made: logging.LogRecord) -> dict[str, Any]:
    line = JsonFormatter().format(made)
    assert len(line.splitlines()) == 1
    assert line.isprintable()
    assert len(line) < LONGEST_LINE
    # Stricter than Python's own decoder, which takes lone surrogates.
    decoded: dict[str, Any] = msgspec.json.decode(line.encode("ascii"))
    assert decoded == json.loads(line)
    return decoded


def test_a_JSON_line_has_when_how_grave_from_where_and_what() -> None:
    assert as_json(record("reloaded: %s", "principals.toml", name="kms.server.reload")) == {
        "time": "2027-01-15T08:00:00.000250Z",
        "level": "INFO",
        "logger": "kms.server.reload",
        "message": "reloaded: principals.toml",
    }


def test_the_fields_of_an_event_are_keys_of_their_own_with_their_own_types() -> None:
    event = Event({"connection": 3, "group": "billing", "version": None})
    line = as_json(record(event))
    assert (line["connection"], line["group"], line["version"]) == (3, "billing", None)
    assert line["message"] == str(event) == "connection=3 group='billing' version=-"


def test_people_read_the_same_event_as_text() -> None:
    assert HumanFormatter("kms-server").format(record(Event({"connection": 3}))).endswith(" INFO kms.audit: connection=3")


@given(ANY_TEXT, ANY_TEXT, ANY_TEXT)
def test_whatever_is_in_an_event_it_is_one_line_of_valid_JSON(message: str, group: str, request_id: str) -> None:
    as_json(record("%s", message))
    line = as_json(record(Event({"group": group, "requestId": request_id})))
    assert line["group"].encode("utf-8", "backslashreplace") == group.encode("utf-8", "backslashreplace")


@pytest.mark.parametrize("character", ["x", "\n", "\x1b", "\u2028", "\U0001f511", "\ud800"])
def test_a_megabyte_of_anything_is_cut_to_what_a_log_takes_and_keeps_its_two_ends(character: str) -> None:
    long = f"begin{character * 1_000_000}end"
    line = as_json(record(Event({"group": long, "requestId": long})))
    assert line["message"].startswith("group=")
    line = as_json(record("%s", long))
    for text in (line["message"], as_json(record(Event({"group": long})))["group"]):
        assert text.startswith("begin")
        assert text.endswith("end")
        assert " ... " in text


def test_the_longest_name_of_a_group_is_not_cut() -> None:
    name = "x" * (MAX_GROUP_NAME_BYTES + len("..."))
    assert as_json(record(Event({"group": name})))["group"] == name


def test_a_traceback_is_in_the_same_line() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        line = as_json(record("it broke", error=sys.exc_info()))
    assert line["message"].startswith("it broke\nTraceback ")
    assert line["message"].endswith("ValueError: why")


def test_a_program_speaks_to_people_until_it_is_told_otherwise() -> None:
    voice = Voice("kms-server")
    assert voice.line(logging.INFO, "ready on\na.sock") == "kms-server: ready on\\na.sock\n"
    assert voice.line(logging.ERROR, "no") == "kms-server: error: no\n"
    voice.use("json")
    line = voice.line(logging.ERROR, "no 100%\n")
    assert line.endswith("}\n")
    decoded = json.loads(line)
    assert (decoded["level"], decoded["logger"], decoded["message"]) == ("ERROR", "kms-server", "no 100%\n")
    voice.use("human")
    assert voice.line(logging.WARNING, "so") == "kms-server: so\n"


@pytest.mark.parametrize("text", ["\x1b]0;PWNED\x1b\\\\", "a\x9bb", "a\u202eb", "a\rb", "\udcff"])
def test_what_a_module_logs_cannot_speak_to_a_terminal_and_a_traceback_keeps_its_lines(text: str) -> None:
    record = logging.LogRecord("kms.service.usage", logging.WARNING, "", 0, "used by %s\n  in two lines", (text,), None)
    line = HumanFormatter("kms-server").format(record)
    assert line.count("\n") == 1
    assert all(one.isprintable() for one in line.split("\n"))

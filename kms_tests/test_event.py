"""A log message of named values, as text."""

from __future__ import annotations

from kms.service.event import Event


def test_an_event_is_its_values_by_name_in_order() -> None:
    event = Event({"connection": 3, "principal": "billing", "group": "billing", "version": None, "requestId": "nightly 7"})
    assert str(event) == "connection=3 principal=billing group='billing' version=- requestId='nightly 7'"


def test_a_clients_words_cannot_pass_for_another_field_or_another_line() -> None:
    line = str(Event({"group": "x' outcome=ok\n\x1b[2J\ud800", "outcome": "AuthFailed"}))
    assert line == r"""group="x' outcome=ok\n\x1b[2J\ud800" outcome=AuthFailed"""
    assert str(Event({"group": "-"})) == "group='-'", "nor for a value that is not there"

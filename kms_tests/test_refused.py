"""What a server refused, in the words of who typed the command."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kms.cli.refused import naming
from kms.errors import InvalidRequestError, UnauthorizedError


def _connect(*names: str) -> Any:
    groups = [SimpleNamespace(key_id=name) for name in names]
    return lambda: cast(Any, nullcontext(SimpleNamespace(iter_key_groups=lambda: iter(groups))))


def _said(complaint: str, name: str | None = None, connect: Any = None, version: int | None = None) -> str:
    with pytest.raises(InvalidRequestError) as refusal, naming(name, connect, version):
        raise InvalidRequestError(complaint)
    return str(refusal.value)


_NO_GROUP = "keyId: no such key group"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("biling", "billing"), ("BILLING", "billing"), ("invoices-us", "invoices-eu"), ("pay roll", "payroll")],
)
def test_the_nearest_name_is_named(typed: str, meant: str) -> None:
    said = _said(_NO_GROUP, typed, _connect("default", "billing", "invoices-eu", "payroll"))
    assert said == f"there is no key group {typed}; did you mean {meant}?"


def test_where_nothing_is_near_it_is_told_where_the_names_are() -> None:
    said = "there is no key group xyz; kms-admin list-keys shows those there are"
    assert _said(_NO_GROUP, "xyz", _connect("default", "billing")) == said
    assert _said(_NO_GROUP, "xyz") == said


def test_who_may_not_see_the_list_is_told_of_none() -> None:
    def refuse() -> Any:
        raise UnauthorizedError("no")

    assert _said(_NO_GROUP, "biling", refuse).startswith("there is no key group biling; kms-admin list-keys")


def test_a_version_that_there_is_not_is_named_and_where_the_others_are() -> None:
    said = _said("version: no such version in this key group", "billing", version=9)
    assert said == "billing has no version 9; kms-admin describe-key billing shows those it has"


@pytest.mark.parametrize(
    ("complaint", "said"),
    [
        ("version: it is DESTROYED, which cannot be undone", "billing v2 is DESTROYED, which cannot be undone"),
        ("keyId: the key group exists already", "key group billing exists already"),
        ("requestId: has 1 to 64 printable characters", "--request-id: has 1 to 64 printable characters"),
        ("forSeconds: there are 100 already", "--for: there are 100 already"),
        ("plaintext: too large", "the input: too large"),
    ],
)
def test_no_field_of_a_request_is_told_to_who_typed_none(complaint: str, said: str) -> None:
    assert _said(complaint, "billing", version=2) == said
    with pytest.raises(InvalidRequestError) as refusal, naming(), naming("billing", None, 2):
        raise InvalidRequestError(complaint)
    assert str(refusal.value) == said


@pytest.mark.parametrize("complaint", ["type: unknown request type", "nested too deeply", "billing: no"])
def test_what_is_of_no_field_that_was_typed_stays_as_it_is(complaint: str) -> None:
    assert _said(complaint, "version") == complaint

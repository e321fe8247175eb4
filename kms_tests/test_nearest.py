"""The key group that somebody may have meant."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kms.cli.nearest import naming
from kms.errors import InvalidRequestError, UnauthorizedError


def _connect(*names: str) -> Any:
    groups = [SimpleNamespace(key_id=name) for name in names]
    return lambda: cast(Any, nullcontext(SimpleNamespace(iter_key_groups=lambda: iter(groups))))


def _said(name: str, connect: Any) -> str:
    with pytest.raises(InvalidRequestError) as refusal, naming(name, connect):
        raise InvalidRequestError("keyId: no such key group")
    return str(refusal.value)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("biling", "billing"), ("BILLING", "billing"), ("invoices-us", "invoices-eu"), ("pay roll", "payroll")],
)
def test_the_nearest_name_is_named(typed: str, meant: str) -> None:
    said = _said(typed, _connect("default", "billing", "invoices-eu", "payroll"))
    assert said == f"there is no key group {typed}; did you mean {meant}?"


def test_nothing_is_named_that_is_not_near() -> None:
    assert _said("xyz", _connect("default", "billing")) == "there is no key group xyz"


def test_who_may_not_see_the_list_is_told_of_none() -> None:
    def refuse() -> Any:
        raise UnauthorizedError("no")

    assert _said("biling", refuse) == "there is no key group biling"


def test_another_refusal_stays_as_it_is() -> None:
    with pytest.raises(InvalidRequestError, match=r"^version: no$"), naming("x"):
        raise InvalidRequestError("version: no")

"""The version that is installed."""

from __future__ import annotations

import importlib.metadata

import pytest

from kms.host import package


def test_it_is_that_of_the_package_or_a_remark(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def version(name: str) -> str:
        asked.append(name)
        return "9.8.7"

    def unknown(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert package.version() == "9.8.7"
    assert asked == ["mini-kms"]
    monkeypatch.setattr(importlib.metadata, "version", unknown)
    assert package.version() == "(run from its source)"

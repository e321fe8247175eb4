"""The exchanges shown in the README, held against a server."""

from __future__ import annotations

import json
from typing import Any

from kms_tests.integration.processes import ROOT, Machine, Server

ANY = "…"
CONTROL = {"CreateKeyGroup", "RotateKeyGroup", "ListKeyGroups", "DisableVersion", "EnableVersion", "DestroyVersion"}


def exchanges() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The requests of the README, each with the reply shown after it."""
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    request: dict[str, Any] | None = None
    for line in (ROOT / "README.rst").read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text.startswith("→ {"):
            assert request is None, f"no reply is shown for {request}"
            request = json.loads(text[1:])
        elif text.startswith("← {"):
            assert request is not None, f"no request is shown for {text}"
            pairs.append((request, json.loads(text[1:])))
            request = None
    assert request is None, f"no reply is shown for {request}"
    return pairs


def matches(shown: Any, real: Any) -> bool:
    """Whether `real` is what is `shown`, where `…` stands for any text and times differ."""
    if isinstance(shown, str) and ANY in shown:
        start, _, end = shown.partition(ANY)
        return isinstance(real, str) and real.startswith(start) and real.endswith(end)
    if isinstance(shown, dict):
        return (
            isinstance(real, dict)
            and shown.keys() == real.keys()
            and all(name == "createdAtEpochSec" or matches(shown[name], real[name]) for name in shown)
        )
    if isinstance(shown, list):
        return isinstance(real, list) and len(shown) == len(real) and all(map(matches, shown, real))
    return bool(shown == real)


def filled(request: dict[str, Any], machine: Machine, ciphertext: str | None) -> dict[str, Any]:
    """`request` with what the README leaves out."""
    real = dict(request)
    token = real.get("token")
    if token == ANY:
        real["token"] = machine.admin_token if real["type"] in CONTROL else machine.api_token
    elif token == "<the API token>":
        real["token"] = machine.api_token
    elif token == "<the admin token>":
        real["token"] = machine.admin_token
    if ANY in str(real.get("ciphertext", "")):
        assert ciphertext is not None, f"no reply before it has a ciphertext for {request}"
        real["ciphertext"] = ciphertext
    if real.get("plaintext") == ANY:
        real["plaintext"] = "aGVsbG8="
    return real


def test_the_exchanges_of_the_readme_happen_as_they_are_shown(machine: Machine, server: Server) -> None:
    shown = exchanges()
    assert shown, "the README shows no exchange"
    ciphertext: str | None = None
    with server.unix() as wire:
        for request, expected in shown:
            reply = wire.ask(**filled(request, machine, ciphertext))
            assert matches(expected, reply), f"{request} is shown with {expected}, but its reply is {reply}"
            ciphertext = reply.get("ciphertext") or reply.get("wrappedDataKey") or ciphertext

"""What the pages show, held against the real programs."""

from __future__ import annotations

import json
import re
import shlex
import urllib.request
from textwrap import dedent
from typing import Any

from kms.core.policy import Plane
from kms.wire.messages import AnyRequest
from kms_tests.integration.processes import DEADLINE, ROOT, Machine, Server

ANY = "…"
CONTROL = {kind.operation.value for kind in AnyRequest.__args__ if kind.plane is Plane.CONTROL}


def page(name: str) -> str:
    """The text of the page of this name."""
    return (ROOT / "docs" / f"{name}.rst").read_text(encoding="utf-8")


def exchanges() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The requests of the page about the protocol, each with the reply shown after it."""
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    request: dict[str, Any] | None = None
    for line in page("wire-protocol").splitlines():
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


_VARIES = re.compile(r"Sec$|^generation$|^memoryLocked$")


def matches(shown: Any, real: Any) -> bool:
    """Whether `real` is what is `shown`, where `…` stands for any text, and times and what a machine has differ."""
    if isinstance(shown, str) and ANY in shown:
        start, _, end = shown.partition(ANY)
        return isinstance(real, str) and real.startswith(start) and real.endswith(end)
    if isinstance(shown, dict):
        return (
            isinstance(real, dict)
            and shown.keys() == real.keys() - {"warnings"}
            and all(_VARIES.search(name) or matches(shown[name], real[name]) for name in shown)
        )
    if isinstance(shown, list):
        return isinstance(real, list) and len(shown) == len(real) and all(map(matches, shown, real))
    return bool(shown == real)


def filled(request: dict[str, Any], machine: Machine, ciphertext: str | None) -> dict[str, Any]:
    """`request` with what the page leaves out."""
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


def test_the_exchanges_of_the_protocol_happen_as_they_are_shown(machine: Machine, server: Server) -> None:
    shown = exchanges()
    assert shown, "the page shows no exchange"
    ciphertext: str | None = None
    with server.unix() as wire:
        for request, expected in shown:
            reply = wire.ask(**filled(request, machine, ciphertext))
            assert matches(expected, reply), f"{request} is shown with {expected}, but its reply is {reply}"
            ciphertext = reply.get("ciphertext") or reply.get("wrappedDataKey") or ciphertext


def blocks(name: str, opening: str) -> list[str]:
    """The indented blocks that follow a line `opening` on the page of this name, without their indent."""
    found = re.findall(rf"^{re.escape(opening)}\n\n((?:(?: {{4}}.*)?\n)+)", page(name), re.MULTILINE)
    return [dedent(block) for block in found]


def test_the_file_of_principals_is_explained_as_it_is_shown(machine: Machine) -> None:
    shown, limits = blocks("team", ".. code:: toml")
    path = machine.data / "principals.toml"
    path.write_text(f"{shown}\n{limits}", encoding="utf-8")
    path.chmod(0o600)
    lines = [line for block in blocks("team", "::") for line in block.splitlines()]
    questions = [number for number, line in enumerate(lines) if line.startswith("$ kms-admin explain")]
    assert len(questions) == 2
    for number in questions:
        told = machine.admin(*shlex.split(lines[number])[2:])
        assert told.stdout.decode() == lines[number + 1] + "\n"
        assert told.status == (0 if lines[number + 1].startswith("allowed") else 1)
    assert machine.start().stop() == 0


def test_the_metrics_are_those_that_are_shown(machine: Machine) -> None:
    (shown,) = blocks("metrics", "::")
    command, _, expected = shown.partition("curl ")[2].partition("\n")
    pattern = shlex.split(command)[-1]
    server = machine.start("--metrics-port", "0")
    with server.unix() as wire:
        for _ in range(3):
            wire.ask(type="Encrypt", token=machine.api_token, plaintext="aGk=")
        wire.ask(type="Encrypt", token="wrong", plaintext="aGk=")
        wire.ask(type="RotateKeyGroup", token=machine.admin_token, keyId="default")
    found = re.search(r"metrics on (\S+)", server.stderr)
    assert found is not None
    with urllib.request.urlopen(found[1], timeout=DEADLINE) as answer:
        lines = answer.read().decode().splitlines()
    assert "".join(f"{line}\n" for line in lines if re.search(pattern, line)) == expected.rstrip() + "\n"


def test_what_is_shown_of_new_token_is_what_it_says(machine: Machine) -> None:
    lines = [line for block in blocks("team", "::") for line in block.splitlines()]
    number = lines.index("$ kms-admin new-token billing --out billing.token")
    made = machine.admin("new-token", "billing", "--out", "billing.token")
    digest = re.compile(r"[0-9a-f]{64}")
    assert made.status == 0
    assert (machine.root / "billing.token").stat().st_mode & 0o777 == 0o600
    assert digest.sub("", made.stdout.decode()) == digest.sub("", lines[number + 1]) + "\n"

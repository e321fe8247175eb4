"""What a server says of a change that may have been made, and only of such a one."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio

from kms.core.keyring import EMPTY
from kms.errors import SaveOutcomeUnknownError, UnavailableError
from kms.service.actor import KeyringActor
from kms.wire.messages import AnyRequest, ControlRequest
from kms_tests.in_memory import ADMIN, API, PEER, Server, answered
from kms_tests.test_actor import Store
from kms_tests.test_team import service_of

CHANGES = [
    ("CreateKeyGroup", {"keyId": "a"}),
    ("RotateKeyGroup", {"keyId": "default"}),
    ("DisableVersion", {"keyId": "default", "version": 1}),
    ("EnableVersion", {"keyId": "default", "version": 1}),
    ("DestroyVersion", {"keyId": "default", "version": 1}),
]


class Trail:
    """An audit log that takes what begins, and not what comes of it."""

    def check(self) -> None:
        pass

    def begin(self, *_: object) -> None:
        pass

    def finish(self, _: object) -> None:
        raise UnavailableError("the audit log cannot be written: no space left")

    def write(self, turns: object) -> None:
        pass


def recorded(server: Server) -> Server:
    server.pipeline.admit(server.pipeline.authenticator, server.pipeline.policy, Trail())  # type: ignore[arg-type]
    return server


def test_every_change_of_keys_is_one() -> None:
    changing = {kind.__struct_config__.tag for kind in AnyRequest.__args__ if kind.changes}
    assert changing == {name for name, _ in CHANGES}
    assert all(issubclass(kind, ControlRequest) for kind in AnyRequest.__args__ if kind.changes)


@pytest.mark.parametrize(("kind", "fields"), CHANGES[:2])
def test_a_change_that_is_made_and_not_on_record_says_so(kind: str, fields: dict[str, Any]) -> None:
    server = recorded(Server())
    assert server.admin(kind, **fields) == {
        "status": "error",
        "errorCode": "Unavailable",
        "message": "the change is made, but not on record yet: the audit log cannot be written: no space left",
        "outcome": "unknown",
    }
    assert server.manager.current.groups.keys() - {"default"} == ({"a"} if kind == "CreateKeyGroup" else set())


def test_one_that_was_refused_was_not_made() -> None:
    server = recorded(Server())
    reply = server.admin("CreateKeyGroup", keyId="default")
    assert "outcome" not in reply
    assert "made" not in reply["message"]


@pytest.mark.parametrize(("kind", "fields"), CHANGES)
def test_a_bug_in_a_change_leaves_its_outcome_unknown(kind: str, fields: dict[str, Any]) -> None:
    server = Server()
    server.manager.fault = LookupError("a bug")
    reply = server.admin(kind, **fields)
    assert (reply["errorCode"], reply["outcome"]) == ("InternalError", "unknown")


def test_a_bug_elsewhere_changes_nothing() -> None:
    server = Server()
    server.manager.fault = LookupError("a bug")
    assert "outcome" not in server.admin("ListKeyGroups")
    assert "outcome" not in server.ask("Encrypt", API, plaintext="", keyId="none")


async def test_a_save_of_unknown_outcome_says_so() -> None:
    class Unsure(Store):
        def commit(self, expected_generation: int, changed: object) -> None:
            raise SaveOutcomeUnknownError("the disk failed")

    actor = KeyringActor(EMPTY, Unsure(), clock=lambda: 1)
    server = Server()
    replies: list[dict[str, Any]] = []

    async def ask() -> None:
        pipeline = service_of(actor, server.service.access).pipeline
        line = json.dumps({"type": "CreateKeyGroup", "token": ADMIN, "keyId": "a"}).encode()
        replies.append(json.loads(await answered(pipeline.session(PEER).serve(line))))

    with pytest.RaisesGroup(SaveOutcomeUnknownError):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(actor.run)
            nursery.start_soon(ask)
    assert [(reply["errorCode"], reply["outcome"]) for reply in replies] == [("InternalError", "unknown")]

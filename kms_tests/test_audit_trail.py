"""What is put on record of each request, and what becomes of a request that cannot be."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Sequence
from typing import Any

import pytest

from kms.core.audit import Record
from kms.core.keyring import Command, KeyGroup
from kms.core.policy import AllowAll, KeyAuthorizationPolicy
from kms.errors import InternalError, UnavailableError
from kms.host.peer import Credentials
from kms.service.audit_settings import DataAudit
from kms.service.audit_trail import AuditTrail
from kms.service.pipeline import Rejection
from kms.service.served import Peer, Turn
from kms_tests.in_memory import ADMIN, API, PEER, Only, Server, finish, text
from kms_tests.keks import forged

TROUBLE = "the audit log cannot be written: no space left"


class Log:
    """A log in memory, which fails when it is told to."""

    def __init__(self) -> None:
        self.records: list[Any] = []
        self.kept: list[Any] = []
        self.writes = 0
        self.is_failing = False
        self.is_scarce = False
        self.fails_next = False

    def write(self, records: Sequence[Record], *, keep: bool = False) -> None:
        if self.is_failing or self.fails_next:
            self.is_failing, self.fails_next = True, False
            self.kept += records if keep else ()
            raise UnavailableError(TROUBLE)
        self.writes += bool(records)
        self.records += records

    def sync(self) -> None:
        raise NotImplementedError


class Audited(Server):
    """A pipeline on one connection, whose every request goes on record before its reply goes out."""

    def __init__(
        self, data: DataAudit = DataAudit.ALL, policy: KeyAuthorizationPolicy | None = None, peer: Peer = PEER
    ) -> None:
        super().__init__(policy)
        self.log = Log()
        pipeline = self.pipeline
        pipeline.admit(pipeline.authenticator, pipeline.policy, AuditTrail(self.log, data))
        self.session = pipeline.session(peer)

    def line(self, line: bytes, peer: Peer = PEER) -> dict[str, Any]:
        return self.turn(line)[0]

    def turn(self, *lines: bytes) -> list[dict[str, Any]]:
        """What is sent for requests that come together."""
        replies = b""
        for line in lines:
            answer = self.session.serve(line)
            replies += finish(answer) + b"\n"
        instead = self.session.commit()
        return [json.loads(reply) for reply in (replies if instead is None else instead).splitlines()]

    def on_record(self) -> list[tuple[Any, ...]]:
        return [
            (r.request, r.principal, r.operation, r.group, r.version, r.outcome, r.error_code) for r in self.log.records
        ]


def request(kind: str, token: str = API, **fields: Any) -> bytes:
    return json.dumps({"type": kind, "token": token, **fields}).encode()


@pytest.fixture
def server() -> Audited:
    return Audited()


def test_every_operation_of_the_data_plane_is_on_record_with_the_version_it_used(server: Audited) -> None:
    sealed = server.ask("Encrypt", plaintext=text(b"x"))["ciphertext"]
    server.ask("GenerateDataKey", keyId="default")
    server.admin("RotateKeyGroup", keyId="default")
    server.ask("Decrypt", ciphertext=sealed)
    server.ask("ReEncrypt", ciphertext=sealed)
    server.ask("Health")
    assert server.on_record() == [
        (1, "api", "Encrypt", "default", 1, "ok", None),
        (2, "api", "GenerateDataKey", "default", 1, "ok", None),
        (3, "admin", "RotateKeyGroup", "default", None, "begun", None),
        (3, "admin", "RotateKeyGroup", "default", 2, "ok", None),
        (4, "api", "Decrypt", "default", 1, "ok", None),
        (5, "api", "ReEncrypt", "default", 2, "ok", None),
        (6, "api", "Health", None, None, "ok", None),
    ]
    moved = server.log.records[5]
    assert (moved.from_group, moved.from_version) == ("default", 1)


def test_a_data_key_under_several_groups_is_on_record_once_for_each(server: Audited) -> None:
    server.admin("CreateKeyGroup", keyId="archive")
    server.log.records.clear()
    for kind in ("GenerateDataKey", "GenerateDataKeyWithoutPlaintext"):
        server.ask(kind, alsoKeyIds=["archive"])
        server.ask(kind, alsoKeyIds=["archive", "absent"])
    server.ask("GenerateRandom", bytes=8)
    assert [record[1:] for record in server.on_record()] == [
        *(
            ("api", kind, group, version, *outcome)
            for kind in ("GenerateDataKey", "GenerateDataKeyWithoutPlaintext")
            for group, version, outcome in (
                ("default", 1, ("ok", None)),
                ("archive", 1, ("ok", None)),
                ("default", None, ("refused", "InvalidRequest")),
                ("archive", None, ("refused", "InvalidRequest")),
                ("absent", None, ("refused", "InvalidRequest")),
            )
        ),
        ("api", "GenerateRandom", None, None, "ok", None),
    ]


def test_every_refusal_is_on_record(server: Audited) -> None:
    forged = b64decode(server.ask("Encrypt", plaintext="")["ciphertext"])
    server.log.records.clear()
    server.ask("Encrypt", "wrong", plaintext="")
    server.ask("Encrypt", plaintext="", keyId="nobody")
    server.ask("Encrypt")
    server.ask("Decrypt", ciphertext=text(forged[:-1] + bytes([forged[-1] ^ 1])))
    server.ask("Decrypt", ciphertext="AAAA")
    server.line(b"nonsense")
    server.admin("RotateKeyGroup", keyId="nobody")
    server.ask("ListKeyGroups", "wrong")
    server.session.frame_too_large(10)
    server.session.commit()
    assert [record[1:] for record in server.on_record()] == [
        (None, "Encrypt", None, None, "refused", "AuthFailed"),
        ("api", "Encrypt", "nobody", None, "refused", "InvalidRequest"),
        ("api", "Encrypt", None, None, "refused", "InvalidRequest"),
        ("api", "Decrypt", "default", 1, "refused", "DecryptionFailed"),
        ("api", "Decrypt", None, None, "refused", "DecryptionFailed"),
        (None, "-", None, None, "refused", "InvalidRequest"),
        ("admin", "RotateKeyGroup", "nobody", None, "begun", None),
        ("admin", "RotateKeyGroup", "nobody", None, "refused", "InvalidRequest"),
        (None, "ListKeyGroups", None, None, "refused", "AuthFailed"),
        (None, "-", None, None, "refused", "FrameTooLarge"),
    ]


def test_a_refusal_of_the_policy_names_who_asked() -> None:
    server = Audited(policy=Only())
    server.ask("Encrypt", plaintext="", keyId="billing")
    server.admin("RotateKeyGroup", keyId="billing")
    assert [record[1:] for record in server.on_record()] == [
        ("api", "Encrypt", "billing", None, "refused", "Unauthorized"),
        ("admin", "RotateKeyGroup", "billing", None, "refused", "Unauthorized"),
    ]


def test_every_operation_of_the_control_plane_is_on_record(server: Audited) -> None:
    server.admin("CreateKeyGroup", keyId="billing")
    server.admin("RotateKeyGroup", keyId="billing")
    server.admin("ListKeyGroups")
    for kind in ("DisableVersion", "EnableVersion", "DestroyVersion"):
        server.admin(kind, keyId="billing", version=1)
    assert [(r.operation, r.version, r.outcome) for r in server.log.records] == [
        ("CreateKeyGroup", None, "begun"),
        ("CreateKeyGroup", 1, "ok"),
        ("RotateKeyGroup", None, "begun"),
        ("RotateKeyGroup", 2, "ok"),
        ("ListKeyGroups", None, "ok"),
        ("DisableVersion", 1, "begun"),
        ("DisableVersion", 1, "ok"),
        ("EnableVersion", 1, "begun"),
        ("EnableVersion", 1, "ok"),
        ("DestroyVersion", 1, "begun"),
        ("DestroyVersion", 1, "ok"),
    ]


@pytest.mark.parametrize(
    ("data", "recorded"),
    [
        (DataAudit.ALL, ["Encrypt", "Encrypt", "ListKeyGroups", "ListKeyGroups", "-"]),
        (DataAudit.REFUSED, ["Encrypt", "ListKeyGroups", "ListKeyGroups", "-"]),
        (DataAudit.NONE, ["ListKeyGroups", "ListKeyGroups", "-"]),
    ],
)
def test_what_is_recorded_of_the_data_plane_can_be_chosen(data: DataAudit, recorded: list[str]) -> None:
    server = Audited(data)
    server.ask("Encrypt", plaintext="")
    server.ask("Encrypt", plaintext="", keyId="nobody")
    server.admin("ListKeyGroups")
    server.ask("ListKeyGroups", "wrong")
    server.line(b"nonsense")
    assert [record.operation for record in server.log.records] == recorded


def test_a_record_says_who_was_at_the_other_end() -> None:
    unix = Audited(peer=Peer(7, "unix", Credentials(101, 1001, 100)))
    unix.ask("Encrypt", plaintext="", requestId="invoice 7")
    tcp = Audited(peer=Peer(8, "tcp", port=50123))
    tcp.ask("Encrypt", plaintext="")
    (one,), (other,) = unix.log.records, tcp.log.records
    assert (one.connection, one.pid, one.uid, one.port, one.request_id) == (7, 101, 1001, None, "invoice 7")
    assert (other.connection, other.pid, other.uid, other.port, other.request_id) == (8, None, None, 50123, None)


def test_no_record_holds_a_secret_or_more_than_a_name(server: Audited) -> None:
    secret = {"plaintext": text(b"plaintext-canary"), "aad": text(b"aad-canary")}
    sealed = server.ask("Encrypt", **secret)["ciphertext"]
    server.ask("Decrypt", ciphertext=sealed, aad=secret["aad"])
    server.ask("Encrypt", "token-canary", keyId="x" * 100_000, **secret)
    server.line(b'{"type":"Encrypt","canary":')
    held = repr([{name: getattr(r, name) for name in r.__struct_fields__} for r in server.log.records])
    for canary in (API, ADMIN, "canary", *secret.values(), sealed):
        assert canary not in held
    assert len(held) < 4000


@pytest.mark.parametrize("name", ["a\x9bb", "a\u202eb", "a\x1b]0;b", "a\nb"])
def test_no_name_on_record_can_speak_to_a_terminal_wherever_it_came_from(server: Audited, name: str) -> None:
    blob = text(forged(name, 1))
    for kind, token, fields in (
        ("Encrypt", API, {"plaintext": "", "keyId": name}),
        ("GenerateDataKey", API, {"keyId": name}),
        ("Decrypt", API, {"ciphertext": blob}),
        ("ReEncrypt", API, {"ciphertext": blob, "keyId": name}),
        ("DescribeKeyGroup", ADMIN, {"keyId": name}),
        ("DisableVersion", ADMIN, {"keyId": name, "version": 1}),
    ):
        server.ask(kind, token, **fields)
    groups = [one for record in server.log.records for one in (record.group, record.from_group) if one is not None]
    assert len(groups) == 8, "a change has two records, and a move two names"
    assert all(group.isprintable() for group in groups)


def test_the_replies_of_a_turn_are_put_on_record_by_one_write(server: Audited) -> None:
    replies = server.turn(*[request("Encrypt", plaintext="")] * 10)
    assert [reply["status"] for reply in replies] == ["ok"] * 10
    assert server.log.writes == 1
    assert server.session.commit() is None
    assert server.log.writes == 1, "and once only"


def test_nothing_that_is_not_on_record_is_answered(server: Audited) -> None:
    server.log.fails_next = True
    replies = server.turn(
        request("Encrypt", plaintext="", requestId="a"), request("Health"), request("Decrypt", ciphertext="AAAA"), b"x"
    )
    unavailable = {"status": "error", "errorCode": "Unavailable", "message": TROUBLE}
    assert replies == [
        {**unavailable, "requestId": "a"},
        {"status": "ok", "detail": "ok"},
        unavailable,
        unavailable,
    ]
    assert server.log.records == []


def test_while_the_log_fails_nothing_is_answered_that_would_need_no_record_either() -> None:
    server = Audited(DataAudit.NONE)
    server.log.is_failing = True
    assert server.ask("Encrypt", plaintext="")["errorCode"] == "Unavailable"
    assert server.ask("Health")["status"] == "ok"


def test_while_the_log_fails_nothing_is_done(server: Audited) -> None:
    server.log.is_failing = True
    before = server.manager.current
    for kind, token, fields in (
        ("Encrypt", API, {"plaintext": ""}),
        ("Encrypt", "wrong", {"plaintext": ""}),
        ("RotateKeyGroup", ADMIN, {"keyId": "default"}),
        ("ListKeyGroups", ADMIN, {}),
    ):
        assert server.ask(kind, token, **fields)["errorCode"] == "Unavailable", kind
    assert server.manager.current is before
    assert server.ask("Health") == {"status": "ok", "detail": "ok"}
    assert server.ask("Health", "wrong")["errorCode"] == "AuthFailed", "Health is for who has the token, as ever"
    assert server.admin("Status")["status"] == "ok", "it is how an administrator finds out"
    assert server.ask("Status", "wrong")["errorCode"] == "AuthFailed"


def test_once_the_log_can_be_written_all_goes_on(server: Audited) -> None:
    server.log.is_failing = True
    server.ask("Encrypt", plaintext="")
    server.log.is_failing = False
    assert server.ask("Encrypt", plaintext="")["status"] == "ok"
    assert server.admin("RotateKeyGroup", keyId="default")["status"] == "ok"


def test_a_change_that_cannot_be_put_on_record_as_begun_is_not_made(server: Audited) -> None:
    before = server.manager.current
    server.log.fails_next = True
    assert server.admin("RotateKeyGroup", keyId="default")["errorCode"] == "Unavailable"
    assert server.manager.current is before
    assert server.log.kept == []


def test_the_outcome_of_a_change_that_was_made_is_kept_until_it_can_be_put_on_record(server: Audited) -> None:
    apply = server.manager._apply

    def applied(command: Command) -> KeyGroup:
        server.log.fails_next = True
        return apply(command)

    server.manager._apply = applied  # type: ignore[method-assign]
    reply = server.admin("RotateKeyGroup", keyId="default", requestId="r")
    assert (reply["errorCode"], reply["requestId"]) == ("Unavailable", "r")
    assert server.manager.current.groups["default"].active.version == 2
    assert [(r.operation, r.version, r.outcome) for r in server.log.kept] == [("RotateKeyGroup", 2, "ok")]


def test_a_reply_to_a_change_goes_out_whatever_becomes_of_its_neighbours(server: Audited) -> None:
    write = server.log.write

    def failing_on_the_turn(records: Sequence[Record], *, keep: bool = False) -> None:
        if len(records) > 1 or (records and records[0].operation == "Encrypt"):
            raise UnavailableError(TROUBLE)
        write(records, keep=keep)

    server.log.write = failing_on_the_turn  # type: ignore[method-assign]
    rotate = request("RotateKeyGroup", ADMIN, keyId="default")
    replies = server.turn(request("Encrypt", plaintext=""), rotate, request("Encrypt", plaintext=""))
    assert [reply.get("errorCode", "ok") for reply in replies] == ["Unavailable", "ok", "Unavailable"]


def test_the_turns_of_many_connections_are_one_write_and_each_fails_with_its_own_replies(server: Audited) -> None:
    sessions = [server.pipeline.session(Peer(number, "unix")) for number in (1, 2)]

    def serve() -> list[Turn]:
        for number, session in enumerate(sessions):
            session.serve(request("Encrypt", plaintext="", requestId=f"r{number}"))
        return [session.take() for session in sessions]

    assert server.pipeline.commit(serve()) == [None, None]
    assert server.log.writes == 1
    assert [(record.connection, record.request_id) for record in server.log.records] == [(1, "r0"), (2, "r1")]
    turns = serve()
    server.log.is_failing = True
    replies = [json.loads(line or b"") for line in server.pipeline.commit(turns)]
    assert [(reply["errorCode"], reply["requestId"]) for reply in replies] == [("Unavailable", "r0"), ("Unavailable", "r1")]
    assert [session.turn for session in sessions] == [[], []]


def test_a_change_that_fails_is_on_record_with_its_failure(server: Audited) -> None:
    server.manager.fault = InternalError("the keystore could not be saved; nothing was changed")
    server.admin("RotateKeyGroup", keyId="default")
    assert [(r.outcome, r.error_code) for r in server.log.records] == [("begun", None), ("refused", "InternalError")]


def test_that_the_log_cannot_be_written_is_not_logged_for_each_request(
    server: Audited, caplog: pytest.LogCaptureFixture
) -> None:
    server.log.is_failing = True
    with caplog.at_level("INFO"):
        server.ask("Encrypt", plaintext="")
    assert caplog.text == ""


def test_without_a_trail_nothing_is_kept_of_a_turn() -> None:
    server = Server(AllowAll())
    session = server.pipeline.session(PEER)
    for _ in range(3):
        session.serve(request("Encrypt", plaintext=""))
    assert session.commit() is None
    assert session.turn == []


def test_refusals_of_a_kind_have_one_record_and_then_a_number(server: Audited) -> None:
    for _ in range(5):
        server.ask("Encrypt", "wrong", plaintext="", keyId="billing", requestId="mine")
    (first,) = server.log.records
    assert (first.operation, first.error_code, first.group, first.request_id) == ("Encrypt", "AuthFailed", None, None)
    assert server.pipeline.trail is not None
    server.pipeline.trail.write_repeats()
    counted = server.log.records[-1]
    assert (counted.event, counted.count, counted.operation) == ("Refusals", 4, "Encrypt")
    assert (counted.error_code, counted.transport) == ("AuthFailed", PEER.transport)
    server.pipeline.trail.write_repeats()
    assert len(server.log.records) == 2


def test_where_space_is_short_strangers_are_only_counted(server: Audited) -> None:
    server.log.is_scarce = True
    server.ask("Encrypt", "wrong", plaintext="")
    server.ask("Encrypt", plaintext="")
    assert [record.outcome for record in server.log.records] == ["ok"]
    trail = server.pipeline.trail
    assert trail is not None
    trail.write_repeats()
    assert len(server.log.records) == 1
    trail.write_repeats(is_last=True)
    assert server.log.records[-1].count == 1


def test_while_the_log_fails_a_wrong_token_is_one_all_the_same(server: Audited) -> None:
    server.log.is_failing = True
    line = json.dumps({"type": "Encrypt", "token": "wrong", "plaintext": ""}).encode()
    assert type(server.session.serve(line)) is Rejection


def test_which_file_of_principals_decides_is_on_record_even_when_that_has_to_wait(server: Audited) -> None:
    trail = server.pipeline.trail
    assert trail is not None
    trail.write_principals("ab" * 32)
    assert (server.log.records[-1].event, server.log.records[-1].principals_sha256) == ("Principals", "ab" * 32)
    server.log.is_failing = True
    trail.write_principals("")
    assert server.log.kept[-1].principals_sha256 == ""

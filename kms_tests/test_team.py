"""Who is let in when there are principals, and what a change of their file does to whom is connected."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from kms.core.keyring import EMPTY
from kms.core.policy import Plane, Principal
from kms.errors import AuthFailedError, ConfigError, InputMissingError, InvalidRequestError
from kms.host.peer import Credentials
from kms.server.config import resolve
from kms.server.reload import Reload
from kms.service.actor import KeyringActor
from kms.service.audit_settings import DataAudit
from kms.service.audit_trail import AuditTrail
from kms.service.served import Peer
from kms.service.service import ServedKeyring, Service
from kms.service.team import Access, AccessSource, TeamAuthenticator
from kms.wire.messages import ServerView
from kms_tests.in_memory import ADMIN, API, SHARED, Server, answered, no_audit, text, usage_of
from kms_tests.test_actor import Store
from kms_tests.test_audit_trail import Log

TCP = Peer(1, "tcp")
EXPIRY = 1798761600.0
"""2027-01-01T00:00:00Z."""


def digest(token: str) -> str:
    return sha256(token.encode()).hexdigest()


FILE = f"""
[principals.billing]
token_sha256 = ["{digest("old token")}", {{ digest = "{digest("new token")}", expires = 2027-01-01T00:00:00Z }}]
[[principals.billing.allow]]
groups = ["default"]
operations = ["Encrypt", "Decrypt", "RotateKeyGroup"]

[principals.backup]
uids = [1001]
[[principals.backup.allow]]
groups = ["default", "archive"]
operations = ["Encrypt", "ListKeyGroups"]
[[principals.backup.deny]]
groups = ["archive"]
operations = ["Encrypt"]

[principals.auditors]
gids = [2000]
[[principals.auditors.allow]]
groups = ["*"]
operations = ["ListKeyGroups", "Decrypt", "ReEncrypt"]
[[principals.auditors.deny]]
groups = ["archive"]
operations = ["ListKeyGroups", "Decrypt"]
"""


class Clock:
    """Wall time that stands still until it is set."""

    def __init__(self) -> None:
        self.now = EXPIRY - 1

    def __call__(self) -> float:
        return self.now


def service_of(keyring: ServedKeyring, access: Access) -> Service:
    return Service(keyring, no_audit(), usage_of(keyring.current), access)


class Team(Server):
    """A server for which a file of principals decides."""

    def __init__(self, directory: Path, content: str | None = FILE) -> None:
        self.path = directory / "principals.toml"
        self.clock = Clock()
        if content is not None:
            self.write(content)
        self.source = AccessSource(self.path, SHARED, self.clock, is_needed=False)
        super().__init__(access=self.access())
        self.reload = Reload(self.service, self.source)

    def access(self) -> Access:
        return self.source.load()

    def write(self, content: str) -> None:
        self.path.write_text(content)
        self.path.chmod(0o600)

    def authenticated(self, token: str, peer: Peer = TCP, plane: Plane = Plane.DATA) -> Principal | None:
        try:
            return self.access().authenticator.authenticate(plane, token, peer)
        except AuthFailedError:
            return None

    def call(self, kind: str, token: str, peer: Peer = TCP, **fields: Any) -> dict[str, Any]:
        return self.line(json.dumps({"type": kind, "token": token, **fields}).encode(), peer)

    def outcome(self, kind: str, token: str, peer: Peer = TCP, **fields: Any) -> str:
        return str(self.call(kind, token, peer, **fields).get("errorCode", "ok"))


def unix(uid: int, gid: int = 3000) -> Peer:
    return Peer(1, "unix", Credentials(77, uid, gid))


@pytest.fixture
def team(data: Path) -> Team:
    directory = data / "mini-kms"
    directory.mkdir(mode=0o700)
    return Team(directory)


def test_a_token_is_its_principals_on_both_planes(team: Team) -> None:
    for plane in Plane:
        assert team.authenticated("old token", plane=plane) == Principal("billing")
        assert team.authenticated("new token", plane=plane) == Principal("billing")
        assert team.authenticated("no token", plane=plane) is None


def test_a_token_is_taken_until_the_instant_it_expires(team: Team) -> None:
    assert team.authenticated("new token") == Principal("billing")
    team.clock.now = EXPIRY
    assert team.authenticated("new token") is None
    assert team.authenticated("old token") == Principal("billing"), "the other lives on"


def test_the_shared_tokens_stay_each_on_its_plane(team: Team) -> None:
    assert team.authenticated(API) == Principal("api")
    assert team.authenticated(ADMIN, plane=Plane.CONTROL) == Principal("admin")
    assert team.authenticated(ADMIN) is None
    assert team.authenticated(API, plane=Plane.CONTROL) is None


def test_each_shared_token_can_be_turned_off(team: Team) -> None:
    team.write("[shared]\napi_token = false\n" + FILE)
    assert team.authenticated(API) is None
    assert team.authenticated(ADMIN, plane=Plane.CONTROL) == Principal("admin")
    team.write("[shared]\nadmin_token = false\n" + FILE)
    assert team.authenticated(API) == Principal("api")
    assert team.authenticated(ADMIN, plane=Plane.CONTROL) is None


@pytest.mark.parametrize(("token", "switch"), [(API, "api_token"), (ADMIN, "admin_token")])
def test_the_digest_of_a_shared_token_is_a_principals_only_when_that_token_is_off(
    team: Team, token: str, switch: str
) -> None:
    claimed = f'[principals.heir]\ntoken_sha256 = ["{digest(token)}"]'
    team.write(claimed)
    with pytest.raises(
        ConfigError, match=r"principals\.heir\.token_sha256\[0\]: the digest of a shared token, which is on"
    ):
        team.access()
    team.write(f"[shared]\n{switch} = false\n{claimed}")
    for plane in Plane:
        assert team.authenticated(token, plane=plane) == Principal("heir")


def test_a_process_without_a_token_is_known_by_its_uid_and_else_by_its_group(team: Team) -> None:
    assert team.authenticated("", unix(1001)) == Principal("backup")
    assert team.authenticated("", unix(1002, 2000)) == Principal("auditors")
    assert team.authenticated("", unix(1001, 2000)) == Principal("backup"), "the uid says more than the group"
    assert team.authenticated("", unix(1002)) is None
    assert team.authenticated("", TCP) is None, "over TCP the kernel does not tell"


def test_a_wrong_token_is_refused_even_from_a_listed_uid(team: Team) -> None:
    for token in ("no token", " ", "\ud800"):
        assert team.authenticated(token, unix(1001, 2000)) is None
    assert team.authenticated("old token", unix(1001)) == Principal("billing"), "a right one says who it is"
    team.clock.now = EXPIRY
    assert team.authenticated("new token", unix(1001)) is None


def test_the_refusals_are_the_ones_of_the_planes(team: Team) -> None:
    refused = {"status": "error", "errorCode": "AuthFailed"}
    for token, peer in (("", TCP), ("wrong", unix(1001)), ("", unix(1))):
        assert team.call("Health", token, peer) == {**refused, "message": "invalid API token"}
        assert team.call("ListKeyGroups", token, peer) == {**refused, "message": "invalid admin token"}


def test_authentication_still_comes_before_validation(team: Team) -> None:
    assert team.outcome("Encrypt", "wrong") == "AuthFailed"
    assert team.outcome("Encrypt", "old token") == "InvalidRequest"
    assert team.outcome("Encrypt", "", unix(1001)) == "InvalidRequest"
    assert team.outcome("Encrypt", "", unix(1)) == "AuthFailed"


def test_a_principal_does_what_it_was_granted_and_nothing_else(team: Team) -> None:
    sealed = team.call("Encrypt", "old token", plaintext=text(b"x"))["ciphertext"]
    assert team.call("Decrypt", "old token", ciphertext=sealed)["plaintext"] == text(b"x")
    assert team.outcome("RotateKeyGroup", "old token", keyId="default") == "ok"
    for kind, fields in (
        ("GenerateDataKey", {}),
        ("ReEncrypt", {"ciphertext": sealed}),
        ("Encrypt", {"plaintext": "", "keyId": "archive"}),
        ("Encrypt", {"plaintext": "", "keyId": "no such group"}),
        ("RotateKeyGroup", {"keyId": "archive"}),
        ("CreateKeyGroup", {"keyId": "mine"}),
        ("ListKeyGroups", {}),
        ("DestroyVersion", {"keyId": "default", "version": 1}),
    ):
        reply = team.call(kind, "old token", **fields)
        assert (reply["errorCode"], reply["message"]) == (
            "Unauthorized",
            "the policy does not allow this operation on this key group",
        ), kind


def test_Health_asks_only_for_a_principal(team: Team) -> None:
    for kind in ("Health", "Ping"):
        assert team.outcome(kind, "old token") == team.outcome(kind, "", unix(1001)) == "ok"


def test_ReEncrypt_needs_Decrypt_on_the_source_and_ReEncrypt_on_the_destination(team: Team) -> None:
    team.call("CreateKeyGroup", ADMIN, keyId="archive")
    here = team.call("Encrypt", API, plaintext="")["ciphertext"]
    there = team.call("Encrypt", API, plaintext="", keyId="archive")["ciphertext"]
    auditor = unix(1, 2000)
    assert team.outcome("ReEncrypt", "", auditor, ciphertext=here, keyId="archive") == "ok"
    assert team.outcome("ReEncrypt", "", auditor, ciphertext=there, keyId="default") == "Unauthorized"
    assert team.outcome("ReEncrypt", "old token", ciphertext=here, keyId="default") == "Unauthorized"


def test_the_AAD_that_a_rule_asks_for_is_the_requests(team: Team) -> None:
    team.write(f"""
        [principals.billing]
        token_sha256 = ["{digest("t")}"]
        [[principals.billing.allow]]
        groups = ["default"]
        operations = ["Encrypt", "Decrypt", "ReEncrypt", "GenerateDataKey"]
        aad_prefix = "{text(b"invoice/")}"
    """)
    trio.run(team.reload)
    sealed = team.call("Encrypt", API, plaintext="", aad=text(b"invoice/7"))["ciphertext"]
    foreign = team.call("Encrypt", API, plaintext="", aad=text(b"payroll/7"))["ciphertext"]
    for kind, fields in (
        ("Encrypt", {"plaintext": ""}),
        ("GenerateDataKey", {}),
        ("Decrypt", {"ciphertext": sealed}),
        ("ReEncrypt", {"ciphertext": sealed}),
    ):
        assert team.outcome(kind, "t", aad=text(b"invoice/7"), **fields) == "ok", kind
        assert team.outcome(kind, "t", aad=text(b"invoice"), **fields) == "Unauthorized", kind
        assert team.outcome(kind, "t", **fields) == "Unauthorized", kind
    assert team.outcome("Decrypt", "t", ciphertext=foreign, aad=text(b"payroll/7")) == "Unauthorized"
    assert team.outcome("Decrypt", "t", ciphertext=foreign, aad=text(b"invoice/7")) == "DecryptionFailed"


@pytest.mark.parametrize(("half", "whole"), [("Decrypt", "ReEncrypt"), ("ReEncrypt", "Decrypt")])
async def test_both_halves_of_a_ReEncrypt_ask_for_their_AAD(team: Team, half: str, whole: str) -> None:
    team.write(f"""
        [principals.billing]
        token_sha256 = ["{digest("t")}"]
        [[principals.billing.allow]]
        groups = ["default"]
        operations = ["{half}"]
        aad_prefix = "{text(b"invoice/")}"
        [[principals.billing.allow]]
        groups = ["default"]
        operations = ["{whole}"]
    """)
    await team.reload.on_hangup()
    for aad, outcome in ((b"invoice/7", "ok"), (b"payroll/7", "Unauthorized"), (b"", "Unauthorized")):
        sealed = team.call("Encrypt", API, plaintext="", aad=text(aad))["ciphertext"]
        assert team.outcome("ReEncrypt", "t", ciphertext=sealed, aad=text(aad)) == outcome


def test_a_list_shows_the_groups_on_which_it_is_allowed(team: Team) -> None:
    for name in ("archive", "payroll"):
        team.call("CreateKeyGroup", ADMIN, keyId=name)

    def shown(token: str, peer: Peer = TCP) -> list[str]:
        return [group["keyId"] for group in team.call("ListKeyGroups", token, peer)["keyGroups"]]

    assert shown(ADMIN) == ["default", "archive", "payroll"]
    assert shown("", unix(1001)) == ["default", "archive"]
    assert shown("", unix(1, 2000)) == ["default", "payroll"]


def test_without_a_file_there_are_the_two_tokens_alone(team: Team) -> None:
    team.path.unlink()
    access = team.access()
    assert access.authenticator is SHARED
    assert team.authenticated(API) == Principal("api")
    assert team.authenticated(ADMIN, plane=Plane.CONTROL) == Principal("admin")
    assert team.authenticated("old token") is None
    assert not access.is_from_file


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_a_file_that_was_named_has_to_be_there(team: Team, how: str) -> None:
    named = str(team.path.with_name("named.toml"))
    config = resolve({"principals": named}, {}) if how == "flag" else resolve({}, {"MINIKMS_PRINCIPALS": named})
    with pytest.raises(InputMissingError, match=r"named\.toml"):
        AccessSource(config.principals, SHARED, team.clock, is_needed=config.principals_named).load()


async def test_a_good_file_is_in_force_from_the_next_request_on(team: Team, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "kms.server.reload")
    assert team.outcome("Encrypt", "old token", plaintext="") == "ok"
    team.write(FILE.replace('"Encrypt", "Decrypt", "RotateKeyGroup"', '"Decrypt"'))
    assert team.outcome("Encrypt", "old token", plaintext="") == "ok", "not before it is told to look"
    await team.reload.on_hangup()
    assert team.outcome("Encrypt", "old token", plaintext="") == "Unauthorized", "nothing that was kept outlives the file"
    team.write(FILE.replace(digest("old token"), digest("newest token")))
    await team.reload.on_hangup()
    assert team.outcome("Encrypt", "old token", plaintext="") == "AuthFailed"
    assert team.outcome("Encrypt", "newest token", plaintext="") == "ok"
    assert team.outcome("Health", "new token") == "ok"
    team.clock.now = EXPIRY
    assert team.outcome("Health", "new token") == "AuthFailed"
    assert [record.getMessage() for record in caplog.records] == [f"reloaded: principals from {team.path}: 3"] * 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_text("nonsense"),
        lambda path: path.write_text(f'[principals.heir]\ntoken_sha256 = ["{digest(API)}"]'),
        lambda path: path.chmod(0o644),
        lambda path: path.unlink(),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["not TOML", "a shared token's digest", "not private", "gone", "a directory"],
)
async def test_a_bad_file_changes_nothing_and_is_one_line_in_the_log(
    team: Team, caplog: pytest.LogCaptureFixture, spoil: Any
) -> None:
    caplog.set_level("INFO", "kms.server.reload")
    spoil(team.path)
    await team.reload.on_hangup()
    assert team.outcome("Encrypt", "old token", plaintext="") == "ok"
    assert team.outcome("Encrypt", "old token", plaintext="", keyId="archive") == "Unauthorized"
    (record,) = caplog.records
    assert record.getMessage().startswith("principals not reloaded, all stays as it was: ")
    assert str(team.path) in record.getMessage()
    assert "\n" not in record.getMessage()


async def test_a_file_that_comes_to_be_at_the_default_place_is_taken_up(data: Path) -> None:
    directory = data / "mini-kms"
    directory.mkdir(mode=0o700)
    team = Team(directory, None)
    assert team.outcome("Encrypt", "old token", plaintext="") == "AuthFailed"
    await team.reload.on_hangup()
    assert team.outcome("Encrypt", API, plaintext="") == "ok"
    team.write("[shared]\napi_token = false\n" + FILE)
    await team.reload.on_hangup()
    assert team.outcome("Encrypt", API, plaintext="") == "AuthFailed"
    assert team.outcome("Encrypt", "old token", plaintext="") == "ok"


async def test_what_the_server_asks_of_itself_goes_on_record_too_once_there_is_a_record(team: Team) -> None:
    schedule = team.service.schedule
    authenticator, policy = schedule.authenticator, schedule.policy
    team.service.keeper.trail = trail = AuditTrail(Log(), DataAudit.ALL)
    await team.reload.on_hangup()
    assert (team.pipeline.trail, schedule.trail) == (trail, trail)
    assert (schedule.authenticator, schedule.policy) == (authenticator, policy), "no file decides about it"


async def test_a_bug_in_reading_the_file_costs_the_reload_and_not_the_server(
    team: Team, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> None:
        raise RuntimeError("canary")

    monkeypatch.setattr("kms.service.team.load", broken)
    await team.reload.on_hangup()
    assert team.outcome("Encrypt", "old token", plaintext="") == "ok"
    assert "RuntimeError" in caplog.text


REVOKED = {
    "the principal is gone": "[principals.other]\n",
    "the grant is gone": FILE.replace('"Encrypt", "Decrypt", "RotateKeyGroup"', '"Encrypt"'),
    "it is denied": FILE + '[[principals.billing.deny]]\ngroups = ["de*"]\noperations = ["RotateKeyGroup"]\n',
    "the token is another": FILE.replace(digest("old token"), digest("newest token")),
}


@pytest.mark.parametrize("content", REVOKED.values(), ids=REVOKED)
async def test_a_mutation_is_authorized_again_when_the_actor_takes_it_up(team: Team, content: str) -> None:
    """Two rotations: one is being saved while the file changes, the other waits behind it."""
    store = Store()
    actor = KeyringActor(EMPTY, store, clock=lambda: 7)
    service = service_of(actor, team.access())
    replies: list[dict[str, Any]] = []

    async def ask(kind: str, token: str, key: str) -> None:
        later = service.pipeline.session(TCP).serve(json.dumps({"type": kind, "token": token, "keyId": key}).encode())
        assert not isinstance(later, bytes)
        replies.append(json.loads(await answered(later)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(actor.run)
        await ask("CreateKeyGroup", ADMIN, "default")
        async with trio.open_nursery() as clients:
            store.gate.clear()
            store.saving.clear()
            clients.start_soon(ask, "RotateKeyGroup", "old token", "default")
            await trio.to_thread.run_sync(store.saving.wait)
            clients.start_soon(ask, "RotateKeyGroup", "old token", "default")
            clients.start_soon(ask, "CreateKeyGroup", ADMIN, "neighbour")
            await trio.testing.wait_all_tasks_blocked()
            team.write(content)
            await Reload(service, team.source)()
            store.gate.set()
        actor.close()
    codes = [reply.get("errorCode", "ok") for reply in replies]
    assert sorted(codes[1:]) == sorted(["ok", "ok", "AuthFailed" if content in _NOBODY else "Unauthorized"])
    assert len(actor.current.groups["default"].versions) == 2, "the rotation under way was done, the waiting one was not"
    assert "neighbour" in actor.current.groups


_NOBODY = (REVOKED["the principal is gone"], REVOKED["the token is another"])


async def test_a_token_that_expires_while_its_mutation_waits_comes_too_late(team: Team) -> None:
    store = Store()
    actor = KeyringActor(EMPTY, store, clock=lambda: 7)
    later = (
        service_of(actor, team.access())
        .pipeline.session(TCP)
        .serve(b'{"type":"RotateKeyGroup","token":"new token","keyId":"default"}')
    )
    assert not isinstance(later, bytes)
    replies: list[dict[str, Any]] = []

    async def ask() -> None:
        replies.append(json.loads(await answered(later)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        team.clock.now = EXPIRY
        nursery.start_soon(actor.run)
        await trio.testing.wait_all_tasks_blocked()
        actor.close()
    assert replies[0]["errorCode"] == "AuthFailed"
    assert store.saved == []


def test_the_final_word_on_a_token_is_a_comparison_in_constant_time(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def refuse(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return False

    monkeypatch.setattr("kms.service.team.compare_digest", refuse)
    assert isinstance(team.access().authenticator, TeamAuthenticator)
    assert team.authenticated("old token") is None
    assert compared == [(sha256(b"old token").digest(),) * 2]


@pytest.mark.parametrize("trace", ["audit.log", "audit.log.head"])
def test_a_start_without_the_file_is_refused_where_an_audit_log_was_kept_for_it(data: Path, trace: str) -> None:
    path, witness = data / "principals.toml", data / "audit.log"
    source = AccessSource(path, SHARED, lambda: 0.0, is_needed=False, witness=witness)
    assert not source.load(is_start=True).is_from_file
    (data / trace).touch()
    with pytest.raises(InputMissingError, match="start with --no-principals"):
        source.load(is_start=True)
    assert not source.load().is_from_file, "a server that was told so is not told otherwise by SIGHUP"
    assert not AccessSource(path, SHARED, lambda: 0.0, is_needed=False).load(is_start=True).is_from_file


def test_anybody_who_is_known_may_ask_who_that_is_and_what_it_may_do(team: Team) -> None:
    report = team.call("Status", "old token")["report"]
    assert report["principal"] == "billing"
    assert {
        "allow": True,
        "operations": sorted(report["rules"][0]["operations"]),
        "groups": report["rules"][0]["groups"],
    } == ({name: value for name, value in report["rules"][0].items() if name != "aadPrefix"})
    assert "server" not in report
    assert team.call("Status", ADMIN)["report"] == {"version": "", "uptimeSec": 0, "principal": "admin"}
    assert team.outcome("Status", "no token") == team.outcome("Status", API) == "AuthFailed"


def test_how_the_server_is_takes_a_grant_on_every_key_group(team: Team) -> None:
    view = ServerView(listening=["here"], keystore="k", generation=1, key_groups=1, principals="", memory_locked=True)
    team.service.operator.report = lambda: view
    assert team.call("Status", ADMIN)["report"]["server"]["listening"] == ["here"]
    assert "server" not in team.call("Status", "old token")["report"]


@pytest.mark.parametrize(("groups", "may"), [('["*"]', True), ('["billing", "de*"]', False)])
async def test_a_reload_is_asked_for_with_a_grant_on_every_key_group_and_answered(
    team: Team,
    groups: str,
    may: bool,
) -> None:
    token = f'[principals.ops]\ntoken_sha256 = ["{digest("ops token")}"]\n'
    team.write(f'{token}[[principals.ops.allow]]\ngroups = {groups}\noperations = ["*"]\n')
    await team.reload()
    team.service.operator.reload = team.reload

    async def ask() -> dict[str, Any]:
        later = team.pipeline.session(TCP).serve(b'{"type":"Reload","token":"ops token"}')
        reply: dict[str, Any] = json.loads(await answered(later))
        return reply

    reply = await ask()
    if not may:
        assert reply["errorCode"] == "Unauthorized"
        return
    assert reply == {"status": "ok", "detail": f"reloaded: principals from {team.path}: 1"}
    team.write("nonsense")
    reply = await ask()
    assert reply["errorCode"] == "InvalidRequest"
    assert reply["message"].startswith(f"principals not reloaded, all stays as it was: {team.path}")
    assert (await ask())["errorCode"] == "InvalidRequest", "and it is still let in"


async def test_a_reload_that_could_not_go_on_in_a_new_audit_log_says_so(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(team.service.keeper, "reopen", lambda: "the audit log was not reopened: no room")
    with pytest.raises(InvalidRequestError, match=r"reloaded: .*, but the audit log was not reopened: no room"):
        await team.reload()

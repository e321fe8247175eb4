"""A team of three programs with a real server: one known by its token, one by its user id, one whose token is rotated.

Under root the second is another user's, who reaches the socket through its group. Nobody else can become another user,
so otherwise it is this user's, and only the tests marked so are left out.
"""

from __future__ import annotations

import grp
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self

import pytest

from kms_tests.integration.processes import DEADLINE, Machine, Server, Wire, eventually

IS_ROOT: Final = os.geteuid() == 0
OTHER_UID: Final = 4_000_000_000 if IS_ROOT else os.getuid()
"""Past what a signed number of 32 bits holds, as the ids of users in containers often are."""
OTHER_GID: Final = 4243 if IS_ROOT else os.getgid()
SOCKET_GROUP: Final = next(
    group for group in grp.getgrall() if group.gr_gid not in (0, 65534) and (IS_ROOT or group.gr_gid == os.getgid())
)

BECOME_AND_RELAY: Final = """
import os, socket, sys
uid, gid, socket_gid, path = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if os.geteuid() == 0:
    os.setgroups([socket_gid] if socket_gid >= 0 else [])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
sock = socket.socket(socket.AF_UNIX)
try:
    sock.connect(path)
except OSError as error:
    sys.exit(error.strerror)
replies = sock.makefile("rb")
for line in sys.stdin.buffer:
    sock.sendall(line)
    sys.stdout.buffer.write(replies.readline())
    sys.stdout.buffer.flush()
"""


class Program:
    """A program of another user, on one connection for as long as it is open."""

    def __init__(
        self, path: Path, *, uid: int = OTHER_UID, gid: int = OTHER_GID, socket_gid: int = SOCKET_GROUP.gr_gid
    ) -> None:
        arguments = [str(uid), str(gid), str(socket_gid), str(path)]
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", BECOME_AND_RELAY, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        reply: dict[str, Any] = json.loads(self.process.stdout.readline())
        return reply

    def failure(self) -> str:
        """Why it could not connect."""
        return self.process.communicate(timeout=DEADLINE)[1].decode().strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.communicate(timeout=DEADLINE)


@pytest.fixture
def meeting_place() -> Iterator[Path]:
    """A directory that the socket's group may enter, and nobody but us may write to."""
    path = Path(tempfile.mkdtemp(prefix="kms", dir="/tmp"))
    path.chmod(0o710)
    os.chown(path, -1, SOCKET_GROUP.gr_gid)
    yield path
    shutil.rmtree(path)


class Team:
    """A server, its file of principals, and how often that was read."""

    def __init__(self, machine: Machine, directory: Path) -> None:
        self.machine = machine
        self.file = machine.data / "principals.toml"
        self.server = machine.start(
            *("--unix-socket", str(directory / "kms.sock"), "--unix-socket-group", SOCKET_GROUP.gr_name),
            *("--audit-log", str(machine.data / "audit.log")),
        )

    def write(self, content: str) -> None:
        """Replace the file and tell the server, which says what it made of it."""
        self.file.write_text(content, encoding="utf-8")
        self.file.chmod(0o600)
        self.reload()

    def reload(self) -> str:
        seen = self.server.stderr.count("\n")
        self.server.process.send_signal(signal.SIGHUP)
        eventually("the server says what it made of the file", lambda: self._said(seen) != "")
        return self._said(seen)

    def _said(self, seen: int) -> str:
        lines = self.server.stderr.splitlines(keepends=True)[seen:]
        return next((line for line in lines if "reloaded" in line and line.endswith("\n")), "")

    def new_token(self, name: str) -> tuple[str, str]:
        """A token as `kms-admin new-token` makes it, and its digest."""
        made = self.machine.admin("new-token", name)
        assert made.status == 0, made.stderr
        return made.stdout.decode().strip(), json.loads(made.stderr.partition(" = ")[2])[0]


@pytest.fixture
def team(machine: Machine, meeting_place: Path) -> Team:
    return Team(machine, meeting_place)


def rules(name: str, groups: list[str], *operations: str, effect: str = "allow") -> str:
    """A rule for `name`."""
    return f"[[principals.{name}.{effect}]]\ngroups = {groups}\noperations = {list(operations)}\n"


def code(reply: dict[str, Any]) -> str:
    """How a request ended."""
    return str(reply.get("errorCode", "ok"))


class Asks(Protocol):
    """A connection."""

    def ask(self, **request: Any) -> dict[str, Any]: ...


class Witness:
    """A connection, and what was said over it as the audit log should have it.

    `names` tells who has a token; `unknown` is whom a request without one is from.
    """

    def __init__(self, connection: Asks, names: dict[str, str], without: str | None = None) -> None:
        self._connection = connection
        self._names = names
        self._without = without
        self.heard: list[tuple[str | None, str, str]] = []

    def ask(self, **request: Any) -> dict[str, Any]:
        reply = self._connection.ask(**request)
        token = request.get("token", "")
        who = self._names.get(token) if token else self._without
        self.heard.append((who if code(reply) != "AuthFailed" else None, request["type"], code(reply)))
        return reply


def on_record(log: Path) -> dict[int, list[tuple[str | None, str, str]]]:
    """What was said over each connection, as the audit log has it: who, what, and how it ended."""
    said: dict[int, list[tuple[str | None, str, str]]] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "operation" in record and record["outcome"] != "begun":
            outcome = record.get("errorCode", record["outcome"])
            said.setdefault(record["connection"], []).append((record.get("principal"), record["operation"], outcome))
    return said


FORBIDDEN: Final = {
    "status": "error",
    "errorCode": "Unauthorized",
    "message": "the policy does not allow this operation on this key group",
}
NOBODY: Final = {"status": "error", "errorCode": "AuthFailed", "message": "invalid API token"}
NO_ADMIN: Final = {"status": "error", "errorCode": "AuthFailed", "message": "invalid admin token"}


def test_a_team_of_three_programs(team: Team, machine: Machine) -> None:
    for group in ("billing", "billing-secret", "archive"):
        assert team.server.admin("create-key", "--key", group).status == 0
    token, digest = team.new_token("billing")
    rotated, rotated_digest = team.new_token("reports")
    names = {token: "billing", rotated: "reports", machine.api_token: "api", machine.admin_token: "admin"}

    billing = f'[principals.billing]\ntoken_sha256 = ["{digest}"]\n' + (
        rules("billing", ["billing", "billing-*"], "Encrypt", "Decrypt", "RotateKeyGroup")
        + rules("billing", ["billing-secret"], "*", effect="deny")
    )
    backup = f"[principals.backup]\nuids = [{OTHER_UID}]\n" + (
        rules("backup", ["archive"], "GenerateDataKey", "Decrypt", "ReEncrypt", "ListKeyGroups")
    )

    def reports(*digests: str) -> str:
        return f"[principals.reports]\ntoken_sha256 = {list(digests)}\n" + rules("reports", ["billing"], "Decrypt")

    with team.server.unix() as first, Program(team.server.socket) as second, team.server.tcp() as third:
        by_token, by_uid, by_rotated = Witness(first, names), Witness(second, names, "backup"), Witness(third, names)
        # Nobody knows them yet, and the connections stay open throughout.
        assert by_token.ask(type="Encrypt", token=token, keyId="billing", plaintext="") == NOBODY
        assert by_uid.ask(type="Health") == NOBODY
        assert by_rotated.ask(type="Health", token=rotated) == NOBODY
        team.write(billing + backup + reports(rotated_digest))

        # One by its token: what it was granted, of either plane, and nothing else.
        sealed = by_token.ask(type="Encrypt", token=token, keyId="billing", plaintext="aGk=")["ciphertext"]
        assert by_token.ask(type="Decrypt", token=token, ciphertext=sealed) == {"status": "ok", "plaintext": "aGk="}
        assert code(by_token.ask(type="RotateKeyGroup", token=token, keyId="billing")) == "ok"
        assert code(by_token.ask(type="Health", token=token)) == "ok"
        for forbidden in (
            {"type": "Encrypt", "keyId": "billing-secret", "plaintext": ""},
            {"type": "Encrypt", "keyId": "archive", "plaintext": ""},
            {"type": "Encrypt", "plaintext": ""},
            {"type": "Encrypt", "keyId": "no such group", "plaintext": ""},
            {"type": "GenerateDataKey", "keyId": "billing"},
            {"type": "ReEncrypt", "ciphertext": sealed, "keyId": "billing"},
            {"type": "RotateKeyGroup", "keyId": "billing-secret"},
            {"type": "CreateKeyGroup", "keyId": "billing-2027"},
            {"type": "DestroyVersion", "keyId": "billing", "version": 1},
            {"type": "ListKeyGroups"},
        ):
            assert by_token.ask(**forbidden, token=token) == FORBIDDEN, forbidden
        assert by_token.ask(type="Encrypt", token=token + "x", keyId="billing", plaintext="") == NOBODY
        assert by_token.ask(type="ListKeyGroups", token=token + "x") == NO_ADMIN

        # One by its user id: no token at all, and a wrong one does not count as none.
        data_key = by_uid.ask(type="GenerateDataKey", keyId="archive")
        assert (
            by_uid.ask(type="Decrypt", ciphertext=data_key["wrappedDataKey"])["plaintext"] == data_key["plaintextDataKey"]
        )
        assert [group["keyId"] for group in by_uid.ask(type="ListKeyGroups", token="")["keyGroups"]] == ["archive"]
        assert by_uid.ask(type="Decrypt", ciphertext=sealed) == FORBIDDEN
        assert by_uid.ask(type="ReEncrypt", ciphertext=sealed, keyId="archive") == FORBIDDEN
        assert by_uid.ask(type="Health", token="wrong") == NOBODY
        assert by_uid.ask(type="RotateKeyGroup", keyId="archive") == FORBIDDEN
        assert by_rotated.ask(type="Health") == NOBODY, "over TCP nobody vouches for a user id"

        # One whose token is rotated: both live until the old one is taken out, with no moment in between.
        newer, newer_digest = team.new_token("reports")
        names[newer] = "reports"
        assert code(by_rotated.ask(type="Decrypt", token=rotated, ciphertext=sealed)) == "ok"
        assert by_rotated.ask(type="Decrypt", token=newer, ciphertext=sealed) == NOBODY
        team.write(billing + backup + reports(rotated_digest, newer_digest))
        for either in (rotated, newer):
            assert code(by_rotated.ask(type="Decrypt", token=either, ciphertext=sealed)) == "ok"
        team.write(billing + backup + reports(newer_digest))
        assert by_rotated.ask(type="Decrypt", token=rotated, ciphertext=sealed) == NOBODY
        assert code(by_rotated.ask(type="Decrypt", token=newer, ciphertext=sealed)) == "ok"

        # Revoked while connected, and nobody else notices.
        team.write(billing + backup)
        assert by_rotated.ask(type="Decrypt", token=newer, ciphertext=sealed) == NOBODY
        assert by_rotated.ask(type="RotateKeyGroup", token=newer, keyId="billing") == NO_ADMIN
        assert code(by_token.ask(type="Decrypt", token=token, ciphertext=sealed)) == "ok"
        assert code(by_uid.ask(type="Health")) == "ok"

        # The shared tokens stay what they are until the file turns them off.
        assert code(by_token.ask(type="Encrypt", token=machine.api_token, plaintext="")) == "ok"
        assert by_token.ask(type="ListKeyGroups", token=machine.api_token) == NO_ADMIN
        team.write("[shared]\napi_token = false\nadmin_token = false\n" + billing + backup)
        assert by_token.ask(type="Encrypt", token=machine.api_token, plaintext="") == NOBODY
        assert by_token.ask(type="ListKeyGroups", token=machine.admin_token) == NO_ADMIN
        assert code(by_token.ask(type="Health", token=token)) == "ok"

    # Every answer is on record, with who got it; every refusal among them.
    assert sum(outcome != "ok" for _, _, outcome in by_token.heard + by_uid.heard + by_rotated.heard) > 25
    said = on_record(machine.data / "audit.log")
    for witness in (by_token, by_uid, by_rotated):
        assert witness.heard in said.values()
    verified = machine.admin("verify-audit")
    assert verified.status == 0, verified.stderr


def test_a_bad_file_is_refused_with_one_line_and_the_old_one_stays(team: Team) -> None:
    token, digest = team.new_token("billing")
    good = f'[principals.billing]\ntoken_sha256 = ["{digest}"]\n'
    team.write(good)
    with team.server.unix() as wire:
        for bad, complaint in (
            (good + '[[principals.billing.allow]]\ngroup = ["a"]', 'principals.billing.allow[0]: unknown key "group"'),
            (good.replace(digest, token), "principals.billing.token_sha256[0]: not a SHA-256 digest"),
            ("not TOML", "not TOML, at line 1"),
        ):
            before = team.server.stderr
            team.write(bad)
            said = team.server.stderr.removeprefix(before)
            assert said.count("\n") == 1
            assert complaint in said
            assert token not in said
            assert code(wire.ask(type="Health", token=token)) == "ok"
        team.file.unlink()
        assert "not reloaded" in team.reload()
        assert code(wire.ask(type="Health", token=token)) == "ok", "a file that is gone takes nobody's access away"
        team.write("")
        assert code(wire.ask(type="Health", token=token)) == "ok", "nor does one that has lost its content"
        team.write("[shared]\napi_token = true\n")
        assert wire.ask(type="Health", token=token) == NOBODY


def test_SIGHUP_without_a_file_of_principals_changes_nothing(server: Server) -> None:
    for times in range(1, 4):
        server.process.send_signal(signal.SIGHUP)
        eventually("it says that there is none", partial(_has_said, server, "reloaded: no principals", times))
    assert server.client("health").status == 0
    assert server.admin("list-keys").status == 0


def _has_said(server: Server, words: str, times: int) -> bool:
    return server.stderr.count(words) == times


HANG_UP_AT_EACH_STEP: Final = """
import os, signal
from kms.server import daemon

run, unlock = daemon.run, daemon._unlock

def hang_up():
    os.kill(os.getpid(), signal.SIGHUP)

def hung_up_run(*arguments, **more):
    hang_up()
    try:
        return run(*arguments, **more)
    finally:
        hang_up()

def hung_up_unlock(*arguments):
    hang_up()
    return unlock(*arguments)

daemon.run, daemon._unlock = hung_up_run, hung_up_unlock
"""


def test_SIGHUP_kills_neither_a_server_that_starts_nor_one_that_stops(machine: Machine) -> None:
    server = machine.start(change=HANG_UP_AT_EACH_STEP)
    eventually("what came while it started is heeded once it serves", partial(_has_said, server, "reloaded: no", 1))
    assert server.client("health").status == 0
    assert server.stop() == 0


def test_a_server_that_is_told_of_a_file_needs_it(machine: Machine) -> None:
    missing = machine.refused_start("--principals", str(machine.root / "missing.toml"))
    assert missing.status == 66
    assert "missing.toml" in missing.said_one_line("kms-server")
    bad = machine.file("bad.toml", b"[principals.api]")
    bad.chmod(0o600)
    refused = machine.refused_start(environment={"MINIKMS_PRINCIPALS": str(bad)})
    assert refused.status == 64
    assert "api is what the log calls the shared API token" in refused.said_one_line("kms-server")
    bad.chmod(0o644)
    assert machine.refused_start("--principals", str(bad)).status == 77


def test_the_command_lines_need_no_token_where_the_user_id_is_known(team: Team) -> None:
    team.write(f"[principals.me]\nuids = [{os.getuid()}]\n" + rules("me", ["*"], "Encrypt", "ListKeyGroups"))
    assert team.server.client("--no-token", "encrypt", "--text", "hi").status == 0
    assert team.server.admin("--no-token", "list-keys").stdout.startswith(b"default\t")
    refused = team.server.admin("--no-token", "rotate-key", "--key", "default")
    assert refused.status == 77
    assert "ask whoever runs the server for access" in refused.said_one_line("kms-admin")
    over_tcp = team.server.client_over_tcp("--no-token", "health")
    assert over_tcp.status == 64


def test_explain_says_of_the_servers_own_file_what_the_server_does(team: Team) -> None:
    token, digest = team.new_token("billing")
    team.write(
        f'[principals.billing]\ntoken_sha256 = ["{digest}"]\n'
        + rules("billing", ["d*"], "Encrypt", "RotateKeyGroup")
        + rules("billing", ["default"], "RotateKeyGroup", effect="deny")
    )
    with team.server.unix() as wire:
        for operation, fields in (
            ("Encrypt", {"plaintext": ""}),
            ("RotateKeyGroup", {}),
            ("GenerateDataKey", {}),
        ):
            told = team.machine.admin("explain", "--principal", "billing", "--operation", operation, "--key", "default")
            done = wire.ask(type=operation, token=token, keyId="default", **fields)
            assert told.status == (0 if code(done) == "ok" else 1), told


only_root = pytest.mark.skipif(not IS_ROOT, reason="only root can become another user")


@only_root
def test_another_user_reaches_the_socket_through_its_group_alone(team: Team) -> None:
    team.write(f"[principals.other]\nuids = [{OTHER_UID}]\n")
    with Program(team.server.socket) as member:
        assert code(member.ask(type="Health")) == "ok"
    with Program(team.server.socket, socket_gid=-1) as stranger:
        assert stranger.failure() == "Permission denied"


@only_root
def test_a_group_is_the_primary_one_of_a_process(team: Team) -> None:
    team.write(f"[principals.staff]\ngids = [{OTHER_GID}]\n[principals.sockets]\ngids = [{SOCKET_GROUP.gr_gid}]\n")
    with Program(team.server.socket, uid=5000) as of_staff:
        assert code(of_staff.ask(type="Health")) == "ok"
    team.write(f"[principals.sockets]\ngids = [{SOCKET_GROUP.gr_gid}]\n")
    with Program(team.server.socket, uid=5000) as of_nobody:
        assert of_nobody.ask(type="Health") == NOBODY, "a supplementary group is not what the kernel vouches for"


@only_root
def test_without_a_group_no_other_user_reaches_the_socket(machine: Machine, server: Server) -> None:
    with Program(server.socket) as other:
        assert other.failure() == "Permission denied"
    with Wire(server.socket) as own:
        assert code(own.ask(type="Health", token=machine.api_token)) == "ok"

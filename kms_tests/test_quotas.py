"""What a principal may ask for in a time, and in all: no narrow grant uses up what others need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio

from kms.core.keyring import EMPTY
from kms.core.policy import AllowAll, Operation, Principal
from kms.errors import LimitExceededError, ThrottledError
from kms.limits import DEFAULT_LIMIT_GROUPS, DEFAULT_LIMIT_TIMED_DISABLES, DEFAULT_LIMIT_VERSIONS_PER_DAY
from kms.service.actor import KeyringActor
from kms.service.pipeline import Refusal
from kms.service.principals import parse
from kms.service.quotas import DEFAULT, UNLIMITED, Limits, Quotas
from kms.service.served import Peer
from kms.service.service import Service
from kms_tests.in_memory import answered, no_audit, usage_of
from kms_tests.test_actor import Store
from kms_tests.test_team import Team, digest

PATH = Path("/etc/mini-kms/principals.toml")
BILLING = Principal("billing")


def allow(*operations: str) -> str:
    return f'[[principals.billing.allow]]\ngroups = ["*"]\noperations = {json.dumps(operations)}\n'


FILE = f"""
[principals.billing]
token_sha256 = ["{digest("t")}"]
{allow("Encrypt", "CreateKeyGroup", "RotateKeyGroup", "DisableVersion", "EnableVersion", "ListKeyGroups")}
[principals.billing.limits]
"""


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def quotas(limits: Limits, clock: Clock | None = None) -> Quotas:
    made = Quotas(clock or Clock())
    made.admit({"billing": limits})
    return made


def outcomes(team: Team, kind: str, number: int, **fields: Any) -> list[str]:
    return [team.outcome(kind, "t", **fields) for _ in range(number)]


def test_who_is_no_administrator_has_limits_by_default() -> None:
    file = parse(b"[principals.billing]\n" + allow("CreateKeyGroup").encode(), PATH)
    assert file.members["billing"].limits == DEFAULT
    assert Limits(None, DEFAULT_LIMIT_GROUPS, DEFAULT_LIMIT_VERSIONS_PER_DAY, DEFAULT_LIMIT_TIMED_DISABLES) == DEFAULT


def test_an_administrator_has_none_but_those_that_the_file_says() -> None:
    text = "[principals.billing]\n" + allow("*")
    assert parse(text.encode(), PATH).members["billing"].limits == UNLIMITED
    text += "[principals.billing.limits]\ngroups = 3\n"
    assert parse(text.encode(), PATH).members["billing"].limits == Limits(groups=3)


def test_who_may_destroy_only_some_groups_versions_is_no_administrator() -> None:
    text = '[[principals.billing.allow]]\ngroups = ["a*"]\noperations = ["*"]\n' + allow("CreateKeyGroup")
    assert parse(text.encode(), PATH).members["billing"].limits == DEFAULT


def test_a_request_over_the_rate_is_throttled_and_told_when_to_ask_again(tmp_path: Path) -> None:
    team = Team(tmp_path, FILE + "requests_per_second = 0.001\n")
    assert team.outcome("Encrypt", "t", plaintext="") == "ok"
    reply = team.call("Encrypt", "t", plaintext="")
    assert reply["errorCode"] == "Throttled"
    assert reply["message"] == "more than 0.001 requests a second: the limit requests_per_second of billing"
    assert 990_000 < reply["retryAfterMs"] <= 1_000_000


@pytest.mark.parametrize(
    "line",
    [
        {"type": "Health"},
        {"type": "Encrypt", "plaintext": ""},
        {"type": "Encrypt", "plaintext": "no base64"},
        {"type": "Decrypt", "ciphertext": ""},
        {"type": "ListKeyGroups"},
        {"type": "DestroyVersion", "keyId": "default", "version": 1},
        {"type": "RotateKeyGroup", "keyId": "nothing of this name"},
    ],
)
def test_every_request_counts_whatever_becomes_of_it(tmp_path: Path, line: dict[str, Any]) -> None:
    team = Team(tmp_path, FILE + "requests_per_second = 0.001\n")
    team.line(json.dumps({**line, "token": "t"}).encode())
    assert team.outcome("Health", "t") == "Throttled"
    team = Team(tmp_path, FILE + "requests_per_second = 0.001\n")
    team.outcome("Health", "t")
    assert team.line(json.dumps({**line, "token": "t"}).encode())["errorCode"] == "Throttled"


def test_who_is_throttled_is_refused_which_ends_a_turn(tmp_path: Path) -> None:
    team = Team(tmp_path, FILE + "requests_per_second = 0.001\n")
    session = team.pipeline.session(Peer(1, "tcp"))
    line = b'{"type":"Health","token":"t"}'
    assert type(session.serve(line)) is bytes
    assert type(session.serve(line)) is Refusal


def test_a_wrong_token_is_refused_before_anything_is_counted(tmp_path: Path) -> None:
    team = Team(tmp_path, FILE + "requests_per_second = 0.001\n")
    assert {team.outcome("Health", "wrong") for _ in range(5)} == {"AuthFailed"}
    assert team.outcome("Health", "t") == "ok"


def test_a_rate_is_refilled_and_a_second_of_it_may_come_at_once() -> None:
    clock = Clock()
    made = quotas(Limits(requests_per_second=10), clock)
    for _ in range(10):
        made.throttle(BILLING)
    with pytest.raises(ThrottledError) as refused:
        made.throttle(BILLING)
    assert refused.value.retry_after == pytest.approx(0.1)
    clock.now += 0.1
    made.throttle(BILLING)
    made.throttle(Principal("another"))


def test_key_groups_that_were_made_are_counted_and_those_that_were_refused_are_not(tmp_path: Path) -> None:
    team = Team(tmp_path, FILE + "groups = 2\n")
    assert team.outcome("CreateKeyGroup", "t", keyId="a") == "ok"
    assert outcomes(team, "CreateKeyGroup", 5, keyId="a") == ["InvalidRequest"] * 5
    assert team.outcome("CreateKeyGroup", "t", keyId="b") == "ok"
    reply = team.call("CreateKeyGroup", "t", keyId="c")
    assert reply == {
        "status": "error",
        "errorCode": "LimitExceeded",
        "message": "2 key groups made since the server's start: the limit groups of billing",
    }


def test_new_versions_of_a_day_are_counted_and_those_that_were_refused_are_not(tmp_path: Path) -> None:
    team = Team(tmp_path, FILE + "versions_per_day = 2\n")
    assert outcomes(team, "RotateKeyGroup", 3, keyId="nothing of this name") == ["InvalidRequest"] * 3
    assert outcomes(team, "RotateKeyGroup", 2, keyId="default") == ["ok", "ok"]
    reply = team.call("RotateKeyGroup", "t", keyId="default")
    assert reply["errorCode"] == "Throttled"
    assert reply["message"].startswith("2 new versions a day: the limit versions_per_day of billing; the next one in 43")
    assert 43_100_000 < reply["retryAfterMs"] <= 43_200_000


def test_a_limit_of_none_is_never_waited_for() -> None:
    none = quotas(Limits(groups=0, versions_per_day=0))
    for operation, name in ((Operation.CREATE_KEY_GROUP, "groups"), (Operation.ROTATE_KEY_GROUP, "versions_per_day")):
        with pytest.raises(LimitExceededError, match=name):
            none.begin(BILLING, operation)


def test_versions_disabled_for_a_time_are_counted_while_they_are_so(tmp_path: Path) -> None:
    async def main() -> None:
        team = Team(tmp_path, FILE + "timed_disables = 1\n")
        for _ in range(3):
            team.admin("RotateKeyGroup", keyId="default")
        pipeline = team.pipeline
        usage = team.usage
        usage.save = _saved  # type: ignore[method-assign]
        usage.flush = _saved  # type: ignore[method-assign]

        async def ask(kind: str, version: int, token: str = "t", **fields: Any) -> dict[str, Any]:
            line = {"type": kind, "token": token, "keyId": "default", "version": version, **fields}
            answer = pipeline.session(Peer(1, "tcp")).serve(json.dumps(line).encode())
            reply: dict[str, Any] = json.loads(await answered(answer))
            return reply

        assert (await ask("DisableVersion", 1, forSeconds=60))["status"] == "ok"
        refused = await ask("DisableVersion", 2, forSeconds=60)
        assert refused["errorCode"] == "LimitExceeded"
        assert refused["message"] == "1 versions disabled for a time at once: the limit timed_disables of billing"
        assert (await ask("DisableVersion", 1, forSeconds=90))["status"] == "ok", "an end that is moved is no other"
        assert (await ask("DisableVersion", 2, token="admin-token-canary", forSeconds=60))["status"] == "ok"
        assert (await ask("EnableVersion", 1))["status"] == "ok"
        assert (await ask("DisableVersion", 3, forSeconds=60))["status"] == "ok"

    trio.run(main)


async def _saved() -> None:
    """In the place of the usage file."""


async def test_many_at_once_do_not_pass_a_limit_together(tmp_path: Path) -> None:
    team = Team(tmp_path, FILE + "groups = 3\n")
    actor = KeyringActor(EMPTY, Store(), clock=lambda: 1)
    service = Service(actor, no_audit(), usage_of(EMPTY), team.access())
    pipeline = service.pipeline
    pipeline.admit(team.access().authenticator, AllowAll(), None, team.access().limits)
    codes: list[str] = []

    async def create(number: int) -> None:
        line = {"type": "CreateKeyGroup", "token": "t", "keyId": f"g{number}"}
        answer = pipeline.session(Peer(number, "tcp")).serve(json.dumps(line).encode())
        codes.append(json.loads(await answered(answer)).get("errorCode", "ok"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(actor.run)
        async with trio.open_nursery() as clients:
            for number in range(20):
                clients.start_soon(create, number)
        actor.close()
    assert sorted(codes) == ["LimitExceeded"] * 17 + ["ok"] * 3


def test_counts_stay_when_the_file_is_read_again_and_follow_its_new_limits(tmp_path: Path) -> None:
    team = Team(tmp_path, FILE + "groups = 1\nversions_per_day = 2\n")
    assert team.outcome("CreateKeyGroup", "t", keyId="a") == "ok"
    assert team.outcome("RotateKeyGroup", "t", keyId="a") == "ok"
    for content in (f'[principals.other]\ntoken_sha256 = ["{digest("o")}"]', FILE + "groups = 2\nversions_per_day = 3\n"):
        team.write(content)
        access = team.access()
        team.pipeline.admit(access.authenticator, access.policy, None, access.limits)
    assert [team.outcome("CreateKeyGroup", "t", keyId=name) for name in "bc"] == ["ok", "LimitExceeded"]


def test_limits_of_a_file_are_in_force_for_a_server_that_reads_it(tmp_path: Path) -> None:
    async def main() -> None:
        team = Team(tmp_path, FILE + "groups = 0\n")
        await team.service.admit(team.access())
        assert team.pipeline.quotas._accounts["billing"].limits.groups == 0

    trio.run(main)


@pytest.mark.parametrize(
    "line",
    [
        "requests_per_second = 0",
        "requests_per_second = -1",
        "requests_per_second = nan",
        "requests_per_second = inf",
        "requests_per_second = 1e9",
        'requests_per_second = "5"',
        "groups = -1",
        "groups = 1.5",
        "groups = 1000001",
        "groups = true",
        "versions = 5",
    ],
)
def test_a_limit_that_is_none_is_an_error_with_its_place(line: str) -> None:
    with pytest.raises(Exception, match=r"principals\.billing\.limits"):
        parse((FILE + line).encode(), PATH)

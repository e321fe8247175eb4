"""What is asked before a version is destroyed, and how the end of a timed disable is waited for. No clock is slept on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, cast

import click
import pytest

from kms.cli import prompt, retiring
from kms.client.blocking import KmsClient
from kms.core.usage import Operations, Refusals, TimedDisable, VersionUsage
from kms.errors import InternalError, InvalidRequestError, ServerUnreachableError, UnauthorizedError
from kms.wire.messages import KeyGroupView, VersionState, VersionView

NOW = 1_800_000_000
DAY = 24 * 3600


class Described:
    """A client to whom one version is all there is; or what it raises instead."""

    def __init__(self, status: str = "DISABLED", **usage: Any) -> None:
        self.status = status
        self.usage = VersionUsage(**{"since_epoch_sec": NOW - 30 * DAY, "operations": Operations(), **usage})
        self.error: Exception | None = None
        self.connected = 0

    def describe_key_group(self, key_id: str) -> KeyGroupView:
        assert self.connected == 1
        if self.error is not None:
            raise self.error
        return KeyGroupView(
            key_id,
            9,
            [VersionView(1, VersionState(self.status), 0, self.usage), VersionView(9, VersionState.ACTIVE, 0, self.usage)],
        )

    def __call__(self) -> KmsClient:
        return cast(KmsClient, self)

    def __enter__(self) -> Described:
        self.connected += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.connected -= 1


class Asked:
    """What a person was asked, and how it had to be answered."""

    def __init__(self) -> None:
        self.question = ""
        self.wants = ""

    def confirm(self, question: str, _remedy: str) -> None:
        self.question, self.wants = question, "yes"

    def confirm_by_name(self, question: str, name: str, _what: str, _remedy: str) -> None:
        self.question, self.wants = question, name


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    asked = Asked()
    monkeypatch.setattr(prompt, "confirm", asked.confirm)
    monkeypatch.setattr(prompt, "confirm_by_name", asked.confirm_by_name)
    monkeypatch.setattr(time, "time", lambda: float(NOW))
    return asked


def ended(**refused: Refusals) -> TimedDisable:
    return TimedDisable("admin", NOW - 9 * DAY, NOW - 8 * DAY, refused, NOW - 8 * DAY)


QUIET = {
    "disabled, and not used for a week": Described(last_used_epoch_sec=NOW - 7 * DAY, last_used_by="billing"),
    "disabled, and never used in a week that was counted": Described(since_epoch_sec=NOW - 7 * DAY),
    "nobody was refused while it was disabled for a time": Described(
        "ENABLED", last_used_epoch_sec=NOW - 10 * DAY, last_used_by="billing", timed_disable=ended()
    ),
}
MISSED = {
    "used within the week": Described(last_used_epoch_sec=NOW - 7 * DAY + 1, last_used_by="billing"),
    "counted for less than a week": Described(since_epoch_sec=NOW - 7 * DAY + 1),
    "never disabled": Described("ENABLED", last_used_epoch_sec=NOW - 20 * DAY, last_used_by="billing"),
    "somebody was refused": Described("ENABLED", timed_disable=ended(billing=Refusals(1, NOW - 8 * DAY))),
}


@pytest.mark.parametrize("client", QUIET.values(), ids=QUIET)
def test_a_version_that_nobody_would_miss_is_destroyed_for_a_yes(client: Described, asked: Asked) -> None:
    retiring.confirm_destruction(client, "billing", 1)
    assert asked.wants == "yes"
    assert "never be undone" in asked.question


def test_of_a_version_that_is_destroyed_already_nothing_is_asked(asked: Asked) -> None:
    retiring.confirm_destruction(Described("DESTROYED"), "billing", 1)
    assert asked.question == ""


@pytest.mark.parametrize(
    ("client", "why"),
    [
        (MISSED["used within the week"], "That is less than 7 days ago."),
        (MISSED["counted for less than a week"], "That is less than 7 days, and who used it before nobody knows."),
        (MISSED["never disabled"], "It was not disabled first"),
    ],
)
def test_it_is_told_why_the_name_is_wanted(client: Described, why: str, asked: Asked) -> None:
    retiring.confirm_destruction(client, "billing", 1)
    assert why in asked.question


@pytest.mark.parametrize("client", MISSED.values(), ids=MISSED)
def test_a_version_that_somebody_may_need_is_destroyed_for_the_name_of_its_group(client: Described, asked: Asked) -> None:
    retiring.confirm_destruction(client, "billing", 1)
    assert asked.wants == "billing"


def test_it_is_told_when_and_by_whom_it_was_last_used(asked: Asked) -> None:
    client = Described(last_used_epoch_sec=NOW - 3 * DAY, last_used_by="nightly", operations=Operations(decrypt=12))
    retiring.confirm_destruction(client, "billing", 1)
    assert "Last used: 3 days ago (2027-01-12 08:00:00 UTC) by nightly; 12 Decrypt since " in asked.question


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UnauthorizedError("no"), "you may not see (DescribeKeyGroup)"),
        (InvalidRequestError("type: not one of ..."), "the server is too old to know"),
    ],
)
def test_one_whose_use_is_not_known_is_destroyed_for_the_name_of_its_group(
    asked: Asked, error: Exception, told: str
) -> None:
    client = Described()
    client.error = error
    retiring.confirm_destruction(client, "billing", 1)
    assert asked.wants == "billing"
    assert told in asked.question


@pytest.mark.parametrize(("version", "why"), [(9, "it is ACTIVE"), (7, "no such version")])
def test_nobody_is_asked_about_one_that_cannot_be_destroyed(asked: Asked, version: int, why: str) -> None:
    with pytest.raises(InvalidRequestError, match=why):
        retiring.confirm_destruction(Described(), "billing", version)
    assert asked.question == ""


def test_another_refusal_is_passed_on(asked: Asked) -> None:
    client = Described()
    client.error = InvalidRequestError("keyId: no such key group")
    with pytest.raises(InvalidRequestError, match="no such key group"):
        retiring.confirm_destruction(client, "nobody", 1)


def test_nothing_is_connected_while_a_person_thinks(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Described()
    seen: list[int] = []
    monkeypatch.setattr(prompt, "confirm", lambda *_: seen.append(client.connected))
    monkeypatch.setattr(prompt, "confirm_by_name", lambda *_: seen.append(client.connected))
    retiring.confirm_destruction(client, "billing", 1)
    assert seen == [0]


def test_a_name_with_control_characters_is_shown_without_them_and_asked_for_as_it_is(asked: Asked) -> None:
    retiring.confirm_destruction(Described("ENABLED"), "a\x1b[2Jb", 1)
    assert "\x1b" not in asked.question
    assert asked.wants == "a\x1b[2Jb"


@pytest.mark.parametrize(("text", "seconds"), [("1s", 1), ("90s", 90), ("15m", 900), ("2h", 7200), ("30d", 30 * DAY)])
def test_a_time_is_a_number_and_a_unit(text: str, seconds: int) -> None:
    assert retiring.duration(cast(Any, None), cast(Any, None), text) == seconds


@pytest.mark.parametrize(
    "text", ["", "0s", "31d", "721h", "2", "h", "2x", "-1h", "1.5h", "2h ", "٢h", "1h30m", "9" * 10 + "s"]
)
def test_any_other_time_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="from 1s to 30d"):
        retiring.duration(cast(Any, None), cast(Any, None), text)


class Time:
    """A clock that goes on only when it is slept on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = float(NOW)
        self.slept: list[float] = []
        monkeypatch.setattr(time, "time", lambda: self.now)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    return Time(monkeypatch)


class Waiting(Described):
    """A version that is disabled until `end`, and described as that by the server; its clock is the test's."""

    def __init__(self, clock: Time, end: float) -> None:
        self.trial = TimedDisable("admin", NOW, NOW + 60, {"billing": Refusals(2, NOW + 5)})
        super().__init__(timed_disable=self.trial)
        self.clock = clock
        self.end = end
        self.unreachable_until = 0.0

    def __call__(self) -> KmsClient:
        if self.clock.now < self.unreachable_until:
            raise ServerUnreachableError("no server")
        return super().__call__()

    def describe_key_group(self, key_id: str) -> KeyGroupView:
        if self.clock.now >= self.end:
            self.status = "ENABLED"
            self.trial.ended_epoch_sec = int(self.end)
        return super().describe_key_group(key_id)


def test_the_end_is_waited_for_and_told(clock: Time, capsys: pytest.CaptureFixture[str]) -> None:
    client = Waiting(clock, NOW + 61)
    trial, status = retiring.wait_until_enabled(client, "billing", 1, client.trial)
    assert (trial.refused["billing"].requests, status) == (2, "ENABLED")
    assert clock.now == pytest.approx(NOW + 61, abs=0.3)
    assert capsys.readouterr().err == "", "nothing counts down where nobody watches"


def test_a_server_that_starts_again_meanwhile_is_waited_for(clock: Time) -> None:
    client = Waiting(clock, NOW + 61)
    client.unreachable_until = NOW + 60 + retiring.LATE_SECONDS / 2
    assert retiring.wait_until_enabled(client, "billing", 1, client.trial)[1] == "ENABLED"


def test_a_server_that_does_not_come_back_is_not_waited_for_without_end(clock: Time) -> None:
    client = Waiting(clock, NOW + 61)
    client.unreachable_until = NOW + DAY
    with pytest.raises(ServerUnreachableError):
        retiring.wait_until_enabled(client, "billing", 1, client.trial)


def test_an_end_that_does_not_come_is_told(clock: Time) -> None:
    client = Waiting(clock, NOW + DAY)
    with pytest.raises(InternalError, match="billing v1 is DISABLED, though its time is over"):
        retiring.wait_until_enabled(client, "billing", 1, client.trial)


@contextlib.contextmanager
def a_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> Iterator[None]:
    monkeypatch.setenv("COLUMNS", str(columns))
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr.isatty", lambda: True)
        yield


def test_at_a_terminal_it_counts_down_in_one_line(
    clock: Time, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Waiting(clock, NOW + 60)
    with a_terminal(monkeypatch, 40):
        retiring.wait_until_enabled(client, "bill\x1bing" * 20, 1, client.trial)
    shown = capsys.readouterr().err
    *lines, gone, after = shown.replace(" \b", "").removeprefix("\r").split("\r")
    assert (gone.strip(), after) == ("", ""), "what comes next stands where it was"
    assert lines[0].startswith("0:01:00 until bill\\x1bing")
    assert len(lines) == 60
    assert max(map(len, lines)) < 40, "a line that is wrapped is not overwritten"

"""The service as a whole: that its parts are the ones that are put together, and what its end leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from kms.core.audit import AuditKeys
from kms.core.keyring import VersionStatus
from kms.core.policy import AllowAll
from kms.core.secret import Secret
from kms.errors import AuditLogError, UnavailableError
from kms.limits import USAGE_FLUSH_SECONDS
from kms.service.audit_keeper import AuditKeeper
from kms.service.audit_settings import AuditSettings, DataAudit
from kms.service.service import Service
from kms.service.team import Access
from kms.service.usage import Usage
from kms_tests.in_memory import ADMIN, API, PEER, SHARED, Manager, Server, no_audit, text, usage_of

ACCESS = Access(SHARED, AllowAll(), "nowhere", is_from_file=False)


class Asked:
    """A service, and the answers of its pipeline."""

    def __init__(self, keeper: AuditKeeper | None = None, **options: Any) -> None:
        self.manager = Manager()
        self.keeper = keeper or no_audit()
        self.service = Service(self.manager, self.keeper, usage_of(self.manager.current), ACCESS, **options)

    async def ask(self, kind: str, token: str = API, **fields: Any) -> dict[str, Any]:
        answer = self.service.pipeline.session(PEER).serve(json.dumps({"type": kind, "token": token, **fields}).encode())
        return dict(json.loads(answer if isinstance(answer, bytes) else await answer()))


def audited(directory: Path) -> AuditKeeper:
    settings = AuditSettings(
        directory / "audit.log", DataAudit.ALL, is_off=False, is_always_kept=True, accept_rollback=False
    )
    return AuditKeeper(settings, AuditKeys(Secret(bytearray(64))))


async def test_the_audit_log_is_open_and_written_from_when_somebody_is_admitted(data: Path) -> None:
    asked = Asked(audited(data))
    service = asked.service
    assert (service.pipeline.trail, service.schedule.trail) == (None, None)
    await service.admit(ACCESS)
    assert service.pipeline.trail is service.schedule.trail is service.keeper.trail
    assert service.pipeline.trail is not None
    service.close()


async def test_a_log_that_cannot_be_opened_leaves_all_as_it_was(data: Path) -> None:
    (data / "audit.log").write_bytes(b"nonsense\n")
    (data / "audit.log").chmod(0o600)
    asked = Asked(audited(data))
    another = Access(SHARED, AllowAll(), "elsewhere", is_from_file=True)
    with pytest.raises(AuditLogError):
        await asked.service.admit(another)
    assert asked.service.access is ACCESS
    assert asked.service.pipeline.trail is None
    asked.service.close()


async def test_the_end_of_a_timed_disable_is_on_record_before_it_is_saved() -> None:
    asked = Asked()

    async def fail() -> None:
        raise UnavailableError("the disk is full")

    asked.keeper.sync = fail  # type: ignore[method-assign]
    asked = Asked(asked.keeper)
    await asked.ask("RotateKeyGroup", ADMIN, keyId="default")
    reply = await asked.ask("DisableVersion", ADMIN, keyId="default", version=1, forSeconds=60)
    assert reply["errorCode"] == "Unavailable"
    assert asked.manager.current.groups["default"].versions[1].status is VersionStatus.ENABLED


async def test_a_ciphertext_that_would_not_fit_the_servers_own_lines_is_not_handed_out() -> None:
    asked = Asked(max_frame_bytes=2048)
    assert (await asked.ask("Encrypt", plaintext=text(bytes(500))))["status"] == "ok"
    assert (await asked.ask("Encrypt", plaintext=text(bytes(1400))))["message"].startswith("plaintext: ")


async def test_what_is_counted_is_written_down_meanwhile_and_at_the_end(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[float] = []

    async def save(usage: Usage) -> None:
        saved.append(trio.current_time())

    monkeypatch.setattr(Usage, "save", save)
    asked = Asked()
    begin = trio.current_time()
    async with trio.open_nursery() as nursery:
        asked.service.start_background(nursery)
        await asked.ask("Encrypt", plaintext="")
        await trio.sleep(2 * USAGE_FLUSH_SECONDS)
        nursery.cancel_scope.cancel()
    assert saved[0] - begin == USAGE_FLUSH_SECONDS
    await asked.ask("Encrypt", plaintext="")
    saved.clear()
    await asked.service.save_usage()
    assert len(saved) == 1
    described = await asked.ask("DescribeKeyGroup", ADMIN, keyId="default")
    assert described["keyGroup"]["versions"][0]["usage"]["operations"] == {"Encrypt": 2}


async def test_the_schedule_runs_on_the_pipeline_that_no_socket_leads_to(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked()
    began: list[object] = []

    async def run(trials: object, pipeline: object) -> None:
        began.append(pipeline)

    monkeypatch.setattr("kms.service.trials.Trials.run", run)
    async with trio.open_nursery() as nursery:
        asked.service.start_background(nursery)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert began == [asked.service.schedule]


def test_who_watches_is_told_of_what_the_server_asks_of_itself_too() -> None:
    server = Server()
    server.service.schedule.session(PEER).serve(b'{"type":"Health"}')
    assert [served.principal and served.principal.name for served in server.seen] == ["(schedule)"]


async def test_what_every_request_rests_on_runs_together(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked()
    began: list[str] = []

    async def run_keyring() -> None:
        began.append("keyring")

    async def run_keeper() -> None:
        began.append("keeper")

    monkeypatch.setattr(asked.manager, "run", run_keyring)
    monkeypatch.setattr(asked.keeper, "run", run_keeper)
    async with trio.open_nursery() as nursery:
        asked.service.start_core(nursery)
    assert sorted(began) == ["keeper", "keyring"]


@pytest.mark.parametrize("is_broken", [False, True], ids=["", "though the audit log cannot be closed"])
async def test_no_key_is_left_when_it_is_closed(is_broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked()
    sealed = (await asked.ask("Encrypt", plaintext=""))["ciphertext"]

    def fail() -> None:
        raise RuntimeError

    if is_broken:
        monkeypatch.setattr(asked.keeper, "close", fail)
        with pytest.raises(RuntimeError):
            asked.service.close()
    else:
        asked.service.close()
    assert (await asked.ask("Decrypt", ciphertext=sealed))["errorCode"] == "DecryptionFailed"

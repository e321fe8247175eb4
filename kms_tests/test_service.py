"""The service as a whole: that its parts are the ones that are put together, and what its end leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from kms.core.audit import AuditKeys
from kms.core.keyring import VersionStatus
from kms.core.secret import Secret
from kms.errors import AuditLogError, UnavailableError
from kms.limits import USAGE_FLUSH_SECONDS
from kms.service.audit_keeper import AuditKeeper
from kms.service.usage import Usage
from kms_tests.in_memory import ADMIN, API, NO_AUDIT, PEER, Server, answered, no_audit, text


async def ask(server: Server, kind: str, token: str = API, **fields: Any) -> dict[str, Any]:
    """As `Server.ask`, for what waits on the way."""
    answer = server.pipeline.session(PEER).serve(json.dumps({"type": kind, "token": token, **fields}).encode())
    return dict(json.loads(await answered(answer)))


def audited(directory: Path) -> AuditKeeper:
    settings = replace(NO_AUDIT, path=directory / "audit.log", is_off=False, is_always_kept=True)
    return AuditKeeper(settings, AuditKeys(Secret(bytearray(64))))


async def test_the_audit_log_is_open_and_written_from_when_somebody_is_admitted(data: Path) -> None:
    server = Server(keeper=audited(data))
    service = server.service
    assert (service.pipeline.trail, service.schedule.trail) == (None, None)
    await service.admit(service.access)
    assert service.pipeline.trail is service.schedule.trail is service.keeper.trail
    assert service.pipeline.trail is not None
    service.close()


async def test_a_log_that_cannot_be_opened_leaves_all_as_it_was(data: Path) -> None:
    (data / "audit.log").write_bytes(b"nonsense\n")
    (data / "audit.log").chmod(0o600)
    server = Server(keeper=audited(data))
    before = server.service.access
    with pytest.raises(AuditLogError):
        await server.service.admit(before._replace(origin="elsewhere"))
    assert server.service.access is before
    assert server.service.pipeline.trail is None
    server.service.close()


async def test_the_end_of_a_timed_disable_is_on_record_before_it_is_saved() -> None:
    async def fail() -> None:
        raise UnavailableError("the disk is full")

    keeper = no_audit()
    keeper.sync = fail  # type: ignore[method-assign]
    server = Server(keeper=keeper)
    await ask(server, "RotateKeyGroup", ADMIN, keyId="default")
    reply = await ask(server, "DisableVersion", ADMIN, keyId="default", version=1, forSeconds=60)
    assert reply["errorCode"] == "Unavailable"
    assert server.manager.current.groups["default"].versions[1].status is VersionStatus.ENABLED


async def test_a_ciphertext_that_would_not_fit_the_servers_own_lines_is_not_handed_out() -> None:
    server = Server(max_frame_bytes=2048)
    assert (await ask(server, "Encrypt", plaintext=text(bytes(500))))["status"] == "ok"
    assert (await ask(server, "Encrypt", plaintext=text(bytes(1400))))["message"].startswith("plaintext: ")


async def test_what_is_counted_is_written_down_meanwhile_and_at_the_end(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[float] = []

    async def save(usage: Usage) -> None:
        saved.append(trio.current_time())

    monkeypatch.setattr(Usage, "save", save)
    server = Server()
    begin = trio.current_time()
    async with trio.open_nursery() as nursery:
        server.service.start_background(nursery)
        await ask(server, "Encrypt", plaintext="")
        await trio.sleep(2 * USAGE_FLUSH_SECONDS)
        nursery.cancel_scope.cancel()
    assert saved[0] - begin == USAGE_FLUSH_SECONDS
    await ask(server, "Encrypt", plaintext="")
    saved.clear()
    await server.service.save_usage()
    assert len(saved) == 1
    described = await ask(server, "DescribeKeyGroup", ADMIN, keyId="default")
    assert described["keyGroup"]["versions"][0]["usage"]["operations"] == {"Encrypt": 2}


async def test_the_schedule_runs_on_the_pipeline_that_no_socket_leads_to(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    began: list[object] = []

    async def run(trials: object, pipeline: object) -> None:
        began.append(pipeline)

    monkeypatch.setattr("kms.service.trials.Trials.run", run)
    async with trio.open_nursery() as nursery:
        server.service.start_background(nursery)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert began == [server.service.schedule]


def test_who_watches_is_told_of_what_the_server_asks_of_itself_too() -> None:
    server = Server()
    server.service.schedule.session(PEER).serve(b'{"type":"Health"}')
    assert [served.principal and served.principal.name for served in server.seen] == ["(schedule)"]


async def test_what_every_request_rests_on_runs_together(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    began: list[str] = []

    async def run_keyring() -> None:
        began.append("keyring")

    async def run_keeper() -> None:
        began.append("keeper")

    monkeypatch.setattr(server.manager, "run", run_keyring)
    monkeypatch.setattr(server.keeper, "run", run_keeper)
    async with trio.open_nursery() as nursery:
        server.service.start_core(nursery)
    assert sorted(began) == ["keeper", "keyring"]


@pytest.mark.parametrize("is_broken", [False, True], ids=["", "though the audit log cannot be closed"])
async def test_no_key_is_left_when_it_is_closed(is_broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    sealed = (await ask(server, "Encrypt", plaintext=""))["ciphertext"]

    def fail() -> None:
        raise RuntimeError

    if is_broken:
        monkeypatch.setattr(server.keeper, "close", fail)
        with pytest.raises(RuntimeError):
            server.service.close()
    else:
        server.service.close()
    assert (await ask(server, "Decrypt", ciphertext=sealed))["errorCode"] == "DecryptionFailed"

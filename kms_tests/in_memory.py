"""A server without a socket or a file: the pipeline over a keyring in memory."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from kms.core.audit import AuditKeys
from kms.core.keyring import (
    EMPTY,
    Command,
    CreateGroup,
    DestroyVersion,
    DisableVersion,
    EnableVersion,
    KeyGroup,
    Keyring,
    KeySlot,
    NewKey,
    RotateGroup,
    apply,
)
from kms.core.policy import AllowAll, KeyAuthorizationPolicy, Operation, Principal
from kms.core.provider import Permit
from kms.core.secret import Secret
from kms.host.entropy import random_key
from kms.limits import MAX_FRAME_BYTES
from kms.service.audit_keeper import AuditKeeper
from kms.service.audit_settings import AuditSettings, DataAudit
from kms.service.authentication import Authenticator
from kms.service.pipeline import Later
from kms.service.served import Peer, Served
from kms.service.service import Service
from kms.service.team import Access
from kms.service.usage import Usage

API, ADMIN = "api-token-canary", "admin-token-canary"
PEER = Peer(3, "unix")


def mint(slot: KeySlot) -> NewKey:
    with random_key() as key:
        return NewKey(slot.spec.load(key), b"wrapped")


class Manager:
    """A `KeyringManager` in memory: another implementation of the seam, as one with etcd behind it would be."""

    def __init__(self) -> None:
        self.current = apply(EMPTY, CreateGroup("default"), now=1, mint=mint)
        self.fault: Exception | None = None

    def _apply(self, command: Command) -> KeyGroup:
        if self.fault is not None:
            raise self.fault
        self.current = apply(self.current, command, now=2, mint=mint)
        return self.current.groups[command.group]

    async def create_group(self, group: str, permit: Permit) -> KeyGroup:
        permit()
        return self._apply(CreateGroup(group))

    async def rotate_group(self, group: str, permit: Permit) -> KeyGroup:
        permit()
        return self._apply(RotateGroup(group))

    async def disable_version(self, group: str, version: int, permit: Permit, *, for_a_time: bool = False) -> KeyGroup:
        permit()
        return self._apply(DisableVersion(group, version, for_a_time))

    async def enable_version(self, group: str, version: int, permit: Permit) -> KeyGroup:
        permit()
        return self._apply(EnableVersion(group, version))

    async def destroy_version(self, group: str, version: int, permit: Permit) -> KeyGroup:
        permit()
        return self._apply(DestroyVersion(group, version))

    def list_groups(self) -> Sequence[KeyGroup]:
        if self.fault is not None:
            raise self.fault
        return tuple(self.current.groups.values())

    def find_group(self, group: str) -> KeyGroup | None:
        return self.current.groups.get(group)

    async def run(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing is held."""


NO_AUDIT: Final = AuditSettings(
    Path("/nowhere/audit.log"), DataAudit.ALL, is_off=True, is_always_kept=False, accept_rollback=False
)
SHARED: Final = Authenticator(Secret(bytearray(API.encode())), Secret(bytearray(ADMIN.encode())))


def usage_of(keyring: Keyring) -> Usage:
    """Counted from a clock that stands still, and never written to a file."""
    return Usage(keyring, None, Path("/nowhere/usage"), lambda: 1000.5)


def no_audit() -> AuditKeeper:
    return AuditKeeper(NO_AUDIT, AuditKeys(Secret(bytearray(64))))


class Server:
    """The pipeline as a function from object to object."""

    def __init__(
        self,
        policy: KeyAuthorizationPolicy | None = None,
        access: Access | None = None,
        keeper: AuditKeeper | None = None,
        max_frame_bytes: int = MAX_FRAME_BYTES,
    ) -> None:
        """Whoever has a shared token may do what `policy` allows, by default everything; or `access` decides."""
        access = access or Access(SHARED, policy or AllowAll(), "nowhere", is_from_file=False, sha256="")
        self.manager = Manager()
        self.usage = usage_of(self.manager.current)
        self.seen: list[Served] = []
        self.keeper = keeper or no_audit()
        self.service = Service(
            self.manager,
            self.keeper,
            self.usage,
            access,
            observers=[self.seen.append],
            max_frame_bytes=max_frame_bytes,
        )
        self.pipeline = self.service.pipeline

    def line(self, line: bytes, peer: Peer = PEER) -> dict[str, Any]:
        reply: dict[str, Any] = json.loads(finish(self.pipeline.session(peer).serve(line)))
        return reply

    def ask(self, kind: str, token: str = API, **fields: Any) -> dict[str, Any]:
        return self.line(json.dumps({"type": kind, "token": token, **fields}).encode())

    def admin(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self.ask(kind, ADMIN, **fields)


async def unrecorded() -> None:
    """In the place of an audit log that is made durable."""


async def answered(answer: bytes | Later) -> bytes:
    """The line of a reply, whichever way it is made."""
    reply = answer if isinstance(answer, bytes) else await answer()
    return reply if isinstance(reply, bytes) else b"".join([piece async for piece in reply.pieces()])


def finish(answer: bytes | Later) -> bytes:
    """The same for one that waits for nothing."""
    with pytest.raises(StopIteration) as stop:
        answered(answer).send(None)
    value = stop.value.value
    assert isinstance(value, bytes)
    return value


def text(data: bytes) -> str:
    return b64encode(data).decode()


class Only(AllowAll):
    """Allows just what it is told."""

    def __init__(self, *allowed: tuple[Operation, str | None]) -> None:
        self.allowed = allowed

    def allows(self, principal: Principal, operation: Operation, group: str | None, aad: bytes) -> bool:
        return (operation, group) in self.allowed

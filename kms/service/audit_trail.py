"""Who did what, on record before anybody hears of it: between the pipeline and the audit log.

- A change of keys is on record twice: `begun` when the actor takes it up, on disk before the keystore is saved, and its
  outcome before the reply is sent. Between the two a crash may come, and then the first shows what may have happened.
- What is answered at once (the data plane, lists, every refusal) is on record before the reply is sent: one write for all
  replies of a turn, and for the turns of all connections that end in the same round of the event loop.
- No record, no answer: what cannot be put on record is answered `Unavailable`, Health alone as always. A change that has
  been made by then is not taken back; its outcome is kept, and is the first thing in the log once that can be written.
- Of the data plane everything is recorded, what was refused, or nothing.
- Of refusals that repeat themselves only the first, and then a number each second (`kms.service.refusals`): the one
  exception to "no record, no answer".
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from msgspec import structs

from kms.core import ciphertext
from kms.core.audit import EventRecord, OperationRecord, Record
from kms.core.names import shown
from kms.core.policy import Plane, Principal
from kms.errors import DecryptionFailedError, UnavailableError
from kms.service.audit_settings import DataAudit
from kms.service.refusals import Kind, Refusals
from kms.service.served import Peer, Served, Turn
from kms.wire.messages import (
    CiphertextReply,
    CreateKeyGroup,
    DataKeyReply,
    Decrypt,
    DescribeKeyGroup,
    DestroyVersion,
    DisableVersion,
    EnableVersion,
    Encrypt,
    GenerateDataKey,
    GenerateDataKeyWithoutPlaintext,
    GenerateRandom,
    GroupRequest,
    Health,
    KeyGroupReply,
    ListKeyGroups,
    Ping,
    ReEncrypt,
    Reload,
    Reply,
    Request,
    RotateKeyGroup,
    Status,
    VersionRequest,
    WrappedDataKeyReply,
    group_of,
)

_CONTROL: Final = Plane.CONTROL


class Log(Protocol):
    """The file; see `kms.storage.audit_log.AuditLog`."""

    @property
    def is_failing(self) -> bool:
        """Whether it can be written, as far as is known."""
        ...

    @property
    def is_scarce(self) -> bool:
        """Whether the disk has no more space for it than what is kept."""
        ...

    def write(self, records: Sequence[Record], *, keep: bool = False) -> None:
        """Append all of them, or none, which raises `UnavailableError`; with `keep` they are written later then.

        With no records it only tries anew whether a log that was failing can be written.
        """
        ...

    def sync(self) -> None:
        """Make what was written durable. From any thread. Raises `UnavailableError`."""
        ...


class AuditTrail:
    """Makes records of what was served, and puts them into the log."""

    def __init__(self, log: Log, data: DataAudit, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._refusals = Refusals(monotonic)
        self._wants_all = data is DataAudit.ALL
        self._wants_refused = data is not DataAudit.NONE

    def check(self) -> None:
        """Raise `UnavailableError` when nothing may be answered now, since it could not be put on record."""
        if self._log.is_failing:
            self._log.write(())

    def begin(self, peer: Peer, number: int, request: Request, principal: Principal | None) -> None:
        """Put on record that a change of keys is taken up; raises `UnavailableError`, and then it must not be."""
        self._log.write(
            [_record(Served(peer, number, request, type(request), principal, None, None, 0, request.request_id))]
        )

    def finish(self, served: Served) -> None:
        """Put the outcome of a change on record, now or as soon as that can be done; raises `UnavailableError`."""
        self._log.write([_record(served)], keep=True)

    def write(self, turns: Sequence[Turn]) -> None:
        """Put on record what is wanted of them, all or nothing; raises `UnavailableError`.

        Of refusals that repeat themselves only the number, a second later.
        """
        wanted = [
            served
            for turn in turns
            for _, served in turn
            if served is not None
            and (self._wants_all or self._wants(served))
            and (served.error is None or self._is_put_on_record(served))
        ]
        if not wanted:
            return
        try:
            self._log.write([record for served in wanted for record in _records(served)])
        except UnavailableError:
            for served in wanted:
                if served.error is not None:
                    self._refusals.forget(served)
            raise

    def _is_put_on_record(self, refused: Served) -> bool:
        if not self._refusals.is_first(refused):
            return False
        if refused.principal is None and self._log.is_scarce:
            # What space is left is not for strangers: they could fill it, a line a second.
            self._refusals.count(refused)
            return False
        return True

    def write_repeats(self, *, is_last: bool = False) -> None:
        """Put on record how many refusals were only counted, now or as soon as that can be done.

        Where space is short, that is once there is some again, or when `is_last`.
        """
        if self._log.is_scarce and not is_last:
            return
        repeats = self._refusals.take()
        if repeats:
            with contextlib.suppress(UnavailableError):
                self._log.write([_counted(kind, count) for kind, count in repeats], keep=True)

    def write_principals(self, sha256: str) -> None:
        """Put on record which file of principals decides from here on, now or as soon as that can be done.

        `sha256` is the hexadecimal digest of its content; empty where there is none.
        """
        self.write_repeats()
        with contextlib.suppress(UnavailableError):
            self._log.write([EventRecord(event="Principals", principals_sha256=sha256)], keep=True)

    def _wants(self, served: Served) -> bool:
        # What has no plane, as its type could not be told, is a refusal that both planes' rules want.
        if served.kind is None or served.kind.plane is _CONTROL:
            return True
        return self._wants_refused and served.error is not None


def _counted(kind: Kind, count: int) -> EventRecord:
    return EventRecord(
        event="Refusals",
        count=count,
        principal=kind.principal,
        uid=kind.uid,
        transport=None if kind.transport == "-" else kind.transport,
        operation=None if kind.operation == "-" else kind.operation,
        error_code=None if kind.code == "-" else kind.code,
    )


def _records(served: Served) -> list[OperationRecord]:
    """One record; and, of a data key that is wrapped under several groups, one for each of the others."""
    record, request = _record(served), served.request
    if not isinstance(request, GenerateDataKey) or not request.also_key_ids or served.principal is None:
        return [record]
    made = getattr(served.reply, "wrapped_data_keys", None) or [None] * len(request.also_key_ids)
    return [record] + [
        structs.replace(
            record, group=shown(group_of(name)), version=None if wrapped is None else ciphertext.version_of(wrapped)
        )
        for name, wrapped in zip(request.also_key_ids, made, strict=True)
    ]


def _record(served: Served) -> OperationRecord:
    peer, request, kind, error = served.peer, served.request, served.kind, served.error
    pid, uid, _ = peer.credentials or (None, None, None)
    if served.principal is None and error is not None:
        # Of who is not authenticated no text is kept: whoever they are, they would write our log.
        return OperationRecord(
            connection=peer.connection,
            request=served.number,
            uid=uid,
            pid=pid,
            port=peer.port,
            operation="-" if kind is None else _NAMES[kind],
            outcome="refused",
            error_code=error.code,
        )
    group, version, from_group, from_version = _NO_KEY if request is None else _KEYS[type(request)](request, served.reply)
    return OperationRecord(
        connection=peer.connection,
        request=served.number,
        request_id=served.request_id,
        principal=None if served.principal is None else served.principal.name,
        uid=uid,
        pid=pid,
        port=peer.port,
        operation="-" if kind is None else _NAMES[kind],
        group=group,
        version=version,
        from_group=from_group,
        from_version=from_version,
        outcome="refused" if error is not None else "begun" if served.reply is None else "ok",
        error_code=None if error is None else error.code,
    )


_Key = tuple[str | None, int | None, str | None, int | None]
"""The key of a request: group and version that were used, else what the request claims; and those that were moved from."""

_NO_KEY: Final[_Key] = (None, None, None, None)


def _key_of_encrypt(request: Encrypt, reply: CiphertextReply | None) -> _Key:
    version = None if reply is None else ciphertext.version_of(reply.ciphertext)
    return shown(group_of(request.key_id)), version, None, None


def _key_of_data_key(request: GenerateDataKey, reply: DataKeyReply | WrappedDataKeyReply | None) -> _Key:
    version = None if reply is None else ciphertext.version_of(reply.wrapped_data_key)
    return shown(group_of(request.key_id)), version, None, None


def _key_of_decrypt(request: Decrypt, reply: Reply | None) -> _Key:
    return *_claimed(request.ciphertext), None, None


def _key_of_re_encrypt(request: ReEncrypt, reply: CiphertextReply | None) -> _Key:
    version = None if reply is None else ciphertext.version_of(reply.ciphertext)
    return shown(group_of(request.key_id)), version, *_claimed(request.ciphertext)


def _claimed(blob: bytes) -> tuple[str | None, int | None]:
    try:
        group, version = ciphertext.named(blob)
    except DecryptionFailedError:
        return None, None
    return shown(group), version


def _key_of_group(request: GroupRequest, reply: KeyGroupReply | None) -> _Key:
    return shown(request.key_id), None if reply is None else reply.key_group.active_version, None, None


def _key_of_version(request: VersionRequest, reply: Reply | None) -> _Key:
    return shown(request.key_id), request.version, None, None


def _no_key(request: Request, reply: Reply | None) -> _Key:
    return _NO_KEY


_KEYS: Final[dict[type[Request], Callable[[Any, Any], _Key]]] = {
    Health: _no_key,
    Ping: _no_key,
    GenerateDataKey: _key_of_data_key,
    GenerateDataKeyWithoutPlaintext: _key_of_data_key,
    GenerateRandom: _no_key,
    Encrypt: _key_of_encrypt,
    Decrypt: _key_of_decrypt,
    ReEncrypt: _key_of_re_encrypt,
    CreateKeyGroup: _key_of_group,
    RotateKeyGroup: _key_of_group,
    ListKeyGroups: _no_key,
    DescribeKeyGroup: _key_of_group,
    Status: _no_key,
    Reload: _no_key,
    DisableVersion: _key_of_version,
    EnableVersion: _key_of_version,
    DestroyVersion: _key_of_version,
}
"""`Any`, since each takes the request and the reply of its own kind."""

_NAMES: Final = {kind: kind.operation.value for kind in _KEYS}
"""An enum's `value` takes 0.1 us."""

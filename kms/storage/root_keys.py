"""The sub-keys of a root key: what a keystore is wrapped, checked and MACed with, and what its audit log is under."""

from __future__ import annotations

import hmac
from types import TracebackType
from typing import Final, Self

from kms.core import derive
from kms.core.audit import AuditKeys
from kms.core.ciphertext import with_length
from kms.core.envelope import CommittingKey, EnvelopeKey
from kms.core.keyring import KeySlot
from kms.core.secret import Secret
from kms.errors import DecryptionFailedError

_ROOT_CHECK: Final = b"mini-kms/root-check/v4"
_LABEL_WRAP: Final = "mini-kms/v4/wrap-kek"
_LABEL_CHECK: Final = "mini-kms/v4/root-check"
_LABEL_MAC: Final = "mini-kms/v4/keystore-mac"
_LABEL_JOURNAL: Final = "mini-kms/v4/journal-mac"
_LABEL_AUDIT_MAC: Final = "mini-kms/v3/audit-mac"
_LABEL_AUDIT_WRAP: Final = "mini-kms/v3/audit-key-wrap"
"""The audit log goes on over a change of the keystore's format, and so do its keys."""


class RootKeys:
    """The sub-keys of one root key."""

    __slots__ = ("_check", "_journal", "_mac", "_wrap", "audit")

    def __init__(self, root: Secret) -> None:
        """Derive them; `root` is not kept, and the caller should wipe it."""
        self._mac = derive.sub_key(root, _LABEL_MAC)
        self._journal = derive.sub_key(root, _LABEL_JOURNAL)
        with derive.sub_key(root, _LABEL_WRAP) as wrap, derive.sub_key(root, _LABEL_CHECK) as check:
            self._wrap = CommittingKey(wrap)
            self._check = EnvelopeKey(check)
        with derive.sub_key(root, _LABEL_AUDIT_MAC) as mac, derive.sub_key(root, _LABEL_AUDIT_WRAP) as wrap:
            self.audit: Final = AuditKeys.join(mac, wrap)

    def wrap(self, slot: KeySlot, key: Secret) -> bytes:
        """`key` sealed for this slot and no other."""
        with key.view() as view:
            return self._wrap.seal(view, _bound(slot))

    def unwrap(self, slot: KeySlot, wrapped: bytes) -> Secret:
        """The key of this slot; raises `DecryptionFailedError` for one that was wrapped for another."""
        return self._wrap.open_secret(wrapped, _bound(slot))

    def seal_check(self) -> bytes:
        """What tells later whether a root key is this one."""
        return self._check.seal(_ROOT_CHECK, b"")

    def is_right(self, root_check: bytes) -> bool:
        """Whether `root_check` was sealed under this root key."""
        try:
            return self._check.open(root_check, b"") == _ROOT_CHECK
        except DecryptionFailedError:
            return False

    def mac(self, message: bytes | bytearray) -> bytes:
        """HMAC-SHA256 for a keystore file, 32 bytes."""
        with self._mac.view() as key:
            return hmac.digest(key, message, "sha256")

    def journal_mac(self, message: bytes) -> bytes:
        """HMAC-SHA256 for a line of a journal, 32 bytes."""
        with self._journal.view() as key:
            return hmac.digest(key, message, "sha256")

    def wipe(self) -> None:
        self._mac.wipe()
        self._journal.wipe()
        self._wrap.wipe()
        self._check.wipe()
        self.audit.wipe()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.wipe()


def _bound(slot: KeySlot) -> bytes:
    """What a wrapped key is authenticated with: each part with its length, or of a length that never differs."""
    name, version = slot.group.encode("utf-8"), slot.version.to_bytes(8, "big")
    return with_length(name) + version + with_length(slot.spec.name.encode("ascii")) + slot.uuid

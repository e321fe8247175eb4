"""The seams that handlers depend on.

Handlers never see a keyring, a file or a key. A root key that lives in an HSM, or a keyring that lives in etcd, is
one new class that implements one of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from kms.core.ciphertext import Ciphertext, Purpose
from kms.core.keyring import KeyGroup, Keyring, KeyVersion
from kms.core.usage import VersionUsage


class MasterKeyProvider(Protocol):
    """Uses keys, for the data plane. Answers at once: it neither waits nor blocks."""

    def seal(self, group: str, plaintext: bytes, aad: bytes, purpose: Purpose) -> bytes:
        """A ciphertext 03 under the group's ACTIVE version; raises `InvalidRequestError` for an unknown group."""
        ...

    def open(self, sealed: Ciphertext, aad: bytes, only_of: str | None = None) -> bytes:
        """The plaintext; raises `DecryptionFailedError` whatever is wrong, also when its group is not `only_of`.

        To refuse takes as long, whatever the reason.
        """
        ...


class KeyringHolder(Protocol):
    """Who has the keyring that is in force."""

    @property
    def current(self) -> Keyring: ...


Permit = Callable[[], None]
"""Raises the `WireError` of a caller who may not do what it asked, or may no longer."""


class KeyringManager(Protocol):
    """Changes keys, for the control plane. What it answers is durable before it answers.

    Each raises `InvalidRequestError` when the group or version does not exist or the change is refused. `permit` is
    called when the change is taken up, which may be a save later than it was asked for: what it raises is the answer.
    """

    async def create_group(self, group: str, permit: Permit) -> KeyGroup: ...

    async def rotate_group(self, group: str, permit: Permit) -> KeyGroup: ...

    async def disable_version(self, group: str, version: int, permit: Permit, *, for_a_time: bool = False) -> KeyGroup:
        """`for_a_time` refuses a version that is DISABLED already."""
        ...

    async def enable_version(self, group: str, version: int, permit: Permit) -> KeyGroup: ...

    async def destroy_version(self, group: str, version: int, permit: Permit) -> KeyGroup: ...

    def list_groups(self) -> Sequence[KeyGroup]: ...

    def find_group(self, group: str) -> KeyGroup | None: ...


class UsageKeeper(Protocol):
    """Knows how keys are used, and finds out who still needs one by disabling it for a time."""

    def usage_of(self, version: KeyVersion) -> VersionUsage:
        """What is known of a version that is, or was, in the keyring."""
        ...

    async def disable_version_for(
        self, group: str, version: int, seconds: int, permit: Permit, *, by: str, most: int | None = None
    ) -> int:
        """Disable a version until `seconds` from now, and let it be enabled again then; when that is, in epoch seconds.

        Both the disabling and its end are durable when this returns. Asked for a version that is disabled for a time
        already, it moves that end. `by` is the name of whoever asks, and `most` how many they may have so at once.
        Raises as `KeyringManager.disable_version`, and `LimitExceededError`.
        """
        ...

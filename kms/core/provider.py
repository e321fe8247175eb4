"""The two seams that handlers depend on.

Handlers never see a keyring, a file or a key. A root key that lives in an HSM, or a keyring that lives in etcd, is
one new class that implements one of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kms.core.ciphertext import Ciphertext
from kms.core.keyring import KeyGroup


class MasterKeyProvider(Protocol):
    """Uses keys, for the data plane. Answers at once: it neither waits nor blocks."""

    def seal(self, group: str, plaintext: bytes, aad: bytes) -> bytes:
        """A client ciphertext under the group's ACTIVE version; raises `InvalidRequestError` for an unknown group."""
        ...

    def open(self, ciphertext: Ciphertext, aad: bytes) -> bytes:
        """The plaintext; raises `DecryptionFailedError` whatever is wrong."""
        ...


class KeyringManager(Protocol):
    """Changes keys, for the control plane. What it answers is durable before it answers.

    Each raises `InvalidRequestError` when the group or version does not exist or the change is refused.
    """

    async def create_group(self, group: str) -> KeyGroup: ...

    async def rotate_group(self, group: str) -> KeyGroup: ...

    async def disable_version(self, group: str, version: int) -> KeyGroup: ...

    async def enable_version(self, group: str, version: int) -> KeyGroup: ...

    async def destroy_version(self, group: str, version: int) -> KeyGroup: ...

    def list_groups(self) -> Sequence[KeyGroup]: ...

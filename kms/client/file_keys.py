"""The data key of a file: the server makes and opens it, and never sees the file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kms.client.protocol import DataKey
from kms.core.secret import Secret
from kms.errors import ProtocolError
from kms.limits import KEY_BYTES


class FileClient(Protocol):
    """What is needed of a client; `KmsClient` has it."""

    def generate_data_key(
        self, key_id: str | None = None, aad: bytes = b"", *, also_key_ids: Sequence[str] = ()
    ) -> DataKey: ...

    def decrypt(self, ciphertext: bytes, aad: bytes = b"", *, source_key_id: str | None = None) -> bytes: ...

    def reencrypt(self, ciphertext: bytes, key_id: str, aad: bytes = b"", *, source_key_id: str | None = None) -> bytes: ...


def new_data_key(
    client: FileClient, key_id: str | None, aad: bytes, also_key_ids: Sequence[str] = ()
) -> tuple[list[bytes], Secret]:
    """A fresh data key of 32 bytes, wrapped under each of the groups and in the clear."""
    made = client.generate_data_key(key_id, aad, also_key_ids=also_key_ids)
    return [made.wrapped, *made.also], _checked(made.plaintext)


def data_key(client: FileClient, wrapped: bytes, aad: bytes, source_key_id: str | None) -> Secret:
    """The data key of 32 bytes that `wrapped` holds; raises what `KmsClient.decrypt` raises."""
    return _checked(client.decrypt(wrapped, aad, source_key_id=source_key_id))


def _checked(plaintext: bytes) -> Secret:
    key = Secret(bytearray(plaintext))
    if len(key) != KEY_BYTES:
        key.wipe()
        raise ProtocolError(f"the server's data key does not have {KEY_BYTES} bytes")
    return key

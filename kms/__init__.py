"""mini-kms: a key management service for one machine or one small team.

The public names are the clients, the data key they return, and the errors they raise:

>>> from kms import KmsClient
>>> with KmsClient.connect_unix("/path/kms.sock", token="...") as client:  # doctest: +SKIP
...     ciphertext = client.encrypt(b"secret", key_id="billing")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kms.errors import (
    AuthFailedError,
    DecryptionFailedError,
    FrameTooLargeError,
    InputError,
    InternalError,
    InvalidRequestError,
    KmsError,
    LimitExceededError,
    ProtocolError,
    ServerUnreachableError,
    ThrottledError,
    UnauthorizedError,
    UnavailableError,
    UnknownServerError,
    WireError,
)

if TYPE_CHECKING:
    from kms.client.async_ import AsyncKmsClient
    from kms.client.blocking import KmsClient
    from kms.client.protocol import DataKey

__all__ = [
    "AsyncKmsClient",
    "AuthFailedError",
    "DataKey",
    "DecryptionFailedError",
    "FrameTooLargeError",
    "InputError",
    "InternalError",
    "InvalidRequestError",
    "KmsClient",
    "KmsError",
    "LimitExceededError",
    "ProtocolError",
    "ServerUnreachableError",
    "ThrottledError",
    "UnauthorizedError",
    "UnavailableError",
    "UnknownServerError",
    "WireError",
]

_LAZY = {
    "AsyncKmsClient": "kms.client.async_",
    "DataKey": "kms.client.protocol",
    "KmsClient": "kms.client.blocking",
}


def __getattr__(name: str) -> Any:
    # Lazy (PEP 562), so that a program which uses the blocking client, `kms-client` above all,
    # never pays for importing trio.
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'kms' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(module), name)

"""mini-kms: a key management service for one machine or one small team.

The public names are the clients, what they return, and the errors they raise:

>>> from kms import KmsClient
>>> with KmsClient.connect_unix("/path/kms.sock", token="...") as client:  # doctest: +SKIP
...     ciphertext = client.encrypt(b"secret", key_id="billing")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kms.errors import (
    AlteredFileError,
    AuthFailedError,
    ConfigError,
    CutOffError,
    DecryptionFailedError,
    FileAccessError,
    FrameTooLargeError,
    InputError,
    InputMissingError,
    InternalError,
    InvalidRequestError,
    KmsError,
    LimitExceededError,
    OutcomeUnknownError,
    ProtocolError,
    ReaderGoneError,
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
    from kms.client.protocol import DataKey, WrappedDataKey
    from kms.core.usage import Operations, Refusals, TimedDisable, VersionUsage
    from kms.wire.messages import KeyGroupView, RuleView, ServerView, StatusView, VersionState, VersionView

    __version__: str

__all__ = [
    "AlteredFileError",
    "AsyncKmsClient",
    "AuthFailedError",
    "ConfigError",
    "CutOffError",
    "DataKey",
    "DecryptionFailedError",
    "FileAccessError",
    "FrameTooLargeError",
    "InputError",
    "InputMissingError",
    "InternalError",
    "InvalidRequestError",
    "KeyGroupView",
    "KmsClient",
    "KmsError",
    "LimitExceededError",
    "Operations",
    "OutcomeUnknownError",
    "ProtocolError",
    "ReaderGoneError",
    "Refusals",
    "RuleView",
    "ServerUnreachableError",
    "ServerView",
    "StatusView",
    "ThrottledError",
    "TimedDisable",
    "UnauthorizedError",
    "UnavailableError",
    "UnknownServerError",
    "VersionState",
    "VersionUsage",
    "VersionView",
    "WireError",
    "WrappedDataKey",
    "__version__",
]

_LAZY = {
    "StatusView": "kms.wire.messages",
    "ServerView": "kms.wire.messages",
    "RuleView": "kms.wire.messages",
    "AsyncKmsClient": "kms.client.async_",
    "DataKey": "kms.client.protocol",
    "KeyGroupView": "kms.wire.messages",
    "KmsClient": "kms.client.blocking",
    "Operations": "kms.core.usage",
    "Refusals": "kms.core.usage",
    "TimedDisable": "kms.core.usage",
    "VersionState": "kms.wire.messages",
    "VersionUsage": "kms.core.usage",
    "VersionView": "kms.wire.messages",
    "WrappedDataKey": "kms.client.protocol",
}


def __getattr__(name: str) -> Any:
    # Lazy (PEP 562), so that a program which uses the blocking client, `kms-client` above all,
    # never pays for importing trio, nor for asking which version this is.
    from importlib import import_module

    if name == "__version__":
        return import_module("kms.host.package").version()
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'kms' has no attribute {name!r}")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Which formats of a keystore file are read here, and by what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import msgspec
from msgspec import Struct

from kms.core.keyring import Keyring
from kms.core.secret import Secret
from kms.errors import KeystoreError
from kms.storage import format2, format3, format4, journal
from kms.storage.content import Pair
from kms.storage.root_keys import RootKeys
from kms.storage.stored import Opener, decode_json

_OPENERS: Final[Mapping[int, Callable[[Pair, bool], Opener]]] = {
    format2.FORMAT: lambda pair, _: format2.Sealed(pair.file.raw),
    format3.FORMAT: lambda pair, _: format3.Sealed(pair.file.raw),
    format4.FORMAT: lambda pair, salvages: format4.Sealed(pair.file.raw, pair.journal_raw, salvages=salvages),
}


class _Head(Struct, rename="camel"):
    format_version: int


_head_decoder: Final = msgspec.json.Decoder(_Head)


def version_of(raw: bytes) -> int:
    """The format a keystore file says it has; raises `KeystoreError` when it is none at all."""
    return decode_json(raw, _head_decoder).format_version


def opener(pair: Pair, *, salvages: bool = False) -> Opener:
    """What opens a keystore; raises `KeystoreError` when it is of no known format."""
    version = version_of(pair.file.raw)
    make = _OPENERS.get(version)
    if make is None:
        raise KeystoreError(
            f"it has the format {version}, of a later release or of none: use the release that wrote it, or put back a "
            "good copy. Nothing was changed"
        )
    if version != format4.FORMAT:
        journal.check_unnamed(pair.journal_raw)
    return make(pair, salvages)


def opened(opener: Opener, root: Secret, keys: RootKeys) -> Keyring:
    """The keyring under `root`, its keys wrapped as the present format has them; raises as `Opener.open`."""
    # What is of that format is wrapped so already.
    return opener.open(root) if isinstance(opener, format4.Sealed) else opener.open(root, keys.wrap)

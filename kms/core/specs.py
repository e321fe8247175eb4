"""The kinds of keys there are: for each its name, what it may be used for, and how one is made and taken up.

A new kind is one entry here, and the file of its family. What a keystore, a request or a policy says of kinds is looked up
here, and what is not here is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final, NamedTuple

from kms.core.kek import Kek
from kms.core.secret import Secret
from kms.limits import KEY_BYTES


class KeyUse(StrEnum):
    """What the keys of a group are for. Of a kind that could be used for two things a group is for one of them."""

    ENCRYPT = "encrypt"


RandomSecret = Callable[[int], Secret]
"""So many random bytes, in a buffer that can be wiped."""

Key = Kek
"""A key that is ready to be used: it holds its bytes where only OpenSSL has them, and can be wiped."""


class KeySpec(NamedTuple):
    """One kind of keys."""

    name: str
    uses: tuple[KeyUse, ...]
    """The first is the usual one."""
    make: Callable[[RandomSecret], Secret]
    """Fresh material, in the form in which a keystore wraps it."""
    load: Callable[[Secret], Key]
    """The key of some material, which the caller should wipe. Raises `ValueError` for what is not of this kind."""


AES_256: Final = KeySpec("AES_256", (KeyUse.ENCRYPT,), lambda random: random(KEY_BYTES), Kek)
DEFAULT: Final = AES_256

SPECS: Final[Mapping[str, KeySpec]] = MappingProxyType({spec.name: spec for spec in (AES_256,)})
"""Every kind, by its name."""

"""What the formats of a keystore have in common: JSON that is authenticated before it is believed, and made a keyring.

Binary fields stay base64 *text* until what holds them is authenticated, so that the MAC covers their every character.
"""

from __future__ import annotations

import hmac
import os
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeVar
from uuid import UUID

import msgspec
from msgspec import Struct

from kms.core import derive
from kms.core.derive import KdfParameters
from kms.core.keyring import KeyGroup, Keyring, KeySlot, KeyVersion, VersionStatus
from kms.core.names import is_possible_name
from kms.core.secret import Secret
from kms.core.specs import AES_256, SPECS
from kms.errors import DecryptionFailedError, KeystoreError
from kms.limits import MAX_KEY_GROUPS, MAX_VERSION, MAX_VERSIONS_PER_GROUP, UUID_BYTES

ALTERED: Final = "the keystore was altered or damaged; nothing was changed. Put back a good copy"
WRONG_PASSPHRASE: Final = "wrong passphrase for this keystore; nothing was changed"  # noqa: S105 - a message

T = TypeVar("T")
Wrap = Callable[[KeySlot, Secret], bytes]
Unwrap = Callable[[KeySlot, bytes], Secret]


class Kdf(Struct, forbid_unknown_fields=True):
    """How a passphrase becomes the root key, as formats 3 and 4 say it."""

    name: Literal["argon2id"]
    version: Literal[0x13]
    memoryKiB: int  # noqa: N815 - the format's own name, which no renaming rule makes
    iterations: int
    parallelism: int
    salt: str

    def header(self) -> KdfHeader:
        """Raises `KeystoreError` for an impossible derivation."""
        header = KdfHeader(KdfParameters(self.memoryKiB, self.iterations, self.parallelism), from_text(self.salt))
        header.parameters.check()
        return header


@dataclass(frozen=True, slots=True)
class KdfHeader:
    """How a passphrase becomes the root key of one keystore."""

    parameters: KdfParameters
    salt: bytes

    def derive(self, passphrase: Secret) -> Secret:
        return derive.root_key(passphrase, self.salt, self.parameters)

    def stored(self) -> Kdf:
        """As a keystore says it."""
        costs = self.parameters
        return Kdf(
            "argon2id", derive.ARGON2_VERSION_13, costs.memory_kib, costs.iterations, costs.parallelism, to_text(self.salt)
        )


class StoredVersion(Struct, forbid_unknown_fields=True, rename="camel", gc=False):
    """A key version as format 4 holds it; what earlier formats hold is made into this."""

    version: int
    status: str
    created_at_epoch_sec: int
    wrapped_key: str | None


class StoredGroup(Struct, forbid_unknown_fields=True, rename="camel", gc=False):
    """A key group, likewise."""

    key_id: str
    key_uuid: str
    spec: str
    use: str
    created_at_epoch_sec: int
    active_version: int
    versions: list[StoredVersion]


def stored_group(key_id: str, created_at: int, active_version: int, versions: list[StoredVersion]) -> StoredGroup:
    """A group of a format that knew one kind of keys, and no UUIDs: it gets one."""
    uuid = uuid_text(os.urandom(UUID_BYTES))
    return StoredGroup(key_id, uuid, AES_256.name, AES_256.uses[0].value, created_at, active_version, versions)


class Opener(Protocol):
    """A keystore file that is parsed and not yet believed: `header` may be used, then `open` tells the rest."""

    header: KdfHeader

    @property
    def version(self) -> int:
        """The number of its format."""
        ...

    @property
    def notes(self) -> list[str]:
        """What `open` could not keep as it was, for people."""
        ...

    def authenticate(self, root: Secret) -> int:
        """The generation. Raises `WrongPassphraseError`, or `KeystoreError` when a MAC is wrong."""
        ...

    def open(self, root: Secret, rewrap: Wrap) -> Keyring:
        """The keyring, its keys wrapped by `rewrap` where they were not wrapped so before.

        Raises `WrongPassphraseError`, or `KeystoreError` when a MAC or anything behind it is wrong.
        """
        ...


def decode_json(raw: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """`raw` as a struct, its every byte strict UTF-8; raises `KeystoreError`."""
    try:
        raw.decode("utf-8")
        return decoder.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise KeystoreError(ALTERED) from None


def check_mac(expected: bytes, presented: str) -> None:
    """Raise `KeystoreError` unless the MAC in the file, as text, is that of `expected`."""
    if not hmac.compare_digest(b64encode(expected), presented.encode("utf-8", "replace")):
        raise KeystoreError(ALTERED)


def build_keyring(generation: int, groups: Iterable[StoredGroup], unwrap: Unwrap, rewrap: Wrap | None = None) -> Keyring:
    """The keyring of authenticated groups, each key unwrapped; raises `KeystoreError` where one breaks a rule.

    With `rewrap` the keys are wrapped anew: for another format, or another root key.
    """
    built: dict[str, KeyGroup] = {}
    uuids: set[bytes] = set()
    for stored in groups:
        group = _build_group(stored, unwrap, rewrap)
        if group.key_id in built or group.uuid in uuids:
            raise KeystoreError(ALTERED)
        uuids.add(group.uuid)
        built[group.key_id] = group
    if generation < 0 or len(built) > MAX_KEY_GROUPS:
        raise KeystoreError(ALTERED)
    return Keyring(generation, built)


def _build_group(stored: StoredGroup, unwrap: Unwrap, rewrap: Wrap | None) -> KeyGroup:
    spec = SPECS.get(stored.spec)
    if not is_possible_name(stored.key_id) or len(stored.versions) > MAX_VERSIONS_PER_GROUP or spec is None:
        raise KeystoreError(ALTERED)
    use = next((use for use in spec.uses if use.value == stored.use), None)
    if use is None:
        raise KeystoreError(ALTERED)
    uuid = uuid_of(stored.key_uuid)
    versions: dict[int, KeyVersion] = {}
    for version in sorted(stored.versions, key=lambda v: v.version):
        if version.version in versions:
            raise KeystoreError(ALTERED)
        slot = KeySlot(stored.key_id, uuid, spec, version.version)
        versions[version.version] = _build_version(slot, version, unwrap, rewrap)
    active = [v for v in versions.values() if v.status is VersionStatus.ACTIVE]
    if len(active) != 1 or active[0].version != stored.active_version:
        raise KeystoreError(ALTERED)
    return KeyGroup(stored.key_id, uuid, spec, use, stored.created_at_epoch_sec, active[0], versions)


def _build_version(slot: KeySlot, stored: StoredVersion, unwrap: Unwrap, rewrap: Wrap | None) -> KeyVersion:
    status = VersionStatus.__members__.get(stored.status)
    if status is None or not 1 <= stored.version <= MAX_VERSION:
        raise KeystoreError(ALTERED)
    if (stored.wrapped_key is None) is not (status is VersionStatus.DESTROYED):
        raise KeystoreError(ALTERED)
    created_at = stored.created_at_epoch_sec
    if stored.wrapped_key is None:
        return KeyVersion.build(slot.group, stored.version, status, created_at, None, None)
    wrapped = from_text(stored.wrapped_key)
    try:
        with unwrap(slot, wrapped) as material:
            key = slot.spec.load(material)
            if rewrap is not None:
                wrapped = rewrap(slot, material)
    except (DecryptionFailedError, ValueError):
        raise KeystoreError(ALTERED) from None
    return KeyVersion.build(slot.group, stored.version, status, created_at, wrapped, key)


def uuid_of(text: str) -> bytes:
    """The 16 bytes of a UUID in its one usual form; raises `KeystoreError`."""
    try:
        uuid = UUID(text)
    except ValueError:
        raise KeystoreError(ALTERED) from None
    if str(uuid) != text:
        raise KeystoreError(ALTERED)
    return uuid.bytes


def uuid_text(uuid: bytes) -> str:
    """`uuid`, 16 bytes, in the usual form: 8-4-4-4-12 hexadecimal digits."""
    return str(UUID(bytes=uuid))


def to_text(data: bytes) -> str:
    """Standard base64."""
    return b64encode(data).decode("ascii")


def from_text(text: str) -> bytes:
    """The bytes of strict standard base64; raises `KeystoreError`."""
    try:
        return b64decode(text, validate=True)
    except ValueError:
        raise KeystoreError(ALTERED) from None

"""Keystore format 2, the file of the Java mini-kms. Read only: what is saved is format 4.

It differs in what protects it: the root key itself wraps the KEKs (with no AAD) and seals the verification token, and
the MAC runs over a binary encoding of the fields, binary values as their base64 text. All integers are big-endian;
`str` is an int32 byte length and UTF-8, null is the int32 -1.

What is authentic opens. That server could write what a keyring here cannot hold: destroyed versions that are enabled or
disabled, names that no ciphertext can hold, and names that are not UTF-8 text. They become what they can be, and each is
told.
"""

from __future__ import annotations

import hmac
import json
from itertools import count
from typing import Final, Literal

import msgspec
from msgspec import Struct

from kms.core.derive import KdfParameters
from kms.core.envelope import EnvelopeKey
from kms.core.keyring import Keyring, VersionStatus
from kms.core.names import is_nameable, shown, without_surrogates
from kms.core.secret import Secret
from kms.errors import DecryptionFailedError, KeystoreError, WrongPassphraseError
from kms.limits import MAX_FINDINGS_SHOWN
from kms.storage.stored import (
    ALTERED,
    WRONG_PASSPHRASE,
    KdfHeader,
    StoredVersion,
    Wrap,
    build_keyring,
    check_mac,
    decode_json,
    from_text,
    stored_group,
)

FORMAT: Final = 2
_VERIFICATION: Final = b"mini-kms/root-verification/v2"
_MAC_LABEL: Final = b"mini-kms/keystore-integrity/v1"


class _Version(Struct, forbid_unknown_fields=True):
    version: int
    status: str
    createdAtEpochSec: int  # noqa: N815 - the format's own name
    wrappedKekBase64: str | None  # noqa: N815 - the format's own name


class _Group(Struct, forbid_unknown_fields=True):
    id: str
    activeVersion: int  # noqa: N815 - the format's own name
    versions: list[_Version]


class _Document(Struct, forbid_unknown_fields=True):
    formatVersion: Literal[2]  # noqa: N815 - the format's own name
    kdf: Literal["argon2id"]
    argonMemoryKiB: int  # noqa: N815 - the format's own name
    argonIterations: int  # noqa: N815 - the format's own name
    argonParallelism: int  # noqa: N815 - the format's own name
    saltBase64: str  # noqa: N815 - the format's own name
    rootVerificationTokenBase64: str  # noqa: N815 - the format's own name
    keyGroups: list[_Group]  # noqa: N815 - the format's own name
    macBase64: str  # noqa: N815 - the format's own name


_decoder: Final = msgspec.json.Decoder(_Document)
_UNDONE: Final = (VersionStatus.ENABLED, VersionStatus.DISABLED)


def _decoded(raw: bytes) -> _Document:
    try:
        return decode_json(raw, _decoder)
    except KeystoreError:
        if b"\\u" not in raw:
            raise
    # A Java string may hold half of a surrogate pair, which msgspec refuses, as it is no character.
    try:
        return msgspec.convert(json.loads(raw.decode("utf-8"), parse_constant=_refuse), _Document)
    except (ValueError, RecursionError, msgspec.ValidationError):
        raise KeystoreError(ALTERED) from None


def _refuse(constant: str) -> None:
    raise ValueError(constant)


class Sealed:
    """A format 2 file that is parsed and not yet believed; see `kms.storage.stored.Opener`."""

    version: Final = FORMAT

    def __init__(self, raw: bytes) -> None:
        """Raises `KeystoreError` when `raw` is not of the format, or asks for an impossible key derivation."""
        document = self._document = _decoded(raw)
        parameters = KdfParameters(document.argonMemoryKiB, document.argonIterations, document.argonParallelism)
        parameters.check()
        self.header = KdfHeader(parameters, from_text(document.saltBase64))
        self._notes: list[str] = []
        self._unsaid = 0

    @property
    def notes(self) -> list[str]:
        """What `open` could not keep as it was, for people."""
        notes = [*self._notes, f"and {self._unsaid} more"] if self._unsaid else self._notes
        return [f"keystore of the Java server: {note}" for note in notes]

    def _note(self, text: str) -> None:
        if len(self._notes) < MAX_FINDINGS_SHOWN:
            self._notes.append(text)
        else:
            self._unsaid += 1

    def authenticate(self, root: Secret) -> int:
        """The generation, which is 0: the format has none."""
        self._authenticated(root).wipe()
        return 0

    def _authenticated(self, root: Secret) -> EnvelopeKey:
        """The root key, ready to open what is under it."""
        document = self._document
        root_key = EnvelopeKey(root)
        try:
            verified = root_key.open(from_text(document.rootVerificationTokenBase64), b"") == _VERIFICATION
        except DecryptionFailedError:
            verified = False
        if not verified:
            raise WrongPassphraseError(WRONG_PASSPHRASE)
        check_mac(_mac(root, document), document.macBase64)
        return root_key

    def open(self, root: Secret, rewrap: Wrap) -> Keyring:
        """The keyring, generation 0; its groups get the UUIDs here that the format did not know."""
        document = self._document
        root_key = self._authenticated(root)
        taken = {group.id for group in document.keyGroups}
        groups = [
            stored_group(
                self._name(group.id, taken),
                min((v.createdAtEpochSec for v in group.versions), default=0),
                group.activeVersion,
                [self._version(group.id, version) for version in group.versions],
            )
            for group in document.keyGroups
        ]
        return build_keyring(0, groups, lambda _slot, wrapped: root_key.open_secret(wrapped, b""), rewrap)

    def _name(self, name: str, taken: set[str]) -> str:
        """What the group `name` is called here, where a ciphertext or a file cannot hold it as it is."""
        usual = without_surrogates(name)
        if usual != name:
            if usual in taken:
                usual = next(other for number in count(2) if (other := f"{usual}-{number}") not in taken)
            taken.add(usual)
            self._note(f"the name of a key group holds half a character: it is called {shown(usual)} from now on")
        if not is_nameable(usual):
            self._note(
                f"the key group {shown(usual)} has a name of more than 255 bytes, which no ciphertext can hold: "
                "nothing can be encrypted under it"
            )
        return usual

    def _version(self, group: str, version: _Version) -> StoredVersion:
        status, text = version.status, version.wrappedKekBase64
        if text is None and status in _UNDONE:
            # That server let a destroyed version be disabled and enabled, which gave it no key again.
            status = VersionStatus.DESTROYED
            self._note(f"{shown(group)} v{version.version} is {version.status} and has no key: it was destroyed")
        return StoredVersion(version.version, status, version.createdAtEpochSec, text)


def _mac(root: Secret, document: _Document) -> bytes:
    with root.view() as view:
        mac_key = hmac.digest(view, _MAC_LABEL, "sha256")
    return hmac.digest(mac_key, _mac_message(document), "sha256")


def _mac_message(document: _Document) -> bytes:
    parts = [
        _int32(document.formatVersion),
        _str(document.kdf),
        _int32(document.argonMemoryKiB),
        _int32(document.argonIterations),
        _int32(document.argonParallelism),
        _str(document.saltBase64),
        _str(document.rootVerificationTokenBase64),
        _int32(len(document.keyGroups)),
    ]
    for group in document.keyGroups:
        parts += (_str(group.id), _int64(group.activeVersion), _int32(len(group.versions)))
        for version in group.versions:
            parts += (
                _int64(version.version),
                _str(version.status),
                _int64(version.createdAtEpochSec),
                _str(version.wrappedKekBase64),
            )
    return b"".join(parts)


def _int32(value: int) -> bytes:
    return _signed(value, 4)


def _int64(value: int) -> bytes:
    return _signed(value, 8)


def _signed(value: int, width: int) -> bytes:
    try:
        return value.to_bytes(width, "big", signed=True)
    except OverflowError:
        raise KeystoreError(ALTERED) from None


def _str(text: str | None) -> bytes:
    if text is None:
        return _int32(-1)
    # As Java has it: a question mark for each half of a surrogate pair.
    encoded = text.encode("utf-8", "replace")
    return _int32(len(encoded)) + encoded

"""Keystore format 4: the keyring as a JSON object, sealed by a MAC, and perhaps a journal of what was changed since.

    {formatVersion: 4, generation, kdf: {name, version, memoryKiB, iterations, parallelism, salt}, rootCheck, journal,
     formerJournal,
     keyGroups: [{keyId, keyUuid, spec, use, createdAtEpochSec, activeVersion,
                  versions: [{version, status, createdAtEpochSec, wrappedKey}]}],
     mac}

What is believed, and when: the KDF's parameters must be read first, and are bounded; `rootCheck` then tells a wrong
passphrase from a right one; the MAC is verified over the deterministic encoding of everything else; only then is any
other field looked at. `journal` is null, or the random id of the journal without which this is not the whole keystore;
`formerJournal` that of one which may still lie beside it, and is all in it (`kms.storage.journal`).
"""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass
from typing import Final, Literal, cast

import msgspec
from msgspec import Struct

from kms.core.keyring import KeyGroup, Keyring, VersionStatus
from kms.core.secret import Secret
from kms.errors import KeystoreError, WrongPassphraseError
from kms.storage import journal
from kms.storage.journal import Journal, Named
from kms.storage.root_keys import RootKeys
from kms.storage.stored import (
    WRONG_PASSPHRASE,
    Kdf,
    KdfHeader,
    StoredGroup,
    Wrap,
    build_keyring,
    check_mac,
    decode_json,
    from_text,
    to_text,
    uuid_text,
)

FORMAT: Final = 4


class _Body(Struct, forbid_unknown_fields=True, rename="camel"):
    """Everything that the MAC covers, in its order."""

    format_version: Literal[4]
    generation: int
    kdf: Kdf
    root_check: str
    journal: str | None
    former_journal: str | None
    key_groups: list[StoredGroup]


class _Document(_Body, rename="camel"):
    mac: str


@dataclass(frozen=True, slots=True)
class Front:
    """What a file has in front of its groups, besides the generation."""

    header: KdfHeader
    root_check: bytes
    journal: str | None = None
    former_journal: str | None = None


class Encoder:
    """Makes keystore files, and keeps each key group as it last encoded it: a mutation changes one of perhaps thousands.

    For 10,000 groups of three versions that is 10 ms for a file instead of 60 to 170, which the event loop would share.
    """

    def __init__(self) -> None:
        self._encoded: dict[str, tuple[KeyGroup, msgspec.Raw]] = {}
        self._file = bytearray()

    def encode(self, keyring: Keyring, front: Front, keys: RootKeys) -> bytearray:
        """The keystore file of `keyring`, in a buffer that the next call overwrites.

        A new one each time would be mapped and unmapped, as it is large, which stops the event loop's thread: Encrypt's
        p99 beside a client that rotates was 4.6 times its quiet one, and is 2.9 times.
        """
        body = _Body(
            format_version=FORMAT,
            generation=keyring.generation,
            kdf=front.header.stored(),
            root_check=to_text(front.root_check),
            journal=front.journal,
            former_journal=front.former_journal,
            # Raw is written as it is, so the groups become what the fields' type says.
            key_groups=cast("list[StoredGroup]", [self.group(group) for group in keyring.groups.values()]),
        )
        file = self._file
        _encoder.encode_into(body, file)
        mac = b64encode(keys.mac(file))
        file[-1:] = b',"mac":"%b"}\n' % mac
        return file

    def group(self, group: KeyGroup) -> msgspec.Raw:
        """One key group, as it stands in a file."""
        kept = self._encoded.get(group.key_id)
        # Groups are frozen: the same object has the same encoding.
        if kept is None or kept[0] is not group:
            kept = self._encoded[group.key_id] = group, msgspec.Raw(msgspec.json.encode(_to_write(group)))
        return kept[1]


class _VersionToWrite(Struct, rename="camel"):
    """`StoredVersion` with its values as the keyring has them: msgspec writes the same text, five times as fast."""

    version: int
    status: VersionStatus
    created_at_epoch_sec: int
    wrapped_key: bytes | None


class _GroupToWrite(Struct, rename="camel"):
    """`StoredGroup`, likewise."""

    key_id: str
    key_uuid: str
    spec: str
    use: str
    created_at_epoch_sec: int
    active_version: int
    versions: list[_VersionToWrite]


def _to_write(group: KeyGroup) -> _GroupToWrite:
    return _GroupToWrite(
        group.key_id,
        uuid_text(group.uuid),
        group.spec.name,
        group.use,
        group.created_at,
        group.active.version,
        [_VersionToWrite(v.version, v.status, v.created_at, v.wrapped) for v in group.versions.values()],
    )


class Sealed:
    """A format 4 file that is parsed and not yet believed; see `kms.storage.stored.Opener`."""

    version: Final = FORMAT

    def __init__(self, raw: bytes, beside: bytes | None, *, salvages: bool = False) -> None:
        """`beside` is the journal that is there, None where there is none; who `salvages` takes what is left of it.

        Raises `KeystoreError` when `raw` is not of the format, or asks for an impossible key derivation.
        """
        document = self._document = decode_json(raw, _document_decoder)
        self._beside = beside
        self._salvages = salvages
        self.header = document.kdf.header()
        root_check = from_text(document.root_check)
        self.front = Front(self.header, root_check, document.journal, document.former_journal)
        self.journal: Journal | None = None
        """What there is of it, once it has been verified."""
        self.trouble: KeystoreError | None = None
        """What would have been raised but for `salvages`."""

    @property
    def notes(self) -> list[str]:
        """What was not kept."""
        torn = 0 if self.journal is None else self.journal.torn
        if not torn:
            return []
        return [f"keystore: the last {torn} bytes of its journal were a change that was never finished, and are gone"]

    def authenticate(self, root: Secret) -> int:
        """The generation, with what is in the journal."""
        with RootKeys(root) as keys:
            return self._authenticated(keys)

    def open(self, root: Secret, rewrap: Wrap | None = None) -> Keyring:
        """The keyring, with what is in the journal; its keys stay wrapped as they are without `rewrap`."""
        with RootKeys(root) as keys:
            generation = self._authenticated(keys)
            groups = self._document.key_groups
            if self.journal is not None:
                later = dict(self.journal.changed)
                groups = [later.pop(group.key_id, group) for group in groups] + list(later.values())
            return build_keyring(generation, groups, keys.unwrap, rewrap)

    def _authenticated(self, keys: RootKeys) -> int:
        document = self._document
        if not keys.is_right(self.front.root_check):
            raise WrongPassphraseError(WRONG_PASSPHRASE)
        body = _Body(
            document.format_version,
            document.generation,
            document.kdf,
            document.root_check,
            document.journal,
            document.former_journal,
            document.key_groups,
        )
        check_mac(keys.mac(msgspec.json.encode(body)), document.mac)
        named = Named(document.journal, document.former_journal, document.generation)
        try:
            self.journal = journal.read(self._beside, named, keys.journal_mac)
        except KeystoreError as error:
            if not self._salvages:
                raise
            self.trouble = error
            self.journal = journal.salvage(self._beside, named, keys.journal_mac)
        return document.generation if self.journal is None else self.journal.generation


_encoder: Final = msgspec.json.Encoder()
_document_decoder: Final = msgspec.json.Decoder(_Document)

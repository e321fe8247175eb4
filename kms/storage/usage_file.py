"""The file beside the keystore that says how its keys are used: `keystore.json.usage`.

    {formatVersion: 1, sinceEpochSec,
     versions: [{keyId, version, operations, lastUsedEpochSec, lastUsedBy, timedDisable}]}

It is a help, not a guard: nothing in it lets anybody in, so it has no MAC, and one that cannot be used is counted anew.
The keystore's lock covers it. It is put together from versions that are encoded already, so that of thousands only
those that were used since the last time cost anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

from kms.core.usage import EpochSeconds, Name, Operations, TimedDisable
from kms.errors import FileAccessError, InputError
from kms.host.durable import write_file
from kms.host.private import open_private
from kms.limits import MAX_USAGE_BYTES, MAX_VERSION

FORMAT: Final = 1


class Record(Struct, rename="camel", omit_defaults=True, gc=False):
    """How one version was used."""

    key_id: str
    version: Annotated[int, Meta(ge=1, le=MAX_VERSION)]
    operations: Operations
    last_used_epoch_sec: EpochSeconds | None = None
    last_used_by: Name | None = None
    timed_disable: TimedDisable | None = None


class Document(Struct, rename="camel"):
    """A whole file. `since_epoch_sec` is from when on its versions, and those not in it, have been counted."""

    format_version: Literal[1]
    since_epoch_sec: EpochSeconds
    versions: list[Record]


_decoder: Final = msgspec.json.Decoder(Document)
encode_record: Final = msgspec.json.Encoder().encode
"""A `Record` as it stands in the file."""


def path_of(keystore: Path) -> Path:
    """Where the usage of the keys in `keystore` is kept."""
    return keystore.with_name(f"{keystore.name}.usage")


def encode(since: int, records: Iterable[bytes]) -> bytes:
    """The file whose records were encoded by `encode_record`."""
    return b'{"formatVersion":%d,"sinceEpochSec":%d,"versions":[\n%s\n]}\n' % (FORMAT, since, b",\n".join(records))


def write(path: Path, since: int, records: Iterable[bytes], last_look: Callable[[], None] = lambda: None) -> None:
    """Put it on disk, durably. Blocking; raises what `durable.write_file` raises, which calls `last_look`."""
    write_file(path, encode(since, records), last_look)


def read(path: Path) -> Document:
    """What the file at `path` says. Blocking.

    Raises `InputMissingError`, `SecretFileError` for a file that others may read, `FileAccessError`, or `InputError` for
    one that is damaged, too large or of another format.
    """
    with os.fdopen(open_private(path), "rb") as file:
        if os.fstat(file.fileno()).st_size > MAX_USAGE_BYTES:
            raise InputError(f"{path} is larger than any usage file")
        try:
            raw = file.read()
        except OSError as error:
            raise FileAccessError(f"cannot read {path}: {error.strerror}") from error
    try:
        return decode(raw)
    except InputError as error:
        raise InputError(f"{path} {error}") from None


def decode(raw: bytes) -> Document:
    """What the bytes of a file say; raises `InputError`."""
    try:
        return _decoder.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        # Not chained, and not told: what is wrong with it may be anything.
        raise InputError("is damaged, or of another version of mini-kms") from None

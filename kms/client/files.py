"""Files of any size, under a data key of their own, in constant memory.

The server makes (or opens) the data key; the file itself never goes to it. What is written is the container MKE2
(`kms.client.mke2`), or MKE1 (`kms.client.mke1`) for programs that read nothing else; both are read.

An output file appears under its name whole and authentic, or not at all.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, Self

from kms.client import mke1, mke2
from kms.client.file_io import Progress, Reader, Source, Target, opened_source, opened_target, resolved, source_size
from kms.client.file_keys import FileClient
from kms.client.protocol import BytesLike, check_text, octets
from kms.core import ciphertext
from kms.core import mke2 as mke2_format
from kms.core.mke1 import MAGIC as MKE1
from kms.core.mke2 import MAGIC as MKE2
from kms.errors import DecryptionFailedError, InputError
from kms.limits import MAX_FRAME_BYTES

PathOrStream = str | os.PathLike[str] | BinaryIO | None
"""How a caller of the library names a source or target."""

_MAGIC_BYTES: Final = len(MKE2)
_MAX_CIPHERTEXT_BYTES: Final = MAX_FRAME_BYTES // 4 * 3
"""What still fits a request as base64."""


class FileFormat(StrEnum):
    """The containers that are written."""

    MKE2 = "mke2"
    MKE1 = "mke1"


def format_named(name: str) -> FileFormat:
    """The format of this name; raises `TypeError` or `InputError`."""
    check_text("file_format", name)
    try:
        return FileFormat(name)
    except ValueError:
        raise InputError(f"file_format: give one of {', '.join(FileFormat)}") from None


class Arguments(NamedTuple):
    """What a caller of the library gives, in the types that are used here."""

    source: Source
    target: Target
    aad: bytes
    progress: Progress | None

    @classmethod
    def of(cls, source: object, target: object, aad: BytesLike, progress: object) -> Self:
        """Raises `TypeError` for what is of none of the types that each may have."""
        if progress is not None and not callable(progress):
            raise TypeError(f"progress has to be callable or None, not {type(progress).__name__}")
        return cls(_path_or_stream("source", source), _path_or_stream("target", target), octets("aad", aad), progress)


def _path_or_stream(name: str, value: Any) -> Path | BinaryIO | None:
    if isinstance(value, (str, os.PathLike)):
        return Path(value)
    if value is not None and (isinstance(value, io.TextIOBase) or not hasattr(value, "fileno")):
        raise TypeError(f"{name} has to be a path, an open binary file or None, not {type(value).__name__}")
    stream: BinaryIO | None = value
    return stream


def encrypt_file(
    client: FileClient,
    source: Source,
    target: Target,
    *,
    key_id: str | None = None,
    aad: bytes = b"",
    progress: Progress | None = None,
    file_format: FileFormat = FileFormat.MKE2,
    also_key_ids: Sequence[str] = (),
) -> None:
    """Encrypt `source` into a container at `target`, under a fresh data key of the group `key_id`, and of `also_key_ids`.

    Raises `InputMissingError` or `InputError` for a source or target that cannot be used, or, for MKE1, a source larger
    than 64 GiB - 32 bytes; `FileAccessError` when reading or writing fails; and what `KmsClient.generate_data_key` raises.
    On any of them an existing target is as it was.
    """
    if also_key_ids and file_format is FileFormat.MKE1:
        raise InputError("a file of MKE1 is under one key group; write MKE2 for several")
    with resolved(target) as target, opened_source(source, progress) as reader:
        if file_format is FileFormat.MKE1:
            mke1.encrypt(client, reader, source, target, key_id, aad)
        else:
            mke2.encrypt(client, reader, target, key_id, aad, also_key_ids)


def decrypt_file(
    client: FileClient,
    source: Source,
    target: Target,
    *,
    source_key_id: str | None = None,
    aad: bytes = b"",
    progress: Progress | None = None,
) -> None:
    """Decrypt the container `source` into `target`; with `source_key_id`, only one under that group.

    Raises `InputError` when the source is no container or ends inside its header, `DecryptionFailedError` when
    anything was altered or cut off, or `aad` is another; else as `encrypt_file`. Not one byte of plaintext is at
    `target` then; but a stream may have an authentic beginning of an MKE2 file, as `CutOffError` tells.
    """
    with resolved(target) as target, opened_source(source, progress) as reader:
        magic = reader.take(_MAGIC_BYTES)
        if magic == MKE2:
            mke2.decrypt(client, reader, target, source_key_id, aad)
        elif magic == MKE1:
            mke1.decrypt(client, reader, target, source_key_id, aad)
        else:
            raise InputError(_NO_CONTAINER)


_NO_CONTAINER: Final = (
    "not an MKE2 or MKE1 file: it was not made by encrypt-file, or its beginning is lost; use decrypt for what encrypt made"
)


def reencrypt_file(
    client: FileClient,
    source: Source,
    target: Target,
    *,
    key_id: str,
    source_key_id: str | None = None,
    aad: bytes = b"",
    progress: Progress | None = None,
) -> None:
    """Put `source` under the active version of the group `key_id`; with `source_key_id`, only what is under that now.

    Name it for files that others can write: the header of one says itself which group its key is under.

    Of a container only the data key in the header is wrapped anew; the body is copied unchanged and not verified, as that
    takes the plaintext data key. Of an MKE2 file under several groups those are moved that are under `key_id` already, to
    its active version; to move another, name it. Any other file is one ciphertext, raw or as base64 text, and is written
    in the same form.

    Raises `InputError` when the source is neither, or too large for one request; else as `decrypt_file`.
    """
    with resolved(target) as target, opened_source(source, progress) as reader:
        magic = reader.take(_MAGIC_BYTES)
        if magic == MKE2:
            mke2.reencrypt(client, reader, target, key_id, source_key_id, aad)
        elif magic == MKE1:
            mke1.reencrypt(client, reader, target, key_id, source_key_id, aad)
        else:
            blob, encode = _one_ciphertext(magic + reader.take(2 * MAX_FRAME_BYTES), reader.name)
            with opened_target(target) as writer:
                writer.write(encode(client.reencrypt(blob, key_id, aad, source_key_id=source_key_id)))
                writer.commit()


def add_recipient(
    client: FileClient,
    source: Source,
    target: Target,
    *,
    key_id: str,
    source_key_id: str | None = None,
    aad: bytes = b"",
    progress: Progress | None = None,
) -> None:
    """Let the MKE2 file `source` be opened under the active version of the group `key_id`, too; its body stays as it is.

    Raises `InputError` for another file, or one with 16 recipients; else as `reencrypt_file`.
    """
    with resolved(target) as target, opened_source(source, progress) as reader:
        _require_mke2(reader)
        mke2.add_recipient(client, reader, target, key_id, source_key_id, aad)


def drop_recipient(source: Source, target: Target, *, key_id: str, progress: Progress | None = None) -> None:
    """Let the MKE2 file `source` be opened under the group `key_id` no more; its body stays as it is. Needs no server.

    Who has kept a copy of the file opens that as before. Raises `InputError` for another file, for one that is not under
    that group, or under no other; `FileAccessError` when reading or writing fails.
    """
    with resolved(target) as target, opened_source(source, progress) as reader:
        _require_mke2(reader)
        mke2.drop_recipient(reader, target, key_id)


def keks_of(source: Path) -> list[tuple[str, int]] | None:
    """The groups and versions that a file claims to be under: a container, or one ciphertext. None for any other file.

    Raises `InputError` for a container whose header is damaged, `InputMissingError` or `FileAccessError`.
    """
    with opened_source(source, None) as reader:
        magic = reader.take(_MAGIC_BYTES)
        if magic == MKE2:
            return [(one.group, one.version) for one in mke2_format.read_header(reader.take).recipients]
        if magic == MKE1:
            return [ciphertext.named(mke1.read_wrapped_key(reader))]
        size = source_size(source)
        if size is None or size > 2 * MAX_FRAME_BYTES:
            return None
        try:
            blob, _ = _one_ciphertext(magic + reader.take(size), reader.name)
            return [ciphertext.parse(blob)[:2]]
        except (InputError, DecryptionFailedError):
            return None


def _require_mke2(reader: Reader) -> None:
    if reader.take(_MAGIC_BYTES) != MKE2:
        raise InputError(f"{reader.name} is not an MKE2 file; only those can be under several key groups")


def write_output(target: Target, data: bytes) -> None:
    """Put `data` at `target`, whole or not at all where that is a file; raises `FileAccessError` or `InputError`."""
    with resolved(target) as target, opened_target(target) as writer:
        writer.write(data)
        writer.commit()


def _one_ciphertext(content: bytes, name: str) -> tuple[bytes, Callable[[bytes], bytes]]:
    """The ciphertext that is the whole of a file, and how to write its successor in the same form."""
    blob = content
    encode: Callable[[bytes], bytes] = bytes
    if not ciphertext.is_one(blob):
        try:
            # Base64 tools break lines.
            blob = base64.b64decode(b"".join(content.split()), validate=True)
        except binascii.Error:
            blob = b""
        if not ciphertext.is_one(blob):
            raise InputError(f"{name} is neither an MKE2 or MKE1 file nor a ciphertext")
        encode = _base64_line if content.endswith(b"\n") else base64.b64encode
    if len(blob) > _MAX_CIPHERTEXT_BYTES:
        raise InputError(f"{name} is larger than the {_MAX_CIPHERTEXT_BYTES} bytes one ciphertext may have")
    return blob, encode


def _base64_line(blob: bytes) -> bytes:
    return base64.b64encode(blob) + b"\n"

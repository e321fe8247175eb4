"""Files in the container MKE1 (`kms.core.mke1`): one envelope of up to 64 GiB under a data key of its own.

Until its tag has been verified, nothing of it may be believed: so what goes to a pipe is decrypted twice.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from kms.client.file_io import (
    Progress,
    Reader,
    Source,
    StreamWriter,
    Target,
    copy,
    opened_target,
    source_size,
    translated,
)
from kms.client.file_keys import FileClient, data_key, new_data_key
from kms.core import mke1
from kms.core.envelope import HEADER_BYTES, StreamOpener, StreamSealer
from kms.core.secret import Secret
from kms.errors import AlteredFileError, DecryptionFailedError, InputError
from kms.limits import FILE_CHUNK_BYTES, GCM_TAG_BYTES, MAX_GCM_PLAINTEXT_BYTES


def encrypt(client: FileClient, reader: Reader, source: Source, target: Target, key_id: str | None, aad: bytes) -> None:
    """What `encrypt_file` does, into an MKE1 file."""
    size = source_size(source)
    if size is not None and size > MAX_GCM_PLAINTEXT_BYTES:
        raise InputError(f"{reader.name} is larger than 64 GiB - 32 bytes, the most one envelope holds; write MKE2")
    with opened_target(target) as writer:
        (wrapped,), key = new_data_key(client, key_id, aad)
        with key:
            sealer = StreamSealer(key, aad)
        writer.write(mke1.header(wrapped) + sealer.header)
        chunk, output = memoryview(bytearray(FILE_CHUNK_BYTES)), bytearray(FILE_CHUNK_BYTES + GCM_TAG_BYTES)
        while length := reader.fill(chunk):
            written = sealer.update_into(chunk[:length], output)
            writer.write(memoryview(output)[:written])
        writer.write(sealer.finish())
        writer.commit()


def decrypt(client: FileClient, reader: Reader, target: Target, source_key_id: str | None, aad: bytes) -> None:
    """What `decrypt_file` does, of an MKE1 file whose magic bytes were read already."""
    wrapped_key = read_wrapped_key(reader)
    with opened_target(target) as writer, data_key(client, wrapped_key, aad, source_key_id) as key:
        decrypt_body = _decrypt_body if isinstance(target, Path) else _decrypt_body_verified_first
        try:
            decrypt_body(reader, key, aad, writer.write)
        except DecryptionFailedError:
            raise AlteredFileError from None
        writer.commit()


def reencrypt(
    client: FileClient, reader: Reader, target: Target, key_id: str, source_key_id: str | None, aad: bytes
) -> None:
    """What `reencrypt_file` does, of an MKE1 file whose magic bytes were read already."""
    wrapped_key = read_wrapped_key(reader)
    with opened_target(target) as writer:
        writer.write(mke1.header(client.reencrypt(wrapped_key, key_id, aad, source_key_id=source_key_id)))
        copy(reader, writer.write)
        writer.commit()


def read_wrapped_key(reader: Reader) -> bytes:
    """The wrapped data key in the header, whose magic bytes were read already."""
    length = mke1.wrapped_key_length(mke1.MAGIC + reader.take(mke1.FIXED_BYTES - len(mke1.MAGIC)))
    wrapped_key = reader.take(length)
    if len(wrapped_key) < length:
        raise InputError("not a whole MKE1 file: it ends inside its header")
    if not mke1.is_wrapped_key(wrapped_key):
        raise InputError("not an MKE1 file: its header holds something else than a data key")
    return wrapped_key


def _decrypt_body(reader: Reader, key: Secret, aad: bytes, write: Callable[[memoryview], None]) -> None:
    """Decrypt the envelope that `reader` holds; what was written is authentic only once this has returned."""
    opener = StreamOpener(key, reader.take(HEADER_BYTES), aad)
    # The last 16 bytes are the tag, and a pipe does not say when they are the last: so 16 are always kept back.
    chunk = memoryview(bytearray(GCM_TAG_BYTES + FILE_CHUNK_BYTES))
    output = bytearray(FILE_CHUNK_BYTES + GCM_TAG_BYTES)
    if reader.fill(chunk[:GCM_TAG_BYTES]) < GCM_TAG_BYTES:
        raise DecryptionFailedError
    while length := reader.fill(chunk[GCM_TAG_BYTES:]):
        written = opener.update_into(chunk[:length], output)
        write(memoryview(output)[:written])
        chunk[:GCM_TAG_BYTES] = bytes(chunk[length : length + GCM_TAG_BYTES])
    opener.finish(bytes(chunk[:GCM_TAG_BYTES]))


def _decrypt_body_verified_first(reader: Reader, key: Secret, aad: bytes, write: Callable[[memoryview], None]) -> None:
    """Decrypt twice: once to verify, once to write.

    What goes to a pipe is acted on at once and cannot be taken back, so the tag must have been verified before the
    first byte. The ciphertext is kept meanwhile, in a file without a name: it is no secret on the disk, unlike the
    plaintext, and nobody can alter it between the two passes, unlike the source.
    """
    with translated(f"cannot make a temporary file in {tempfile.gettempdir()}"):
        spool = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (closed below; only its making is translated)
    with spool:
        name = f"a temporary file in {tempfile.gettempdir()} (TMPDIR names another place)"
        reader.progress = _shared(reader.progress, 3)
        copy(reader, StreamWriter(spool, name).write)
        for output in (_discard, write):
            spool.seek(0)
            _decrypt_body(Reader(spool, name, reader.progress), key, aad, output)


def _shared(progress: Progress | None, times: int) -> Progress | None:
    """What reports each byte once that is read so many times: only at the end of the last all of them."""
    if progress is None:
        return None
    rest = 0

    def report(length: int) -> None:
        nonlocal rest
        whole, rest = divmod(rest + length, times)
        progress(whole)

    return report


def _discard(piece: memoryview) -> None:
    pass

"""Files in the container MKE2 (`kms.core.mke2`): one pass, whatever they are read from and written to.

Each chunk is authentic when it is released, and known not to be the last of a stream that was cut off there. So a pipe gets
what it can trust as it comes; only that the rest is missing shows no sooner than at the end.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Final, TypeVar

from kms.client.file_io import Reader, Target, Writer, copy, opened_target
from kms.client.file_keys import FileClient, data_key, new_data_key
from kms.core import mke2
from kms.core.envelope import ChunkOpener, ChunkSealer
from kms.core.mke2 import SALT_BYTES, SEALED_CHUNK_BYTES, Header, Recipient
from kms.core.secret import Secret
from kms.errors import (
    AlteredFileError,
    CutOffError,
    DecryptionFailedError,
    InputError,
    ProtocolError,
    UnauthorizedError,
)
from kms.limits import GCM_TAG_BYTES, STREAM_CHUNK_BYTES

_R = TypeVar("_R")

_CHUNKS: Final = 16
"""Read and written at once: a system call for each megabyte."""


def encrypt(
    client: FileClient,
    reader: Reader,
    target: Target,
    key_id: str | None,
    aad: bytes,
    also_key_ids: Sequence[str] = (),
) -> None:
    """What `encrypt_file` does, into an MKE2 file."""
    with opened_target(target) as writer:
        wrapped, key = new_data_key(client, key_id, aad, also_key_ids)
        with key:
            recipients = list(map(_new_recipient, wrapped))
            salt = os.urandom(SALT_BYTES)
            commitment, chunk_key = mke2.keys(key, salt, aad)
        with chunk_key:
            sealer = ChunkSealer(chunk_key)
        writer.write(Header(recipients, salt, commitment).encode())
        with _behind(writer, is_file=isinstance(target, Path)) as write:
            _seal(reader, sealer, write)
        writer.commit()


def decrypt(client: FileClient, reader: Reader, target: Target, source_key_id: str | None, aad: bytes) -> None:
    """What `decrypt_file` does, of an MKE2 file whose magic bytes were read already.

    A stream has got an authentic beginning when it raises `CutOffError`; else there is nothing, and never at a path.
    """
    header = mke2.read_header(reader.take)
    with opened_target(target) as writer:
        with _opened_by_a_recipient(client, header.recipients, aad, source_key_id) as key:
            opener = _opener(header, key, aad)
        released = 0
        try:
            with _behind(writer, is_file=isinstance(target, Path)) as write:
                for plaintext in _opened(reader, opener):
                    write(plaintext)
                    released += len(plaintext)
        except DecryptionFailedError:
            if isinstance(target, Path) or not released:
                raise AlteredFileError from None
            writer.commit()
            raise CutOffError(released) from None
        writer.commit()


def reencrypt(
    client: FileClient, reader: Reader, target: Target, key_id: str, source_key_id: str | None, aad: bytes
) -> None:
    """What `reencrypt_file` does, of an MKE2 file whose magic bytes were read already."""
    header = mke2.read_header(reader.take)
    chosen = _to_be_moved(header.recipients, key_id, source_key_id)
    moved: dict[tuple[str, int], Recipient] = {}
    for one in header.recipients:
        new = one
        if one in chosen:
            new = _wrapped_anew(client, one, key_id, aad)
        # Two versions of a group come to be one.
        moved.setdefault((new.group, new.version), new)
    _rewritten(header, list(moved.values()), reader, target)


def add_recipient(
    client: FileClient, reader: Reader, target: Target, key_id: str, source_key_id: str | None, aad: bytes
) -> None:
    """Let the file be opened under the active version of the group `key_id`, too."""
    header = mke2.read_header(reader.take)
    new = _first(header.recipients, source_key_id, lambda one: _wrapped_anew(client, one, key_id, aad))
    others = [one for one in header.recipients if (one.group, one.version) != (new.group, new.version)]
    _rewritten(header, [*others, new], reader, target)


def drop_recipient(reader: Reader, target: Target, key_id: str) -> None:
    """Take the wrapped data keys of the group `key_id` out of the file. Who has kept a copy of it has them still."""
    header = mke2.read_header(reader.take)
    kept = [one for one in header.recipients if one.group != key_id]
    if len(kept) == len(header.recipients):
        raise InputError(f"{reader.name} is not under the key group {key_id}; nothing was changed")
    if not kept:
        raise InputError(f"{reader.name} is under the key group {key_id} alone; add another first")
    _rewritten(header, kept, reader, target)


def _rewritten(header: Header, recipients: Sequence[Recipient], reader: Reader, target: Target) -> None:
    with opened_target(target) as writer:
        writer.write(header._replace(recipients=recipients).encode())
        copy(reader, writer.write)
        writer.commit()


def _to_be_moved(recipients: Sequence[Recipient], key_id: str, source_key_id: str | None) -> Sequence[Recipient]:
    if source_key_id is not None:
        named = [one for one in recipients if one.group == source_key_id]
        if not named:
            raise DecryptionFailedError
        return named
    same = [one for one in recipients if one.group == key_id]
    if not same and len(recipients) > 1:
        groups = ", ".join(sorted({one.group for one in recipients}))
        raise InputError(f"the file is under several key groups ({groups}); name the one to move from")
    return same or recipients


def _opened_by_a_recipient(
    client: FileClient, recipients: Sequence[Recipient], aad: bytes, source_key_id: str | None
) -> Secret:
    return _first(recipients, source_key_id, lambda one: data_key(client, one.wrapped, aad, one.group))


def _first(recipients: Sequence[Recipient], source_key_id: str | None, use: Callable[[Recipient], _R]) -> _R:
    """What `use` makes of the first recipient that it is not refused for; raises the first refusal when it is for all."""
    refusal: DecryptionFailedError | UnauthorizedError | None = None
    for one in recipients:
        if source_key_id not in (None, one.group):
            continue
        try:
            return use(one)
        except (DecryptionFailedError, UnauthorizedError) as error:
            refusal = refusal or error
    raise refusal or DecryptionFailedError()


def _opener(header: Header, key: Secret, aad: bytes) -> ChunkOpener:
    try:
        with mke2.opened(header, key, aad) as chunk_key:
            return ChunkOpener(chunk_key)
    except DecryptionFailedError:
        raise AlteredFileError from None


def _wrapped_anew(client: FileClient, one: Recipient, key_id: str, aad: bytes) -> Recipient:
    """The same data key under the active version of the group `key_id`."""
    return _new_recipient(client.reencrypt(one.wrapped, key_id, aad, source_key_id=one.group))


def _new_recipient(wrapped: bytes) -> Recipient:
    try:
        return mke2.recipient(wrapped)
    except InputError:
        raise ProtocolError("the server wraps no keys for MKE2 files; write MKE1, or take a newer server") from None


def _seal(reader: Reader, sealer: ChunkSealer, write: Callable[[memoryview], None]) -> None:
    # One byte more than is sealed at once says whether anything follows.
    plain = memoryview(bytearray(_CHUNKS * STREAM_CHUNK_BYTES + 1))
    outputs = [memoryview(bytearray(_CHUNKS * SEALED_CHUNK_BYTES)) for _ in range(2)]
    held, is_end = 0, False
    while not is_end:
        held += reader.fill(plain[held:])
        is_end = held < len(plain)
        ends = _ends(held if is_end else len(plain) - 1, STREAM_CHUNK_BYTES)
        start, written = 0, 0
        for end in ends:
            length = end - start + GCM_TAG_BYTES
            is_last = is_end and end == ends[-1]
            sealer.seal_into(plain[start:end], outputs[0][written : written + length], is_last=is_last)
            start, written = end, written + length
        write(outputs[0][:written])
        outputs.reverse()
        plain[:1], held = bytes(plain[-1:]), 1


def _opened(reader: Reader, opener: ChunkOpener) -> Iterator[memoryview]:
    """The plaintext in pieces, each of which stays as it is until the one after the next; and `DecryptionFailedError`."""
    sealed = memoryview(bytearray(_CHUNKS * SEALED_CHUNK_BYTES + 1))
    outputs = [memoryview(bytearray(_CHUNKS * STREAM_CHUNK_BYTES)) for _ in range(2)]
    held, is_end, is_first = 0, False, True
    while not is_end:
        held += reader.fill(sealed[held:])
        is_end = held < len(sealed)
        ends = _ends(held if is_end else len(sealed) - 1, SEALED_CHUNK_BYTES)
        start, written = 0, 0
        try:
            for end in ends:
                length = end - start - GCM_TAG_BYTES
                # Only an empty file has an empty chunk: else there would be two files for one content.
                if length < 0 or (length == 0 and not is_first):
                    raise DecryptionFailedError
                is_last = is_end and end == ends[-1]
                opener.open_into(sealed[start:end], outputs[0][written : written + length], is_last=is_last)
                start, written, is_first = end, written + length, False
        finally:
            if written:
                yield outputs[0][:written]
        outputs.reverse()
        sealed[:1], held = bytes(sealed[-1:]), 1


def _ends(length: int, chunk: int) -> list[int]:
    """Where each chunk ends of so many bytes; nothing at all is one chunk, too."""
    return [*range(chunk, length, chunk), length]


@contextlib.contextmanager
def _behind(writer: Writer, *, is_file: bool) -> Iterator[Callable[[memoryview], None]]:
    """A function that writes what it is given while its caller goes on; all is written, or has failed, at the end.

    A thread for as long as this is open: ciphering and writing take a core each. What it was given must stay as it is until
    it is called again.
    """
    given: SimpleQueue[memoryview | None] = SimpleQueue()
    done: SimpleQueue[BaseException | None] = SimpleQueue()
    pending = False

    def work() -> None:
        while (piece := given.get()) is not None:
            try:
                writer.write(piece)
            except BaseException as error:
                done.put(error)
            else:
                done.put(None)

    def wait() -> None:
        nonlocal pending
        if pending:
            error = done.get()
            pending = False
            if error is not None:
                raise error

    def write(piece: memoryview) -> None:
        nonlocal pending
        wait()
        given.put(piece)
        pending = True

    thread = threading.Thread(target=work, name="kms-writer", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        # There may be no more threads (ulimit -u). Without one it is slower.
        yield writer.write
        return
    try:
        yield write
        wait()
    except DecryptionFailedError:
        wait()
        raise
    finally:
        given.put(None)
        # A pipe that nobody reads would keep whoever interrupts this waiting for ever; a disk does not.
        if is_file or not pending:
            thread.join()

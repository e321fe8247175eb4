"""Files of any size, under a data key of their own, in constant memory.

The server makes (or opens) the data key; the file itself never goes to it. A file in the container MKE1 is a header
with the wrapped data key and one envelope under that key (`kms.core.container`).

An output file appears under its name whole and authentic, or not at all. Standard output cannot be taken back, so
there nothing is released before the tag has been verified.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import io
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, Protocol, Self

from kms.client.protocol import BytesLike, DataKey, octets
from kms.core import ciphertext, container
from kms.core.envelope import HEADER_BYTES, StreamOpener, StreamSealer
from kms.core.secret import Secret
from kms.errors import (
    AlteredFileError,
    DecryptionFailedError,
    FileAccessError,
    InputError,
    InputMissingError,
    ProtocolError,
    ReaderGoneError,
)
from kms.host import streams
from kms.host.durable import RenameError
from kms.host.output import OutputFile, open_stream
from kms.limits import FILE_CHUNK_BYTES, GCM_TAG_BYTES, KEY_BYTES, MAX_FRAME_BYTES, MAX_GCM_PLAINTEXT_BYTES

Source = Path | BinaryIO | None
"""Where to read: a path, an open binary file (it stays open), or None for standard input."""
Target = Path | BinaryIO | None
"""Where to write: a path, an open binary file (it stays open), or None for standard output."""
PathOrStream = str | os.PathLike[str] | BinaryIO | None
"""How a caller of the library names either."""
Progress = Callable[[int], None]
"""Called after each chunk with the number of bytes that are done since the last call; in the end all of the source."""

_MAX_CIPHERTEXT_BYTES: Final = MAX_FRAME_BYTES // 4 * 3
"""What still fits a request as base64."""


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


class FileClient(Protocol):
    """What is needed of a client; `KmsClient` has it."""

    def generate_data_key(self, key_id: str | None = None, aad: bytes = b"") -> DataKey: ...

    def decrypt(self, ciphertext: bytes, aad: bytes = b"", *, source_key_id: str | None = None) -> bytes: ...

    def reencrypt(self, ciphertext: bytes, key_id: str, aad: bytes = b"", *, source_key_id: str | None = None) -> bytes: ...


def encrypt_file(
    client: FileClient,
    source: Source,
    target: Target,
    *,
    key_id: str | None = None,
    aad: bytes = b"",
    progress: Progress | None = None,
) -> None:
    """Encrypt `source` into an MKE1 container at `target`, under a fresh data key of the group `key_id`.

    Raises `InputMissingError` or `InputError` for a source or target that cannot be used, or a source larger than
    64 GiB - 32 bytes; `FileAccessError` when reading or writing fails; and what `KmsClient.generate_data_key` raises.
    On any of them an existing target is as it was.
    """
    with _resolved(target) as target, _opened_source(source, progress) as reader:
        size = source_size(source)
        if size is not None and size > MAX_GCM_PLAINTEXT_BYTES:
            raise InputError(f"{reader.name} is larger than 64 GiB - 32 bytes, the most one envelope holds; split it")
        with _opened_target(target) as writer:
            data_key = client.generate_data_key(key_id, aad)
            if len(data_key.plaintext) != KEY_BYTES:
                raise ProtocolError(f"the server's data key does not have {KEY_BYTES} bytes")
            with Secret(bytearray(data_key.plaintext)) as key:
                sealer = StreamSealer(key, aad)
            writer.write(container.header(data_key.wrapped) + sealer.header)
            chunk, output = memoryview(bytearray(FILE_CHUNK_BYTES)), bytearray(FILE_CHUNK_BYTES + GCM_TAG_BYTES)
            while length := reader.fill(chunk):
                written = sealer.update_into(chunk[:length], output)
                writer.write(memoryview(output)[:written])
            writer.write(sealer.finish())
            writer.commit()


def decrypt_file(
    client: FileClient,
    source: Source,
    target: Target,
    *,
    source_key_id: str | None = None,
    aad: bytes = b"",
    progress: Progress | None = None,
) -> None:
    """Decrypt the MKE1 container `source` into `target`; with `source_key_id`, only one under that group.

    Raises `InputError` when the source is no container or ends inside its header, `DecryptionFailedError` when
    anything was altered or cut off, or `aad` is another; else as `encrypt_file`. Not one byte of plaintext is at
    `target` then.
    """
    with _resolved(target) as target, _opened_source(source, progress) as reader:
        wrapped_key = _read_wrapped_key(reader)
        with _opened_target(target) as writer, _data_key(client, wrapped_key, aad, source_key_id) as key:
            decrypt = _decrypt_body if isinstance(target, Path) else _decrypt_body_verified_first
            try:
                decrypt(reader, key, aad, writer.write)
            except DecryptionFailedError:
                raise AlteredFileError from None
            writer.commit()


def _data_key(client: FileClient, wrapped_key: bytes, aad: bytes, source_key_id: str | None) -> Secret:
    key = Secret(bytearray(client.decrypt(wrapped_key, aad, source_key_id=source_key_id)))
    if len(key) != KEY_BYTES:
        key.wipe()
        raise ProtocolError(f"the server's data key does not have {KEY_BYTES} bytes")
    return key


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

    Of an MKE1 container only the data key in the header is wrapped anew; the body is copied unchanged and not
    verified, as that takes the plaintext data key. Any other file is one ciphertext, raw or as base64 text, and is
    written in the same form.

    Raises `InputError` when the source is neither, or too large for one request; else as `decrypt_file`.
    """
    with _resolved(target) as target, _opened_source(source, progress) as reader:
        start = reader.take(container.FIXED_BYTES)
        if start.startswith(container.MAGIC):
            wrapped_key = _read_wrapped_key(reader, start)
            with _opened_target(target) as writer:
                writer.write(container.header(client.reencrypt(wrapped_key, key_id, aad, source_key_id=source_key_id)))
                _copy(reader, writer.write)
                writer.commit()
        else:
            blob, encode = _one_ciphertext(start + reader.take(2 * MAX_FRAME_BYTES), reader.name)
            with _opened_target(target) as writer:
                writer.write(encode(client.reencrypt(blob, key_id, aad, source_key_id=source_key_id)))
                writer.commit()


def write_output(target: Target, data: bytes) -> None:
    """Put `data` at `target`, whole or not at all where that is a file; raises `FileAccessError` or `InputError`."""
    with _resolved(target) as target, _opened_target(target) as writer:
        writer.write(data)
        writer.commit()


def source_size(source: Source) -> int | None:
    """The size of `source` in bytes, for a progress bar; None when it is not a regular file or does not exist."""
    if not isinstance(source, Path):
        return None
    try:
        state = source.stat()
    except OSError:
        return None
    return state.st_size if stat.S_ISREG(state.st_mode) else None


class _Reader:
    """Reads whole pieces from a source, short ones only at its end, and reports progress."""

    def __init__(self, stream: BinaryIO, name: str, progress: Progress | None = None) -> None:
        self._stream = stream
        self.name = name
        self.progress = progress

    def fill(self, buffer: memoryview) -> int:
        """Fill `buffer` from its start; returns how many bytes, fewer than its length only at the end."""
        with _translated(f"cannot read {self.name}"):
            length = streams.fill(self._stream, buffer)
        if self.progress is not None and length:
            self.progress(length)
        return length

    def take(self, most: int) -> bytes:
        """The next `most` bytes, or fewer at the end."""
        buffer = bytearray(most)
        length = self.fill(memoryview(buffer))
        return bytes(buffer[:length])


class _Writer(Protocol):
    def write(self, data: bytes | memoryview) -> None: ...

    def commit(self) -> None: ...


class _StreamWriter:
    """Writes to an open file, such as standard output."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream = stream
        self._name = name

    def write(self, data: bytes | memoryview) -> None:
        with _translated(f"cannot write {self._name}"):
            streams.put(self._stream, data)

    def commit(self) -> None:
        with _translated(f"cannot write {self._name}"):
            self._stream.flush()


class _FileWriter:
    """Writes a file that appears under its name at `commit`."""

    def __init__(self, file: OutputFile, path: Path) -> None:
        self._file = file
        self._action = f"cannot write {path}"

    def write(self, data: bytes | memoryview) -> None:
        with _translated(self._action):
            self._file.write(data)

    def commit(self) -> None:
        with _translated(self._action):
            self._file.commit()


@contextlib.contextmanager
def _opened_source(source: Source, progress: Progress | None) -> Iterator[_Reader]:
    if source is None:
        yield _Reader(streams.standard_input(), "standard input", progress)
    elif isinstance(source, Path):
        try:
            stream = source.open("rb", buffering=0)
        except FileNotFoundError:
            raise InputMissingError(f"there is no file {source}") from None
        except IsADirectoryError:
            raise InputError(f"{source} is a directory; name a file") from None
        except OSError as error:
            raise FileAccessError(_message(f"cannot read {source}", error)) from error
        with stream:
            yield _Reader(stream, str(source), progress)
    else:
        yield _Reader(source, "the input", progress)


@contextlib.contextmanager
def _resolved(target: Target) -> Iterator[Target]:
    """`target`, or the stream that its path names."""
    stream = None
    if isinstance(target, Path):
        with _translated(f"cannot write {target}"):
            stream = open_stream(target)
    if stream is None:
        yield target
    else:
        with stream:
            yield stream


@contextlib.contextmanager
def _opened_target(target: Target) -> Iterator[_Writer]:
    if target is None:
        yield _StreamWriter(sys.stdout.buffer, "standard output")
    elif isinstance(target, Path):
        with _translated(f"cannot write {target}"):
            file = OutputFile(Path(os.path.realpath(target)))
        with file:
            yield _FileWriter(file, target)
    else:
        yield _StreamWriter(target, "the output")


def _read_wrapped_key(reader: _Reader, start: bytes | None = None) -> bytes:
    """The wrapped data key in the header, of which `start` (8 bytes) may have been read already."""
    length = container.wrapped_key_length(reader.take(container.FIXED_BYTES) if start is None else start)
    wrapped_key = reader.take(length)
    if len(wrapped_key) < length:
        raise InputError("not a whole MKE1 file: it ends inside its header")
    if not container.is_wrapped_key(wrapped_key):
        raise InputError("not an MKE1 file: its header holds something else than a data key")
    return wrapped_key


def _decrypt_body(reader: _Reader, key: Secret, aad: bytes, write: Callable[[memoryview], None]) -> None:
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


def _decrypt_body_verified_first(reader: _Reader, key: Secret, aad: bytes, write: Callable[[memoryview], None]) -> None:
    """Decrypt twice: once to verify, once to write.

    What goes to a pipe is acted on at once and cannot be taken back, so the tag must have been verified before the
    first byte. The ciphertext is kept meanwhile, in a file without a name: it is no secret on the disk, unlike the
    plaintext, and nobody can alter it between the two passes, unlike the source.
    """
    with _translated(f"cannot make a temporary file in {tempfile.gettempdir()}"):
        spool = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (closed below; only its making is translated)
    with spool:
        name = f"a temporary file in {tempfile.gettempdir()} (TMPDIR names another place)"
        reader.progress = _shared(reader.progress, 3)
        _copy(reader, _StreamWriter(spool, name).write)
        for output in (_discard, write):
            spool.seek(0)
            _decrypt_body(_Reader(spool, name, reader.progress), key, aad, output)


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


def _copy(reader: _Reader, write: Callable[[memoryview], None]) -> None:
    chunk = memoryview(bytearray(FILE_CHUNK_BYTES))
    while length := reader.fill(chunk):
        write(chunk[:length])


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
            raise InputError(f"{name} is neither an MKE1 file nor a ciphertext")
        encode = _base64_line if content.endswith(b"\n") else base64.b64encode
    if len(blob) > _MAX_CIPHERTEXT_BYTES:
        raise InputError(f"{name} is larger than the {_MAX_CIPHERTEXT_BYTES} bytes one ciphertext may have")
    return blob, encode


def _base64_line(blob: bytes) -> bytes:
    return base64.b64encode(blob) + b"\n"


@contextlib.contextmanager
def _translated(action: str) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        raise ReaderGoneError(_message(action, error)) from error
    except OSError as error:
        raise FileAccessError(_message(action, error)) from error


_REMEDIES: Final = {
    errno.ENOSPC: "free some space and run it again",
    errno.EDQUOT: "free some of your quota and run it again",
    errno.ENOENT: "make its directory first",
    errno.EACCES: "check the permissions of the file and its directory",
    errno.EROFS: "name a place that can be written",
    errno.EBUSY: "it is a mount point of its own, which nothing can replace: write with --out - > FILE",
    errno.EXDEV: "it is a mount point of its own, which nothing can replace: write with --out - > FILE",
    errno.EIO: "check the disk",
    errno.EBADF: "it is closed",
    errno.EFBIG: "raise the limit (ulimit -f)",
    errno.EPIPE: "the reader of the pipe has ended",
}


def _message(action: str, error: OSError) -> str:
    if isinstance(error, RenameError):
        remedy = "either the old or the new file is there now; look before you run it again"
    else:
        remedy = _REMEDIES.get(error.errno or 0, "no output was made")
    return f"{action}: {error.strerror or error}; {remedy}"

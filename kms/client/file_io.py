"""Where files are read and written: whole pieces from a source, and outputs that appear whole or not at all.

Standard output cannot be taken back, so what is written there has to be authentic by then.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from kms.errors import FileAccessError, InputError, InputMissingError, ReaderGoneError
from kms.host import streams
from kms.host.durable import RenameError
from kms.host.output import OutputFile, open_stream
from kms.limits import FILE_CHUNK_BYTES

Source = Path | BinaryIO | None
"""Where to read: a path, an open binary file (it stays open), or None for standard input."""
Target = Path | BinaryIO | None
"""Where to write: a path, an open binary file (it stays open), or None for standard output."""
PathOrStream = str | os.PathLike[str] | BinaryIO | None
Progress = Callable[[int], None]
"""Called after each chunk with the number of bytes that are done since the last call; in the end all of the source."""


def source_size(source: Source) -> int | None:
    """The size of `source` in bytes, for a progress bar; None when it is not a regular file or does not exist."""
    if not isinstance(source, Path):
        return None
    try:
        state = source.stat()
    except OSError:
        return None
    return state.st_size if stat.S_ISREG(state.st_mode) else None


class Reader:
    """Reads whole pieces from a source, short ones only at its end, and reports progress."""

    def __init__(self, stream: BinaryIO, name: str, progress: Progress | None = None) -> None:
        self._stream = stream
        self.name = name
        self.progress = progress
        streams.widen(stream)

    def fill(self, buffer: memoryview) -> int:
        """Fill `buffer` from its start; returns how many bytes, fewer than its length only at the end."""
        with translated(f"cannot read {self.name}"):
            length = streams.fill(self._stream, buffer)
        if self.progress is not None and length:
            self.progress(length)
        return length

    def take(self, most: int) -> bytes:
        """The next `most` bytes, or fewer at the end."""
        buffer = bytearray(most)
        length = self.fill(memoryview(buffer))
        return bytes(buffer[:length])


class Writer(Protocol):
    def write(self, data: bytes | memoryview) -> None: ...

    def commit(self) -> None: ...


class StreamWriter:
    """Writes to an open file, such as standard output."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream = stream
        self._name = name
        streams.widen(stream)

    def write(self, data: bytes | memoryview) -> None:
        with translated(f"cannot write {self._name}"):
            streams.put(self._stream, data)

    def commit(self) -> None:
        with translated(f"cannot write {self._name}"):
            self._stream.flush()


class FileWriter:
    """Writes a file that appears under its name at `commit`."""

    def __init__(self, file: OutputFile, path: Path) -> None:
        self._file = file
        self._action = f"cannot write {path}"

    def write(self, data: bytes | memoryview) -> None:
        with translated(self._action):
            self._file.write(data)

    def commit(self) -> None:
        with translated(self._action):
            self._file.commit()


@contextlib.contextmanager
def opened_source(source: Source, progress: Progress | None) -> Iterator[Reader]:
    if source is None:
        yield Reader(streams.standard_input(), "standard input", progress)
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
            yield Reader(stream, str(source), progress)
    else:
        yield Reader(source, "the input", progress)


@contextlib.contextmanager
def resolved(target: Target) -> Iterator[Target]:
    """`target`, or the stream that its path names."""
    stream = None
    if isinstance(target, Path):
        with translated(f"cannot write {target}"):
            stream = open_stream(target)
    if stream is None:
        yield target
    else:
        with stream:
            yield stream


@contextlib.contextmanager
def opened_target(target: Target) -> Iterator[Writer]:
    if target is None:
        yield StreamWriter(sys.stdout.buffer, "standard output")
    elif isinstance(target, Path):
        with translated(f"cannot write {target}"):
            file = OutputFile(Path(os.path.realpath(target)))
        with file:
            yield FileWriter(file, target)
    else:
        yield StreamWriter(target, "the output")


def copy(reader: Reader, write: Callable[[memoryview], None]) -> None:
    chunk = memoryview(bytearray(FILE_CHUNK_BYTES))
    while length := reader.fill(chunk):
        write(chunk[:length])


@contextlib.contextmanager
def translated(action: str) -> Iterator[None]:
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

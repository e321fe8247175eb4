"""Reads an audit log to verify it: the files, the keys that it was under, and the head. Beside a running server, too.

The head is read before the files. Records only ever come after it, so what it names has to be in them.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final

from kms.core.audit import AuditKeys, decode_head, parse
from kms.core.audit_verifier import Verifier
from kms.errors import DecryptionFailedError, FileAccessError, InputError, InputMissingError
from kms.limits import MAX_AUDIT_LINE_BYTES, MAX_KEY_CHANGES
from kms.storage.audit_head import head_path, read_head
from kms.storage.audit_reader import AuditReader

_HANDS_OVER: Final = b'"event":"ChangePassphrase"'


def verify(files: Sequence[Path], keystore: AuditReader, *, needs_head: bool) -> Verifier:
    """Verify `files`, the oldest first; the last has a head beside it if it is the one that is written (`needs_head`).

    Raises `InputMissingError`, `InputError` or `FileAccessError` for one that cannot be read, and what reading the head
    or the keystore raises.
    """
    newest = files[-1]
    raw_head = read_head(newest)
    with contextlib.ExitStack() as stack:
        logs = [(path, stack.enter_context(_open(path))) for path in files]
        keys = _keys(logs, keystore.keys)
        for key in keys[:-1]:
            stack.callback(key.wipe)
        head = decode_head(raw_head, keys[-1]) if raw_head is not None else None
        # Until the passphrase has changed for certain, the head is under the old keys.
        is_old_head = raw_head is not None and head is None and len(keys) > 1
        if raw_head is not None and is_old_head:
            head = decode_head(raw_head, keys[-2])
        verifier = Verifier(keys, head)
        for path, log in logs:
            verifier.begin(str(path))
            for piece in _pieces(log, path):
                verifier.feed(piece)
        verifier.finish()
    if raw_head is None:
        _without_head(verifier, newest, needs_head=needs_head)
    elif head is None or (is_old_head and not verifier.handed_over):
        verifier.find(str(head_path(newest)), 0, "was altered, or belongs to another log")
    generation = keystore.generation()
    if generation < verifier.generation:
        verifier.find(
            str(keystore.path),
            0,
            f"is older than the log: its generation is {generation}, and the log ends at {verifier.generation}. An older "
            "keystore was put back",
        )
    return verifier


def _without_head(verifier: Verifier, newest: Path, *, needs_head: bool) -> None:
    if not verifier.seq:
        verifier.find(str(newest), 0, "holds no record")
    elif needs_head and verifier.seq > 1:
        verifier.find(str(head_path(newest)), 0, "is missing: it tells whether the log was cut short")
    elif not needs_head:
        verifier.note(str(newest), 0, "has no head file beside it: whether it was cut short at its end cannot be told")


def check_readable(files: Sequence[Path]) -> None:
    """Raise what `verify` would raise of these files before it reads one."""
    for path in files:
        _open(path).close()


def _open(path: Path) -> BinaryIO:
    try:
        # O_NONBLOCK: opening a FIFO must not hang before its kind is known.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise InputMissingError(f"there is no audit log {path}; name its files, the oldest first") from None
    except OSError as error:
        raise FileAccessError(f"cannot read {path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{path} is not a regular file; it is read twice, so unpack it into one")
    return os.fdopen(descriptor, "rb")


def _pieces(log: BinaryIO, path: Path) -> Iterator[bytes]:
    """The lines of `log`; one that is longer than a record may be, in pieces."""
    try:
        log.seek(0)
        while piece := log.readline(MAX_AUDIT_LINE_BYTES + 1):
            yield piece
    except OSError as error:
        raise FileAccessError(f"cannot read {path}: {error.strerror}") from error


def _keys(logs: Sequence[tuple[Path, BinaryIO]], newest: AuditKeys) -> list[AuditKeys]:
    """The keys that the log was under, one after the other: each record that hands over holds those before it.

    Nothing is believed here but that the seal opens. One of a change that was not made is sealed for keys that nobody has.
    """
    sealed: deque[bytes] = deque(maxlen=MAX_KEY_CHANGES)
    for path, log in logs:
        for piece in _pieces(log, path):
            if _HANDS_OVER in piece and (line := parse(piece)) is not None:
                sealed.append(line.claims.sealed_key)
    keys = deque([newest])
    for one in reversed(sealed):
        with contextlib.suppress(DecryptionFailedError):
            keys.appendleft(keys[0].open_predecessor(one))
    return list(keys)

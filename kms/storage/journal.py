"""The journal beside a keystore: what was changed since the file was written whole, a line for each commit.

    {"journal": id, "generation": that of the file it was begun for, "mac"}
    {"generation": one more each time, "previous": the MAC of the line before, "keyGroups": [whole groups], "mac"}
    ...

So a change costs one write and one fsync, however large the keystore is. When the journal is longer than the keystore, that
is written whole, and the journal begun anew: folded. The keystore is renamed into its place first, so a power cut between
the two leaves the journal before, all of which is in the keystore already: that names it as its former one.

Each line has a MAC over itself, and names the one before it: none can be altered, left out, or put elsewhere, and the id,
which is random for each journal and in the keystore under its MAC, ties the first one to that file alone. What nobody can
tell by this is that the last lines were cut off whole, no more than that an older keystore was put back: for that there is
the audit log.

A write that a power cut ended leaves a line that is no line: a beginning of one, or blocks of zeros or of garbage. Such an
end is cut off, as its change was never answered. It is not taken for one when any line after it is authentic, or when it is
a line of text: then somebody or something has altered what was answered.
"""

from __future__ import annotations

import hmac
import re
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final, TypeVar

import msgspec
from msgspec import Struct

from kms.errors import KeystoreError
from kms.storage.stored import StoredGroup, decode_json

T = TypeVar("T")
Mac = Callable[[bytes], bytes]
"""HMAC-SHA256 under the key for journals: 32 bytes."""

_MISSING: Final = (
    "its journal is missing, and with it the changes since generation {0}: put it back beside it. If it is lost for good, "
    "kms-admin mend-keystore goes on without it"
)
_ANOTHERS: Final = (
    "the journal beside it is not its own: put back the two that belong together. If the right one is lost for good, "
    "kms-admin mend-keystore goes on without it"
)
_UNNAMED: Final = (
    "there is a journal beside it that it does not name: when this is a backup that was put back, move the journal away; "
    "else put back the keystore that the journal belongs to"
)
_DAMAGED: Final = (
    "its journal was altered or damaged; nothing was changed. Put back a good copy of both, or see what is left with "
    "kms-admin mend-keystore"
)


class _Header(Struct, forbid_unknown_fields=True):
    journal: str
    generation: int


class _Record(Struct, forbid_unknown_fields=True, rename="camel"):
    generation: int
    previous: str
    key_groups: list[StoredGroup]


class _RecordToWrite(Struct, rename="camel"):
    """`_Record` with its groups encoded already."""

    generation: int
    previous: str
    key_groups: Sequence[msgspec.Raw]


@dataclass(frozen=True, slots=True)
class Named:
    """What a keystore file says of journals, in the form of the file."""

    current: str | None
    """The id of the one that goes on from it; None where it is the whole keystore."""
    former: str | None
    """The id of the one that all is in it of, which may not have been removed yet."""
    generation: int


@dataclass(frozen=True, slots=True)
class Journal:
    """A journal that was verified, and goes on from its keystore file."""

    generation: int
    """That of the keystore, with what is in here."""
    changed: dict[str, StoredGroup]
    """The groups that differ from those in the file, the new ones in their order."""
    length: int
    """So many bytes of it are authentic; what is behind them was torn."""
    last: str
    """The MAC of its last line, which the next one names."""
    torn: int


def header(identity: str, generation: int, mac: Mac) -> bytes:
    """The first line of a journal."""
    return _sealed(msgspec.json.encode(_Header(identity, generation)), mac)


def record(generation: int, previous: str, groups: Sequence[msgspec.Raw], mac: Mac) -> bytes:
    """The line of one commit, whose groups are encoded as in a keystore file."""
    return _sealed(msgspec.json.encode(_RecordToWrite(generation, previous, groups)), mac)


def mac_of(line: bytes) -> str:
    """The MAC in a line that `header` or `record` made, with its line end."""
    return line[-_TAIL_BYTES - 1 :][len(_MAC) : -len(_END) - 1].decode("ascii")


def read(raw: bytes | None, named: Named, mac: Mac) -> Journal | None:
    """What is in the journal `raw` that is beside a keystore file; None where none goes on from it.

    Raises `KeystoreError` unless it is the one that belongs there, and authentic to its end.
    """
    if raw is None:
        if named.current is not None:
            raise KeystoreError(_MISSING.format(named.generation))
        return None
    mine = claimed(raw)
    if mine is not None and mine == named.former:
        # A server was ended right after the keystore had its name, in which all of this is.
        return None
    if named.current is None:
        check_unnamed(raw)
        return None
    if mine is not None and mine != named.current:
        raise KeystoreError(_ANOTHERS)
    journal, trouble = _verified(raw, named, mac)
    if journal is None or trouble:
        raise KeystoreError(_DAMAGED)
    return journal


def salvage(raw: bytes | None, named: Named, mac: Mac) -> Journal | None:
    """`read` for who cannot have all: what is authentic, up to the first line that is not; None where nothing fits."""
    return None if raw is None or named.current is None else _verified(raw, named, mac)[0]


def check_unnamed(raw: bytes | None) -> None:
    """Raise `KeystoreError` for what is beside a keystore that names no journal, unless no change is in it."""
    # It is begun before the keystore that names it has its name, and a server may have been ended between the two.
    if raw is not None and (claimed(raw) is None or raw.find(b"\n") != len(raw) - 1):
        raise KeystoreError(_UNNAMED)


def claimed(raw: bytes) -> str | None:
    """Whose journal it says it is."""
    line = raw[: max(0, raw.find(b"\n"))]
    found = _decoded(line[:-_TAIL_BYTES] + b"}", _header_decoder)
    return None if found is None else found.journal


def _verified(raw: bytes, named: Named, mac: Mac) -> tuple[Journal | None, bool]:
    """What of it is authentic and of this keystore, if any is, and whether something is wrong with the rest."""
    end = raw.find(b"\n") + 1
    body = _body(raw[: max(0, end - 1)], mac)
    start = None if body is None else _decoded(body, _header_decoder)
    if start is None or start.journal != named.current or start.generation != named.generation:
        return None, True
    length, last, generation = end, _last_mac(raw, end), start.generation
    changed: dict[str, StoredGroup] = {}
    is_wrong = False
    while length < len(raw):
        end = raw.find(b"\n", length) + 1
        line = raw[length : end - 1] if end else b""
        found = _next(line, last, generation, mac)
        if found is None:
            is_wrong = not _is_torn(raw[length:], mac)
            break
        changed.update((group.key_id, group) for group in found.key_groups)
        length, last, generation = end, _last_mac(raw, end), found.generation
    return Journal(generation, changed, length, last, len(raw) - length), is_wrong


def _last_mac(raw: bytes, end: int) -> str:
    return mac_of(raw[end - _TAIL_BYTES - 1 : end])


def _next(line: bytes, previous: str, generation: int, mac: Mac) -> _Record | None:
    """The record in `line`, if that is authentic and comes next."""
    body = _body(line, mac)
    found = None if body is None else _decoded(body, _record_decoder)
    if found is None or found.previous != previous or found.generation != generation + 1:
        return None
    return found


def _is_torn(rest: bytes, mac: Mac) -> bool:
    """Whether `rest` can be what is left of a single write: a beginning of a line, or blocks that are no text."""
    if b"\n" not in rest:
        return True
    for line in rest.split(b"\n"):
        # The last of a line: where a line end was lost, two are in one. Each try takes as long as what it tries.
        start = line.rfind(_RECORD)
        if start >= 0 and _body(line[start:], mac) is not None:
            return False
    # A bit that flipped makes one such character, and a block that never arrived hundreds.
    return sum(1 for _ in islice(_NO_TEXT.finditer(rest.decode("utf-8", "replace")), _LEAST_GARBAGE)) == _LEAST_GARBAGE


def _body(line: bytes, mac: Mac) -> bytes | None:
    """What the MAC in `line` is of, if it is authentic."""
    tail = line[-_TAIL_BYTES:]
    if len(line) <= _TAIL_BYTES or not (tail.startswith(_MAC) and tail.endswith(_END)):
        return None
    body = line[:-_TAIL_BYTES] + b"}"
    presented = tail[len(_MAC) : -len(_END)]
    return body if hmac.compare_digest(b64encode(mac(body)), presented) else None


def _sealed(body: bytes, mac: Mac) -> bytes:
    return body[:-1] + _MAC + b64encode(mac(body)) + _END + b"\n"


def _decoded(body: bytes, decoder: msgspec.json.Decoder[T]) -> T | None:
    try:
        return decode_json(body, decoder)
    except KeystoreError:
        return None


_MAC: Final = b',"mac":"'
_END: Final = b'"}'
_TAIL_BYTES: Final = len(_MAC) + 44 + len(_END)
"""A MAC as base64, and what is around it at the end of a line."""
_RECORD: Final = b'{"generation":'
"""What a record begins with, and nothing else: in a name its quotes would be escaped."""
_NO_TEXT: Final = re.compile("[\ufffd\\x00-\\x09\\x0b-\\x1f\\x7f]")
_LEAST_GARBAGE: Final = 4
_header_decoder: Final = msgspec.json.Decoder(_Header)
_record_decoder: Final = msgspec.json.Decoder(_Record)

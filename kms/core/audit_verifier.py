"""Verifies an audit log from its first line to its last, in constant memory.

It holds where the chain ended so far. A line that follows from there is authentic, and the chain ends with it. One that
does not is a finding, and the chain goes on from the MAC that the line itself claims, so that a single edit is a finding or
two and not one for each line behind it. What it claims is taken for nothing else.

Lines that have not even the form of a record leave the chain where it was. They are excused when the record that
follows names them as a torn write, or when they are one unfinished line at the end of all; anywhere else they are findings.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Final, NamedTuple

from kms.core.audit import NEW_CHAIN, AuditKeys, Chain, Head, Line, Torn, is_torn, parse
from kms.errors import DecryptionFailedError
from kms.limits import MAX_AUDIT_LINE_BYTES, MAX_FINDINGS_SHOWN

_BEGINNING_BYTES: Final = 64
"""Of a torn line: more than the number with which it begins."""


class Finding(NamedTuple):
    """What is wrong, and where. Line 0 is the file as a whole."""

    file: str
    line: int
    what: str


class Span:
    """The authentic records of one file: how many, and the first and last of them with their times."""

    def __init__(self, file: str) -> None:
        self.file: Final = file
        self.records = 0
        self.first = self.last = 0
        self.begins = self.ends = ""

    def add(self, line: Line) -> None:
        claims = line.claims
        if not self.records:
            self.first, self.begins = claims.seq, claims.time
        self.records += 1
        self.last, self.ends = claims.seq, claims.time


class _Debris:
    """Lines in a row that are no records."""

    def __init__(self, file: str, line: int) -> None:
        self.file: Final = file
        self.line: Final = line
        self.lines = 0
        self.length = 0
        self.is_closed = False
        self._beginning = b""
        self._digest = sha256()
        self._before_newline = sha256()

    def add(self, piece: bytes, *, is_new: bool) -> None:
        self.lines += is_new
        self._beginning = (self._beginning + piece)[:_BEGINNING_BYTES]
        self.is_closed = piece.endswith(b"\n")
        self.length += len(piece)
        self._before_newline = self._digest.copy()
        self._before_newline.update(piece.removesuffix(b"\n"))
        self._digest.update(piece)

    def is_torn(self, seq: int) -> bool:
        """Whether a crash can have left it, of the write of record `seq`; what a start would not go on behind."""
        return self.lines == 1 and is_torn(self._beginning.removesuffix(b"\n"), seq)

    def torn(self, *, without_newline: bool) -> Torn:
        """It, with or without the line end at its end."""
        if without_newline and self.is_closed:
            return Torn(self.length - 1, self._before_newline.hexdigest())
        return Torn(self.length, self._digest.hexdigest())


class Verifier:
    """Is fed the files of a log, the oldest first: `begin` for each, then `feed` with its lines; `finish` after all."""

    def __init__(self, keys: Sequence[AuditKeys], head: Head | None) -> None:
        """`keys` are those that the log was under, one after the other; `head` belongs to the last file, if it has one."""
        self.findings: Final[list[Finding]] = []
        """The first of them."""
        self.count = 0
        """All of them."""
        self.notes: Final[list[Finding]] = []
        self.counted = 0
        """Refusals that have no record of their own."""
        self.reloads = 0
        """How often a file of principals, or that there is none, was put in force."""
        self.principals = ""
        """When that was last, and which."""
        self.spans: Final[list[Span]] = []
        self.generation = 0
        """Of the last authentic record."""
        self.handed_over = False
        """Whether that record hands over to the last of the keys."""
        self._keys = keys
        self._key = 0
        self._head = head
        self._chain: Chain | None = None
        self._highest = 0
        self._debris: _Debris | None = None
        self._line = 0
        self._in_line = False
        self._is_first = True

    def begin(self, file: str) -> None:
        """The lines of `file` follow."""
        if self.spans and not self._line:
            # The newest one is, until SIGHUP comes.
            self.find(self._file, 0, "is empty: each file of a log but the newest holds its first record at least")
        self.spans.append(Span(file))
        self._line = 0
        self._in_line = False
        self._is_first = True

    def feed(self, piece: bytes) -> None:
        """A line with its line end, if it has one; of one that is longer than a record may be, piece after piece."""
        is_new = not self._in_line
        self._line += is_new
        self._in_line = not piece.endswith(b"\n")
        line = parse(piece) if is_new else None
        if line is None:
            if self._debris is None or self._debris.file != self._file:
                self._report_debris()
                self._debris = _Debris(self._file, self._line)
            self._debris.add(piece, is_new=is_new)
        elif self._is_authentic(line):
            self._accept(line)
        else:
            self._report_debris()
            self._find(self._what_is_wrong(line))
            self._end_with(line)

    def finish(self) -> None:
        """There are no more files."""
        debris = self._debris
        if debris is not None and debris.lines == 1 and not debris.is_closed and debris.length <= MAX_AUDIT_LINE_BYTES:
            self.note(
                debris.file,
                debris.line,
                f"the last line is torn: {debris.length} bytes of a record that a crash cut short, or is being written",
            )
            self._debris = None
        self._report_debris()
        if self._head is not None and self._highest < self._head.seq:
            self.find(
                self._file, 0, f"was cut short: it ends with record {self._highest}, and record {self._head.seq} was in it"
            )

    @property
    def seq(self) -> int:
        """Of the last record, authentic or not; 0 when there is none."""
        return self._chain.seq if self._chain is not None else 0

    def find(self, file: str, line: int, what: str) -> None:
        """Add what was found by other means."""
        self.count += 1
        if self.count <= MAX_FINDINGS_SHOWN:
            self.findings.append(Finding(file, line, what))

    def note(self, file: str, line: int, what: str) -> None:
        """Add what is to be known, and is nothing wrong."""
        if len(self.notes) < MAX_FINDINGS_SHOWN:
            self.notes.append(Finding(file, line, what))

    @property
    def _file(self) -> str:
        return self.spans[-1].file

    def _find(self, what: str) -> None:
        self.find(self._file, self._line, what)

    def _note(self, what: str) -> None:
        self.note(self._file, self._line, what)

    def _is_authentic(self, line: Line) -> bool:
        """Whether `line` follows from where the chain ends; or, as the first of all, from where it says itself."""
        if self._chain is not None:
            return self._verifies(line, self._chain.mac)
        return self._follows_itself(line)

    def _follows_itself(self, line: Line) -> bool:
        return line.previous is not None and self._verifies(line, line.previous)

    def _verifies(self, line: Line, previous: bytes) -> bool:
        # Later keys too: where the record is missing that hands over to them, they are still nobody else's.
        for number in range(self._key, len(self._keys)):
            if line.is_after(previous, self._keys[number]):
                self._key = number
                return True
        return False

    def _accept(self, line: Line) -> None:
        claims = line.claims
        self._excuse_debris(line)
        if self._is_first and claims.previous is None:
            self._find(f"does not begin with the first record of a file: what stood before record {claims.seq} is gone")
        elif not self._is_first and claims.previous is not None:
            self._find(f"record {claims.seq} begins a file, and stands in the middle of one")
        if self._chain is None:
            if line.previous == NEW_CHAIN.mac:
                self._expect(claims.seq, 1)
            elif claims.seq > 1:
                self._note(
                    f"records 1 to {claims.seq - 1} are not here: to verify them too, give the older files first",
                )
        else:
            self._expect(claims.seq, self._chain.seq + 1)
            if claims.generation < self.generation and not claims.accepted_rollback:
                self._find(
                    f"record {claims.seq} was written at generation {claims.generation} of the keystore, behind one at "
                    f"{self.generation}: an older keystore was put back",
                )
        self.generation = claims.generation
        self._end_with(line)
        self.spans[-1].add(line)
        if self._head is not None and claims.seq == self._head.seq and line.mac != self._head.chain.mac:
            self._find(f"record {claims.seq} is not the one that the head file names")
        if claims.event == "Refusals":
            self.counted += claims.count
        elif claims.event == "Principals" and claims.principals_sha256 is not None:
            self.reloads += 1
            what = (
                f"the file of principals with SHA-256 {claims.principals_sha256}" if claims.principals_sha256 else "no file"
            )
            self.principals = f"record {claims.seq}, {claims.time}: {what} decides from here on"
        self.handed_over = claims.event == "ChangePassphrase" and self._hands_over(claims.sealed_key)
        self._key += self.handed_over

    def _end_with(self, line: Line) -> None:
        self._chain = Chain(line.claims.seq, line.mac)
        self._highest = max(self._highest, line.claims.seq)
        self._is_first = False

    def _expect(self, seq: int, expected: int) -> None:
        if seq != expected:
            self._find(_out_of_order(seq, expected))

    def _hands_over(self, sealed: bytes) -> bool:
        """Whether the keys that come next open `sealed`. If not, the passphrase was not changed in the end."""
        if self._key + 1 == len(self._keys):
            return False
        try:
            self._keys[self._key + 1].open_predecessor(sealed).wipe()
        except DecryptionFailedError:
            return False
        return True

    def _excuse_debris(self, line: Line) -> None:
        """Take the lines before `line` for a torn write if it says so, or report them."""
        claims = line.claims
        debris = self._debris
        if claims.torn and debris is not None:
            # In the same file, the line end at its end was written with the record.
            torn = debris.torn(without_newline=debris.file == self._file)
            if torn == Torn(claims.torn, claims.torn_sha256) and (claims.event != "Start" or debris.is_torn(claims.seq)):
                self._note(
                    f"record {claims.seq} follows a write that was cut short: {claims.torn} bytes of it are left",
                )
                self._debris = None
                return
        self._report_debris()
        if claims.torn:
            self._find(f"record {claims.seq} names {claims.torn} bytes of a torn write, which are not before it")

    def _report_debris(self) -> None:
        debris, self._debris = self._debris, None
        if debris is None:
            return
        last = debris.line + debris.lines - 1
        lines = "is not a record" if debris.lines == 1 else f"and those up to line {last} are no records"
        self.find(debris.file, debris.line, lines)

    def _what_is_wrong(self, line: Line) -> str:
        """Of a line that does not follow from where the chain ends."""
        seq = line.claims.seq
        if self._chain is None:
            if line.claims.previous is None:
                return f"does not begin with the first record of a file: what stood before record {seq} is gone"
            return f"record {seq} was altered, or is under a key that is not known"
        expected = self._chain.seq + 1
        if line.claims.previous is not None and self._follows_itself(line):
            return f"record {seq} begins a file, but not the one that goes on from record {expected - 1}"
        return f"record {seq} was altered, or one before it" if seq == expected else _out_of_order(seq, expected)


def _out_of_order(seq: int, expected: int) -> str:
    if seq < expected:
        return f"record {seq} stands here again, or in the wrong place: record {expected} was to follow"
    missing = f"record {expected} is" if seq == expected + 1 else f"records {expected} to {seq - 1} are"
    return f"{missing} missing before record {seq}"

"""Audit logs that several tests share: keys, records, and whole logs as a server leaves them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from kms.core.audit import NEW_CHAIN, AuditKeys, Chain, EventRecord, Head, OperationRecord, Outcome, Record, seal, to_text
from kms.core.audit_verifier import Verifier
from kms.core.secret import Secret

TIME: Final = "2026-01-31T12:00:00.000001Z"


def audit_keys(number: int = 1) -> AuditKeys:
    """The keys of one passphrase out of many."""
    return AuditKeys(Secret(bytearray([number]) * 64))


def operation(number: int = 1, operation: str = "Encrypt", outcome: Outcome = "ok") -> OperationRecord:
    return OperationRecord(
        time=TIME,
        connection=3,
        request=number,
        principal="billing",
        uid=1001,
        pid=4711,
        operation=operation,
        group="billing",
        version=2,
        outcome=outcome,
        generation=5,
    )


class Writer:
    """Makes the files of a log without a disk."""

    def __init__(self, keys: AuditKeys | None = None) -> None:
        self.keys = keys or audit_keys()
        self.files: list[bytearray] = []
        self.chain: Chain = NEW_CHAIN
        self.generation = 5

    def add(self, *records: Record) -> None:
        for record in records:
            record.time = record.time or TIME
            record.generation = self.generation
        data, self.chain = seal(records, self.chain, self.keys)
        self.files[-1] += data

    def begin_file(self) -> None:
        """A new file, and its first record."""
        previous = to_text(self.chain.mac).decode() if self.chain.seq else ""
        event = EventRecord(event="Continue" if self.files else "Start", previous=previous)
        self.files.append(bytearray())
        self.add(event)

    @property
    def head(self) -> Head:
        return Head(self.chain.seq, self.generation, to_text(self.chain.mac).decode())


def three_files(keys: AuditKeys | None = None) -> Writer:
    """A log that was rotated twice and restarted once: 60 records."""
    log = Writer(keys)
    for number in range(3):
        log.begin_file()
        log.add(*(operation(20 * number + request) for request in range(9)))
        log.add(EventRecord(event="Stop"), EventRecord(event="Start"))
        log.generation += 1
        log.add(*(operation(20 * number + request, "Decrypt", "refused") for request in range(8)))
    return log


def verified(
    files: Sequence[bytes | bytearray], keys: Sequence[AuditKeys] | None = None, head: Head | None = None
) -> Verifier:
    """What the verifier finds in `files`."""
    verifier = Verifier(keys or [audit_keys()], head)
    for number, content in enumerate(files, 1):
        verifier.begin(f"log.{number}")
        for line in lines(content):
            verifier.feed(line)
    verifier.finish()
    return verifier


def lines(content: bytes | bytearray) -> list[bytes]:
    """The lines of `content` with their line ends; what follows the last one is a line, too."""
    *whole, rest = bytes(content).split(b"\n")
    return [line + b"\n" for line in whole] + ([rest] if rest else [])


def told(verifier: Verifier) -> list[str]:
    """Findings and notes as people read them."""
    return [f"{file}:{line}: {what}" for file, line, what in (*verifier.findings, *verifier.notes)]

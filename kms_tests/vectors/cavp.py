"""Reads the vector files of NIST's CAVP and of the package `cryptography-vectors`: `name = value` lines, in sections."""

from __future__ import annotations

import re
from collections.abc import Iterator

import cryptography_vectors

Record = dict[str, str]


def records(file: str, starts_with: str) -> Iterator[Record]:
    """Each record, which its field `starts_with` begins; it also has the fields of its `[section]`. FAIL is a field."""
    section: Record = {}
    record: Record | None = None
    with cryptography_vectors.open_vector_file(file, "r") as lines:
        for line in lines:
            if found := re.fullmatch(r"\[(\w+) = (\w+)\]", line.strip()):
                if record is not None:
                    yield record
                    record = None
                section[found[1]] = found[2]
                continue
            name, equals, value = line.partition("=")
            if line.startswith("#") or not (equals or line.strip() == "FAIL"):
                continue
            if name.strip() == starts_with:
                if record is not None:
                    yield record
                record = dict(section)
            if record is not None:
                record[name.strip()] = value.strip()
    if record is not None:
        yield record

"""A column of a database that only the server can read.

The context (AAD) of each value is the place it belongs to. So a value that somebody copies into another row, to be shown it
there, does not open.

Prints:

    stored 101 bytes for ada
    ada's number is 4111 1111
    a number that was moved to another row does not open
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from kms import DecryptionFailedError, KmsClient


def place(name: str) -> bytes:
    """Where the value of this row belongs. Whatever identifies it and does not change will do."""
    return f"people/{name}/number".encode()


def main() -> None:
    token = Path(os.environ["MINIKMS_API_TOKEN_FILE"]).read_text(encoding="ascii").strip()
    database = sqlite3.connect(":memory:")
    database.execute("CREATE TABLE people (name TEXT PRIMARY KEY, number BLOB)")
    with KmsClient.connect_unix(os.environ["MINIKMS_UNIX_SOCKET"], token=token) as kms:
        for name, number in (("ada", b"4111 1111"), ("bob", b"4222 2222")):
            sealed = kms.encrypt(number, aad=place(name))
            database.execute("INSERT INTO people VALUES (?, ?)", (name, sealed))

        def number_of(name: str) -> str:
            (sealed,) = database.execute("SELECT number FROM people WHERE name = ?", (name,)).fetchone()
            return kms.decrypt(sealed, aad=place(name)).decode()

        (size,) = database.execute("SELECT length(number) FROM people WHERE name = 'ada'").fetchone()
        print(f"stored {size} bytes for ada")
        print(f"ada's number is {number_of('ada')}")
        database.execute("UPDATE people SET number = (SELECT number FROM people WHERE name = 'ada') WHERE name = 'bob'")
        try:
            number_of("bob")
        except DecryptionFailedError:
            print("a number that was moved to another row does not open")


if __name__ == "__main__":
    main()

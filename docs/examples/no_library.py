"""The protocol without our library: a JSON object a line, binary as base64.

A client in another language is no longer than this.

Prints:

    the server answers: ok
    hello
    refused: DecryptionFailed
"""

from __future__ import annotations

import base64
import json
import os
import socket
from pathlib import Path
from typing import Any


class Kms:
    """One connection. Replies come in the order of the requests."""

    def __init__(self, path: str, token: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._replies = self._socket.makefile("rb")
        self._token = token

    def ask(self, kind: str, **fields: str) -> dict[str, Any]:
        """Send a request; its reply, which has the status `ok` or `error`. What is not known in it is to be ignored."""
        line = json.dumps({"type": kind, "token": self._token, **fields})
        self._socket.sendall(line.encode() + b"\n")
        reply: dict[str, Any] = json.loads(self._replies.readline())
        return reply


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def main() -> None:
    token = Path(os.environ["MINIKMS_API_TOKEN_FILE"]).read_text(encoding="ascii").strip()
    kms = Kms(os.environ["MINIKMS_UNIX_SOCKET"], token)
    print("the server answers:", kms.ask("Health")["status"])
    sealed = kms.ask("Encrypt", plaintext=text(b"hello"), aad=text(b"greeting"))["ciphertext"]
    opened = kms.ask("Decrypt", ciphertext=sealed, aad=text(b"greeting"))
    print(base64.b64decode(opened["plaintext"]).decode())
    refused = kms.ask("Decrypt", ciphertext=sealed, aad=text(b"farewell"))
    print("refused:", refused["errorCode"])


if __name__ == "__main__":
    main()

"""Envelope encryption: large data is encrypted here, and only its key goes to the server.

`kms-client encrypt-file` does this for files. Do it yourself where the data is no file, or where one data key is to serve
many small records for a while.

Prints:

    8388608 bytes encrypted; the server saw 32 of them
    opened: they are the same
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kms import KmsClient

CONTEXT = b"photos/2026"


class Sealed(NamedTuple):
    """What is kept: nothing in it is secret."""

    wrapped_key: bytes
    nonce: bytes
    body: bytes


def seal(kms: KmsClient, data: bytes) -> Sealed:
    """Encrypt `data` under a fresh key. The key in the clear is used once and forgotten."""
    key = kms.generate_data_key(aad=CONTEXT)
    nonce = os.urandom(12)
    return Sealed(key.wrapped, nonce, AESGCM(key.plaintext).encrypt(nonce, data, CONTEXT))


def unseal(kms: KmsClient, sealed: Sealed) -> bytes:
    """Ask the server for the key, and decrypt. It refuses once the key's version is disabled."""
    key = kms.decrypt(sealed.wrapped_key, aad=CONTEXT)
    return AESGCM(key).decrypt(sealed.nonce, sealed.body, CONTEXT)


def main() -> None:
    token = Path(os.environ["MINIKMS_API_TOKEN_FILE"]).read_text(encoding="ascii").strip()
    data = os.urandom(8 << 20)
    with KmsClient.connect_unix(os.environ["MINIKMS_UNIX_SOCKET"], token=token) as kms:
        sealed = seal(kms, data)
        print(f"{len(data)} bytes encrypted; the server saw 32 of them")
        print("opened: they are the same" if unseal(kms, sealed) == data else "they differ")


if __name__ == "__main__":
    main()

"""Rotate a key group, move everything that is encrypted under it, and take the old version out of use.

The plaintexts stay in the server. Each ciphertext is replaced on its own, so moving them can be interrupted and begun again
at any time: what has been moved opens, and so does what has not.

Prints:

    payroll: version 2 is active
    moved 3 ciphertexts
    version 1 is disabled, and all 3 still open
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from kms import KmsClient

GROUP = "payroll"


def connect(token_file: str) -> KmsClient:
    """A client with the token in the file that the environment variable names."""
    token = Path(os.environ[token_file]).read_text(encoding="ascii").strip()
    return KmsClient.connect_unix(os.environ["MINIKMS_UNIX_SOCKET"], token=token)


def replace(path: Path, content: bytes) -> None:
    """The old content or the new one, never a part of either."""
    fresh = path.with_suffix(".new")
    fresh.write_bytes(content)
    fresh.replace(path)


def main() -> None:
    with (
        connect("MINIKMS_API_TOKEN_FILE") as kms,
        connect("MINIKMS_ADMIN_TOKEN_FILE") as admin,
        tempfile.TemporaryDirectory() as directory,
    ):
        admin.create_key_group(GROUP)
        for month in ("may", "june", "july"):
            (Path(directory) / month).write_bytes(kms.encrypt(month.encode(), key_id=GROUP))

        group = admin.rotate_key_group(GROUP)
        print(f"{GROUP}: version {group.active_version} is active")
        sealed = sorted(Path(directory).iterdir())
        for path in sealed:
            replace(path, kms.reencrypt(path.read_bytes(), key_id=GROUP))
        print(f"moved {len(sealed)} ciphertexts")

        # Not destroyed: for a while it can still be enabled again, if something was forgotten.
        admin.disable_version(GROUP, 1)
        opened = [kms.decrypt(path.read_bytes()).decode() for path in sealed]
        print(f"version 1 is disabled, and all {len(opened)} still open")


if __name__ == "__main__":
    main()

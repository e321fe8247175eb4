"""A backup: the keystore in one file, whatever a server is doing with it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from kms.core.secret import Secret
from kms.errors import FileAccessError, KeystoreError
from kms.host import durable
from kms.storage import format4, formats
from kms.storage.content import read_pair
from kms.storage.file import naming
from kms.storage.root_keys import RootKeys


def check_target(target: Path) -> None:
    """Raise `KeystoreError` unless a backup may be written to `target`."""
    if os.path.lexists(target):
        raise KeystoreError(f"there is something at {target} already; it is not touched. Name another file")
    if not target.parent.is_dir():
        raise FileAccessError(f"there is no directory {target.parent}; make it first, or name another file")


def back_up(keystore: Path, passphrase: Secret, target: Path) -> int:
    """Write the keystore, and what is in its journal, whole to `target`, durably; returns its generation.

    It needs no lock, and opens every key first: a backup that was made can be put back. Raises what `load` raises, and
    `KeystoreError` where there is something at `target` already.
    """
    check_target(target)
    pair = read_pair(keystore)
    with naming(keystore), contextlib.ExitStack() as wipes:
        opener = formats.opener(pair)
        with opener.header.derive(passphrase) as root:
            keys = wipes.enter_context(RootKeys(root))
            keyring = formats.opened(opener, root, keys)
        for key in keyring.live_keys():
            wipes.callback(key.wipe)
        content = pair.file.raw
        if isinstance(opener, format4.Sealed):
            front = format4.Front(opener.header, opener.front.root_check)
            content = bytes(format4.Encoder().encode(keyring, front, keys))
    try:
        durable.write_file(target, content)
    except OSError as error:
        raise FileAccessError(f"cannot write {target}: {error.strerror}") from error
    return keyring.generation

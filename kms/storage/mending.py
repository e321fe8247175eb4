"""A keystore whose journal is missing or damaged, opened with what is left."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from kms.core.secret import Secret
from kms.errors import FileAccessError, KeystoreError
from kms.host import durable
from kms.limits import MAX_KEPT_KEYSTORES
from kms.storage.file import load
from kms.storage.lock import KeystoreLock, journal_path


class Mended(NamedTuple):
    """What came of it: the generation up to which all is there, and where the journal that was there is kept."""

    generation: int
    kept: Path | None


def mend(lock: KeystoreLock, passphrase: Secret) -> Mended:
    """Write the keystore whole, with what can be read of its journal, which is kept beside it.

    What was changed after that is lost, and the keys with it that were made. Raises what `load` raises, `KeystoreError`
    where there is nothing to mend, and what `Keystore.write_whole` raises.
    """
    journal = journal_path(lock.keystore)
    keystore, keyring = load(lock, passphrase, salvages=True)
    try:
        if keystore.trouble is None:
            raise KeystoreError(f"{lock.keystore}: there is nothing to mend; it opens as it is")
        kept = _keep(journal) if os.path.lexists(journal) else None
        keystore.write_whole()
    finally:
        keystore.wipe()
        for key in keyring.live_keys():
            key.wipe()
    return Mended(keyring.generation, kept)


def _keep(journal: Path) -> Path:
    """Give it one more name, under which it stays when its own is taken away."""
    try:
        for number in range(MAX_KEPT_KEYSTORES):
            kept = journal.with_name(f"{journal.name}.unread{f'.{number}' if number else ''}")
            if not os.path.lexists(kept):
                kept.hardlink_to(journal)
                durable.sync_names(kept.parent)
                return kept
    except OSError as error:
        raise FileAccessError(f"cannot keep {journal}: {error.strerror}; nothing was changed") from error
    raise FileAccessError(f"cannot keep {journal}: there are {MAX_KEPT_KEYSTORES} others; move them away")

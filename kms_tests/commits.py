"""Commits for tests, which have the keyring as it is to be and not what differs."""

from __future__ import annotations

from kms.core.keyring import Keyring
from kms.storage.file import Keystore


def commit(store: Keystore, keyring: Keyring) -> None:
    """Have `store` hold `keyring`, by a commit of the groups that differ; its generation is the next one."""
    before = store._groups
    changed = [group for name, group in keyring.groups.items() if before.get(name) is not group]
    store.commit(keyring.generation - 1, changed)

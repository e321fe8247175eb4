"""Servers with a bug, to see that the checker finds it. Each function breaks the process that calls it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from kms.core import keyring as core
from kms.core.keyring import Command, KeyGroup, Keyring, Mint, RotateGroup, VersionStatus
from kms.service import actor
from kms.storage.file import Keystore


def reply_before_save() -> None:
    """Answer at once, and save a moment later."""
    commit = Keystore.commit
    writer = ThreadPoolExecutor(1)

    def commit_later(store: Keystore, expected_generation: int, changed: Sequence[KeyGroup]) -> None:
        writer.submit(time.sleep, 0.1)
        writer.submit(commit, store, expected_generation, changed)

    Keystore.commit = commit_later  # type: ignore[assignment, method-assign]


def lose_updates() -> None:
    """Apply one command in three to the keyring as it was before the last one."""
    count = 0
    former: Keyring | None = None

    def transition(keyring: Keyring, command: Command, *, now: int, mint: Mint) -> KeyGroup:
        nonlocal count, former
        count += 1
        base = keyring if former is None or count % 3 else former
        # A copy, as the actor goes on with the one it has.
        former = Keyring(keyring.generation, dict(keyring.groups))
        return core.transition(base, command, now=now, mint=mint)

    actor.transition = transition  # type: ignore[attr-defined]


def reuse_numbers() -> None:
    """Give a rotation the number of a destroyed version, where there is one."""

    def transition(keyring: Keyring, command: Command, *, now: int, mint: Mint) -> KeyGroup:
        group = core.transition(keyring, command, now=now, mint=mint)
        if not isinstance(command, RotateGroup):
            return group
        destroyed = [n for n, version in group.versions.items() if version.status is VersionStatus.DESTROYED]
        if not destroyed:
            return group
        number = destroyed[0]
        key, wrapped = mint(group.slot(number))
        active = core.KeyVersion.build(command.group, number, VersionStatus.ACTIVE, now, wrapped, key)
        versions = {n: version for n, version in group.versions.items() if n != group.active.version} | {number: active}
        return replace(group, active=active, versions=versions)

    actor.transition = transition  # type: ignore[attr-defined]

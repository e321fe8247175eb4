"""Small keystores to break, what is done to them, and the two states that are right afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from kms.core.keyring import Command, CreateGroup, DisableVersion, Keyring, RotateGroup, apply, transition
from kms.core.secret import Secret
from kms.storage import file
from kms.storage.lock import KeystoreLock, journal_path
from kms_tests import earlier_keystore, java_keystore
from kms_tests.commits import commit
from kms_tests.faults.program import TINY
from kms_tests.integration.processes import PASSPHRASE

NEW_PASSPHRASE: Final = "a new one of some length"
Table = dict[str, dict[int, str]]
"""Each group's versions and their states."""


@dataclass(frozen=True)
class Mutation:
    """A request that saves, and what it makes of `BEFORE`."""

    request: Mapping[str, Any]
    changed: Table

    @property
    def after(self) -> Table:
        return {**BEFORE, **self.changed}


BEFORE: Final[Table] = {"default": {1: "ENABLED", 2: "DISABLED", 3: "ENABLED", 4: "ACTIVE"}}
_ROTATED: Final[Table] = {"default": {1: "ENABLED", 2: "DISABLED", 3: "ENABLED", 4: "ENABLED", 5: "ACTIVE"}}


def _on_default(kind: str, **more: int) -> dict[str, Any]:
    return {"type": kind, "keyId": "default", **more}


MUTATIONS: Final = {
    "create": Mutation({"type": "CreateKeyGroup", "keyId": "billing"}, {"billing": {1: "ACTIVE"}}),
    "rotate": Mutation(_on_default("RotateKeyGroup"), _ROTATED),
    "disable": Mutation(_on_default("DisableVersion", version=1), {"default": {**BEFORE["default"], 1: "DISABLED"}}),
    "enable": Mutation(_on_default("EnableVersion", version=2), {"default": {**BEFORE["default"], 2: "ENABLED"}}),
    "destroy": Mutation(_on_default("DestroyVersion", version=3), {"default": {**BEFORE["default"], 3: "DESTROYED"}}),
}


def secret(passphrase: str = PASSPHRASE) -> Secret:
    return Secret(bytearray(passphrase.encode()))


def make_earlier(keystore: Path, version: int) -> None:
    """A keystore with the groups `BEFORE` in an earlier format, in the place of any that is there."""
    keystore.unlink(missing_ok=True)
    keystore.touch(mode=0o600)
    statuses = BEFORE["default"]
    if version == 2:
        versions = [java_keystore.Version(number, status) for number, status in statuses.items()]
        keystore.write_bytes(java_keystore.write([java_keystore.Group("default", 4, versions)], PASSPHRASE))
    else:
        group = earlier_keystore.Group("default", tuple(statuses.values()))
        keystore.write_bytes(earlier_keystore.write([group], PASSPHRASE))


def make(keystore: Path) -> None:
    """A keystore with the groups `BEFORE`, in a directory that is there, in the place of any that is there."""
    for path in (keystore, journal_path(keystore)):
        path.unlink(missing_ok=True)
    with KeystoreLock(keystore) as lock:
        store, keyring = file.initialise(lock, secret(), now=1, parameters=TINY)
        commands: list[Command] = [RotateGroup("default")] * 3
        for command in [*commands, DisableVersion("default", 2)]:
            keyring = apply(keyring, command, now=1, mint=store.mint)
        commit(store, replace(keyring, generation=keyring.generation + 1))


def make_large(keystore: Path, *, groups: int, versions: int) -> None:
    """A keystore with as many groups of as many versions, `default` the first, in the place of any that is there."""
    keystore.unlink(missing_ok=True)
    with KeystoreLock(keystore) as lock:
        store, keyring = file.initialise(lock, secret(), now=1, parameters=TINY)
        made = dict(keyring.groups)
        draft = Keyring(keyring.generation, made)
        for number in range(groups):
            name = f"group-{number}" if number else "default"
            commands: list[Command] = [RotateGroup(name)] * (versions - 1)
            for command in [*([CreateGroup(name)] if number else []), *commands]:
                made[name] = transition(draft, command, now=1, mint=store.mint)
        commit(store, draft.next_generation())


def load(keystore: Path, passphrase: str = PASSPHRASE) -> Keyring:
    """What a program finds there that starts now."""
    with KeystoreLock(keystore) as lock:
        store, keyring = file.load(lock, secret(passphrase))
    store.wipe()
    return keyring


def table(keyring: Keyring) -> Table:
    return {
        name: {number: version.status.value for number, version in group.versions.items()}
        for name, group in keyring.groups.items()
    }

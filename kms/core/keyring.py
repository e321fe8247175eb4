"""The keyring: frozen values, and the transitions between them as pure functions.

The rules, for each group:

- exactly one version is ACTIVE (encrypts and decrypts); the others are ENABLED (decrypt only), DISABLED (do nothing,
  reversibly) or DESTROYED (their key is gone for good; the number stays as a tombstone and is never used again);
- create makes v1 ACTIVE, and is refused when the name exists; a group never disappears, so a name is never reused;
- rotate makes v(max+1) ACTIVE and the former ACTIVE version ENABLED;
- disable takes ENABLED or DISABLED to DISABLED; the ACTIVE version is refused, since the group could not encrypt;
- disable for a time takes ENABLED to DISABLED; what is DISABLED already is refused, since its end would undo more;
- enable takes DISABLED or ENABLED to ENABLED, and leaves ACTIVE as it is;
- destroy takes ENABLED, DISABLED or DESTROYED to DESTROYED; the ACTIVE version is refused;
- what is DESTROYED never comes back.

A transition that changes nothing returns the very same group, so that nobody saves for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final, NamedTuple

from kms.core import ciphertext
from kms.core.names import NO_SUCH_GROUP, NO_SUCH_VERSION, check_new_name
from kms.core.specs import DEFAULT, Key, KeySpec, KeyUse
from kms.errors import InvalidRequestError
from kms.limits import MAX_KEY_GROUPS, MAX_VERSION, MAX_VERSIONS_PER_GROUP, UUID_BYTES


class VersionStatus(StrEnum):
    """The state of a KEK version."""

    ACTIVE = "ACTIVE"
    ENABLED = "ENABLED"
    DISABLED = "DISABLED"
    DESTROYED = "DESTROYED"


class KeySlot(NamedTuple):
    """The one place that a key belongs to, to which its wrapping is bound."""

    group: str
    uuid: bytes
    spec: KeySpec
    version: int


class NewKey(NamedTuple):
    """A fresh key in its two forms."""

    key: Key
    wrapped: bytes


Mint = Callable[[KeySlot], NewKey]
"""Makes the key of a slot, wrapped for it. A parameter, so that transitions stay pure."""


@dataclass(frozen=True, slots=True)
class KeyVersion:
    """One key. `key` and `wrapped` are None exactly when it is DESTROYED; `created_at` is in epoch seconds."""

    version: int
    status: VersionStatus
    created_at: int
    wrapped: bytes | None
    key: Key | None = field(compare=False)
    kek_id: bytes = field(compare=False, repr=False)
    """What its ciphertexts have in front."""

    @classmethod
    def build(
        cls,
        group: str,
        version: int,
        status: VersionStatus,
        created_at: int,
        wrapped: bytes | None,
        key: Key | None,
    ) -> KeyVersion:
        return cls(version, status, created_at, wrapped, key, ciphertext.kek_id(group, version))

    @property
    def decrypts(self) -> bool:
        return self.status in (VersionStatus.ACTIVE, VersionStatus.ENABLED)


@dataclass(frozen=True, slots=True)
class KeyGroup:
    """A named key. `versions` maps each number ever used to its version, in ascending order."""

    key_id: str
    uuid: bytes
    """16 random bytes, the same for good: a name may be given to another group one day, this is not."""
    spec: KeySpec
    use: KeyUse
    created_at: int
    active: KeyVersion
    versions: Mapping[int, KeyVersion]

    def slot(self, version: int) -> KeySlot:
        """Where the key of this version belongs."""
        return KeySlot(self.key_id, self.uuid, self.spec, version)


@dataclass(frozen=True, slots=True)
class Keyring:
    """All groups, in the order they were made. `generation` counts the saves."""

    generation: int
    groups: Mapping[str, KeyGroup]

    def next_generation(self) -> Keyring:
        """The same keyring, as the next save writes it."""
        return replace(self, generation=self.generation + 1)

    def live_keys(self) -> Iterator[Key]:
        """Every live key, to be wiped at the end."""
        for group in self.groups.values():
            for version in group.versions.values():
                if version.key is not None:
                    yield version.key


@dataclass(frozen=True, slots=True)
class CreateGroup:
    group: str
    spec: KeySpec = DEFAULT
    use: KeyUse | None = None
    """None for the usual one of its kind."""
    uuid: bytes = field(default_factory=lambda: os.urandom(UUID_BYTES))


@dataclass(frozen=True, slots=True)
class RotateGroup:
    group: str


@dataclass(frozen=True, slots=True)
class DisableVersion:
    group: str
    version: int
    for_a_time: bool = False
    """It will be enabled again without being asked for, so it must not be DISABLED already."""


@dataclass(frozen=True, slots=True)
class EnableVersion:
    group: str
    version: int


@dataclass(frozen=True, slots=True)
class DestroyVersion:
    group: str
    version: int


Command = CreateGroup | RotateGroup | DisableVersion | EnableVersion | DestroyVersion
EMPTY: Final = Keyring(generation=0, groups={})


def apply(keyring: Keyring, command: Command, *, now: int, mint: Mint) -> Keyring:
    """The keyring after `command` at `now` (epoch seconds); raises `InvalidRequestError` when the rules refuse it.

    The generation stays as it is: several commands may share one save.
    """
    group = transition(keyring, command, now=now, mint=mint)
    if keyring.groups.get(group.key_id) is group:
        return keyring
    return replace(keyring, groups={**keyring.groups, group.key_id: group})


def transition(keyring: Keyring, command: Command, *, now: int, mint: Mint) -> KeyGroup:
    """The one group that `command` changes, as it is afterwards: the very same one when nothing changes.

    For who applies many commands at once: `apply` copies the map of all groups for each.
    """
    match command:
        case CreateGroup():
            return _created(keyring, command, now, mint)
        case RotateGroup(name):
            return _rotated(_find(keyring, name), now, mint)
        case DisableVersion(name, number, for_a_time):
            group = _find(keyring, name)
            disabled = _with_status(group, number, VersionStatus.DISABLED)
            if for_a_time and disabled is group:
                raise InvalidRequestError("version: it is DISABLED already, and not for a time; enable it first")
            return disabled
        case EnableVersion(name, number):
            return _with_status(_find(keyring, name), number, VersionStatus.ENABLED)
        case DestroyVersion(name, number):
            return _with_status(_find(keyring, name), number, VersionStatus.DESTROYED)


def _find(keyring: Keyring, name: str) -> KeyGroup:
    group = keyring.groups.get(name)
    if group is None:
        raise InvalidRequestError(NO_SUCH_GROUP)
    return group


def _created(keyring: Keyring, command: CreateGroup, now: int, mint: Mint) -> KeyGroup:
    name, spec = command.group, command.spec
    check_new_name(name)
    if name in keyring.groups:
        raise InvalidRequestError("keyId: the key group exists already")
    if len(keyring.groups) >= MAX_KEY_GROUPS:
        raise InvalidRequestError(f"keyId: there are {MAX_KEY_GROUPS} key groups, the most a keystore holds")
    active = _minted(KeySlot(name, command.uuid, spec, 1), now, mint)
    return KeyGroup(name, command.uuid, spec, command.use or spec.uses[0], now, active, {1: active})


def _rotated(group: KeyGroup, now: int, mint: Mint) -> KeyGroup:
    highest = max(group.versions)
    if highest >= MAX_VERSION or len(group.versions) >= MAX_VERSIONS_PER_GROUP:
        raise InvalidRequestError("keyId: the key group has as many versions as it can hold; create another")
    retired = replace(group.active, status=VersionStatus.ENABLED)
    active = _minted(group.slot(highest + 1), now, mint)
    versions = {**group.versions, retired.version: retired, active.version: active}
    return replace(group, active=active, versions=versions)


def _minted(slot: KeySlot, now: int, mint: Mint) -> KeyVersion:
    key, wrapped = mint(slot)
    return KeyVersion.build(slot.group, slot.version, VersionStatus.ACTIVE, now, wrapped, key)


def _with_status(group: KeyGroup, number: int, status: VersionStatus) -> KeyGroup:
    version = group.versions.get(number)
    if version is None:
        raise InvalidRequestError(NO_SUCH_VERSION)
    if version.status is VersionStatus.ACTIVE:
        if status is VersionStatus.ENABLED:
            return group
        raise InvalidRequestError("version: it is ACTIVE; rotate the key group first")
    if version.status is status:
        return group
    if version.status is VersionStatus.DESTROYED:
        raise InvalidRequestError("version: it is DESTROYED, which cannot be undone")
    changed = replace(version, status=status)
    if status is VersionStatus.DESTROYED:
        changed = replace(changed, wrapped=None, key=None)
    return replace(group, versions={**group.versions, number: changed})

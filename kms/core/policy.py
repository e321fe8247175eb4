"""Who may do what: the seam where authorization plugs in.

A request is first authenticated, which yields a `Principal`, then authorized: the policy is asked once for each
(operation, group) the request needs. `AllowAll` is the policy of a single team that trusts its two tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class Plane(StrEnum):
    """Which token opens an operation. Neither token opens the other plane."""

    DATA = "data"
    CONTROL = "control"


class Operation(StrEnum):
    """What a policy decides on; the values are the wire's `type` names."""

    HEALTH = "Health"
    GENERATE_DATA_KEY = "GenerateDataKey"
    ENCRYPT = "Encrypt"
    DECRYPT = "Decrypt"
    RE_ENCRYPT = "ReEncrypt"
    CREATE_KEY_GROUP = "CreateKeyGroup"
    ROTATE_KEY_GROUP = "RotateKeyGroup"
    LIST_KEY_GROUPS = "ListKeyGroups"
    DISABLE_VERSION = "DisableVersion"
    ENABLE_VERSION = "EnableVersion"
    DESTROY_VERSION = "DestroyVersion"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks: a name for policy and log, and the plane its token opened."""

    name: str
    plane: Plane


class KeyAuthorizationPolicy(Protocol):
    """Decides whether an authenticated principal may use an operation on a group."""

    def allows(self, principal: Principal, operation: Operation, group: str | None) -> bool:
        """True when allowed. `group` is None for operations on no one group (Health, ListKeyGroups)."""
        ...


class AllowAll:
    """Whoever holds a plane's token may do everything on that plane."""

    def allows(self, principal: Principal, operation: Operation, group: str | None) -> bool:
        return True

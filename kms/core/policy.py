"""Who may do what: the seam where authorization plugs in, and the two policies there are.

A request is first authenticated, which yields a `Principal`, then authorized: the policy is asked once for each
(operation, group) the request needs. `AllowAll` is the policy of a single team that trusts its two tokens.
`GrantPolicy` is that of a team whose programs have names:

- what no allow rule grants is refused, and no grant implies another;
- a deny rule wins over every allow rule;
- a rule covers an operation on a group when it names the operation, or `*` for all, and one of its globs is the group's
  name. Globs are those of `fnmatch.fnmatchcase`: `*` is any text, `?` one character, `[ab]` and `[!ab]` one of a set, and
  everything else itself, compared as it is: neither case nor Unicode forms are folded;
- an allow rule with an AAD prefix covers only requests whose AAD begins with it;
- Health needs no grant: whoever is authenticated may ask whether the server is there;
- ListKeyGroups is granted by any allow rule that names it, and shows the groups on which it is allowed; of those, how
  they are used where DescribeKeyGroup is allowed;
- Status needs no grant to ask who one is and what one may do. What it tells of the server itself is granted, as Reload and
  GenerateRandom are, by a rule that has `*` among its groups: what is about no group is about all of them.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NamedTuple, Protocol

from kms.limits import MAX_DECISIONS_KEPT, MAX_GROUP_NAME_BYTES


class Plane(StrEnum):
    """Which of the shared tokens opens an operation. Neither opens the other plane."""

    DATA = "data"
    CONTROL = "control"


class Operation(StrEnum):
    """What a policy decides on; the values are the wire's `type` names."""

    HEALTH = "Health"
    GENERATE_DATA_KEY = "GenerateDataKey"
    GENERATE_DATA_KEY_WITHOUT_PLAINTEXT = "GenerateDataKeyWithoutPlaintext"
    GENERATE_RANDOM = "GenerateRandom"
    ENCRYPT = "Encrypt"
    DECRYPT = "Decrypt"
    RE_ENCRYPT = "ReEncrypt"
    CREATE_KEY_GROUP = "CreateKeyGroup"
    ROTATE_KEY_GROUP = "RotateKeyGroup"
    LIST_KEY_GROUPS = "ListKeyGroups"
    DESCRIBE_KEY_GROUP = "DescribeKeyGroup"
    DISABLE_VERSION = "DisableVersion"
    ENABLE_VERSION = "EnableVersion"
    DESTROY_VERSION = "DestroyVersion"
    STATUS = "Status"
    RELOAD = "Reload"

    # Enum's own is a Python call, which each look at a table keyed by operations would pay.
    __hash__ = str.__hash__


WITH_AAD: Final = frozenset(
    {
        Operation.GENERATE_DATA_KEY,
        Operation.GENERATE_DATA_KEY_WITHOUT_PLAINTEXT,
        Operation.ENCRYPT,
        Operation.DECRYPT,
        Operation.RE_ENCRYPT,
    }
)
"""The operations whose requests carry an AAD."""

_HEALTH: Final = Operation.HEALTH
_LIST: Final = Operation.LIST_KEY_GROUPS
_DESTROY: Final = Operation.DESTROY_VERSION
_EVERY_GROUP: Final = "*"
OF_SERVER: Final = frozenset({Operation.STATUS, Operation.RELOAD, Operation.GENERATE_RANDOM})
"""Operations on no key group but on the server."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks: a name for policy and log."""

    name: str


class KeyAuthorizationPolicy(Protocol):
    """Decides whether an authenticated principal may use an operation on a group."""

    def allows(self, principal: Principal, operation: Operation, group: str | None, aad: bytes) -> bool:
        """True when allowed.

        `group` is None for operations on no one group (Health, ListKeyGroups); `aad` is empty for a request without one.
        """
        ...

    def rules_of(self, principal: Principal) -> Rules | None:
        """The rules that decide on the requests of `principal`; None where it may do everything."""
        ...


class AllowAll:
    """Whoever holds a plane's token may do everything on that plane."""

    def allows(self, principal: Principal, operation: Operation, group: str | None, aad: bytes) -> bool:
        return True

    def rules_of(self, principal: Principal) -> Rules | None:
        return None


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: `place` is where it stands in its file, `aad_prefix` is what only an allow rule may have."""

    place: str
    groups: tuple[str, ...]
    operations: frozenset[Operation]
    aad_prefix: bytes = b""
    _names: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Without its cache, fnmatch would compile anew; and one search for all globs is the cheaper.
        object.__setattr__(self, "_names", re.compile("|".join(map(fnmatch.translate, self.groups))))

    def covers(self, operation: Operation, group: str) -> bool:
        """Whether it is about this operation on this group; the AAD is not looked at."""
        if operation in OF_SERVER:
            return operation in self.operations and _EVERY_GROUP in self.groups
        return operation in self.operations and self._names.match(group) is not None


class Rules(NamedTuple):
    """What allows, and what denies."""

    allow: tuple[Rule, ...]
    deny: tuple[Rule, ...]


class Verdict(NamedTuple):
    """What is decided, by which rule (its place; None when by none), and why, for people."""

    allowed: bool
    rule: str | None
    reason: str


class Grants:
    """The rules of one principal, and what they came to for the names asked of late."""

    def __init__(self, allow: Iterable[Rule], deny: Iterable[Rule] = ()) -> None:
        self.rules: Final = Rules(tuple(allow), tuple(deny))
        self._allow, self._deny = self.rules
        self._listed = any(_LIST in rule.operations for rule in self._allow)
        self.is_administrator: Final = any(
            _DESTROY in rule.operations and _EVERY_GROUP in rule.groups for rule in self._allow
        )
        """Whether one rule lets it destroy a version of any key group: nothing is kept from who may do that."""
        self._decisions: dict[tuple[Operation, str], tuple[bytes, ...]] = {}

    def allows(self, operation: Operation, group: str | None, aad: bytes) -> bool:
        """Whether `operation` on `group` is allowed to a request with this AAD."""
        if group is None and operation in OF_SERVER:
            group = _EVERY_GROUP
        if group is None:
            return operation is _HEALTH or (operation is _LIST and self._listed)
        # Not the decision is kept but the AAD prefixes that lead to a yes: none of them is a no.
        prefixes = self._decisions.get((operation, group))
        if prefixes is None:
            prefixes = self._decide(operation, group)
        return aad.startswith(prefixes)

    def explain(self, operation: Operation, group: str, aad: bytes) -> Verdict:
        """Why `allows` says what it says: the first rule that decides."""
        if operation is _HEALTH:
            return Verdict(allowed=True, rule=None, reason="Health needs no grant")
        if len(group) > MAX_GROUP_NAME_BYTES:
            return Verdict(allowed=False, rule=None, reason="no key group has a name of this length")
        denied = self._denied_by(operation, group)
        if denied is not None:
            return Verdict(allowed=False, rule=denied.place, reason=f"{denied.place} denies it")
        covering = self._allowed_by(operation, group)
        for rule in covering:
            if aad.startswith(rule.aad_prefix):
                return Verdict(allowed=True, rule=rule.place, reason=f"{rule.place} allows it")
        if covering:
            place = covering[0].place
            return Verdict(
                allowed=False,
                rule=None,
                reason=f"no rule allows it; {place} would, for an AAD that begins with its aad_prefix",
            )
        return Verdict(allowed=False, rule=None, reason="no rule allows it")

    def _denied_by(self, operation: Operation, group: str) -> Rule | None:
        return next((rule for rule in self._deny if rule.covers(operation, group)), None)

    def _allowed_by(self, operation: Operation, group: str) -> list[Rule]:
        return [rule for rule in self._allow if rule.covers(operation, group)]

    def _decide(self, operation: Operation, group: str) -> tuple[bytes, ...]:
        if len(group) > MAX_GROUP_NAME_BYTES:
            return ()  # no group has such a name: it is neither compared with every glob nor kept
        denied = self._denied_by(operation, group) is not None
        prefixes = () if denied else tuple(rule.aad_prefix for rule in self._allowed_by(operation, group))
        if len(self._decisions) >= MAX_DECISIONS_KEPT:
            self._decisions.clear()  # the names come from requests, so somebody may make up ever new ones
        self._decisions[operation, group] = prefixes
        return prefixes


class GrantPolicy:
    """Each principal by its grants. `trusted` names those that may do everything, as under `AllowAll`."""

    def __init__(self, grants: Mapping[str, Grants], trusted: Iterable[str]) -> None:
        self._grants = grants
        self._trusted = frozenset(trusted)

    def allows(self, principal: Principal, operation: Operation, group: str | None, aad: bytes) -> bool:
        grants = self._grants.get(principal.name)
        if grants is None:
            return principal.name in self._trusted
        return grants.allows(operation, group, aad)

    def rules_of(self, principal: Principal) -> Rules | None:
        grants = self._grants.get(principal.name)
        if grants is None:
            return None if principal.name in self._trusted else Rules((), ())
        return grants.rules

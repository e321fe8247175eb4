"""How much each principal may ask for: `[principals.x.limits]`, so that a narrow grant cannot use up what all need.

- Requests a second are counted as soon as somebody is known, whatever then becomes of them. Over the limit they are
  `Throttled`, with the time after which to ask again.
- New versions are counted over a day: `Throttled` too, and the time is long.
- Key groups that were made, and versions that are disabled for a time at once, are `LimitExceeded`: waiting does not help.
- What was refused, or failed, is not counted. What is counted is taken before the change is made, so that many at once
  cannot pass together.

Counts are since the server started. They stay when the file of principals is read again, also those of a principal that it
has no more: one that is taken out and put back has not begun anew. Only the file makes a name, so they are few.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from kms.core.bucket import Bucket
from kms.core.policy import Operation, Principal
from kms.errors import LimitExceededError, ThrottledError
from kms.limits import DEFAULT_LIMIT_GROUPS, DEFAULT_LIMIT_TIMED_DISABLES, DEFAULT_LIMIT_VERSIONS_PER_DAY

_DAY: Final = 24 * 3600.0

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one principal may ask for; None is no limit."""

    requests_per_second: float | None = None
    groups: int | None = None
    versions_per_day: int | None = None
    timed_disables: int | None = None


UNLIMITED: Final = Limits()
"""Of the shared tokens, and of administrators: who may destroy every key is not kept from harm by a number."""

DEFAULT: Final = Limits(None, DEFAULT_LIMIT_GROUPS, DEFAULT_LIMIT_VERSIONS_PER_DAY, DEFAULT_LIMIT_TIMED_DISABLES)
"""Of all others, as far as the file does not say otherwise."""


class _Account:
    """The counts of one principal."""

    def __init__(self) -> None:
        self.limits = UNLIMITED
        self.groups = 0
        self.requests: Bucket | None = None
        self.versions: Bucket | None = None

    def limit(self, limits: Limits, now: float) -> None:
        self.limits = limits
        rate, versions = limits.requests_per_second, limits.versions_per_day
        # A second's worth at once, and never less than one request: else it could never ask.
        self.requests = None if rate is None else _sized(self.requests, max(rate, 1.0), rate, now)
        self.versions = None if versions is None else _sized(self.versions, versions, versions / _DAY, now)


class Quotas:
    """Counts what principals ask for, and refuses what is over their limits."""

    def __init__(self, monotonic: Clock) -> None:
        """`monotonic` returns seconds."""
        self._monotonic = monotonic
        self._accounts: dict[str, _Account] = {}
        self.rates: Mapping[str, Bucket] = {}
        """Whose requests are counted; for who asks at each request whether there is anything to do."""

    def admit(self, limits: Mapping[str, Limits]) -> None:
        """From now on these are the limits, by the principals' names; who is not among them has none."""
        now = self._monotonic()
        for name in self._accounts.keys() | limits.keys():
            self._accounts.setdefault(name, _Account()).limit(limits.get(name, UNLIMITED), now)
        self.rates = {name: account.requests for name, account in self._accounts.items() if account.requests is not None}

    def throttle(self, principal: Principal) -> None:
        """Count a request; raises `ThrottledError`."""
        bucket = self.rates.get(principal.name)
        if bucket is not None and (wait := bucket.take(self._monotonic())):
            limit = self._accounts[principal.name].limits.requests_per_second
            raise ThrottledError(
                f"more than {limit:g} requests a second: the limit requests_per_second of {principal.name}", wait
            )

    def begin(self, principal: Principal, operation: Operation) -> None:
        """Count a change that is about to be made; raises `ThrottledError` or `LimitExceededError`."""
        account = self._accounts.get(principal.name)
        if account is None:
            return
        if operation is Operation.CREATE_KEY_GROUP:
            limit = account.limits.groups
            if limit is not None and account.groups >= limit:
                raise LimitExceededError(
                    f"{limit} key groups made since the server's start: the limit groups of {principal.name}"
                )
            account.groups += 1
        elif operation is Operation.ROTATE_KEY_GROUP and account.versions is not None:
            wait = account.versions.take(self._monotonic())
            if wait:
                what = (
                    f"{account.limits.versions_per_day} new versions a day: the limit versions_per_day of {principal.name}"
                )
                if math.isinf(wait):
                    raise LimitExceededError(what)
                raise ThrottledError(f"{what}; the next one in {math.ceil(wait)} s", wait)

    def take_back(self, principal: Principal, operation: Operation) -> None:
        """The change was not made."""
        account = self._accounts.get(principal.name)
        if account is None:
            return
        if operation is Operation.CREATE_KEY_GROUP:
            account.groups -= 1
        elif operation is Operation.ROTATE_KEY_GROUP and account.versions is not None:
            account.versions.put_back()

    def most_timed_disables(self, principal: Principal) -> int | None:
        """How many versions it may have disabled for a time at once."""
        account = self._accounts.get(principal.name)
        return None if account is None else account.limits.timed_disables


def _sized(bucket: Bucket | None, capacity: float, per_second: float, now: float) -> Bucket:
    if bucket is None:
        return Bucket(capacity, per_second, now)
    bucket.resize(capacity, per_second, now)
    return bucket

"""Who is let in when there are principals beside the two shared tokens, and how a change of their file takes effect.

- A token is looked up by its digest. Those of principals open both planes, as far as their grants go; a shared token
  opens its own plane, unless the file turns it off.
- A request without a token, over the Unix socket, is that of the principal who has the uid of the connected process, or
  else its primary gid. A wrong token is refused even from there: who shows one means to be somebody else.
- A file that cannot be used changes nothing. Nor does one that has vanished: without it the shared tokens could do
  everything, which it may have been written to end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hmac import compare_digest
from pathlib import Path
from typing import Final, NamedTuple

from kms.core.policy import AllowAll, GrantPolicy, KeyAuthorizationPolicy, Plane, Principal
from kms.errors import AuthFailedError, ConfigError, InputMissingError
from kms.service.authentication import Authenticator, SharedToken, presented_digest
from kms.service.principals import Principals, load
from kms.service.quotas import Limits
from kms.service.served import Peer
from kms.storage.audit_log import is_kept

_DATA: Final = Plane.DATA

Clock = Callable[[], float]
"""Seconds since 1970. Wall time: that is what a person who writes an expiry means."""


class _KnownToken(NamedTuple):
    digest: bytes
    principal: Principal
    expires: float


_NEVER: Final = float("inf")


class TeamAuthenticator(Authenticator):
    """Knows the principals of a file, and those of the shared tokens that it leaves on."""

    def __init__(self, shared: Authenticator, principals: Principals, clock: Clock) -> None:
        """Raises `ConfigError` when a principal has the digest of a shared token that is on: whose would it be?"""
        self.api = shared.api
        self.admin = shared.admin
        self._clock = clock
        known: dict[bytes, _KnownToken] = {}
        self._by_uid: dict[int, Principal] = {}
        self._by_gid: dict[int, Principal] = {}
        is_on = {shared.api.digest: principals.api_token, shared.admin.digest: principals.admin_token}
        for name, member in principals.members.items():
            principal = Principal(name)
            for token in member.tokens:
                if is_on.get(token.digest, False):
                    raise ConfigError(f"{principals.path}: {token.place}: the digest of a shared token, which is on")
                known[token.digest] = _KnownToken(
                    token.digest, principal, _NEVER if token.expires is None else token.expires
                )
            self._by_uid |= dict.fromkeys(member.uids, principal)
            self._by_gid |= dict.fromkeys(member.gids, principal)
        self._data = _with_shared(known, shared.api, is_on=principals.api_token)
        self._control = _with_shared(known, shared.admin, is_on=principals.admin_token)

    def authenticate(self, plane: Plane, token: str, peer: Peer) -> Principal:
        known = self._data if plane is _DATA else self._control
        presented = presented_digest(token)
        # How long a look at the table takes may tell about digests of wrong tokens, which whoever sends them knows, but
        # not how near a right one they came: to make a digest begin as another does is to search for it. The
        # comparison that lets somebody in takes as long wherever the two differ, all the same.
        found = known.get(presented)
        if found is not None and compare_digest(presented, found.digest) and self._clock() < found.expires:
            return found.principal
        if not token and peer.credentials is not None:
            principal = self._by_uid.get(peer.credentials.uid) or self._by_gid.get(peer.credentials.gid)
            if principal is not None:
                return principal
        raise AuthFailedError((self.api if plane is _DATA else self.admin).refusal)


def _with_shared(known: dict[bytes, _KnownToken], shared: SharedToken, *, is_on: bool) -> dict[bytes, _KnownToken]:
    if not is_on:
        return known
    return {**known, shared.digest: _KnownToken(shared.digest, shared.principal, _NEVER)}


class Access(NamedTuple):
    """What decides on requests, and where it comes from, for people."""

    authenticator: Authenticator
    policy: KeyAuthorizationPolicy
    origin: str
    is_from_file: bool
    sha256: str
    """Of the file's content, in hexadecimal; empty without one."""
    limits: Mapping[str, Limits] = {}
    """Of each principal of the file."""


class AccessSource:
    """Where what decides on requests comes from: a file of principals beside the two shared tokens, or they alone."""

    def __init__(
        self, path: Path, shared: Authenticator, clock: Clock, *, is_needed: bool, witness: Path | None = None
    ) -> None:
        """`is_needed` says that the file has to exist.

        So does an audit log at `witness`, at a start: it was kept since there were principals, and without them the shared
        tokens could do everything again.
        """
        self._path = path
        self._shared = shared
        self._clock = clock
        self._is_needed = is_needed
        self._witness = witness

    def load(self, *, needs_file: bool = False, is_start: bool = False) -> Access:
        """What decides from now on. Blocking.

        Raises what `principals.load` raises; a file that is not there is an error where it is needed, or with `needs_file`.
        """
        path, shared = self._path, self._shared
        try:
            principals = load(path)
        except InputMissingError:
            if self._is_needed or needs_file:
                raise
            if is_start and self._witness is not None and is_kept(self._witness):
                raise InputMissingError(
                    f"there is no file of principals {path}, and the audit log {self._witness} is there, which is kept for "
                    "principals. Put the file back; or start with --no-principals, and the shared tokens may do everything"
                ) from None
            return Access(shared, AllowAll(), f"no principals: there is no {path}", is_from_file=False, sha256="")
        authenticator = TeamAuthenticator(shared, principals, self._clock)
        policy = GrantPolicy(
            {name: member.grants for name, member in principals.members.items()},
            trusted=(shared.api.principal.name, shared.admin.principal.name),
        )
        limits = {name: member.limits for name, member in principals.members.items()}
        origin = f"principals from {path}: {len(principals.members)}"
        return Access(authenticator, policy, origin, is_from_file=True, sha256=principals.sha256, limits=limits)

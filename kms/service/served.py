"""Who asks, and what became of it: the facts of one request, for whoever watches the pipeline.

An observer is told of each request once, in the event loop and before the reply is sent: it must not raise, wait or block,
and what it takes is added to every request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from msgspec import Struct

from kms.core.policy import Principal
from kms.errors import WireError
from kms.host.peer import Credentials
from kms.wire.messages import Reply, Request


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end of a connection: a number for the log, `unix` or `tcp`, and what is known of it.

    Over `unix` that is which process, over `tcp` the port that it connects from.
    """

    connection: int
    transport: str
    credentials: Credentials | None = None
    port: int | None = None


class Served(Struct, frozen=True):
    """One request and its outcome. A msgspec struct, since a NamedTuple takes 0.2 us to make, and this 0.1.

    The garbage collector looks into it: `error` may be part of a circle of references, which could not be freed otherwise.
    """

    peer: Peer
    number: int
    """Of the request on its connection, from 1."""
    request: Request | None
    """None when it did not decode, or was too large."""
    kind: type[Request] | None
    """Its type, also of one that did not decode as long as that could be told."""
    principal: Principal | None
    """None when nobody was authenticated."""
    reply: Reply | None
    """None when it was refused."""
    error: WireError | None
    """Why it was refused."""
    began: float
    """When the server took it up: seconds of `time.perf_counter`."""
    request_id: str | None
    """What the client calls it."""

    def __repr__(self) -> str:
        return "<Served>"


Turn = list[tuple[bytes, Served | None]]
"""What one connection was answered and not yet sent: each reply line, and what has to be on record before it goes."""

Observer = Callable[[Served], None]


class UsageCounter(Protocol):
    """Counts how keys are used. Not one more observer: each request would pay for being described to it, 0.3 us."""

    def count(self, kind: type[Request], request: Any, reply: Any, principal: Principal, began: float) -> None:
        """A request of the data plane has succeeded. `request` and `reply` are those of its kind."""
        ...

    def refused(self, served: Served) -> None:
        """A request of either plane was refused."""
        ...

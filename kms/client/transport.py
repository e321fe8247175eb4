"""An exchange on a non-blocking socket: the part of the I/O that needs no waiting, and so is the same in both clients."""

from __future__ import annotations

import socket

from kms.client.protocol import Exchange, T
from kms.errors import ServerUnreachableError
from kms.limits import READ_BYTES


def advance(link: socket.socket, exchange: Exchange[T], address: str) -> bool:
    """Send what `link` takes and receive what is there, once. Returns whether the exchange also waits to send more.

    Reading goes on while a send is stuck: a server that waits for us to take its replies would otherwise never take
    our requests. Raises `ServerUnreachableError` when the connection broke, `ProtocolError` for a bad reply.
    """
    waits_to_send = _send(link, exchange)
    if exchange.is_done:
        return False
    try:
        data = link.recv(READ_BYTES)
    except BlockingIOError:
        return waits_to_send
    except OSError as error:
        raise ServerUnreachableError(broken(address, error.strerror)) from error
    if not data:
        raise ServerUnreachableError(broken(address, "the server closed it"))
    exchange.received(data)
    # Again: the replies made room for more, and when they were all there were, none is left to wake us.
    return _send(link, exchange)


def _send(link: socket.socket, exchange: Exchange[T]) -> bool:
    while piece := exchange.outgoing():
        try:
            exchange.sent(link.send(piece))
        except BlockingIOError:
            return True
        except OSError:
            # A server that refuses a frame as too large says so and closes: its reply may be there to be read.
            exchange.stop_sending()
    return False


def broken(address: str, reason: str | None) -> str:
    """The message for a connection that broke."""
    return f"the connection to {address} broke: {reason}; connect again (is kms-server running?)"


def refused(address: str, error: OSError) -> str:
    """The message for a connection that could not be made."""
    if isinstance(error, FileNotFoundError):
        return f"there is no socket {address}; start kms-server, or say where it is (--unix, --tcp)"
    return f"no server answers at {address}: {error.strerror or error}; is kms-server running?"


def silent(address: str, timeout: float) -> str:
    """The message for a server that does not answer; `timeout` in seconds."""
    return f"{address} did not answer for {timeout:g} s; is kms-server running and healthy?"


def closed(address: str) -> str:
    """The message for the use of a client that was closed."""
    return f"the connection to {address} is closed; connect again (is kms-server running?)"

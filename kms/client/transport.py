"""The part of an exchange's I/O that needs no waiting, and so is the same in both clients."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from kms.client.protocol import Exchange, T
from kms.errors import ConfigError, KmsError, OutcomeUnknownError, ServerUnreachableError
from kms.limits import MAX_PORT, MAX_TIMEOUT, READ_BYTES


def advance(link: socket.socket, exchange: Exchange[T], address: str) -> bool:
    """Send what `link` takes and receive what is there, once. Returns whether the exchange also waits to send more.

    Reading goes on while a send is stuck: a server that waits for us to take its replies would otherwise never take
    our requests. Raises `ServerUnreachableError` when the connection broke, `ProtocolError` for a bad reply.
    """
    waits_to_send = _send(link, exchange)
    if exchange.is_done:
        return False
    try:
        data = link.recv(READ_BYTES, socket.MSG_DONTWAIT)
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
            exchange.sent(link.send(piece, socket.MSG_DONTWAIT))
        except BlockingIOError:
            return True
        except OSError:
            # A server that refuses a frame as too large says so and closes: its reply may be there to be read.
            exchange.stop_sending()
    return False


def seconds(name: str, value: float) -> float:
    """`value`, or `TypeError` for what is no number; `ConfigError` for one that is no time."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} has to be a number of seconds, not {type(value).__name__}")
    if not 0 < value <= MAX_TIMEOUT:
        raise ConfigError(f"{name}: has to be more than 0 s, and at most {MAX_TIMEOUT} s")
    return value


def port_number(value: int) -> int:
    """`value`, or `TypeError` for what is no int; `ConfigError` for one that is no port."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"port has to be int, not {type(value).__name__}")
    if not 1 <= value <= MAX_PORT:
        raise ConfigError(f"port: is outside of 1 to {MAX_PORT}")
    return value


def broken(address: str, reason: str | None) -> str:
    """The message for a connection that broke."""
    return f"the connection to {address} broke: {reason}; connect again (is kms-server running?)"


def refused(address: str, error: OSError) -> str:
    """The message for a connection that could not be made."""
    if isinstance(error, FileNotFoundError):
        start = "start kms-server" if Path(address).parent.is_dir() else "run kms-admin init, then start kms-server"
        return f"there is no socket {address}; {start}, or say where it is (--unix, --tcp)"
    if error.errno in (errno.EACCES, errno.EPERM):
        # It may well be running.
        return (
            f"user id {os.geteuid()} may not use the socket {address}: {error.strerror}; run this as the server's user, or "
            "start it with --unix-socket-group and a group that you are in"
        )
    return f"no server answers at {address}: {error.strerror or error}; is kms-server running?"


def ended(error: ServerUnreachableError, exchange: Exchange[T]) -> KmsError:
    """What a connection that broke means for who was in the middle of `exchange`."""
    if not exchange.may_have_changed:
        return error
    return OutcomeUnknownError(f"{error}. Whether the change was made is not known: look before asking again")


def silent(address: str, timeout: float) -> str:
    """The message for a server that does not answer; `timeout` in seconds."""
    return f"{address} did not answer for {timeout:g} s; is kms-server running and healthy?"


def closed(address: str) -> str:
    """The message for the use of a client that was closed."""
    return f"the connection to {address} is closed; connect again (is kms-server running?)"

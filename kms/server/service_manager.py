"""What systemd is told, when it has started the server."""

from __future__ import annotations

import logging
import os
import socket
from typing import Final

log: Final = logging.getLogger(__name__)


def notify(state: str) -> None:
    """Tell systemd (sd_notify(3)), when it listens: `state` to the datagram socket in NOTIFY_SOCKET."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(state.encode("ascii"), address)
        except OSError as error:
            log.warning("cannot tell the service manager: %s", error.strerror)

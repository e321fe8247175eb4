"""Whose process holds the other end of a connection over loopback TCP, as the kernel tells anybody who asks.

TCP has no SO_PEERCRED. But both ends of a loopback connection are sockets of this machine, and sock_diag(7) tells of
each who made it. It needs no privilege, and takes some 20 us.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Final

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLM_F_REQUEST: Final = 1
_NLMSG_ERROR: Final = 2
_HEADER: Final = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence, port."""
_ERROR: Final = struct.Struct("=i")
_REQUEST: Final = struct.Struct("=BBBxI")
"""The beginning of struct inet_diag_req_v2: family, protocol, extensions, states."""
_SOCKET_ID: Final = struct.Struct("!HH16s16s12s")
"""struct inet_diag_sockid: port and address of either end, the near one first; interface and cookie."""
_ANY_INTERFACE_AND_COOKIE: Final = bytes(4) + b"\xff" * 8
_MESSAGE: Final = struct.Struct("=BBxx48x5I")
"""struct inet_diag_msg, but for the socket's identity in its middle: family, state; expires, two queues, uid, inode."""
_IDENTITY: Final = slice(4, 52)
_ALL_STATES: Final = 0xFFFFFFFF
_ESTABLISHED: Final = 1
_MAX_ANSWER_BYTES: Final = 8192
_SEQUENCE: Final = 1


@dataclass(frozen=True, slots=True)
class FarEnd:
    """The socket at the other end of a connection."""

    uid: int
    """Who made it; 0 for one that no process has."""
    is_held: bool
    """Whether it is established and some process has it: not still in the listener's queue, and not closed."""


def far_end_of(family: int, near: tuple[str, int], far: tuple[str, int]) -> FarEnd | None:
    """The other end of the TCP connection from `near` to `far`; None where this machine's kernel knows of none here.

    That is so for one in another network namespace, or on another machine. Raises `OSError` when the kernel does not
    answer such questions.
    """
    # Seen from the far end, whose own address comes first.
    identity = _SOCKET_ID.pack(
        far[1], near[1], _packed(family, far[0]), _packed(family, near[0]), _ANY_INTERFACE_AND_COOKIE
    )
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, _ALL_STATES) + identity
    header = _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, _SEQUENCE, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as kernel:
        kernel.bind((0, 0))
        # The answer is there when the request was sent; without a bound a kernel that has none would hold us.
        kernel.settimeout(1.0)
        kernel.sendto(header + body, (0, 0))
        answer, (sender, _) = kernel.recvfrom(_MAX_ANSWER_BYTES)
    if sender != 0 or len(answer) < _HEADER.size:
        raise OSError(errno.EPROTO, os.strerror(errno.EPROTO))
    return _read(answer, family, far, near)


def _read(answer: bytes, family: int, far: tuple[str, int], near: tuple[str, int]) -> FarEnd | None:
    _, kind, _, sequence, _ = _HEADER.unpack_from(answer)
    body = answer[_HEADER.size :]
    if kind == _NLMSG_ERROR and len(body) >= _ERROR.size:
        number = -_ERROR.unpack_from(body)[0]
        if number == errno.ENOENT:
            return None
        raise OSError(number, os.strerror(number))
    if kind != _SOCK_DIAG_BY_FAMILY or sequence != _SEQUENCE or len(body) < _MESSAGE.size:
        raise OSError(errno.EPROTO, os.strerror(errno.EPROTO))
    found, state, _, _, _, uid, inode = _MESSAGE.unpack_from(body)
    far_port, near_port, far_address, near_address, _ = _SOCKET_ID.unpack(body[_IDENTITY])
    # The kernel falls back to a socket that listens there, and a dual-stack server's is of the other family.
    is_it = (far_port, near_port) == (far[1], near[1]) and (
        (_plain(found, far_address), _plain(found, near_address))
        == (_plain(family, _packed(family, far[0])), _plain(family, _packed(family, near[0])))
    )
    return FarEnd(uid, state == _ESTABLISHED and inode != 0) if is_it else None


def _packed(family: int, address: str) -> bytes:
    """`address` as it stands in a request: 16 bytes, of which IPv4 takes the first four."""
    return socket.inet_pton(family, address).ljust(16, b"\0")


def _plain(family: int, packed: bytes) -> bytes:
    """What `packed` means, of four bytes for IPv4 also where that is mapped into IPv6."""
    if family == socket.AF_INET:
        return packed[:4]
    mapped = IPv6Address(packed).ipv4_mapped
    return packed if mapped is None else mapped.packed

"""The bare echo: the shortest idiomatic trio server, the most that a server on trio's streams could reach.

    python echo.py REPLY_BYTES UNIX_SOCKET

It answers each line with a constant reply of REPLY_BYTES, line end included; the port of its TCP socket is the one
line it prints.
"""

from __future__ import annotations

import sys
from functools import partial

import trio


def reply_of(size: int) -> bytes:
    """A line of `size` bytes that looks like Encrypt's reply."""
    empty = b'{"status":"ok","ciphertext":""}\n'
    return empty[:-3] + b"A" * (size - len(empty)) + empty[-3:]


async def main(size: int, path: str) -> None:
    reply = reply_of(size)

    async def serve(stream: trio.SocketStream) -> None:
        async for chunk in stream:
            await stream.send_all(reply * chunk.count(b"\n"))

    unix = trio.socket.socket(trio.socket.AF_UNIX)
    await unix.bind(path)
    unix.listen(512)
    tcp = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=512)
    print(tcp[0].socket.getsockname()[1], flush=True)
    await trio.serve_listeners(serve, [*tcp, trio.SocketListener(unix)])


if __name__ == "__main__":
    trio.run(partial(main, int(sys.argv[1]), sys.argv[2]))

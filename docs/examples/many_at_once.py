"""Many values at once: pipelined on one connection, and from many tasks of a trio program.

Prints:

    1000 values, pipelined: all came back
    20 tasks with a connection each: all came back
"""

from __future__ import annotations

import os
from pathlib import Path

import trio

from kms import AsyncKmsClient


async def main(address: str, token: str) -> None:
    values = [b"value %d" % number for number in range(1000)]
    async with await AsyncKmsClient.connect_unix(address, token=token) as kms:
        # Sent without waiting for each reply: some twenty times as fast as one after the other.
        opened = await kms.decrypt_many(await kms.encrypt_many(values))
    print(f"{len(values)} values, pipelined: {'all came back' if opened == values else 'they differ'}")

    came_back: list[bool] = []

    async def one(number: int) -> None:
        async with await AsyncKmsClient.connect_unix(address, token=token) as kms:
            value = values[number]
            came_back.append(await kms.decrypt(await kms.encrypt(value)) == value)

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(one, number)
    print(f"{len(came_back)} tasks with a connection each: {'all came back' if all(came_back) else 'they differ'}")


if __name__ == "__main__":
    trio.run(
        main,
        os.environ["MINIKMS_UNIX_SOCKET"],
        Path(os.environ["MINIKMS_API_TOKEN_FILE"]).read_text(encoding="ascii").strip(),
    )

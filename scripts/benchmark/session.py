"""What a request costs in `Session.serve`, without a socket: this checkout beside another, process by process in turns.

Run as a program, with the root of a checkout, it measures that one, and prints microseconds for each operation as JSON.
Only what every release has is used of it: that of the tests which is a server in memory.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

ROOT: Final = Path(__file__).resolve().parents[2]
REQUESTS: Final = 2_000
PASSES: Final = 9
BOUNDS: Final = {"Encrypt": 1.25, "Decrypt, sealed or opened lately": 1.25, "Decrypt, any other": 1.7}
"""The most that an operation may cost, times what it costs in the baseline."""


class SessionCost(msgspec.Struct, rename="camel"):
    """An operation in microseconds, and its ratio to the baseline's: the median of the rounds, the least and the most."""

    operation: str
    ours: float
    theirs: float
    ratio: float
    ratio_low: float
    ratio_high: float
    bound: float


def compare(source: Path, *, rounds: int, said: Callable[[str], None]) -> list[SessionCost]:
    """This checkout beside that at `source`."""
    runs: dict[Path, list[dict[str, float]]] = {ROOT: [], source.resolve(): []}
    for number in range(rounds):
        # Each goes first as often as the other.
        for root in sorted(runs, reverse=bool(number % 2)):
            said(f"Session.serve of {root.name}, round {number + 1}")
            runs[root].append(_measured(root))
    costs = []
    for operation, bound in BOUNDS.items():
        ours, theirs = ([run[operation] for run in runs[root]] for root in (ROOT, source.resolve()))
        ratios = sorted(mine / other for mine, other in zip(ours, theirs, strict=True))
        costs.append(
            SessionCost(
                operation,
                statistics.median(ours),
                statistics.median(theirs),
                statistics.median(ratios),
                ratios[0],
                ratios[-1],
                bound,
            )
        )
    return costs


def _measured(root: Path) -> dict[str, float]:
    environment = os.environ | {"PYTHONPATH": str(root)}
    ran = subprocess.run([sys.executable, __file__, str(root)], env=environment, cwd=root, capture_output=True, check=True)
    found: dict[str, float] = json.loads(ran.stdout)
    return found


def _main(root: Path) -> None:
    import kms
    from kms.core import envelope
    from kms_tests import in_memory

    if not Path(kms.__file__).is_relative_to(root):
        raise SystemExit(f"what runs is {kms.__file__}, not that of {root}")
    server = in_memory.Server()
    session = server.pipeline.session(in_memory.PEER)

    def serve(line: bytes) -> Any:
        reply = session.serve(line)
        session.commit()
        # What the tests look at is nothing that a server keeps; left there, it would be collected again and again.
        server.seen.clear()
        return reply

    def line(kind: str, **fields: str) -> bytes:
        return json.dumps({"type": kind, "token": in_memory.API, **fields}).encode()

    encrypt = line("Encrypt", plaintext=b64encode(bytes(32)).decode())

    def decrypt() -> bytes:
        return line("Decrypt", ciphertext=json.loads(serve(encrypt))["ciphertext"])

    def cost(lines: list[bytes]) -> float:
        passes = []
        for _ in range(PASSES):
            start = time.perf_counter()
            for one in lines:
                serve(one)
            passes.append((time.perf_counter() - start) / len(lines) * 1e6)
        return min(passes)

    # One subkey for each ciphertext, as if each came from another server. Earlier releases have no such thing.
    seals = getattr(envelope, "MAX_SEALS_PER_SUBKEY", None)
    vars(envelope)["MAX_SEALS_PER_SUBKEY"] = 1
    others = [decrypt() for _ in range(REQUESTS)]
    vars(envelope)["MAX_SEALS_PER_SUBKEY"] = seals
    decrypt()
    recent = [decrypt() for _ in range(REQUESTS)]
    print(json.dumps(dict(zip(BOUNDS, map(cost, ([encrypt] * REQUESTS, recent, others)), strict=True))))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))

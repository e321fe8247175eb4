"""The data plane beside the bare echo: the same lines over the same connections, in turns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from itertools import product
from typing import Final

from scripts.benchmark.processes import Bench
from scripts.benchmark.turns import Row, Shape, Side, compare, prepare

SHAPES: Final = (Shape(1, 1), Shape(32, 1), Shape(32, 16), Shape(256, 1))

TARGETS: Final = {
    ("Encrypt 32 B", Shape(1, 1)): 0.85,
    ("Encrypt 32 B", Shape(32, 1)): 0.85,
    ("Encrypt 32 B", Shape(256, 1)): 0.85,
    ("Encrypt 32 B", Shape(32, 16)): 0.17,
    ("Encrypt 4 KiB", Shape(32, 1)): 0.6,
}
"""The least ratio to the echo, over the Unix socket."""


def measure(
    bench: Bench, *, rounds: int, seconds: float, said: Callable[[str], None], chosen: Callable[[str], bool]
) -> list[Row]:
    """All operations in all shapes over both transports; `chosen` says which, by names like "unix Encrypt 32 B 32x1"."""
    rows: list[Row] = []
    with bench.server() as server, contextlib.ExitStack() as echoes:
        works = prepare(server)
        # As long as Encrypt's replies: of 4 KiB for the one, of 32 bytes for all the others.
        large, small = (
            echoes.enter_context(bench.echo(works[name].reply_bytes)) for name in ("Encrypt 4 KiB", "Encrypt 32 B")
        )
        for transport, shape, work in product(("unix", "tcp"), SHAPES, works.values()):
            what = f"{transport} {work.name} {shape.connections}x{shape.depth}"
            if not chosen(what):
                continue
            said(what)
            pid, path, port = large if work.name == "Encrypt 4 KiB" else small
            echo = Side("echo", pid, f"unix:{path}" if transport == "unix" else f"tcp:{port}", work, is_checked=False)
            ours = Side.of("kms-server", server, work, transport)
            target = TARGETS.get((work.name, shape)) if transport == "unix" else None
            rows.append(compare(bench, ours, echo, shape, rounds=rounds, seconds=seconds, target=target))
    return rows

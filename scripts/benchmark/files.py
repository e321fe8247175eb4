"""Whole commands: files beside `age` and `cp`, and the cold start of `kms-client health`."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Final

import msgspec

from kms_tests.integration.processes import Server, measured, program
from scripts.benchmark.processes import MIB, Bench, BenchmarkError, spread

PIECE: Final = 1 << 20
_COMMAND_SECONDS: Final = 600.0
FILE_RATIOS: Final = {
    "kms-client encrypt-file": 1.1,
    "kms-client decrypt-file": 1.3,
    "kms-client decrypt-file, pipe to pipe": 1.2,
}
"""The least ratio to age's throughput."""


class FileRate(msgspec.Struct, frozen=True, rename="camel"):
    """One way of moving a file: MiB/s, its ratio to age's in the same round, and its peak memory in MiB."""

    name: str
    rate: float
    ratio: float
    ratio_low: float
    ratio_high: float
    peak_mib: float


class ColdStart(msgspec.Struct, frozen=True, rename="camel"):
    """From the start of a process to its end, in milliseconds."""

    name: str
    milliseconds: float


def require_age() -> None:
    """Raise `BenchmarkError` when there is nothing to compare with: better at once than after minutes."""
    if shutil.which("age") is None or shutil.which("age-keygen") is None:
        raise BenchmarkError("age is not installed; apt-get install age")


def measure(bench: Bench, directory: Path, *, size_mib: int, rounds: int, said: Callable[[str], None]) -> list[FileRate]:
    """Encrypt, decrypt and copy a file of random bytes in `directory`, in turns.

    Each is followed by a sync of what it wrote, and that counts: kms-client has made its output durable by then, the
    others have not. From pipe to pipe nothing is written that stays.
    """
    plain, sealed, opened, other, back, copy = (
        directory / name for name in ("plain", "sealed.mke", "opened", "sealed.age", "back", "copy")
    )
    digest = _random_file(plain, size_mib)
    identity = directory / "identity"
    made = subprocess.run(["age-keygen", "-o", str(identity)], check=True, capture_output=True, text=True)
    recipient = made.stderr.split()[-1]
    with bench.server() as server:
        kms = [*program("client"), "--unix", str(server.socket)]

        def piped(source: Path, command: list[str]) -> list[str]:
            return ["sh", "-c", f"cat {shlex.quote(str(source))} | {shlex.join(command)} | cat > /dev/null"]

        commands: dict[str, tuple[list[str], Path | None]] = {
            "kms-client encrypt-file": ([*kms, "encrypt-file", "--in", str(plain), "--out", str(sealed)], sealed),
            "age, encrypting": (["age", "-r", recipient, "-o", str(other), str(plain)], other),
            "kms-client decrypt-file": ([*kms, "decrypt-file", "--in", str(sealed), "--out", str(opened)], opened),
            "age, decrypting": (["age", "-d", "-i", str(identity), "-o", str(back), str(other)], back),
            "kms-client decrypt-file, pipe to pipe": (
                piped(sealed, [*kms, "decrypt-file", "--in", "-", "--out", "-"]),
                None,
            ),
            "age, decrypting, pipe to pipe": (piped(other, ["age", "-d", "-i", str(identity)]), None),
            "cp": (["cp", str(plain), str(copy)], copy),
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        peaks = dict.fromkeys(commands, 0.0)
        for number in range(rounds):
            said(f"{size_mib} MiB files, round {number + 1} of {rounds}")
            for name, (command, output) in commands.items():
                seconds, peak = _durably(command, output, server)
                times[name].append(seconds)
                peaks[name] = max(peaks[name], peak)
            if _digest(opened) != digest:
                raise BenchmarkError("a file that was decrypted is not what was encrypted")
            for _, output in commands.values():
                if output is not None:
                    output.unlink()
    rows = []
    for name, took in times.items():
        beside = times[_beside(name)]
        ratios = [theirs / ours for ours, theirs in zip(took, beside, strict=True)]
        rows.append(FileRate(name, size_mib / median(took), *spread(ratios), peaks[name]))
    return rows


def _beside(name: str) -> str:
    if "pipe" in name:
        return "age, decrypting, pipe to pipe"
    return "age, encrypting" if "encrypt" in name else "age, decrypting"


def cold_start(bench: Bench, *, rounds: int, said: Callable[[str], None]) -> list[ColdStart]:
    """`kms-client health`, beside what of it is the interpreter and rich-click."""
    with bench.server() as server:
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "import rich_click": [sys.executable, "-c", "import rich_click"],
            "kms-client health": [*program("client"), "--unix", str(server.socket), "health"],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        said("cold start")
        for _ in range(rounds):
            for name, command in commands.items():
                start = time.perf_counter()
                done = subprocess.run(command, env=_environment(server), capture_output=True, text=True, check=False)
                times[name].append(time.perf_counter() - start)
                _require_success(command, done)
    return [ColdStart(name, median(took) * 1e3) for name, took in times.items()]


def _durably(command: list[str], output: Path | None, server: Server) -> tuple[float, float]:
    """How long `command` and a sync of its output take, in seconds, and the command's peak memory in MiB."""
    start = time.perf_counter()
    done, peak = measured([str(shutil.which(command[0])), *command[1:]], _environment(server), _COMMAND_SECONDS)
    _require_success(command, done)
    if output is not None:
        descriptor = os.open(output, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - start, peak * 1024 / MIB


def _environment(server: Server) -> dict[str, str]:
    # With bytecode, as an installed program has it.
    return server.machine.changed({"PYTHONDONTWRITEBYTECODE": None})


def _require_success(command: list[str], done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode != 0:
        raise BenchmarkError(f"{command[0]} ended with status {done.returncode}: {done.stderr.strip()}")


def _random_file(path: Path, size_mib: int) -> bytes:
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for _ in range(size_mib * MIB // PIECE):
            piece = os.urandom(PIECE)
            digest.update(piece)
            file.write(piece)
    return digest.digest()


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()

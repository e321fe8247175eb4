"""What the benchmark measures as processes of their own: the server, the echo, the load; and what they use."""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from kms_tests.integration.processes import ROOT, Machine, Server

HERE: Final = Path(__file__).parent
MIB: Final = 1 << 20
CORES: Final = len(os.sched_getaffinity(0))


class LoadResult(msgspec.Struct, frozen=True):
    """What the load generator saw: replies in all, replies per second while it counted, times in seconds."""

    total: int
    rate: float
    p50: float
    p99: float
    max: float
    waited: float


class BenchmarkError(Exception):
    """A measurement that cannot be made, or that is worth nothing; its text is for the person who asked for it."""


class Bench:
    """A private directory with the compiled load generator, and the processes that live as long as it."""

    def __enter__(self) -> Self:
        """Raises `BenchmarkError` when there is no C compiler."""
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            raise BenchmarkError("no C compiler for the load generator; install gcc")
        self.directory = Path(tempfile.mkdtemp(prefix="kmsbench"))
        self._load = self.directory / "load"
        try:
            subprocess.run([compiler, "-O2", "-o", str(self._load), str(HERE / "load.c")], check=True)
        except BaseException:
            shutil.rmtree(self.directory)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    @contextlib.contextmanager
    def machine(self, template: Path | None = None, source: Path = ROOT) -> Iterator[Machine]:
        """A machine of its own, with a copy of the data directory `template`, or one that `kms-admin init` has made.

        The programs are those of the checkout at `source`.
        """
        machine = Machine(template, source)
        try:
            if template is None:
                made = machine.admin("init")
                if made.status != 0:
                    raise BenchmarkError(made.stderr)
            yield machine
        finally:
            machine.dispose()

    @contextlib.contextmanager
    def server(self, template: Path | None = None, source: Path = ROOT) -> Iterator[Server]:
        """A kms-server on such a machine, with its default configuration but for the TCP port."""
        with self.machine(template, source) as machine:
            yield machine.start()

    @contextlib.contextmanager
    def echo(self, reply_bytes: int) -> Iterator[tuple[int, Path, int]]:
        """A bare echo whose replies have `reply_bytes`, line end included: its pid, Unix socket and TCP port."""
        path = self.directory / f"echo-{reply_bytes}.sock"
        command = [sys.executable, str(HERE / "echo.py"), str(reply_bytes), str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                yield process.pid, path, int(process.stdout.readline())
            finally:
                process.kill()
        path.unlink()

    def load(
        self, address: str, connections: int, depth: int, seconds: float, *requests: bytes, alone: bool = False
    ) -> tuple[LoadResult, list[bytes]]:
        """Load `address` (`unix:PATH` or `tcp:PORT`) for some seconds; the figures, and each connection's last reply.

        With `alone` it takes the second core for itself; the server should have been pinned to the first.
        """
        with self.loading(address, connections, depth, seconds, *requests, alone=alone) as under_way:
            return under_way()

    @contextlib.contextmanager
    def loading(
        self, address: str, connections: int, depth: int, seconds: float, *requests: bytes, alone: bool = False
    ) -> Iterator[Callable[[], tuple[LoadResult, list[bytes]]]]:
        """A load that runs meanwhile; what it yields waits for its end and gives what `load` gives."""
        directory = Path(tempfile.mkdtemp(dir=self.directory))
        lines, samples = directory / "requests", directory / "samples"
        lines.write_bytes(b"".join(requests))
        arguments = map(str, (address, connections, depth, min(0.2, seconds / 4), seconds, lines, samples))
        command = [str(self._load), *arguments, *(["spin"] if alone and CORES > 1 else [])]

        def end() -> tuple[LoadResult, list[bytes]]:
            stdout, stderr = process.communicate(timeout=seconds + 60)
            if process.returncode != 0:
                raise BenchmarkError(stderr.decode().strip())
            return msgspec.json.decode(stdout, type=LoadResult), samples.read_bytes().splitlines()

        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            if alone:
                pin(process.pid, 1)
            try:
                yield end
            finally:
                process.kill()


def spread(ratios: Sequence[float]) -> tuple[float, float, float]:
    """What is told of the ratios of some rounds: their median, the lowest and the highest."""
    return statistics.median(ratios), min(ratios), max(ratios)


def pin(pid: int, which: int) -> None:
    """Keep a process on the first (0) or the second core (1), when there are two.

    What is loaded and what loads it have a core each: without that the scheduler moved them about, and the ratios of
    one shape lay between 0.4 and 0.9.
    """
    if CORES > 1:
        for task in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), {sorted(os.sched_getaffinity(0))[which]})


def cpu_seconds(pid: int) -> float:
    """CPU time that all threads of a process have had so far."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def resident_mib(pid: int) -> float:
    """Memory in RAM, in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB

"""Every parser of bytes from outside, under a coverage-guided fuzzer that starts from valid inputs.

Each target runs in a process of its own (`engine`); its corpus is then replayed here without the instrumentation, under
the true budget of time. That the fuzzer finds bugs is shown by putting some in.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kms_tests.budget import within_budget
from kms_tests.fuzz.mutants import MUTANTS
from kms_tests.fuzz.targets import TARGETS

ROOT = Path(__file__).parents[2]
SHORT_SECONDS, LONG_SECONDS = 2, 900
MUTANT_SECONDS = 60
_START_SECONDS = 240
_LONGEST_INPUT_SHOWN = _LONGEST_TRACEBACK = 4096


@pytest.fixture(autouse=True)
def _atheris() -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.fail(
            f"atheris is not installed on Python {sys.version_info.major}.{sys.version_info.minor}: pip install atheris"
        )


class Run:
    """One run of the engine: how it ended, what it said, and what is in its corpus."""

    def __init__(self, target: str, directory: Path, seconds: int, mutant: str = "-") -> None:
        self._artifacts = directory / "artifacts"
        self._corpus = directory / "corpus"
        self._artifacts.mkdir()
        self._corpus.mkdir()
        options = [f"-max_total_time={seconds}", f"-artifact_prefix={self._artifacts}/", "-len_control=0", "-seed=1"]
        options += ["-print_final_stats=1", "-timeout=60", "-rss_limit_mb=1024"]
        program = [sys.executable, "-m", "kms_tests.fuzz.engine", target, mutant, str(self._corpus), *options]
        done = subprocess.run(
            program,
            cwd=ROOT,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds + _START_SECONDS,
            check=False,
        )
        self.status = done.returncode
        self.said = done.stdout + done.stderr

    @property
    def executions(self) -> int:
        found = re.search(r"number_of_executed_units: (\d+)", self.said)
        return int(found[1]) if found else 0

    @property
    def corpus(self) -> list[bytes]:
        return [path.read_bytes() for path in sorted(self._corpus.iterdir())]

    def report(self) -> str:
        """The traceback, and each input that failed, to be pasted into a regression test."""
        _, found, traceback = self.said.partition("=== Uncaught Python exception: ===")
        traceback = traceback[:_LONGEST_TRACEBACK] if found else self.said[-_LONGEST_TRACEBACK:]
        inputs = [f"{path.name}: {path.read_bytes()[:_LONGEST_INPUT_SHOWN]!r}" for path in self._artifacts.iterdir()]
        return "\n".join([traceback, *inputs])


@pytest.mark.parametrize("target", TARGETS)
def test_no_input_breaks_a_promise(target: str, tmp_path: Path, long: bool) -> None:
    seeds = len(TARGETS[target].seeds())
    run = Run(target, tmp_path, LONG_SECONDS if long else SHORT_SECONDS)
    assert run.status == 0, run.report()
    assert run.executions > seeds, run.said
    print(f"{target}: {run.executions} inputs")
    slowest = max(within_budget(lambda data=data: TARGETS[target].check(data)) for data in run.corpus)  # type: ignore[misc]
    print(f"{target}: the slowest of {len(run.corpus)} took {slowest * 1000:.1f} ms")


@pytest.mark.parametrize("name", MUTANTS)
def test_the_fuzzer_finds(name: str, tmp_path: Path) -> None:
    mutant = MUTANTS[name]
    run = Run(mutant.target, tmp_path, MUTANT_SECONDS, name)
    assert run.status != 0, f"not found in {run.executions} inputs"
    assert mutant.shows_as in run.report()

"""One coverage-guided run, a program of its own: `python -m kms_tests.fuzz.engine TARGET MUTANT CORPUS [OPTIONS]`.

MUTANT is `-`, or the name of a bug to put in first (see `mutants`). The options are libFuzzer's. It ends with status 0
when the time is up, else with a traceback and the input in a file.

Seeds are made here, not by the caller: they hold keys that only this process has.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["kms", "json"]):
    from kms_tests.budget import BUDGET, within_budget
    from kms_tests.fuzz.mutants import MUTANTS
    from kms_tests.fuzz.targets import TARGETS

INSTRUMENTED_BUDGET = 4 * BUDGET
"""Counting coverage makes pure Python this much slower. What is slower than `BUDGET` without it is found by replaying."""


def main() -> None:
    name, mutant, corpus, *options = sys.argv[1:]
    target = TARGETS[name]
    if mutant != "-":
        MUTANTS[mutant].put_in()
    for number, seed in enumerate(target.seeds()):
        Path(corpus, f"seed-{number}").write_bytes(seed)
    arguments = [sys.argv[0], corpus, f"-max_len={target.max_bytes}", *options]
    atheris.Setup(arguments, lambda data: within_budget(lambda: target.check(data), INSTRUMENTED_BUDGET))
    atheris.Fuzz()


if __name__ == "__main__":
    main()

"""The parts of the benchmark that `scripts/bench.py` runs."""

"""Measures speed: `python src/benchmark.py part=data data=digits`; conf/benchmark.yaml has the options."""

import consistency.runtime.first  # noqa: F401  (before all else, for its effect)
from consistency.command import command
from consistency.speed import benchmark

if __name__ == "__main__":
    command("benchmark")(benchmark)()

"""Measures speed: `python src/benchmark.py part=data data=digits`; conf/benchmark.yaml has the options."""

from consistency.command import command
from consistency.speed import benchmark

if __name__ == "__main__":
    command("benchmark")(benchmark)()

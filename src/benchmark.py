"""Measure speed: `python src/benchmark.py part=data data=digits`; conf/benchmark.yaml has the options."""

from consistency.commands import start

start(__name__, "benchmark")

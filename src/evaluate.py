"""Measure samples: `python src/evaluate.py checkpoint=<run or file> data=cifar10`; conf/evaluate.yaml has the options."""

from consistency.commands import start

start(__name__, "evaluate")

"""Measures samples: `python src/evaluate.py checkpoint=<run or file> data=cifar10`; conf/evaluate.yaml has the options."""

import consistency.runtime.first  # noqa: F401  (before all else, for its effect)
from consistency.command import command
from consistency.evaluating import evaluate

if __name__ == "__main__":
    command("evaluate")(evaluate)()

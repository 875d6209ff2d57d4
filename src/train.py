"""Trains a consistency model or a teacher: `python src/train.py mode=ect data=digits`; conf/train.yaml has the options."""

import consistency.runtime.first  # noqa: F401  (before all else, for its effect)
from consistency.command import command
from consistency.training.run import train

if __name__ == "__main__":
    command("train")(train)()

"""Draws samples: `python src/sample.py checkpoint=<run or file> sampler=onestep`; conf/sample.yaml has the options."""

import consistency.runtime.first  # noqa: F401  (before all else, for its effect)
from consistency.command import command
from consistency.sampling import sample

if __name__ == "__main__":
    command("sample")(sample)()

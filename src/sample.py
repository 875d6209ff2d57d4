"""Draws samples: `python src/sample.py checkpoint=<run or file> sampler=onestep`; conf/sample.yaml has the options."""

from consistency.command import command
from consistency.sampling import sample

if __name__ == "__main__":
    command("sample")(sample)()

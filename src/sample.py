"""Draw samples: `python src/sample.py checkpoint=<run or file> sampler=onestep`; conf/sample.yaml has the options."""

from consistency.commands import start

start(__name__, "sample")

"""Draw the curves of runs: `python src/plot.py <runs...>`; conf/plot.yaml has the options."""

from consistency.commands import start

start(__name__, "plot")

"""Search time points of sampling: `python src/search.py checkpoint=<run> points=1`; conf/search.yaml has the options."""

from consistency.commands import start

start(__name__, "search")

"""Compare modes at equal training time: `python src/compare.py`; conf/compare.yaml has the options."""

from consistency.commands import start

start(__name__, "compare")

"""Make a set in one zip: `python src/prepare.py source=<images> output=<file>.zip`; conf/prepare.yaml has the options."""

from consistency.commands import start

start(__name__, "prepare")

"""Make a W&B workspace: `python src/dashboard.py entity=<team> project=<project>`; conf/dashboard.yaml has the options."""

from consistency.commands import start

start(__name__, "dashboard")

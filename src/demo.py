"""Serve a page for trying a checkpoint: `python src/demo.py checkpoint=<run or file>`; conf/demo.yaml has the options."""

from consistency.commands import start

start(__name__, "demo")

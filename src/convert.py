"""Convert or check a checkpoint: `python src/convert.py source=<file> output=<path>`; conf/convert.yaml has the options."""

from consistency.commands import start

start(__name__, "convert")

"""Convert a checkpoint or check one: `python src/convert.py source=<file> to=ours output=<path>`; conf/convert.yaml
has the options.
"""

from consistency.commands import start

start(__name__, "convert")

"""Make a set of images in one zip: `python src/prepare.py source=<images> resolution=64 output=<file>.zip`;
conf/prepare.yaml has the options.
"""

from consistency.commands import start

start(__name__, "prepare")

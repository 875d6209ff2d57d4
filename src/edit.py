"""Edit images: `python src/edit.py task=inpaint input=<images> checkpoint=<run or file>`; conf/edit.yaml has the options."""

from consistency.commands import start

start(__name__, "edit")

"""Edits images: `python src/edit.py task=inpaint input=<image or folder> checkpoint=<run or file>`; conf/edit.yaml has
the options.
"""

import consistency.runtime.first  # noqa: F401  (before all else, for its effect)
from consistency.command import command
from consistency.retouching import edit

if __name__ == "__main__":
    command("edit")(edit)()

"""Edits images: `python src/edit.py task=inpaint input=<image or folder> checkpoint=<run or file>`; conf/edit.yaml has
the options.
"""

from consistency.command import command
from consistency.retouching import edit

if __name__ == "__main__":
    command("edit")(edit)()

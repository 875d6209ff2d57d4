"""Makes a set of images in one zip: `python src/prepare.py source=<images> resolution=64 output=<file>.zip`;
conf/prepare.yaml has the options.
"""

import consistency.runtime.first  # noqa: F401  (before all else, for its effect)
from consistency.command import command
from consistency.data.preparation import prepare

if __name__ == "__main__":
    command("prepare")(prepare)()

"""Converts a checkpoint or checks one: `python src/convert.py source=<file> to=ours output=<path>`; conf/convert.yaml
has the options.
"""

import consistency.runtime.first  # noqa: F401  (before all else, for its effect)
from consistency.command import command
from consistency.conversion import convert

if __name__ == "__main__":
    command("convert")(convert)()

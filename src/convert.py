"""Converts a checkpoint or checks one: `python src/convert.py source=<file> to=ours output=<path>`; conf/convert.yaml
has the options.
"""

from consistency.command import command
from consistency.conversion import convert

if __name__ == "__main__":
    command("convert")(convert)()

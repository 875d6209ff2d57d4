"""Compares modes at equal training time: `python src/compare.py`; conf/compare.yaml has the options."""

from consistency.command import command
from consistency.comparison import compare

if __name__ == "__main__":
    command("compare")(compare)()

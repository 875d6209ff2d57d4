"""Compares modes at equal training time: `python src/compare.py`; conf/compare.yaml has the options."""

import consistency.runtime.first  # noqa: F401  (before all else, for its effect)
from consistency.command import command
from consistency.comparison import compare

if __name__ == "__main__":
    command("compare")(compare)()

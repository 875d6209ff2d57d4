"""Searches the time points of multi-step sampling: `python src/search.py checkpoint=<run> points=1`; conf/search.yaml has
the options.
"""

import consistency.runtime.first  # noqa: F401  (before all else, for its effect)
from consistency.command import command
from consistency.searching import search

if __name__ == "__main__":
    command("search")(search)()

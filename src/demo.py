"""Serves a page for trying a checkpoint: `python src/demo.py checkpoint=<run or file>`; conf/demo.yaml has the options."""

import consistency.runtime.first  # noqa: F401  (before all else, for its effect)
from consistency.command import command
from consistency.page import demo

if __name__ == "__main__":
    command("demo")(demo)()

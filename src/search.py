"""Search the time points of multi-step sampling: `python src/search.py checkpoint=<run> points=1`; conf/search.yaml has
the options.
"""

from consistency.runtime.signals import take_over

take_over()  # before torch is imported

if __name__ == "__main__":
    from consistency.commands.cli import command
    from consistency.commands.search import search

    command("search")(search)()

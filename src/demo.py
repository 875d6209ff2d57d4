"""Serve a page for trying a checkpoint: `python src/demo.py checkpoint=<run or file>`; conf/demo.yaml has the options."""

from consistency.runtime.signals import take_over

take_over()  # before torch is imported

if __name__ == "__main__":
    from consistency.commands.cli import command
    from consistency.commands.demo import demo

    command("demo")(demo)()

"""Convert a checkpoint or check one: `python src/convert.py source=<file> to=ours output=<path>`; conf/convert.yaml
has the options.
"""

from consistency.runtime.signals import take_over

take_over()  # before torch is imported

if __name__ == "__main__":
    from consistency.commands.cli import command
    from consistency.commands.convert import convert

    command("convert")(convert)()

"""Make a set of images in one zip: `python src/prepare.py source=<images> resolution=64 output=<file>.zip`;
conf/prepare.yaml has the options.
"""

from consistency.runtime.signals import take_over

take_over()  # before torch is imported

if __name__ == "__main__":
    from consistency.commands.cli import command
    from consistency.commands.prepare import prepare

    command("prepare")(prepare)()

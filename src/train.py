"""Train a consistency model or a teacher: `python src/train.py mode=ect data=digits`; conf/train.yaml has the options."""

from consistency.runtime.signals import take_over

take_over()  # before torch is imported

if __name__ == "__main__":
    from consistency.commands.cli import command
    from consistency.commands.train import train

    command("train")(train)()

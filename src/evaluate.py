"""Measure samples: `python src/evaluate.py checkpoint=<run or file> data=cifar10`; conf/evaluate.yaml has the options."""

from consistency.runtime.signals import take_over

take_over()  # before torch is imported

if __name__ == "__main__":
    from consistency.commands.cli import command
    from consistency.commands.evaluate import evaluate

    command("evaluate")(evaluate)()

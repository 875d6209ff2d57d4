"""Draw samples: `python src/sample.py checkpoint=<run or file> sampler=onestep`; conf/sample.yaml has the options."""

from consistency.runtime.signals import take_over

take_over()  # before torch is imported

if __name__ == "__main__":
    from consistency.commands.cli import command
    from consistency.commands.sample import sample

    command("sample")(sample)()

"""Compare modes at equal training time: `python src/compare.py`; conf/compare.yaml has the options."""

from consistency.runtime.signals import take_over

take_over()  # before torch is imported

if __name__ == "__main__":
    from consistency.commands.cli import command
    from consistency.commands.compare import compare

    command("compare")(compare)()

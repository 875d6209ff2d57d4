"""Measure speed: `python src/benchmark.py part=data data=digits`; conf/benchmark.yaml has the options."""

from consistency.runtime.signals import take_over

take_over()  # before torch is imported

if __name__ == "__main__":
    from consistency.commands.benchmark import benchmark
    from consistency.commands.cli import command

    command("benchmark")(benchmark)()

"""Measure speed: `python src/benchmark.py part=data data=digits`; conf/benchmark.yaml has the options."""

from consistency.runtime.signals import take_over

take_over()  # before torch is imported

if __name__ == "__main__":
    from consistency.command import command
    from consistency.speed import benchmark

    command("benchmark")(benchmark)()

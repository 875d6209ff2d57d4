"""The commands: one module a verb, started by src/<verb>.py. Importing this package imports no torch."""

from importlib import import_module

from consistency.runtime.signals import take_over


def start(module: str, verb: str) -> None:
    """Handle Ctrl-C before torch is imported, and run the verb if the script is not only imported by a worker.

    module: `__name__` of the script.
    """
    take_over()
    if module == "__main__":
        main = getattr(import_module(f"consistency.commands.{verb}"), verb)
        import_module("consistency.commands.cli").run(verb, main)

"""Print the functions of this package that `consistency.load` calls: `python entered_functions.py <checkpoint>`."""

import sys
from pathlib import Path
from types import FrameType

import consistency

UNCOUNTED = (
    "consistency.networks",
    "consistency.preconditioning",
    "consistency.denoiser",
    "consistency.errors",
    "consistency.checkpoints.contents.check",
)
"""The parts that are built, and the guards `require` and `check`."""

INTERPRETER = "consistency.checkpoints.pickle_reader"
"""The pickle reader counts as one function, its entry `read_zip`."""


def entered(path: str) -> set[str]:
    """Return the called functions by module and name, without comprehensions and generated methods."""
    load = consistency.load
    names: set[str] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        module, code = str(frame.f_globals.get("__name__")), frame.f_code
        above = str(frame.f_back.f_globals.get("__name__")) if frame.f_back else ""
        ours = event == "call" and module.split(".")[0] == "consistency"
        written = Path(code.co_filename).is_file() and (
            not code.co_name.startswith("<") or code.co_name == "<lambda>"
        )
        inside = module == INTERPRETER and above != "consistency.checkpoints.load"
        name = f"{module}.{code.co_qualname}"
        if ours and written and not inside and not name.startswith(UNCOUNTED):
            names.add(name)

    sys.setprofile(note)
    load(path)
    sys.setprofile(None)
    return names


if __name__ == "__main__":
    print(*sorted(entered(sys.argv[1])))

"""Run the blocks of a page in this folder, in their order: `python tests/tools/blocks_of_pages.py docs/gpus.md ...`.

Blocks of bash run each in a shell; blocks of Python, and the cells of a notebook, in one namespace. A block that fails ends the run.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from blocks import blocks


def run(page: str) -> None:
    """Run a page, and print every block that has run, with its seconds."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for block in blocks(page):
        begun = time.monotonic()
        if block.reason is not None or block.language not in ("bash", "python"):
            continue
        if block.language == "bash":
            shell = ["bash", "-e", "-o", "pipefail", "-c", block.text]
            subprocess.run(shell, env=os.environ | {"PATH": path}, check=True)
        else:
            exec(compile(block.text, str(block), "exec"), namespace)
        print(f"ran {block} in {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    for page in sys.argv[1:]:
        run(page)

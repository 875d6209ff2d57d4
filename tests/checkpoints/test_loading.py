"""The way of a checkpoint from its path to a model: short, and without the frameworks of training."""

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from consistency.checkpoints import ours
from tiny_models import tiny, tiny_adm


def write(kind: str, folder: Path) -> Path:
    """The checkpoint of a run, as far as `load` reads it, or a converted model."""
    if kind == "model.safetensors":
        ours.write_sealed(folder / kind, tiny(), tiny_adm())
        return folder / kind
    online = {f"online.network.{name}": value for name, value in tiny_adm().items()}
    averages = {"EvaluationEMA": {"averages": {"0.99": tiny_adm()}}}
    content = {"card": tiny().saved(), "state_dict": online, "callbacks": averages}
    ours.write(content, folder / kind)
    return folder / kind


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_checkpoint_of_a_run_passes_a_dozen_functions(tmp_path: Path) -> None:
    path = write("last.ckpt", tmp_path)
    assert path.with_name("last.ckpt.sha256").is_file()
    names = run(str(ROOT / "tests" / "support" / "entered_functions.py"), str(path)).split()
    assert "consistency.checkpoints.load.load" in names
    assert len(names) <= 12, names


ALLOWED = ("torch", "numpy", "safetensors", "PIL", "jaxtyping", "consistency")
THEIRS = (
    *("torchgen", "typing_extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe"),
    *("filelock", "fsspec", "wadler_lindig"),
)
"""The parts and the dependencies of torch and jaxtyping."""

ALONE = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

class Known(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        known = name.split(".")[0] in {{*{known!r}, *sys.stdlib_module_names}}
        return super().find_spec(name, path, target) if known else None

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Known]
import torch
import consistency
from consistency.editing import colorize
model = consistency.load({path!r})
images = model.sample(4)
assert images.shape == (4, 3, 8, 8) and images.dtype == torch.uint8
assert model.edit(images[:2], colorize).shape == (2, 1, 3, 8, 8)
print(*(name for name in sys.modules if name.startswith("consistency.")))
"""


@pytest.mark.parametrize("kind", ["last.ckpt", "model.safetensors"])
def test_loading_and_sampling_need_no_framework(kind: str, tmp_path: Path) -> None:
    """torch, numpy, safetensors, pillow and jaxtyping with their own dependencies can be imported, nothing else."""
    path = write(kind, tmp_path)
    modules = run("-c", ALONE.format(known=(*ALLOWED, *THEIRS), path=str(path))).split()
    rooms = {name.split(".")[1] for name in modules}
    assert not rooms & {"training", "data", "evaluation", "commands"}

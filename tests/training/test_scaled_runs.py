"""A run of each data set in small: its recipe at a fraction of its length, a tiny network, random images in the set's format."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import originals
from conftest import NO_CURVES, Run
from originals import encoded, noise

FAST = [
    "logger=csv",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "scaler=null",
    "data.batch_size=2",
    "data.num_workers=0",
    "callbacks.samples=null",
    "callbacks.evaluation=null",
    "callbacks.checkpoint.monitor=null",
    NO_CURVES,
]
SMALL = ["model.network.model_channels=8", "model.network.channel_mult=[1,1,1]", "model.network.attention_resolutions=[]"]  # fmt: skip
SMALL += ["model.network.num_res_blocks=1"]
ADM = [*SMALL, "model.network.num_head_channels=8", "model.network.num_groups=4"]
LARGE = [
    *ADM,
    "model.network.channel_mult=[1,1,1,1,1]",
]  # small maps inside, where an ADM has attention


def pictures(count: int, side: int) -> list[bytes]:
    return [encoded(Image.fromarray(p)) for p in noise(count, side, side + 3, 3)]


def write_classes(root: Path) -> None:
    named = {f"n{i:08d}/{i}.JPEG": file for i, file in enumerate(pictures(4, 80))}
    originals.write_files(root, named)


def write_faces(root: Path) -> None:
    square = [encoded(Image.fromarray(p)) for p in noise(4, 64, 64, 3)]
    originals.write_archive(root, [(f"00000/img{i:08d}.png", f) for i, f in enumerate(square)])


def write_scenes(category: str) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        root.mkdir()
        originals.write_lmdb(root / f"{category}_train_lmdb", pictures(4, 260))

    return write


RUNS: dict[str, tuple[str, float, list[str], Callable[[Path], object] | None]] = {
    "digits": ("ect", 3 / 1500, ADM, None),
    "mnist": ("ect", 3 / 400_000, ADM, originals.write_idx),
    "fashion_mnist": ("ect", 3 / 6000, ADM, originals.write_idx),
    "cifar10": ("ict", 3 / 400_000, SMALL, originals.write_cifar),
    "imagenet64": ("edm", 3 / 610_352, ADM, write_classes),
    "lsun_bedroom": ("edm", 3 / 600_000, LARGE, write_scenes("bedroom")),
    "lsun_cat": ("edm", 3 / 300_000, LARGE, write_scenes("cat")),
    "ffhq64": ("edm", 3 / 781_250, SMALL, write_faces),
    "afhqv2": ("edm", 3 / 781_250, SMALL, write_faces),
}
"""Mode, scale of three steps, tiny network, and writer of the images, by data set."""


@pytest.mark.parametrize(
    "data", [pytest.param(d, marks=[] if d == "digits" else [pytest.mark.slow]) for d in RUNS]
)
def test_a_run_in_small_trains_on_the_set_s_own_format(
    data: str, verb: Run, tmp_path: Path
) -> None:
    mode, scale, network, write = RUNS[data]
    output, path = tmp_path / "run", tmp_path / ("set.zip" if write is write_faces else "set")
    given = [f"mode={mode}", f"data={data}", f"scale={scale}", *network, *FAST]
    if write is not None:
        write(path)
        given += [f"data.path={path}"]
    outcome = verb("train", *given, f"output={output}")
    assert outcome.status == 0, outcome.err
    assert "3 optimizer steps of 2 images" in outcome.out
    assert (output / "checkpoints" / "last.ckpt").is_file()

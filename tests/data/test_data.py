"""The order of the data is a function of position; sources give what is in the files."""

import io
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from consistency.data.digits import Digits
from consistency.data.lsun import LSUN
from consistency.data.memory import InMemory, load_into_memory
from consistency.data.module import BatchSplit, DataModule, PositionedBatches
from consistency.data.source import Source
from consistency.data.zip_or_folder import Folder
from consistency.errors import UserError
from consistency.pixels import to_uint8, to_unit


def batches(*, world_size: int = 1, accumulate: int = 1, **changes: int) -> PositionedBatches:
    source = InMemory(torch.zeros(103, 1, 1, 1, dtype=torch.uint8), torch.zeros(103).long())
    split = BatchSplit(world_size, 12 // (world_size * accumulate), accumulate)
    return PositionedBatches(
        source, split, **{**dict(rank=0, seed=0, start=0, total=20), **changes}
    )


def test_an_epoch_shows_every_image_at_most_once() -> None:
    flat = [i for batch in batches(total=8) for i in batch]
    assert len(flat) == len(set(flat)) == 96


def test_epochs_differ_and_repeat_under_the_same_seed() -> None:
    drawn = list(batches(total=16))
    assert drawn[:8] != drawn[8:]
    assert drawn == list(batches(total=16))
    assert drawn != list(batches(total=16, seed=1))


@pytest.mark.parametrize("start", [1, 7, 8, 13])
def test_a_resumed_order_goes_on_where_it_was(start: int) -> None:
    assert list(batches(start=start)) == list(batches())[start:]


def test_iterating_twice_gives_the_same() -> None:
    sampler = batches(start=5)
    assert list(sampler) == list(sampler)


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 3), (2, 1), (2, 3), (4, 1)])
def test_shares_make_up_the_same_global_batches(world_size: int, accumulate: int) -> None:
    whole = list(batches())
    shares = [
        list(
            batches(rank=rank, world_size=world_size, accumulate=accumulate, total=20 * accumulate)
        )
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        joined = [
            i
            for micro in range(accumulate)
            for share in shares
            for i in share[step * accumulate + micro]
        ]
        assert joined == batch


def test_the_digits_are_split_once_and_for_all() -> None:
    train, held_out = Digits(split="train"), Digits(split="held_out")
    assert (len(train), len(held_out)) == (899, 898)
    seen = {train[i][0].numpy().tobytes() for i in range(899)}
    again = sum(held_out[i][0].numpy().tobytes() in seen for i in range(898))
    assert again == 0
    assert sorted(set(train.labels.tolist())) == list(range(10))
    assert int(train.images.max()) == 255


def test_grey_values_survive_the_way_to_unit_and_back() -> None:
    grey = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    unit = to_unit(grey)
    assert (float(unit.min()), float(unit.max())) == (-1.0, 1.0)
    assert torch.equal(to_uint8(unit), grey)


def test_a_folder_gives_its_images_by_class_in_sorted_order(tmp_path: Path) -> None:
    for name, grey in (("b/1.png", 20), ("a/2.jpg", 200), ("a/1.png", 100)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (8, 12), grey).save(tmp_path / name, quality=100)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    source = Folder(path=str(tmp_path), image_size=4, channels=3, classes=True)
    assert len(source) == 3
    assert source.class_names == ["a", "b"]
    found = [(image.shape, round(float(image.float().mean())), label) for image, label in
             (source[i] for i in range(3))]  # fmt: skip
    assert [(s, label) for s, _, label in found] == [((3, 4, 4), 0), ((3, 4, 4), 0), ((3, 4, 4), 1)]
    assert all(
        abs(mean - grey) <= 1 for (_, mean, _), grey in zip(found, (100, 200, 20), strict=True)
    )


def test_a_folder_crops_the_centre(tmp_path: Path) -> None:
    pixels = np.zeros((8, 16), np.uint8)
    pixels[:, 4:12] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    image, _ = Folder(path=str(tmp_path), image_size=8, channels=1, classes=False)[0]
    assert int(image.min()) == 255


def test_lsun_reads_the_original_database(tmp_path: Path) -> None:
    folder = tmp_path / "bedroom_train_lmdb"
    with lmdb.open(str(folder), map_size=1 << 20) as database, database.begin(write=True) as write:
        for key, grey in ((b"0a1", 40), (b"0b2", 210)):
            jpeg = io.BytesIO()
            Image.new("RGB", (300, 256), (grey, grey, grey)).save(jpeg, "JPEG", quality=95)
            write.put(key, jpeg.getvalue())
    source = LSUN(path=str(tmp_path), category="bedroom", split="train", image_size=64)
    assert len(source) == 2
    shapes = [source[i][0].shape for i in range(2)]
    assert shapes == [(3, 64, 64)] * 2
    assert [round(float(source[i][0].float().mean())) for i in range(2)] == [40, 210]


def test_flipping_is_half_of_the_time_and_a_function_of_the_generator() -> None:
    module = DataModule(
        source=lambda: Digits(split="train"), held_out=None, image_size=8, channels=1, num_classes=10,
        batch_size=8, device_batch_size=None, num_workers=0, flip=True, seed=0,
    )  # fmt: skip
    images = Digits(split="train").images[:500]
    drawn = [module.augmented(images, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    plain = to_unit(images)
    same = (drawn[0] == plain).flatten(1).all(1)
    mirrored = (drawn[0] == plain.flip(-1)).flatten(1).all(1)
    assert bool((same | mirrored).all())
    assert 200 < int(mirrored.sum()) < 300


def digits(**changes: object) -> DataModule:
    settings = dict(
        source=lambda: Digits(split="train"), held_out=None, image_size=8, channels=1, num_classes=10,
        batch_size=64, device_batch_size=None, num_workers=0, flip=False, seed=0,
    )  # fmt: skip
    return DataModule(**{**settings, **changes})


@pytest.mark.parametrize(
    ("batch", "devices", "at_most", "expected"),
    [
        (256, 2, 64, (2, 64, 2)),
        (256, 2, None, (2, 128, 1)),
        (64, 1, 100, (1, 64, 1)),
        (60, 2, 16, (2, 15, 2)),
        (14, 2, 5, (2, 1, 7)),
    ],
)
def test_a_batch_is_cut_by_the_largest_divisor_that_fits(
    batch: int, devices: int, at_most: int | None, expected: tuple[int, int, int]
) -> None:
    module = digits(batch_size=batch, device_batch_size=at_most)
    assert module.split(devices) == expected
    assert module.split(devices).accumulated == expected[2]
    line = module.summary(devices).splitlines()[0]
    assert line.startswith(f"Batch: {batch} = {devices} device")


def test_the_summary_says_how_a_batch_is_cut_and_what_is_left_out() -> None:
    assert digits(batch_size=256, device_batch_size=64).summary(2).splitlines() == [
        "Batch: 256 = 2 devices x 64 images x 2 accumulated",
        "Epoch: 899 images = 3 batches, the 131 that remain are left out, other ones in each",
    ]
    assert "none left out" in digits(batch_size=29).summary(1)


def test_devices_have_equal_shares() -> None:
    with pytest.raises(UserError, match="multiple"):
        digits(batch_size=64).split(3)
    with pytest.raises(UserError, match="device_batch_size"):
        digits(device_batch_size=0).split(1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_the_images_of_its_index_lists(workers: int) -> None:
    module, source = digits(num_workers=workers), Digits(split="train")
    sampler = module.batches(split=module.split(1), start=3, total=17)
    loaded = list(module.loader(sampler))
    assert len(loaded) == 14
    for (images, classes), indices in zip(loaded, sampler, strict=True):
        assert images.dtype == torch.uint8
        assert classes.dtype == torch.int64
        assert torch.equal(images, source.images[indices])
        assert torch.equal(classes, source.labels[indices])


def test_a_source_held_in_memory_is_the_source(tmp_path: Path) -> None:
    for number in range(5):
        Image.new("L", (8, 8), 50 * number).save(tmp_path / f"{number}.png")
    folder = Folder(path=str(tmp_path), image_size=8, channels=1, classes=False)
    held = load_into_memory(folder)
    assert isinstance(held, InMemory)
    images, classes = held.batch([4, 0, 2])
    assert torch.equal(images, torch.stack([folder[i][0] for i in (4, 0, 2)]))
    assert classes.tolist() == [0, 0, 0]
    module = digits(source=lambda: folder, in_memory=True, num_classes=None, batch_size=4)
    assert isinstance(module.train_source, InMemory)
    source = Digits(split="train")
    assert load_into_memory(source) is source


def test_another_order_is_refused_unless_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    saved = {"order": digits().order, "images": 899, "batch_size": 64, "accumulation": 1}
    digits(num_workers=3, device_batch_size=16).load_state_dict(saved)
    for change in ({"batch_size": 32}, {"seed": 1}, {"source": lambda: Digits(split="held_out")}):
        with pytest.raises(UserError, match="allow_reorder"):
            digits(**change).load_state_dict(saved)
        digits(allow_reorder=True, **change).load_state_dict(saved)
        assert "another order than before" in capsys.readouterr().out


class Unrelated:
    """A data set that does not derive from `Source`."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(1, 8, 8, dtype=torch.uint8), 0


class Plain(Unrelated, Source):
    """A source with nothing but the two methods that it needs."""


def test_a_source_derives_from_the_base_and_needs_two_methods() -> None:
    with pytest.raises(UserError, match="derive the class from Source"):
        digits(source=Unrelated)
    module = digits(source=Plain)
    assert (module.train_source.class_names, module.train_source.left_out) == ((), 0)
    assert sorted(i for batch in module.batches(split=module.split(1), total=1) for i in batch) == list(range(64))  # fmt: skip

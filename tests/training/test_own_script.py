"""The LightningModule in a script of one's own: any loader of (images, labels), a plain Lightning trainer."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

import consistency
from configurations import composed
from conftest import TINY
from consistency.errors import UserError
from consistency.schedules import square_root
from consistency.training.build import build_module, quiet
from consistency.training.callbacks.ema import EvaluationEMA, TargetEMA
from consistency.training.callbacks.progress import Throughput
from consistency.training.callbacks.schedules import ScaleSchedule
from consistency.training.module import ConsistencyModule

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

MODES = ("ct", "ict", "ect", "edm", "ct_continuous")
DIGITS = torch.randint(256, (32, 1, 8, 8), dtype=torch.uint8)
CLASSES = torch.arange(32) % 10


@cache
def config(*overrides: str) -> DictConfig:
    return composed("train", *TINY, "trainer.max_steps=3", *overrides)


def module(*overrides: str) -> ConsistencyModule:
    quiet()
    torch.manual_seed(0)
    return build_module(config(*overrides))


def fitted(ours: ConsistencyModule, loader: Any, **arguments: Any) -> L.Trainer:
    given: dict[str, Any] = {
        "max_steps": 3,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        **arguments,
    }
    trainer = L.Trainer(**given)
    trainer.fit(ours, loader)
    return trainer


def batches(*tensors: Tensor, size: int = 8) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*tensors), batch_size=size)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains_on_a_loader_of_images_and_labels(mode: str) -> None:
    ours = module(f"mode={mode}")
    before = [p.detach().clone() for p in ours.online.parameters()]
    fitted(ours, batches(DIGITS, CLASSES))
    assert ours.k == 3
    after = ours.online.parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_it_brings_the_schedules_and_averages_of_its_method() -> None:
    ours = module("mode=ct")
    trainer = fitted(ours, batches(DIGITS, CLASSES))
    schedule = ours.config["mode"]["callbacks"]["scale_schedule"]["num_scales"]
    constants = {name: schedule[name] for name in ("s_0", "s_1", "total_steps")}
    assert ours.num_scales == square_root(2, **constants) > 2
    assert ours.target is not None
    ema = ours.config["callbacks"]["evaluation_ema"]
    names = [f"ema:{decay}" for decay in ema["decays"]] + [f"power:{w}" for w in ema["widths"]]
    assert list(ours.averages) == names
    kinds = [type(callback) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    assert kinds.count(ScaleSchedule) == kinds.count(TargetEMA) == kinds.count(EvaluationEMA) == 1


def test_the_callbacks_of_a_person_come_before_those_it_brings() -> None:
    ours = module("mode=ct")
    mine = ScaleSchedule(num_scales=lambda k: 7)
    fitted(ours, batches(DIGITS, CLASSES), callbacks=[mine, Throughput()])
    assert ours.num_scales == 7


class Listed(Dataset[Any]):
    """Items of any form."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Any:
        return self.items[number]


FLOATS = DIGITS.float() / 127.5 - 1
GIVEN = {
    "uint8": batches(DIGITS, CLASSES),
    "float": batches(FLOATS, CLASSES),
    "half": batches(FLOATS.half(), CLASSES),
    "double": batches(FLOATS.double(), CLASSES),
    "int32 labels": batches(DIGITS, CLASSES.int()),
    "pairs of a list": DataLoader(Listed([(x, int(y)) for x, y in zip(DIGITS, CLASSES, strict=True)]), batch_size=8),
    "batches as they are": DataLoader(Listed([(DIGITS[:8], CLASSES[:8])] * 3), batch_size=None),
}  # fmt: skip


@pytest.mark.parametrize("kind", GIVEN)
def test_images_of_any_kind_are_the_same_images(kind: str) -> None:
    ours, same = module("mode=edm"), module("mode=edm")
    fitted(ours, GIVEN[kind], max_steps=1)
    fitted(same, batches(DIGITS, CLASSES), max_steps=1)
    for a, b in zip(ours.online.parameters(), same.online.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("loader", [batches(DIGITS), DataLoader(Listed(DIGITS), batch_size=8)])
def test_labels_may_be_absent_where_the_model_has_no_classes(loader: Any) -> None:
    ours = module("mode=edm", "data.num_classes=null", "model.network.num_classes=null")
    fitted(ours, loader, callbacks=[Throughput()])
    assert ours.k == 3


WRONG = {
    "images outside of [-1, 1]": ([(DIGITS.float(), CLASSES)], r"\[-1, 1\]\n  got: values from 0 to 25\d\n"),
    "images that are not finite": ([(FLOATS * torch.nan, CLASSES)], r"got: values from nan to nan"),
    "whole numbers": ([(DIGITS.long(), CLASSES)], r"got: images of torch.int64"),
    "no channels": ([(DIGITS[:, 0], CLASSES)], r"got: torch.uint8 of shape \(32, 8, 8\)"),
    "other channels": ([(DIGITS.expand(-1, 3, -1, -1), CLASSES)], r"\(batch, 1, 8, 8\)\n  got: .*\(32, 3, 8, 8\)"),
    "another size": ([(DIGITS[..., :4], CLASSES)], r"got: torch.uint8 of shape \(32, 1, 8, 4\)"),
    "a dictionary": ([{"image": DIGITS, "label": CLASSES}], r"batches \(images, labels\).*\n  got: dict"),
    "three parts": ([(DIGITS, CLASSES, CLASSES)], r"got: list of Tensor, Tensor, Tensor"),
    "no labels": ([(DIGITS,)], r"for a model of 10 classes\n  got: none\n"),
    "a label too many": ([(DIGITS, CLASSES + 1)], r"from 0 to 9, .*\n  got: labels from 1 to 10"),
    "labels from below": ([(DIGITS, CLASSES - 1)], r"got: labels from -1 to 8"),
    "labels of another type": ([(DIGITS, CLASSES.float())], r"got: torch.float32 of shape \(32,\)"),
    "labels as one-hot": ([(DIGITS, torch.eye(10).long()[CLASSES])], r"got: torch.int64 of shape \(32, 10\)"),
    "labels of other images": ([(DIGITS, CLASSES[:5])], r"32 labels.*\n  got: torch.int64 of shape \(5,\)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_what_it_cannot_train_on_is_told(kind: str) -> None:
    given, said = WRONG[kind]
    loader = DataLoader(Listed(given), batch_size=None)
    with pytest.raises(UserError, match=said):
        fitted(module("mode=edm"), loader)


@pytest.mark.parametrize("mode", ["ct", "ict", "ect"])
def test_without_a_schedule_of_scales_what_is_missing_is_told(mode: str) -> None:
    ours = module(f"mode={mode}")
    ours.make_callbacks = tuple
    with pytest.raises(UserError, match=r"number of scales\n  got: N\(k\) = 0, which no callback has set\n.*ScaleSchedule"):  # fmt: skip
        fitted(ours, batches(DIGITS, CLASSES))


def test_images_between_0_and_1_are_taken_and_said(capfd: pytest.CaptureFixture[str]) -> None:
    fitted(module("mode=edm"), batches(DIGITS.float() / 255, CLASSES))
    assert capfd.readouterr().err.count("lie between 0 and 1 and are taken as they are") == 1


def test_every_epoch_draws_other_noise() -> None:
    """The same batch three times, at a rate that moves nothing: three losses."""
    losses: list[float] = []

    class Losses(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            losses.append(float(trainer.callback_metrics["loss"]))

    ours = module("mode=edm", "optimizer.lr=1e-20", "model.network.dropout=0.0")
    fitted(ours, batches(DIGITS[:8], CLASSES[:8]), callbacks=[Losses()])
    assert len(set(losses)) == 3


def test_its_checkpoint_goes_on_and_opens_as_any_other(tmp_path: Path) -> None:
    """A ModelCheckpoint of Lightning's, which knows nothing of ours."""
    ours = module("mode=ct")
    trainer = fitted(ours, batches(DIGITS, CLASSES))
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    model = consistency.load(tmp_path / "mine.ckpt")
    assert model.sample(2, seed=0).shape == (2, 1, 8, 8)
    later = module("mode=ct")
    again = L.Trainer(max_steps=5, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False)  # fmt: skip
    again.fit(later, batches(DIGITS, CLASSES), ckpt_path=str(tmp_path / "mine.ckpt"))
    assert later.k == 5


def test_a_callback_that_looks_at_the_data_says_that_a_loader_has_none() -> None:
    ours = module("mode=edm")

    class Looks(L.Callback):
        def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
            module.data  # noqa: B018

    with pytest.raises(UserError, match=r"datamodule=consistency.training.build.build_data"):
        fitted(ours, batches(DIGITS, CLASSES), callbacks=[Looks()])

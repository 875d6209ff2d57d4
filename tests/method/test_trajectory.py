"""A published run through the real training loop: Lightning, our module and our callbacks, with recorded draws.

`golden_trajectories` repeats the runs with the same parts in a loop of its own; this decides that training itself
reads N(k) and mu(k) at the step before it is counted, and updates optimizer, averages and target in that order.
"""

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader

from consistency.data.module import DataModule
from consistency.denoiser import Denoiser
from consistency.objectives import ConsistencyObjective, Losses
from consistency.pairs import UniformPairs
from consistency.preconditioning import EDM, Boundary
from consistency.solvers import heun_step
from consistency.steps import DataStep, Step, TeacherStep
from consistency.tensors import Data, Denoise, Label
from consistency.training.callbacks.ema import EvaluationEMA, TargetEMA
from consistency.training.callbacks.schedules import ScaleSchedule
from consistency.training.module import ConsistencyModule
from golden_formulas import GRID, SIGMA_DATA, T_MIN, weighting
from golden_harness import FOLDER, Archive, read_json
from golden_losses import OPENAI_DISTANCES
from golden_networks import OPENAI, small_network
from golden_trajectories import functions_of_k, optimizer_of, rates_of

SPECS = read_json(FOLDER / "openai_trajectory" / "specs.json")
# Runs from the first step whose weights move far enough to tell one order of updates from another.
RUNS = [n for n, s in SPECS.items() if s.get("start_global_step") == 0 and s["lr"] > 1e-3]

BOUNDARY = Boundary(sigma_data=SIGMA_DATA, t_min=T_MIN, c_noise_scale=OPENAI)
PLAIN = EDM(sigma_data=SIGMA_DATA, c_noise_scale=OPENAI)


class Recorded(DataModule):
    """The recorded batches, in their order."""

    def __init__(self, archive: Archive) -> None:
        L.LightningDataModule.__init__(self)
        images = archive.tensor("x_start")
        classes = archive.tensor("y") if "y" in archive else torch.zeros(images.shape[:2])
        self.batches = list(zip(images, classes, strict=True))
        self.num_classes = 10 if "y" in archive else None

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]

    def augmented(self, images: Tensor, draw: Generator) -> Data:
        return images


class RecordedDraws(nn.Module):
    """The objective, given the recorded index and noise of each of its calls in place of its own draws."""

    def __init__(self, objective: ConsistencyObjective, archive: Archive) -> None:
        super().__init__()
        self.objective, self.calls = objective, 0
        self.i, self.z = archive.tensor("indices"), archive.tensor("noise")
        self.losses: list[Tensor] = []

    def forward(
        self,
        online: Denoise,
        target: Denoise,
        x_0: Data,
        label: Label,
        num_scales: int,
        generator: Generator,
    ) -> Losses:
        t, r = GRID.neighbours(self.i[self.calls], num_scales)
        z = self.z[self.calls]
        self.calls += 1
        losses = self.objective.losses_at(online, target, x_0, label, t, r, z)
        self.losses.append(losses.loss.detach())
        return losses


class Weights(Callback):
    """Keeps one parameter of every role after every step."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows: dict[str, list[Tensor]] = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        if not self.rows:
            self._keep(module)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        self._keep(module)

    def _keep(self, module: L.LightningModule) -> None:
        assert isinstance(module, ConsistencyModule) and module.target is not None
        roles = {"online": module.online.network, "target": module.target.network}
        roles |= {f"ema{j}": average for j, average in enumerate(module.averages.values())}
        for role, network in roles.items():
            value = network.get_parameter(self.name).detach().clone()
            self.rows.setdefault(role, []).append(value)


def train(name: str, archive: Archive, watched: Weights) -> tuple[RecordedDraws, ConsistencyModule]:
    spec, folder = SPECS[name], FOLDER / "openai_small"
    step: Step = DataStep()
    if spec["mode"] == "consistency_distillation":
        teacher = Denoiser(small_network(folder, "teacher"), PLAIN)
        step = TeacherStep(teacher=teacher, solver=heun_step)
    objective = ConsistencyObjective(
        pairs=UniformPairs(grid=GRID),
        step=step,
        distance=OPENAI_DISTANCES[spec["norm"]],
        weighting=weighting("uniform"),
    )
    draws = RecordedDraws(objective, archive)
    num_scales, decay = functions_of_k(spec)
    module = ConsistencyModule(
        online=Denoiser(small_network(folder, spec["init"].split(".")[0]), BOUNDARY),
        objective=draws,
        sampling_preconditioning=BOUNDARY,
        optimizer=optimizer_of(spec),
        card=None,
        config={},
        seed=0,
        on_nonfinite="stop",
        sources={},
    )
    rates = rates_of(spec)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=spec["steps"],
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            ScaleSchedule(num_scales=num_scales),
            TargetEMA(decay=decay),
            EvaluationEMA(decays=rates),
            watched,
        ],
    )
    trainer.fit(module, datamodule=Recorded(archive))
    return draws, module


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:Found .* module\\(s\\) in eval mode")
@pytest.mark.parametrize("name", RUNS)
def test_training_repeats_the_published_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    archive = Archive(FOLDER / "openai_trajectory" / f"{name}.npz")
    parameter = archive.matching("dw64.online.*")[0].removeprefix("dw64.online.")
    watched = Weights(parameter)
    draws, module = train(name, archive, watched)
    assert module.k == SPECS[name]["steps"]
    theirs = torch.from_numpy(archive.arrays["loss_per_sample"])
    assert torch.allclose(torch.stack(draws.losses), theirs, rtol=1e-3, atol=0)
    for role in ("online", "target", *(f"ema{j}" for j in range(len(module.averages)))):
        values = torch.stack(watched.rows[role])
        moved, expected = (
            values - values[0],
            torch.from_numpy(archive.arrays[f"dw64.{role}.{parameter}"]),
        )
        assert float((moved - expected).norm()) <= 1e-2 * float(expected.norm()), role
        for ours, row in zip(moved[1:], expected[1:], strict=True):
            assert float((ours - row).norm()) <= 2e-2 * float(row.norm()), role

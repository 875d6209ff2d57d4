"""Progressive distillation: what happens where the number of steps halves."""

from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader

from conftest import TINY, Run
from consistency.checkpoints.load import load
from consistency.data.module import DataModule
from consistency.denoiser import Denoiser
from consistency.distances import L2
from consistency.errors import UserError
from consistency.grids import KarrasGrid
from consistency.networks.mlp import MLP
from consistency.objectives import ProgressiveObjective
from consistency.pixels import to_unit
from consistency.preconditioning import EDM
from consistency.randomness import WHOLE, Share
from consistency.schedules import halving
from consistency.training.callbacks.ema import EvaluationEMA
from consistency.training.callbacks.progressive_distillation import DistillationStages
from consistency.training.callbacks.schedules import ScaleSchedule
from consistency.training.module import ConsistencyModule
from consistency.weightings import truncated_snr

SCALINGS = EDM(sigma_data=0.5, c_noise_scale=0.25)
STEPS = 16
N = partial(halving, s_0=16, total_steps=STEPS)
FIRST_STEPS = [k for k in range(1, STEPS) if N(k) != N(k - 1)]


class Images(DataModule):
    def __init__(self) -> None:
        L.LightningDataModule.__init__(self)
        self.num_classes = None

    def augmented(self, images: Tensor, draw: Generator, share: Share = WHOLE) -> Tensor:
        return to_unit(images)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        image = torch.randint(256, (8, 1, 2, 2), dtype=torch.uint8)
        return DataLoader([(image, torch.zeros(8))] * STEPS, batch_size=None)  # type: ignore[arg-type]


def denoiser(seed: int) -> Denoiser:
    torch.manual_seed(seed)
    network = MLP(channels=4, width=8, depth=1)
    nn.init.normal_(network.last.weight)
    return Denoiser(network, SCALINGS)


def row(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


class Seen(Callback):
    """What stands at the start of every step, after the stages have been begun."""

    def __init__(self) -> None:
        self.online: list[Tensor] = []
        self.teacher: list[Tensor] = []
        self.average: list[Tensor] = []
        self.moments: list[int] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        assert isinstance(module, ConsistencyModule) and module.target is not None
        assert not module.target.training
        assert not any(p.requires_grad for p in module.target.parameters())
        self.online.append(row(module.online))
        self.teacher.append(row(module.target))
        self.average.append(row(module.averages["ema:0.9"]))
        self.moments.append(len(trainer.optimizers[0].state))


def train(teacher: Denoiser, student: Denoiser) -> Seen:
    grid = KarrasGrid(t_min=0.002, t_max=80.0, rho=7.0)
    module = ConsistencyModule(
        online=student,
        objective=ProgressiveObjective(grid=grid, distance=L2(), weighting=truncated_snr),
        sampling_preconditioning=SCALINGS,
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        card=None,
        config={},
        seed=0,
        on_nonfinite="stop",
        sources={},
    )
    seen = Seen()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            ScaleSchedule(num_scales=N),
            DistillationStages(teacher=teacher, num_scales=N),
            EvaluationEMA(decays=[0.9]),
            seen,
        ],
    )
    trainer.fit(module, datamodule=Images())
    return seen


quiet = pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
quiet_eval = pytest.mark.filterwarnings("ignore:Found .* module\\(s\\) in eval mode")


@quiet
@quiet_eval
def test_the_student_becomes_the_teacher_where_n_halves() -> None:
    teacher = denoiser(1)
    seen = train(teacher, denoiser(2))
    assert torch.equal(seen.teacher[0], row(teacher))
    assert not torch.equal(seen.teacher[0], seen.online[0])
    for k in range(1, STEPS):
        if k in FIRST_STEPS:
            assert torch.equal(seen.teacher[k], seen.online[k])
            assert torch.equal(seen.average[k], seen.online[k])
            assert seen.moments[k] == 0
        else:
            assert torch.equal(seen.teacher[k], seen.teacher[k - 1])
            assert not torch.equal(seen.average[k], seen.online[k])
            assert seen.moments[k] > 0
        assert not torch.equal(seen.online[k], seen.online[k - 1])


@quiet
def test_a_teacher_of_another_network_is_refused() -> None:
    other = Denoiser(MLP(channels=4, width=16, depth=1), SCALINGS)
    with pytest.raises(UserError, match="same network"):
        train(other, denoiser(2))


@pytest.mark.slow
def test_the_teacher_of_the_stage_is_in_the_checkpoint(
    verb: Run, trained: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    given: list[str] = ["mode=progdist", f"teacher={trained['edm']}", f"output={run}"]
    scales = "parts.scales.halving.s_0=4"
    outcome = verb("train", *TINY, *given, "trainer.max_steps=6", scales)
    assert outcome.status == 0, outcome.err
    first = row(load(trained["edm"]).denoiser)
    teacher, student = (row(load(run, weights=role).denoiser) for role in ("target", "online"))
    assert not torch.equal(teacher, first)
    assert not torch.equal(teacher, student)


def test_distillation_needs_a_teacher(verb: Run, tmp_path: Path) -> None:
    outcome = verb("train", *TINY, "mode=progdist", f"output={tmp_path / 'run'}")
    assert outcome.status == 2
    assert "teacher" in outcome.err

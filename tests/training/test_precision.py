"""Half precision and losses that are not finite: what is left out moves nothing, and what must stop stops."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader

from configurations import composed
from conftest import ROOT, TINY, Run
from consistency.checkpoints.load import load
from consistency.data.module import DataModule
from consistency.denoiser import Denoiser
from consistency.distances import L2
from consistency.errors import UserError
from consistency.networks.mlp import MLP
from consistency.objectives import DenoisingObjective
from consistency.pairs import LognormalTimes
from consistency.pixels import to_unit
from consistency.preconditioning import EDM, Scalings
from consistency.randomness import WHOLE, SampleNoise, Share
from consistency.runtime.devices import in_precision
from consistency.samplers import onestep
from consistency.schedules import square_root
from consistency.tensors import Time
from consistency.training import build, module
from consistency.training.callbacks.ema import EvaluationEMA, TargetEMA
from consistency.training.callbacks.schedules import ScaleSchedule
from consistency.training.module import ConsistencyModule
from consistency.training.nonfinite import OVERFLOWS, NonfiniteGuard
from consistency.training.optimizers import RAdam
from probe import Poisoned
from tiny_models import randomised

BATCHES = 8
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")])  # fmt: skip


class Images(DataModule):
    def __init__(self, batches: int) -> None:
        L.LightningDataModule.__init__(self)
        self.num_classes, self.batches = None, batches

    def augmented(self, images: Tensor, draw: Generator, share: Share = WHOLE) -> Tensor:
        return to_unit(images)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        image = torch.randint(256, (8, 1, 2, 2), dtype=torch.uint8)
        return DataLoader([(image, torch.zeros(8))] * self.batches, batch_size=None)  # type: ignore[arg-type]


class Journal(Callback):
    """k, N(k) and all weights and averages before every batch."""

    def __init__(self) -> None:
        self.k: list[int] = []
        self.scales: list[int] = []
        self.state: list[Tensor] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        assert isinstance(module, ConsistencyModule) and module.target is not None
        parts: list[nn.Module] = [module.online, module.target, *module.averages.values()]
        self.k.append(module.k)
        self.scales.append(module.num_scales)
        self.state.append(
            torch.cat([p.detach().flatten().clone() for part in parts for p in part.parameters()])
        )


def run(
    weighting: Callable[..., Tensor],
    *,
    on_nonfinite: str = "stop",
    batches: int = BATCHES,
    accumulate: int = 1,
    plugins: Sequence[Any] = (),
    callbacks: Sequence[Callback] = (),
    preconditioning: Any = EDM(sigma_data=0.5, c_noise_scale=0.25),  # noqa: B008
    precision: Any = None,
    accelerator: str = "cpu",
    optimizer: Callable[..., Any] = partial(torch.optim.Adam, lr=1e-2),  # noqa: B008
    journal: Any = None,
) -> tuple[ConsistencyModule, Journal]:
    torch.manual_seed(0)
    network = MLP(channels=4, width=8, depth=1)
    nn.init.normal_(network.last.weight)
    module = ConsistencyModule(
        online=Denoiser(network, preconditioning),
        objective=DenoisingObjective(
            times=LognormalTimes(p_mean=-1.2, p_std=1.2), distance=L2(), weighting=weighting
        ),
        sampling_preconditioning=preconditioning,
        optimizer=optimizer,
        card=None,
        config={},
        seed=0,
        on_nonfinite=on_nonfinite,
        sources={},
    )
    journal = journal or Journal()
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=1,
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=list(plugins),
        callbacks=[
            ScaleSchedule(num_scales=partial(square_root, s_0=2, s_1=50, total_steps=BATCHES)),
            TargetEMA(decay=lambda n: 0.5),
            EvaluationEMA(decays=[0.9]),
            journal,
            *callbacks,
        ],
    )
    trainer.fit(module, datamodule=Images(batches))
    return module, journal


class Passes(Callback):
    """Weights, averages, moments and target after a run, and N(k) of the loss of each batch. Reads no state in between."""

    def __init__(self) -> None:
        self.scales: list[int] = []

    def on_before_backward(
        self, trainer: L.Trainer, module: L.LightningModule, loss: Tensor
    ) -> None:
        self.scales.append(module.num_scales)  # type: ignore[arg-type]

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ConsistencyModule) and module.target is not None
        parts: list[nn.Module] = [module.online, *module.averages.values()]
        moments = [v for state in trainer.optimizers[0].state.values() for v in state.values()]
        self.end = [p.detach().clone() for part in parts for p in part.parameters()] + moments
        self.target = [p.detach().clone() for p in module.target.parameters()]


def moved(journal: Journal) -> list[bool]:
    """Whether anything changed between one batch and the next."""
    pairs = zip(journal.state, journal.state[1:], strict=False)
    return [not torch.equal(before, after) for before, after in pairs]


@pytest.mark.filterwarnings("ignore")
def test_a_step_that_is_left_out_moves_nothing() -> None:
    module, journal = run(Poisoned(calls=[2, 5]), on_nonfinite="skip:2")
    assert moved(journal) == [True, True, False, True, True, False, True]
    assert journal.k == [0, 1, 2, 2, 3, 4, 4, 5]
    assert module.k == 6
    assert journal.scales[3] == journal.scales[2] < journal.scales[4]


@pytest.mark.filterwarnings("ignore")
def test_n_in_a_row_stop_the_run() -> None:
    with pytest.raises(UserError, match=r"DenoisingObjective at step k=2, t=.*last of 3 such"):
        run(Poisoned(calls=[2, 3, 4]), on_nonfinite="skip:3")


def test_stop_is_the_first_one() -> None:
    with pytest.raises(UserError, match=r"1 of 8 samples .* at step k=0, t=[\d.e-]+ r=0\n"):
        run(Poisoned(calls=[0]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("poisoned", [0, 1])
def test_one_bad_batch_of_several_spoils_its_step(poisoned: int) -> None:
    """Batches 2 and 3 belong to the second optimizer step."""
    module, journal = run(Poisoned(calls=[2 + poisoned]), on_nonfinite="skip:2", accumulate=2)
    assert journal.k == [0, 0, 1, 1, 1, 1, 2, 2]
    assert module.k == 3
    assert moved(journal) == [False, True, False, False, False, True, False]


class Overflow(Callback):
    """Puts an infinity into the gradients of one batch, as half precision does, while its loss is finite."""

    def on_after_backward(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1 == 3:
            next(iter(module.parameters())).grad.fill_(torch.inf)  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore")
def test_a_step_that_the_scaler_skips_advances_no_schedule_and_no_average() -> None:
    """And never counts as a loss that is not finite."""
    scaler = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    module, journal = run(Poisoned(calls=[]), plugins=[scaler], callbacks=[Overflow()])
    assert journal.k == [0, 1, 2, 3, 3, 4, 5, 6]
    assert module.k == 7
    assert moved(journal)[3] is False
    assert journal.scales[4] == journal.scales[3]


class Overflows(Callback):
    """Puts an infinity into the gradients of these batches."""

    def __init__(self, batches: Sequence[int]) -> None:
        self.batches = batches

    def on_after_backward(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1 in self.batches:
            next(iter(module.parameters())).grad.fill_(torch.inf)  # type: ignore[union-attr]


def half(device: str = "cpu") -> MixedPrecision:
    return MixedPrecision("16-mixed", device, scaler=torch.amp.GradScaler(device))


def test_a_scaler_that_falls_for_ever_stops_the_run() -> None:
    found = rf"overflow in the term DenoisingObjective at step k=2, t=[\d.e-]+ to [\d.e-]+, the last of {OVERFLOWS} in a row"
    with pytest.raises(UserError, match=found):
        run(
            Poisoned(calls=[]),
            batches=OVERFLOWS + 2,
            plugins=[half()],
            callbacks=[Overflows(range(2, 10**6))],
        )


def test_a_scaler_that_finds_its_scale_stops_nothing_and_is_said_once(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """At the first and, with their number, at the end; whatever the policy for what is not finite."""
    last = OVERFLOWS - 1
    module, journal = run(
        Poisoned(calls=[]),
        batches=2 * last + 2,
        plugins=[half()],
        callbacks=[Overflows([*range(last), *range(last + 1, 2 * last + 1)])],
    )
    assert module.k == 2
    assert set(journal.k) == {0, 1}
    said = capfd.readouterr().err
    assert said.count("warning:") == 2
    assert "at step k=0: the scaler skips the step and continues with scale 32768" in said
    assert f"the gradient scaler left out {2 * last} steps" in said


def test_the_count_of_overflows_goes_on_with_the_run() -> None:
    module, _ = run(Poisoned(calls=[]), plugins=[half()], callbacks=[Overflows(range(2, 10**6))])
    kept: dict[str, Any] = {"state_dict": {}}
    module.on_save_checkpoint(kept)
    later, _ = run(Poisoned(calls=[]), batches=1)
    later.on_load_checkpoint(kept)
    assert later.guard.overflows_in_a_row == later.guard.overflows == BATCHES - 2


def test_a_fused_optimizer_hides_no_overflow() -> None:
    """It would leave the step out inside its kernel, and k, averages and schedules would go on."""
    optimizer = partial(torch.optim.Adam, lr=1e-2, fused=True)
    module, journal = run(
        Poisoned(calls=[]), plugins=[half()], callbacks=[Overflow()], optimizer=optimizer
    )
    assert journal.k == [0, 1, 2, 3, 3, 4, 5, 6]
    assert module.k == 7
    assert moved(journal)[3] is False


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("fused", [False, True])
def test_on_a_gpu_a_scaler_that_falls_for_ever_stops_the_run(fused: bool) -> None:
    optimizer = partial(torch.optim.Adam, lr=1e-2, fused=fused)
    with pytest.raises(UserError, match=rf"at step k=2, t=.*last of {OVERFLOWS} in a row"):
        run(
            Poisoned(calls=[]),
            batches=OVERFLOWS + 2,
            precision="16-mixed",
            accelerator="gpu",
            callbacks=[Overflows(range(2, 10**6))],
            optimizer=optimizer,
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_a_step_that_overflows_does_not_count_and_the_healthy_run_ends() -> None:
    module, journal = run(
        Poisoned(calls=[]), precision="16-mixed", accelerator="gpu", callbacks=[Overflow()]
    )
    assert module.k == BATCHES - 1
    assert moved(journal)[3] is False


def test_an_infinite_gradient_of_a_finite_loss_is_left_out_and_named() -> None:
    """Where no scaler looks for it; the module is that of its parameter."""
    named = r"of a finite loss, in the term DenoisingObjective at step k=3, t=[\d.e-]+ to [\d.e-]+, in network\.embed\.0"
    with pytest.warns(UserWarning, match=named):
        module, journal = run(Poisoned(calls=[]), callbacks=[Overflow()], on_nonfinite="skip:2")
    assert journal.k == [0, 1, 2, 3, 3, 4, 5, 6]
    assert module.k == 7
    assert moved(journal)[3] is False


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bad", [[0, 2, 5], [3, 4, 7]])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", [torch.optim.Adam, RAdam])
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_look_behind_the_next_passes_changes_no_bit(
    device: str, kind: Any, accumulate: int, bad: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the kernel leaves the step out, k and target are taken back, and the passes begin again with N(k)."""

    def trained(devices: tuple[str, ...], journal: Any) -> Passes:
        monkeypatch.setattr(module, "QUEUES", devices)
        run(
            Poisoned(calls=[]),
            accumulate=accumulate,
            callbacks=[Overflows(bad), passes := Passes()],
            on_nonfinite="skip:4",
            optimizer=partial(kind, lr=1e-2),
            accelerator=device,
            journal=journal,
        )
        return passes

    at_once = trained((), Journal())
    for reader in (Journal(), Callback()):  # one that reads the averages before a step, and none
        later = trained((device,), reader)
        assert later.scales == at_once.scales
        for one, other in zip(at_once.end, later.end, strict=True):
            assert torch.equal(one, other)
        for one, other in zip(at_once.target, later.target, strict=True):
            torch.testing.assert_close(one, other)  # its update was inverted


def test_a_bad_step_found_behind_the_next_passes_stops_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "QUEUES", ("cpu",))
    seen = Passes()
    with pytest.raises(UserError, match=r"at step k=3, t=[\d.e-]+ to [\d.e-]+, in network\.embed"):
        run(Poisoned(calls=[]), callbacks=[Overflows([3]), seen], journal=Callback())


def test_nothing_waits_between_the_passes_of_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look at a step comes behind the passes of the next: its place is not in the optimizer's step."""
    monkeypatch.setattr(module, "QUEUES", ("cpu",))
    order: list[str] = []
    passed, passes = NonfiniteGuard.passed, ConsistencyModule._losses
    monkeypatch.setattr(
        NonfiniteGuard, "passed", lambda self: (order.append("look"), passed(self))[1]
    )
    monkeypatch.setattr(
        ConsistencyModule, "_losses", lambda *args: (order.append("passes"), passes(*args))[1]
    )
    run(Poisoned(calls=[]), batches=3, journal=Callback())
    # The loader, not a number of steps, ends this run: so the look at the last step comes with its end.
    assert order == ["passes", "passes", "look", "passes", "look", "look"]


def test_a_gradient_whose_square_overflows_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    class Steep(Callback):
        def on_after_backward(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(1e25)

    for devices in ((), ("cpu",)):  # the look at once and behind the next passes
        monkeypatch.setattr(module, "QUEUES", devices)
        trained, _ = run(Poisoned(calls=[]), callbacks=[Steep()])
        trained.settle()
        assert trained.k == BATCHES


class Watched(EDM):
    """Scalings that record in which precision they are asked for."""

    seen: set[torch.dtype] = set()  # noqa: RUF012

    def __call__(self, t: Time) -> Scalings:
        found = super().__call__(t)
        self.seen.update([t.dtype, *(c.dtype for c in found)])
        return found


class Precisions(Callback):
    """The precision of the network's output and of the loss."""

    def __init__(self) -> None:
        self.network: set[torch.dtype] = set()
        self.loss: set[torch.dtype] = set()

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, ConsistencyModule)
        last = module.online.network.last
        assert isinstance(last, nn.Module)
        last.register_forward_hook(lambda *args: self.network.add(args[-1].dtype))

    def on_before_backward(
        self, trainer: L.Trainer, module: L.LightningModule, loss: Tensor
    ) -> None:
        self.loss.add(loss.dtype)


def test_only_the_network_computes_in_half_precision() -> None:
    found = Precisions()
    scalings = Watched(sigma_data=0.5, c_noise_scale=0.25)
    module, _ = run(
        Poisoned(calls=[]), precision="bf16-mixed", callbacks=[found], preconditioning=scalings
    )
    assert module.k == BATCHES
    assert found.network == {torch.bfloat16}
    assert found.loss == scalings.seen == {torch.float32}


DEVICES = [pytest.param("cpu", marks=pytest.mark.slow), GPU]


def rounding(network: nn.Module, passes: int = 1) -> float:
    """The relative error of bfloat16, whose numbers have 8 bits: one rounding in each layer and pass, adding as squares do."""
    layers = sum(isinstance(part, nn.Conv2d | nn.Linear) for part in network.modules())
    return (passes * layers) ** 0.5 * 2.0**-8


def apart(one: Tensor, other: Tensor) -> float:
    """The distance of two tensors, relative to the first."""
    return float((one - other).norm() / one.norm())


class Step(Callback):
    """The loss and all gradients of a step."""

    def on_after_backward(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        grads = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
        self.gradient = torch.cat(grads).float().cpu()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.loss = outputs["loss"].float().cpu()


def stepped(precision: str, device: str, folder: Path) -> tuple[Step, ConsistencyModule]:
    """Take a step of consistency training as train.py does, from random weights of which none is zero."""
    given = [f"trainer.precision={precision}", f"trainer.accelerator={device}", "mode=ct"]
    given += ["trainer.max_steps=1", "callbacks.samples=null", "float32_matmul=highest"]
    config = composed("train", *TINY, *given)
    config.output = str(folder / precision)
    data = build.build_data(config)
    module = build.build_module(config, data)
    module.online.network.load_state_dict(randomised(module.online.network))
    step = Step()
    trainer = build.build_trainer(config, [*build.build_callbacks(config), step], [], data)
    trainer.fit(module, datamodule=data)
    return step, module.to(device)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("device", DEVICES)
def test_bf16_steps_and_samples_as_float32_but_for_rounding(device: str, tmp_path: Path) -> None:
    """Loss and gradients of the first step, and samples in one step of the same network."""
    one, module = stepped("32-true", device, tmp_path)
    other, _ = stepped("bf16-mixed", device, tmp_path)
    network = module.online.network
    assert 0 < apart(one.loss, other.loss) < rounding(network, passes=2)
    assert 0 < apart(one.gradient, other.gradient) < rounding(network, passes=2)
    denoise = Denoiser(network, module.sampling_preconditioning).eval()
    labels = torch.arange(8, device=device)
    drawn = [
        onestep(
            in_precision(denoise, precision, torch.device(device)),
            SampleNoise(0, range(8), (1, 8, 8), device),
            labels,
            t_max=80.0,
            clip=False,
        )
        for precision in ("32-true", "bf16-mixed")
    ]
    assert 0 < apart(*drawn) < rounding(network)


@pytest.mark.parametrize("policy", ["go on", "skip", "skip:0", "skip:-1", "stop:3"])
def test_an_unknown_policy_is_told(policy: str, verb: Run, tmp_path: Path) -> None:
    outcome = verb("train", *TINY, f"on_nonfinite='{policy}'", f"output={tmp_path / 'run'}")
    assert outcome.status == 2
    assert "skip:<n>" in outcome.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_sample_that_is_not_finite_on_the_other_rank_stops_both(
    process: Run, tmp_path: Path
) -> None:
    """And the first rank says so, once."""
    outcome = process(
        "train",
        *TINY,
        "mode=edm",
        "trainer=ddp",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        "trainer.log_every_n_steps=1",
        "trainer.max_steps=4",
        "+parts.weighting.poisoned={_target_: probe.Poisoned, calls: [2], rank: 1}",
        "mode.weighting=poisoned",
        f"output={tmp_path / 'run'}",
        PYTHONPATH=str(ROOT / "tests" / "support"),
    )
    assert outcome.status == 2, outcome.err
    assert outcome.err.count("DenoisingObjective at step k=2") == 1
    assert "Traceback" not in outcome.err


def test_the_checkpoint_names_the_files_a_run_began_with(
    verb: Run, trained: dict[str, Path], tmp_path: Path
) -> None:
    """By path and hash; the teacher's weights are not in it, nor in the optimizer."""
    output = tmp_path / "run"
    given = ["mode=cd", f"teacher={trained['edm']}", "trainer.max_steps=1", f"output={output}"]
    outcome = verb("train", *TINY, *given)
    assert outcome.status == 0, outcome.err
    content = torch.load(output / "checkpoints" / "last.ckpt", weights_only=True)
    file = trained["edm"] / "checkpoints" / "last.ckpt"
    digest = file.with_name("last.ckpt.sha256").read_text().split()[0]
    expected = {"path": str(file), "weights": "ema", "sha256": digest}
    assert content["sources"] == {"teacher": expected, "init": expected}
    assert f"teacher: {file} (ema, sha256 {digest[:12]})" in outcome.out
    assert not any("teacher" in name for name in content["state_dict"])
    online = sum(1 for _ in load(output).denoiser.network.parameters())
    assert len(content["optimizer_states"][0]["state"]) == online

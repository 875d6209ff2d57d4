"""The mode `meanflow` in configurations, checkpoints, samplers and averages."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from configurations import composed
from conftest import TINY
from consistency import derivatives, flow_pairs, steps
from consistency.checkpoints.load import load
from consistency.checkpoints.ours import write_sealed
from consistency.denoiser import Denoiser
from consistency.editing import colorize
from consistency.errors import UserError
from consistency.flow_samplers import flow_jumps, flow_multistep
from consistency.inference.model import Model
from consistency.inference.options import require_suited
from consistency.samplers import multistep, onestep
from consistency.training.build import build_module
from consistency.training.callbacks.ema import EvaluationEMA

MEANFLOW = ["mode=meanflow", *TINY]


@pytest.fixture(scope="module")
def config() -> Any:
    """FastGen's range of times, the other second time, guidance, and a difference for the derivative."""
    given = [
        "mode.process.t_max=0.999",
        "model.network.second_time=end",
        "mode.guidance=self",
        "mode.derivative=flow_difference",
    ]
    return composed("train", *MEANFLOW, *given, "mode.objective.label_dropout=0.1")


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    module = build_module(composed("train", *MEANFLOW))
    assert module.card is not None
    for parameter in module.online.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    denoiser = Denoiser(module.online.network, module.sampling_preconditioning).eval()
    return Model(denoiser.requires_grad_(False), module.card, Path("-"), "random", "ours")


def test_laws_derivative_and_guidance_of_the_released_codes_are_one_word(config: Any) -> None:
    for name, kind, equal in (
        ("flow_each", flow_pairs.LogitNormalPairs, 0.25),
        ("flow_capped", flow_pairs.CappedPairs, 0.25),
        ("flow_first", flow_pairs.FirstPairs, 0.75),
        ("flow_counted", flow_pairs.CountedPairs, 0.25),
    ):
        ours = instantiate(config.parts.pairs[name])
        assert type(ours) is kind
        assert (ours.equal, ours.t_max) == (equal, 0.999)
    objective = instantiate(config.mode.objective)
    assert type(objective.pairs) is flow_pairs.CappedPairs
    assert objective.derivative == derivatives.FiniteDifference(e=1e-4, t_max=0.999)
    assert objective.guidance == steps.SelfGuidance(w=1.0, k=0.5)
    assert config.model.network.second_time == "end"


def test_a_network_without_what_the_mode_needs_is_refused(config: Any) -> None:
    with pytest.raises(UserError, match="no class"):
        build_module(config)
    other = OmegaConf.merge(config, {"model": {"network": {"second_time": None}}})
    with pytest.raises(UserError, match="two times"):
        build_module(other)


def test_a_checkpoint_holds_the_second_time_and_draws_with_any_number_of_jumps(
    model: Model, tmp_path: Path
) -> None:
    write_sealed(tmp_path / "flow.safetensors", model.card, model.denoiser.network.state_dict())
    loaded = load(tmp_path / "flow.safetensors")
    assert loaded.card == model.card
    assert loaded.card.network["second_time"] == "gap"
    for jumps in (1, 2, 3):
        assert torch.equal(loaded.sample(4, steps=jumps), model.sample(4, steps=jumps))
    assert loaded.card.sampler(2).keywords["times"] == [1.0, 0.5]  # type: ignore[attr-defined]
    points = loaded.card.sampler(4).keywords["times"]  # type: ignore[attr-defined]
    assert points == pytest.approx([1.0, 0.75, 0.5, 0.25])
    one = loaded.sample(4, sampler=partial(onestep, t_max=1.0, clip=True))
    assert int((one.int() - loaded.sample(4).int()).abs().max()) <= 1


def test_only_samplers_of_the_flow_are_taken(model: Model) -> None:
    points: Any = {"times": [1.0, 0.5], "t_max": 1.0}
    for sampler in (
        partial(onestep, t_max=1.0, clip=True),
        partial(flow_jumps, **points),
        partial(flow_multistep, **points, clip=False),
    ):
        require_suited(sampler, model, force=False)
    wrong = partial(multistep, times=[80.0], t_min=0.002, t_max=80.0, clip=True)
    with pytest.raises(UserError, match="flow_jumps"):
        require_suited(wrong, model, force=False)
    with pytest.raises(UserError, match="variance-exploding"):
        model.edit(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), colorize)


def test_averages_every_16_steps_have_the_decay_of_16() -> None:
    """After 48 steps three updates have been made; between them the averages rest."""
    ema = EvaluationEMA(decays=[0.9], every=16, in_double=True)
    decays = [ema.decays_at(k)["0.9"] for k in range(48)]
    assert [k + 1 for k, decay in enumerate(decays) if decay != 1] == [16, 32, 48]
    assert decays[15] == 0.9**16
    with pytest.raises(UserError, match="every"):
        EvaluationEMA(widths=[0.1], every=16)

"""Every part of a method can be chosen on the command line, and the chosen part is the one that trains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from analytic import Gaussian, normal, times
from configurations import composed
from consistency import distances, pairs, preconditioning, solvers, steps, tangents
from consistency.distances import LPIPS
from consistency.training.lpips import RESIZING, TAPS

GRID = "{_target_: consistency.grids.KarrasGrid, t_min: 0.002, t_max: 80.0, rho: 7.0}"


def built(place: str, *overrides: str) -> Any:
    """The object at a place of the configuration."""
    return instantiate(OmegaConf.select(composed("train", *overrides), place), _convert_="all")


def replaced(place: str, part: str) -> list[str]:
    """Overrides that put another part where one with other settings stands."""
    return [f"~{place}", f"+{place}={{{part}}}"]


SIMPLE = ["L1", "L2", "LInf", "L2At32", "SquaredNorm"]


@pytest.mark.parametrize("name", SIMPLE)
@pytest.mark.parametrize("mode", ["ct", "progdist", "edm"])
def test_a_distance_is_one_word(name: str, mode: str) -> None:
    place = "mode.objective.distance"
    chosen = f"{place}._target_=consistency.distances.{name}"
    assert type(built(place, f"mode={mode}", chosen)) is getattr(distances, name)


def test_a_distance_with_settings_replaces_the_mode_s() -> None:
    place, huber = "mode.objective.distance", "_target_:consistency.distances.PseudoHuber"
    chosen = replaced(place, f"{huber},c:0.03,per_root_dimension:false")
    ours = built(place, "mode=ct", *chosen)
    assert (type(ours), ours.c) == (distances.PseudoHuber, 0.03)
    assert built(place, "mode=ict", f"{place}.c=0.1").c == 0.1
    plain = replaced(place, "_target_:consistency.distances.L2")
    assert type(built(place, "mode=ict", *plain)) is distances.L2


@pytest.mark.parametrize("variant", RESIZING)
@pytest.mark.parametrize("backbone", TAPS)
def test_every_lpips_is_named_by_backbone_and_variant(
    backbone: str, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "consistency.training.lpips._imagenet_weights", lambda name: _random_features(name)
    )
    place = "mode.objective.distance"
    lpips = f"_target_:consistency.training.lpips.load_lpips,backbone:{backbone},variant:{variant}"
    ours = built(place, "mode=ct", f"+{place}={{{lpips}}}")
    assert isinstance(ours, LPIPS)
    assert ours.resize is RESIZING[variant]
    assert len(ours.weights) == len(TAPS[backbone])


def _random_features(name: Any) -> dict[str, torch.Tensor]:
    from consistency.training.lpips import empty_features

    return {k: torch.zeros(v.shape) for k, v in empty_features(name).state_dict().items()}


def test_without_its_weights_lpips_is_an_error_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    place = "mode.objective.distance"
    lpips = (
        "_target_:consistency.training.lpips.load_lpips,backbone:vgg16,variant:average_pooled_unit"
    )
    with pytest.raises(InstantiationException, match=r"vgg16-397923af\.pth"):
        built(place, "mode=ct", f"+{place}={{{lpips}}}")


@pytest.mark.parametrize(
    ("name", "settings", "at_half"),
    [
        ("uniform", "", 1.0),
        ("snr", "", 4.0),
        ("snr_plus_one", "", 5.0),
        ("truncated_snr", "", 4.0),
        ("inverse_gap", "", 4.0),
        ("karras", ",sigma_data:0.5", 8.0),
    ],
)
def test_every_weighting(name: str, settings: str, at_half: float) -> None:
    place = "mode.objective.weighting"
    part = f"_target_:consistency.weightings.{name},_partial_:true{settings}"
    ours = built(place, "mode=ct", *replaced(place, part))
    assert float(ours(torch.tensor([0.5]), torch.tensor([0.25]))) == at_half


@pytest.mark.parametrize(
    ("part", "scales"),
    [
        ("constant,num_scales:18", [18, 18]),
        ("square_root,s_0:2,s_1:150,total_steps:800000", [2, 107]),
        ("doubling,s_0:10,s_1:1280,total_steps:800000", [11, 161]),
        ("powers,q:4,stages:4,total_steps:800000", [4, 64]),
        ("halving,s_0:4096,total_steps:800000", [4096, 16]),
    ],
)
def test_every_schedule_of_scales(part: str, scales: list[int]) -> None:
    place = "mode.callbacks.scale_schedule.num_scales"
    chosen = replaced(place, f"_partial_:true,_target_:consistency.schedules.{part}")
    ours = built(place, "mode=ct", *chosen)
    assert [ours(0), ours(400_000)] == scales


@pytest.mark.parametrize(
    ("part", "mu"),
    [
        ("fixed_decay,mu:0.95", 0.95),
        ("decay_as_released,s_0:2,mu_0:0.9", 0.81),
        ("decay_as_printed,s_0:2,mu_0:0.9", 0.9),
    ],
)
def test_every_schedule_of_the_decay(part: str, mu: float) -> None:
    place = "mode.callbacks.target_ema.decay"
    chosen = replaced(place, f"_partial_:true,_target_:consistency.schedules.{part}")
    assert built(place, "mode=ct", *chosen)(2) == pytest.approx(mu)


@pytest.mark.parametrize(
    ("mode", "part", "kind"),
    [
        ("ct", f"UniformPairs,grid:{GRID}", pairs.UniformPairs),
        (
            "ct",
            f"DiscreteLognormalPairs,p_mean:-1.1,p_std:2.0,grid:{GRID}",
            pairs.DiscreteLognormalPairs,
        ),
        ("ct", "RatioPairs,p_mean:-1.1,p_std:2.0,k:8.0,b:1.0", pairs.RatioPairs),
    ],
)
def test_every_law_of_pairs(mode: str, part: str, kind: type) -> None:
    place = "mode.objective.pairs"
    chosen = replaced(place, f"_target_:consistency.pairs.{part}")
    assert type(built(place, f"mode={mode}", *chosen)) is kind


def test_every_law_of_times() -> None:
    place = "mode.objective.times"
    assert built(place, "mode=edm", f"+{place}.even=true").even
    assert built("mode.objective.pairs", "mode=ect", "mode.objective.pairs.k=0.0").k == 0.0
    chosen = replaced(place, f"_target_:consistency.pairs.UniformTimes,grid:{GRID}")
    assert type(built(place, "mode=edm", *chosen)) is pairs.UniformTimes
    law = "_target_:consistency.pairs.LognormalTimes,p_mean:-1.2,p_std:1.2"
    ours = built(place, "mode=ct_continuous", *replaced(place, law))
    assert type(ours) is pairs.LognormalTimes


@pytest.mark.parametrize("name", ["euler_step", "heun_step"])
def test_every_solver(name: str, trained: dict[str, Path]) -> None:
    place = "mode.objective.step"
    chosen = f"{place}.solver._target_=consistency.solvers.{name}"
    ours = built(place, "mode=cd", f"teacher={trained['edm']}", chosen)
    assert isinstance(ours, steps.TeacherStep)
    law, x = Gaussian(0.0, 0.5), normal(2, 1, 2, 2)
    arguments = (law.denoise, x, times(2, 3.0), times(2, 1.0), None)
    assert torch.equal(ours.solver(*arguments), getattr(solvers, name)(*arguments))


@pytest.mark.parametrize(
    ("kind", "unused"),
    [
        (preconditioning.EDM, ["t_min"]),
        (preconditioning.Boundary, []),
        (preconditioning.TrigFlow, ["t_min", "c_noise_scale"]),
    ],
)
def test_every_preconditioning(kind: type, unused: list[str]) -> None:
    place = "mode.preconditioning"
    chosen = f"{place}._target_=consistency.preconditioning.{kind.__name__}"
    ours = built(place, "mode=ct", *[f"~{place}.{name}" for name in unused], chosen)
    assert type(ours) is kind


def test_the_scale_of_the_time_input_is_the_network_s() -> None:
    for model, scale in (("adm_lsun256", 250.0), ("ddpmpp_cifar10", 0.25)):
        ours = built("mode.preconditioning", "mode=ct", f"model={model}")
        assert ours.c_noise_scale == scale


@pytest.mark.parametrize("name", ["L1Tangent", "L2Tangent", "LInfTangent"])
def test_every_continuous_length(name: str) -> None:
    ours = built(
        "mode.objective",
        "mode=ct_continuous",
        "mode.objective.stop_gradient=false",
        f"mode.objective.tangent._target_=consistency.tangents.{name}",
    )
    assert type(ours.tangent) is getattr(tangents, name)
    assert ours.stop_gradient is False


@pytest.mark.parametrize("stop_gradient", ["true", "false"])
def test_continuous_time_with_any_distance(stop_gradient: str) -> None:
    hessian = "_target_:consistency.tangents.HessianTangent"
    ours = built(
        "mode.objective",
        "mode=ct_continuous",
        f"mode.objective.stop_gradient={stop_gradient}",
        f"+mode.objective.tangent={{{hessian},distance:{{_target_:consistency.distances.L2}}}}",
    )
    assert isinstance(ours.tangent, tangents.HessianTangent)
    assert ours.stop_gradient is (stop_gradient == "true")


def test_the_gradient_through_the_target_is_an_option() -> None:
    assert built("mode.objective", "mode=ct").stop_gradient is True
    ours = built("mode.objective", "mode=ct", "+mode.objective.stop_gradient=false")
    assert ours.stop_gradient is False


@pytest.mark.parametrize(
    "part",
    [
        "falling_in_stages,s_0:4096,total_steps:800000",
        "rising_rate,ramp_steps:19531",
        "constant_rate",
    ],
)
def test_every_schedule_of_the_rate(part: str) -> None:
    place = "callbacks.learning_rate.factor"
    chosen = replaced(place, f"_partial_:true,_target_:consistency.schedules.{part}")
    assert 0 <= built(place, "mode=ct", *chosen)(100) <= 1

"""Every part of a method can be chosen on the command line, and the chosen part is the one that trains."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

import consistency
from analytic import Gaussian, normal, times
from configurations import composed
from conftest import TINY, Run
from consistency import distances, pairs, preconditioning, solvers, steps, tangents, trigflow
from consistency.distances import LPIPS
from consistency.errors import UserError
from consistency.training.build import expanded
from consistency.training.lpips import RESIZING, TAPS


def built(place: str, *overrides: str) -> Any:
    """The object at a place of the configuration."""
    return instantiate(OmegaConf.select(composed("train", *overrides), place), _convert_="all")


DISTANCE = "mode.objective.distance"
SIMPLE = {
    "l1": "L1",
    "l2": "L2",
    "linf": "LInf",
    "l2_at_32": "L2At32",
    "squared_norm": "SquaredNorm",
}


@pytest.mark.parametrize("name", SIMPLE)
@pytest.mark.parametrize("mode", ["ct", "progdist", "edm"])
def test_a_distance_is_one_word(name: str, mode: str) -> None:
    ours = built(DISTANCE, f"mode={mode}", f"mode.distance={name}")
    assert type(ours) is getattr(distances, SIMPLE[name])


def test_a_distance_with_settings_replaces_the_mode_s() -> None:
    huber = [
        "parts.distance.pseudo_huber.c=0.03",
        "parts.distance.pseudo_huber.per_root_dimension=false",
    ]
    ours = built(DISTANCE, "mode=ct", "mode.distance=pseudo_huber", *huber)
    assert (type(ours), ours.c) == (distances.PseudoHuber, 0.03)
    assert built(DISTANCE, "mode=ict", "parts.distance.pseudo_huber.c=0.1").c == 0.1
    assert type(built(DISTANCE, "mode=ict", "mode.distance=l2")) is distances.L2
    own = "+parts.distance.own={_target_:consistency.distances.PseudoHuber,c:2.0,per_root_dimension:false}"
    assert built(DISTANCE, "mode=ict", own, "mode.distance=own").c == 2.0


@pytest.mark.parametrize("variant", RESIZING)
@pytest.mark.parametrize("backbone", TAPS)
def test_every_lpips_is_named_by_backbone_and_variant(
    backbone: str, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "consistency.training.lpips._imagenet_weights", lambda name: _random_features(name)
    )
    name = "lpips_average_pooled" if variant == "average_pooled_unit" else "lpips_max_pooled"
    options = [f"mode.distance={name}", f"parts.distance.{name}.backbone={backbone}"]
    ours = built(DISTANCE, "mode=ct", *options)
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
    with pytest.raises(InstantiationException, match=r"vgg16-397923af\.pth"):
        built(DISTANCE, "mode=ct", "mode.distance=lpips_average_pooled")


@pytest.mark.parametrize(
    ("name", "at_half"),
    [("uniform", 1.0), ("snr", 4.0), ("snr_plus_one", 5.0), ("truncated_snr", 4.0), ("inverse_gap", 4.0), ("karras", 8.0)],
)  # fmt: skip
def test_every_weighting(name: str, at_half: float) -> None:
    ours = built("mode.objective.weighting", "mode=ct", f"mode.weighting={name}")
    assert float(ours(torch.tensor([0.5]), torch.tensor([0.25]))) == at_half


@pytest.mark.parametrize(
    ("name", "options", "scales"),
    [
        ("constant", ["constant.num_scales=18"], [18, 18]),
        ("square_root", ["square_root.s_1=150"], [2, 107]),
        ("doubling", [], [11, 161]),
        ("powers", ["powers.q=4", "powers.stages=4"], [4, 64]),
        ("halving", [], [4096, 16]),
    ],
)
def test_every_schedule_of_scales(name: str, options: list[str], scales: list[int]) -> None:
    given = [
        f"mode.scales={name}",
        "mode.total_steps=800000",
        *(f"parts.scales.{o}" for o in options),
    ]
    ours = built("mode.callbacks.scale_schedule.num_scales", "mode=ct", *given)
    assert [ours(0), ours(400_000)] == scales


@pytest.mark.parametrize(("name", "mu"), [("fixed", 0.95), ("released", 0.81), ("printed", 0.9)])
def test_every_schedule_of_the_decay(name: str, mu: float) -> None:
    given = [f"mode.target={name}", "parts.target.released.mu_0=0.9"]
    assert built("mode.callbacks.target_ema.decay", "mode=ct", *given)(2) == pytest.approx(mu)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("uniform", pairs.UniformPairs), ("lognormal", pairs.DiscreteLognormalPairs), ("ratio", pairs.RatioPairs), ("ratio_student", pairs.RatioPairs)],
)  # fmt: skip
def test_every_law_of_pairs(name: str, kind: type) -> None:
    assert type(built("mode.objective.pairs", "mode=ct", f"mode.pairs={name}")) is kind


def test_every_law_of_times() -> None:
    place = "mode.objective.times"
    assert built(place, "mode=edm", "parts.times.lognormal.even=true").even
    assert built("mode.objective.pairs", "mode=ect", "parts.pairs.ratio.k=0.0").k == 0.0
    assert type(built(place, "mode=edm", "mode.times=uniform")) is pairs.UniformTimes
    assert type(built(place, "mode=ct_continuous", "mode.times=lognormal")) is pairs.LognormalTimes


def test_every_part_of_trigflow() -> None:
    given = ["mode.derivative=central_difference", "parts.derivative.central_difference.share=0.01"]
    given += ["mode.normalisation=root_mean_square", "mode.head=none", "mode.times=quantised"]
    given += ["mode.weighting=inverse_level", "mode.distance=l2_over_dimension"]
    ours = built("mode.objective", "mode=sct", *given)
    assert (type(ours.derivative), ours.derivative.share) == (trigflow.CentralDifference, 0.01)
    assert (type(ours.times), type(ours.times.times)) == (
        pairs.QuantisedTimes,
        pairs.TruncatedLognormalTimes,
    )
    assert (ours.head, type(ours.distance)) == (None, distances.L2OverDimension)
    g = normal(2, 1, 2, 2)
    root_mean_square = g.square().mean((1, 2, 3), keepdim=True).sqrt()
    assert torch.allclose(ours.normalisation(g), g / (root_mean_square + 0.1))
    paper = built("mode.objective", "mode=sct")
    assert type(paper.derivative) is trigflow.ForwardDerivative
    length = g.flatten(1).norm(dim=1)[:, None, None, None]
    assert torch.allclose(paper.normalisation(g), g / (length + 0.1))
    place, steps = "mode.callbacks.warm_up.num_scales", "parts.warmup.linear.ramp_steps=100"
    assert built(place, "mode=sct", steps)(25) == 0.25
    assert built(place, "mode=scd", "mode.warmup=none")(0) == 1.0


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_every_solver(name: str, trained: dict[str, Path]) -> None:
    given = [f"teacher={trained['edm']}", f"mode.solver={name}"]
    ours = built("mode.objective.step", "mode=cd", *given)
    assert isinstance(ours, steps.TeacherStep)
    law, x = Gaussian(0.0, 0.5), normal(2, 1, 2, 2)
    arguments = (law.denoise, x, times(2, 3.0), times(2, 1.0), None)
    assert torch.equal(ours.solver(*arguments), getattr(solvers, f"{name}_step")(*arguments))


@pytest.mark.parametrize(
    ("kind", "unused"),
    [
        (preconditioning.EDM, ["t_min"]),
        (preconditioning.Boundary, []),
        (preconditioning.TrigFlow, ["t_min", "c_noise_scale"]),
        (preconditioning.TrigFlowSlope, ["t_min"]),
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


@pytest.mark.parametrize("name", ["L1", "L2", "LInf"])
def test_every_continuous_length(name: str) -> None:
    given = ["mode.objective.stop_gradient=false", f"mode.tangent={name.lower()}"]
    ours = built("mode.objective", "mode=ct_continuous", *given)
    assert type(ours.tangent) is getattr(tangents, f"{name}Tangent")
    assert ours.stop_gradient is False


@pytest.mark.parametrize("stop_gradient", ["true", "false"])
def test_continuous_time_with_any_distance(stop_gradient: str) -> None:
    given = [
        f"mode.objective.stop_gradient={stop_gradient}",
        "mode.tangent=hessian",
        "mode.distance=squared_norm",
    ]
    ours = built("mode.objective", "mode=ct_continuous", *given)
    assert isinstance(ours.tangent, tangents.HessianTangent)
    assert isinstance(ours.tangent.distance, distances.SquaredNorm)
    assert ours.stop_gradient is (stop_gradient == "true")


def test_the_gradient_through_the_target_is_an_option() -> None:
    assert built("mode.objective", "mode=ct").stop_gradient is True
    ours = built("mode.objective", "mode=ct", "+mode.objective.stop_gradient=false")
    assert ours.stop_gradient is False


@pytest.mark.parametrize(
    "name", ["constant", "falling", "rising", "inverse_root", "falling_in_stages"]
)
def test_every_schedule_of_the_rate(name: str) -> None:
    ours = built("callbacks.learning_rate.factor", "mode=ct", f"mode.rate={name}")
    assert 0 <= ours(100) <= 1


def test_every_part_of_the_menu_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("consistency.training.lpips._imagenet_weights", _random_features)
    menu = composed("train").parts
    parts = [menu.grid, *(part for kind in menu if kind != "grid" for part in menu[kind].values())]
    assert len(parts) > 40
    for part in parts:
        assert part is None or instantiate(part, _convert_="all")


def test_a_run_saves_its_parts_and_no_menu() -> None:
    config = expanded(composed("train", "mode=ict", "mode.distance=l1", "mode.pairs=ratio"))
    plain: Any = OmegaConf.to_container(config, resolve=True)
    assert "parts" not in plain
    assert "${parts" not in OmegaConf.to_yaml(config)
    assert plain["mode"]["distance"] == "l1"
    assert plain["mode"]["objective"]["distance"] == {"_target_": "consistency.distances.L1"}
    pair = {
        "_target_": "consistency.pairs.RatioPairs",
        "times": {"_target_": "consistency.pairs.LognormalTimes", "p_mean": -1.1, "p_std": 2.0},
        "k": 8.0,
        "b": 1.0,
        "ratio_limit": 1.0,
        "r_min": 0.0,
        "least_gap": 0.0,
    }
    assert plain["mode"]["objective"]["pairs"] == pair


@pytest.mark.slow
def test_a_sweep_swaps_parts(tmp_path: Path, verb: Run) -> None:
    given = [
        "-m",
        "mode=ct",
        "mode.distance=l1,pseudo_huber",
        f"output={tmp_path / 'sweep'}",
        *TINY,
    ]
    outcome = verb("train", *given, "trainer.max_steps=1", "logger=none")
    assert outcome.status == 0, outcome.err
    saved = [OmegaConf.load(file) for file in sorted((tmp_path / "sweep").glob("*/config.yaml"))]
    chosen = [dict(config.mode.objective.distance) for config in saved]
    assert chosen == [
        {"_target_": "consistency.distances.L1"},
        {"_target_": "consistency.distances.PseudoHuber", "c": 0.00054, "per_root_dimension": True},
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["mode=ct", "mode.distance=huber"], "mode.distance among l1, l2, squared_norm"),
        (["mode=ct_continuous", "mode.tangent=hessian", "mode.distance=huber"], "mode.distance among"),
        (["mode=ict", "mode.objective.distance.c=3"], "parts.distance.<name>.c=<value>"),
        (["mode=ict", "+mode.objective.pairs.grid.rho=3"], "parts.pairs.<name>.grid.rho=<value>"),
        (["callbacks.evaluation_ema.decays=[0.5]"], "parts.average.<name>.decays=<value>"),
        (["~mode.objective.distance", "+mode.objective.distance={_target_: consistency.distances.L1}"], "to be named by"),
        (["mode.rate=null"], "rate"),
    ],
)  # fmt: skip
def test_a_part_that_is_chosen_otherwise_is_one_message(given: list[str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        consistency.compose(given)

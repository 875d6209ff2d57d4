"""Every published run that our modes express composes to the published settings, column by column of published_runs.csv.

The table has the values as they stand in the paper or the released script named in `source`. A text that no rule of a column
reads is a failure.
"""

import csv
import math
import re
import shlex
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import recipes
import yaml
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from configurations import composed
from conftest import ROOT
from consistency.augmentation import EDMAugmentation
from consistency.averaging import power_exponent, relative_width
from consistency.training.build import expanded
from consistency.training.length import SCALED, shorten

with (Path(__file__).parent / "published_runs.csv").open() as file:
    RUNS = {row["run_id"]: row for row in csv.DictReader(file)}

RECIPES = {
    "cm_cifar10_edm_released", "cm_cifar10_cd_lpips", "cm_cifar10_ct_released", "ict_cifar10", "ect_cifar10_200k",
    "cm_cifar10_progdist", "cm_cifar10_continuous_cd_l2", "cm_cifar10_continuous_ct_l2", "cm_imagenet64_edm_released",
    "cm_imagenet64_cd_lpips_released", "cm_imagenet64_ct_released", "ict_imagenet64", "cm_lsun_bedroom_edm_released",
    "cm_lsun_bedroom_cd_lpips_released", "cm_lsun_bedroom_ct_released", "cm_lsun_cat_edm_released",
    "cm_lsun_cat_cd_lpips_released", "cm_lsun_cat_ct_released", "edm_ffhq64_vp", "edm_afhqv264_vp", "tcm_cifar10_stage2",
    "fastgen_sct_cifar10", "fastgen_scd_cifar10", "meanflow_cifar10_v1", "meanflow_imagenet256_b4", "edm2_imagenet512_s",
}  # fmt: skip
"""Runs that `mode=<mode> data=<data>` is; the others are experiments of their name."""

STEPS = {
    "not given": 610352,
    "not set": 1_000_000,
    "iteration=800,000 as bound": 800_000,
    "240 epochs": 1_200_960,
    "16,000 epochs": 800_000,
    "not printed": 400_000,
    "100k / 200k / 400k": 100_000,
}
OPENAI_SCALER = {"init_scale": 2**20, "growth_factor": 2**0.001, "growth_interval": 1}
DISTANCES = {
    "l2, denoising": "L2", "l1": "L1", "l2": "L2", "LPIPS": "max", "||.||^2 summed": "SquaredNorm", "l2 norm (c=0)": 0.0,
    "l2 norm of the tangent": "L2Tangent", "LPIPS (Hessian)": "Hessian", "pseudo-Huber 1e-8": 1e-8, "pseudo-Huber, c=0.00054": 0.00054,
    "pseudo-Huber c=1e-8": 1e-8, "pseudo-Huber 0.06": 0.06, "pseudo-Huber c=0.06": 0.06,
    "adaptive weighted l2 of the normalised tangent": "L2", "normalised tangent": "L2OverDimension",
    "squared error with adaptive weight, p=1, eps 0.01": (1.0, 0.01), "poly_1.0, const 1.0": (1.0, 1.0),
    "squared error with adaptive weight, p=0.75, eps 1e-3": (0.75, 1e-3), "poly_0.75, const 1e-3": (0.75, 1e-3),
}  # fmt: skip
WEIGHTINGS = {"karras": "karras", "1/t^2+1/sd^2": "karras", "uniform": "uniform", "truncated snr": "truncated_snr", "1/(t-r)": "inverse_gap", "1/c_out^2": "karras", "learned w(t)": "uniform", "learned + prior": "inverse_level"}  # fmt: skip
NETWORKS = {
    "NCSN++ 5": (128, 4, 16.0), "NCSN++, 4": (128, 4, 0.02), "NCSN++, 8": (128, 8, 0.02), "NCSN++ 6": (128, 4, 16.0),
    "DDPM++": (128, 4, None), "SongUNet, encoder standard": (128, 4, None), "ADM 296M": (192, 3, True), "ADM 526M": (256, 2, False), "ADM, 3": (192, 3, False), "ADM, 6": (192, 6, False),
    "EDM2-S": (192, 3, None), "EDM2-M": (256, 3, None), "EDM2-L": (320, 3, None), "EDM2-XL": (384, 3, None),
    "EDM2-XS": (128, 3, None), "EDM2-XXL": (448, 3, None), "SiT-B/4": (768, 12, 4), "SiT-B/2": (768, 12, 2), "SiT-XL/2": (1152, 28, 2),
    "DiT-B/2": (768, 12, 2), "DiT-XL/2": (1152, 28, 2),
}  # fmt: skip


def names_another_run(run: str) -> bool:
    """Whether its experiment is another run with the network of another size, say."""
    file = ROOT / "experiments" / f"{run}.yaml"
    defaults = yaml.safe_load(file.read_text()).get("defaults", []) if file.is_file() else []
    return any(name in RUNS for name in defaults if isinstance(name, str))


PARAMETERS = [
    pytest.param(run, marks=pytest.mark.slow) if names_another_run(run) else run for run in RUNS
]


def rule(table: dict[str, Any], text: str) -> Any:
    """The value of the longest key that the text begins with."""
    keys = [key for key in table if text.startswith(key)]
    assert keys, f"no rule reads {text!r}"
    return table[max(keys, key=len)]


def numbers(text: str) -> list[float]:
    return [float(n) for n in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", text)]


@cache
def configuration(run: str) -> DictConfig:
    """The configuration of the command of a published run."""
    row = RUNS[run]
    recipe = [f"mode={row['mode']}", f"data={row['data']}"]
    return expanded(composed("train", *(recipe if run in RECIPES else [f"experiment={run}"])))


@pytest.mark.parametrize("run", PARAMETERS)
def test_the_schedules_of_a_hundredth_are_those_of_the_whole_sampled(run: str) -> None:
    """N_small(k) = N(100 k), the rate likewise, and every decay d_small(k) = d(100 k)^100: the same share of the run."""
    whole = configuration(run)
    nodes = {name: OmegaConf.to_container(whole[name]) for name in SCALED}
    small: Any = OmegaConf.create(nodes | {"scale": 0.01})
    shorten(small)
    steps = small.trainer.max_steps
    assert steps == small.mode.total_steps == round(0.01 * whole.trainer.max_steps)
    drawn = sorted({k * steps // 17 for k in range(1, 18)})

    def part(config: DictConfig, key: str) -> Any:
        node: Any = OmegaConf.select(config, key)
        plain: Any = OmegaConf.to_container(node, resolve=True) if node else None
        return plain and partial(
            get_object(plain["_target_"]), **{n: v for n, v in plain.items() if n[0] != "_"}
        )

    def both(key: str) -> tuple[Any, Any]:
        return part(small, key), part(whole, key)

    few, many = both("mode.callbacks.scale_schedule.num_scales")
    if many is not None:
        assert [few(k) for k in drawn] == [many(100 * k) for k in drawn]
    few_mu, many_mu = both("mode.callbacks.target_ema.decay")
    if many_mu is not None:
        exact = [many_mu(many(100 * k)) ** 100 for k in drawn]
        assert [few_mu(few(k)) for k in drawn] == pytest.approx(exact)
    rate, whole_rate = both("callbacks.learning_rate.factor")
    exact = [whole_rate(100 * k) for k in drawn]
    assert [rate(k) for k in drawn] == pytest.approx(exact, abs=0.01)  # a ramp of whole steps
    ema, whole_ema = both("callbacks.evaluation_ema")
    if ema is not None:
        ema, whole_ema = ema(), whole_ema()
        ema.batch = whole_ema.batch = whole.data.batch_size
        every = (
            ema.every
        )  # an update comes after the last of so many steps, whose number is counted from 0
        # That of a power function, (1 - 1/k)^(gamma + 1), is the same share of a run but for (gamma + 1) / 2 k^2.
        power = max((power_exponent(width) + 1 for width in ema.widths.values()), default=0.0)
        for k in (every * (k // every or 1) - (every > 1) for k in drawn):
            decays = whole_ema.decays_at(100 * (k + (every > 1)) - (every > 1)).values()
            exact = [decay**100 for decay in decays]
            assert [*ema.decays_at(k).values()] == pytest.approx(exact, abs=1e-6 + power / k**2)
    for name, node in whole.callbacks.items():
        if node and "every_n_train_steps" in node:
            every = small.callbacks[name].every_n_train_steps
            assert every == node.every_n_train_steps / 100


@pytest.mark.parametrize("run", PARAMETERS)
def test_a_published_run_is_one_command(run: str) -> None:
    row = RUNS[run]
    config: Any = OmegaConf.to_container(configuration(run), resolve=True)
    mode, network, optimizer = config["mode"], config["model"]["network"], config["optimizer"]
    objective, trainer, callbacks = mode["objective"], config["trainer"], config["callbacks"]
    scales = mode["callbacks"].get("scale_schedule", {}).get("num_scales", {})
    assert mode["published"] == run
    assert config["data"]["batch_size"] == (
        1024 if row["batch"].startswith("not set") else int(row["batch"])
    )
    assert optimizer["lr"] == float(row["lr"])
    assert optimizer["_target_"].rpartition(".")[2] == row["optimizer"]
    given = [numbers(row["betas"]), float(row["eps"]), float(row["weight_decay"])]
    assert [optimizer["betas"], optimizer["eps"], optimizer["weight_decay"]] == given
    clip = None if row["grad_clip"].startswith("none") else float(row["grad_clip"])
    assert trainer["gradient_clip_val"] == clip
    steps = STEPS.get(row["steps"].partition(" (")[0]) or numbers(row["steps"].replace(",", ""))[0]
    assert trainer["max_steps"] == mode["total_steps"] == steps
    _same_network(row, config, network)
    _same_method(row, mode, objective, scales, config)
    if "pairs" in objective and row["mode"] != "meanflow":
        _same_range(run.partition("_")[0], row["mode"], objective["pairs"])
    _same_averages(row["ema_rates"], callbacks["evaluation_ema"], callbacks["samples"]["weights"])
    _same_rate(row["lr_schedule"], callbacks["learning_rate"]["factor"])
    _same_precision(row["precision"], trainer["precision"], config)
    _same_sampling(row["time_points"], mode)
    _same_start(row["init"], config)


def _same_network(row: dict[str, str], config: dict[str, Any], network: dict[str, Any]) -> None:
    width, blocks, kind = rule(NETWORKS, row["network"])
    if "patch_size" in network:
        assert network["patch_size"] == kind
        assert (network["hidden_size"], network["depth"]) == (width, blocks)
    else:
        assert (network["model_channels"], network["num_res_blocks"]) == (width, blocks)
    if "use_scale_shift_norm" in network:
        assert network["use_scale_shift_norm"] is kind
    elif network["_target_"].endswith("SongUNet"):
        assert network["fourier_scale"] == kind
        assert network["residual_input"] is (kind is not None)
    classes = {"no": None, "10 classes": 10, "1,000 classes": 1000}[row["conditional"]]
    assert config["data"]["num_classes"] == network["num_classes"] == classes
    assert network.get("dropout", 0.0) == numbers(row["dropout"])[0]
    small = re.search(r"(at |<=)16", row["dropout"])
    assert network.get("dropout_resolution") == (16 if small else None)
    piped = re.match(r"augment pipe p=([\d.]+)|EDM pipe", row["augmentation"])
    assert config["data"]["flip"] is row["augmentation"].startswith("horizontal flip")
    given = config["augmentation"] or {}
    p = (
        float(piped[1] or 0.12)
        if piped
        else 0.12
        if row["augmentation"].startswith("as EDM")
        else None
    )
    assert given.get("p") == p
    labels = 6 if "6 labels" in row["augmentation"] else 9
    if p is not None:
        arguments = {name: value for name, value in given.items() if name != "_target_"}
        assert network["augment_dim"] == EDMAugmentation(**arguments).num_labels == labels


def _same_method(row: dict[str, str], mode: Any, objective: Any, scales: Any, config: Any) -> None:
    distance = objective.get("distance") or objective["tangent"]
    kind = rule(DISTANCES, row["distance"])
    if isinstance(kind, float):
        assert distance["c"] == kind
    elif isinstance(kind, tuple):
        assert (distance["p"], distance["c"]) == kind
        _same_flow(row, mode, objective, config["model"]["network"])
        return
    elif kind == "max":
        pooled = "average_pooled_unit" if "verage" in row["distance"] else "max_pooled_signed"
        assert (distance["backbone"], distance["variant"]) == ("vgg16", pooled)
    elif kind == "Hessian":
        assert distance["distance"]["variant"] == "max_pooled_signed"
    else:
        assert distance["_target_"].endswith(f".{kind}")
    assert objective["weighting"]["_target_"].endswith(f".{rule(WEIGHTINGS, row['weighting'])}")
    if row["mode"] == "edm":
        head = objective.get("head") or {"_target_": "none"}
        assert head["_target_"].endswith("FourierWeighting") is ("learned" in row["weighting"])
    law = objective.get("pairs") or objective.get("times") or {"_target_": ""}
    law = law.get("times", law)
    if "df .01" in row["t_law"]:
        assert [law["df"], law["loc"], law["scale"]] == [0.01, 0.0, 0.2]
        boundary = [objective[n] for n in ("t_split", "boundary_share", "boundary_weight")]
        assert boundary == [1.0, 0.25, 0.1]
    elif row["t_law"].startswith(("lognormal", "discretised", "truncated", "ln(sd tan t)")):
        assert [law["p_mean"], law["p_std"]] == [
            float(n) for n in re.findall(r"-?\d\.\d", row["t_law"])[:2]
        ]
    else:
        assert row["t_law"].startswith("uniform")
        assert (
            law["_target_"].endswith(
                ("Uniform" + ("Times" if "t^(1/7)" in row["t_law"] else "Pairs"), "")
            )
            or not law["_target_"]
        )
    if "derivative" in objective:
        _same_tangent(row, mode, objective)
    _same_scales(row["n_scales"], scales, objective.get("pairs", {}), config["data"]["batch_size"])
    target, mu = mode["callbacks"].get("target_ema", {}).get("decay"), row["mu"]
    if mu.startswith("mu0"):
        printed = "printed" in mu or row["run_id"].endswith("ct_paper")
        assert target["_target_"].endswith("printed" if printed else "released")
        assert target["mu_0"] == numbers(mu.replace("mu0", ""))[0]
    elif "fixed" in mu or mu.startswith("0 (target"):
        assert target["mu"] == numbers(mu)[0]
    else:
        assert mu in ("-", "none", "stop-gradient", "1 within a stage", "0 (stop-gradient)", "0")
        assert target is None


def _same_scales(text: str, scales: Any, pairs: Any, batch: int) -> None:
    given = numbers(text.replace(",", ""))
    if "fixed" in text:
        assert scales["num_scales"] == given[0]
    elif "->" in text:
        name = "square_root" if "square-root" in text else "doubling"
        assert scales["_target_"].endswith(name)
        assert [scales["s_0"], scales["s_1"]] == given[:2]
    elif text.startswith(("goes on", "held")):  # at the limit of the first stage
        limit = float(re.search(r"ratio (?:<= )?(0\.\d+)", text)[1])  # type: ignore[index]
        assert 1 - 1 / scales["num_scales"] >= pairs["ratio_limit"] == limit
    elif limit := re.search(r"ratio <= (0\.\d+)", text):
        length, unit = re.search(r"([\d,]+)(k its| kimg)", text).groups()  # type: ignore[union-attr]
        steps = int(length.replace(",", "")) * 1000 // (batch if "img" in unit else 1)
        assert (scales["q"], scales["stage_steps"]) == (given[0], steps)
        assert pairs["ratio_limit"] == float(limit[1]) < 1 - scales["q"] ** -scales["stages"]
    elif text.startswith("q="):
        stages = re.search(r"\((\d+) stages\)", text)
        assert (scales["q"], scales["stages"]) == (given[0], int(stages[1]) if stages else 1)
        assert scales["stage_steps"] is None
    elif text.startswith("4096"):
        assert scales["s_0"] == 4096
    else:
        assert text in ("-", "continuous")
        assert not scales


RELEASED_RANGE = {
    "fastgen": {"r_min": 0.002, "least_gap": 1e-6, "t_lo": 0.002, "t_hi": 80.0},
    "tcm": {"r_min": 1e-6, "least_gap": 0.0, "t_lo": 0.002, "t_hi": 80.0},
    "ect": {"r_min": 0.0, "least_gap": 0.0},
}
"""Ends of the laws of times by family, as in the released codes."""


def _same_range(family: str, mode: str, pairs: Any) -> None:
    ends = RELEASED_RANGE.get(family, {}) | ({"t_lo": 1.0} if mode == "tcm" else {})
    found = pairs | pairs.get("times", {})
    assert {name: found.get(name) for name in ends} == ends
    assert "t_lo" in ends or "t_lo" not in found


def _same_tangent(row: dict[str, str], mode: Any, objective: Any) -> None:
    """The parts of sCT and sCD: as in the paper, or as in FastGen, which has a root mean square, other dropout and ends of t."""
    released = row["run_id"].startswith("fastgen")
    assert objective["derivative"]["_target_"].endswith("ForwardDerivative")
    assert objective["normalisation"]["c"] == 0.1
    assert objective["normalisation"]["per_root_dimension"] is released
    assert objective["shared_dropout"] is not released
    assert objective["head"]["_target_"].endswith("LearnedWeighting")
    assert mode["callbacks"]["warm_up"]["num_scales"]["ramp_steps"] == 10_000
    ends = [objective["times"].get(end) for end in ("t_lo", "t_hi")]
    last = 800.0 if "up to 800" in row["t_law"] else 80.0
    assert ends == ([0.002, last] if released else [None, None])


def _same_flow(row: dict[str, str], mode: Any, objective: Any, network: Any) -> None:
    """The times, the second time and the guidance of MeanFlow."""
    pairs, latents = objective["pairs"], "imagenet256" in row["run_id"]
    law = [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", row["t_law"].partition(";")[0])[:4]]
    assert [pairs[n] for n in ("mean_t", "std_t", "mean_r", "std_r")] == law
    share = re.search(r"75% have r = t|ratio \.25", row["t_law"])
    assert share or re.search(r"r!=t in 75%|ratio \.75", row["t_law"])
    fastgen = row["run_id"].startswith("fastgen")
    kinds = {"meanflow_cifar10_v0": "LogitNormalPairs", "meanflow_cifar10_v1": "CappedPairs"}
    kind = "CountedPairs" if fastgen else "FirstPairs"
    assert pairs["_target_"].endswith(kinds.get(row["run_id"], kind))
    assert (pairs["equal"], pairs["t_max"]) == (0.75 if share else 0.25, 0.999 if fastgen else 1.0)
    assert network["second_time"] == ("end" if fastgen and not latents else "gap")
    assert (row["weighting"][0], row["n_scales"]) == ("-", "-")
    assert mode["derivative"] == "flow_forward"
    guided = re.search(
        r"w (\S+), k (\S+) in \[(\S+),(\S+)\], labels dropped (\S+)", row["weighting"]
    )
    given = [float(n) for n in guided.groups()] if guided else [None] * 4 + [0.0]
    node = objective["guidance"] or {}
    found = [node.get(n) for n in ("w", "k", "t_start", "t_end")] + [objective["label_dropout"]]
    assert found == given


def _same_averages(text: str, ema: Any, weights: str) -> None:
    if "none" in text:
        assert (ema, weights) == (None, "online")
    elif text.startswith("power"):
        given = numbers(text.partition(" (")[0])
        widths = [relative_width(g) for g in given] if "gamma" in text else given
        assert widths == pytest.approx(ema["widths"], rel=1e-3)
    elif text.startswith("half-life"):
        assert (ema["half_lives"], ema["ramp_up"]) == ([numbers(text)[0] * 1e6], 0.05)
    else:
        assert ema["decays"] == numbers(text.partition(" ")[0])
        published = (16, True) if "every 16 updates, in float64" in text else (1, False)
        assert (ema.get("every", 1), ema.get("in_double", False)) == published


def _same_rate(text: str, factor: Any) -> None:
    ramp = re.search(r"([\d,]+) its", text.replace("200 epochs", "9765 its"))
    if text.startswith("1/sqrt"):
        assert factor["_target_"].endswith("inverse_root_rate")
        ref = re.search(r"(?:ref |k/)(\d+)", text)
        rise = int(ramp[1].replace(",", "")) if ramp and "rise" in text else 0
        assert [factor["ref_steps"], factor["ramp_steps"]] == [int(ref[1]), rise]  # type: ignore[index]
    elif ramp:
        assert factor["_target_"].endswith("rising_rate")
        assert factor["ramp_steps"] == int(ramp[1].replace(",", ""))
        start = 1e-8 / 6e-4 if factor["ramp_steps"] == 9765 else 0
        assert factor["start"] == pytest.approx(start)
    else:
        name = {"constant": "constant_rate", "linear to 0 within every stage": "falling_in_stages"}
        assert factor["_target_"].endswith(name[text])


def _same_precision(text: str, precision: str, config: Any) -> None:
    half = {"fp16": "16-mixed", "mixed fp16": "16-mixed", "bf16": "bf16-mixed"}
    assert precision == rule({"fp32": "32-true"} | half, text)
    assert config["float32_matmul"] == ("highest" if "tf32 off" in text else "high")
    if "2^20" in text:
        assert config["scaler"] == pytest.approx(OPENAI_SCALER)
    elif static := re.search(r"static loss scale (\d+)", text):
        scaler = config["scaler"]
        assert (scaler["init_scale"], scaler["growth_interval"]) == (int(static[1]), 2**31 - 1)
    elif "scaler 16" in text:
        assert config["scaler"] == {"init_scale": 16, "growth_interval": 20_000}
    else:
        assert config["scaler"] is None


def _same_sampling(text: str, mode: Any) -> None:
    if re.match(r"Heun|256", text):
        sampler, given = mode["samplers"]["heun"], numbers(text)
        assert sampler["steps"] == given[0]
        churned = [sampler[n] for n in ("s_churn", "s_tmin", "s_tmax", "s_noise")]
        assert churned == (given[1:5] if "S_churn" in text else [0.0, 0.0, float("inf"), 1.0])
    elif "mid t=" in text:
        angle = numbers(text.partition("t=")[2])[0]
        assert mode["process"]["times"] == [80.0, pytest.approx(0.5 * math.tan(angle), abs=1e-5)]
    elif text.startswith("80, ") and "None" not in text:
        assert mode["process"]["times"] == numbers(text)[:2]
    else:
        assert text in (
            "-",
            "80",
            "not published",
            "t 1 -> 0",
            "N steps",
            "80, None (ts not published)",
        )


def _same_start(text: str, config: Any) -> None:
    init = config["init"]
    if text.startswith("stage-1"):  # the run given as teacher=
        assert init is config["teacher"] is None
        assert config["mode"]["objective"]["first_stage"]["path"] is None
    elif text == "random":
        assert init is None
    elif text == "TrigFlow teacher":  # here EDM2 of the same size
        size = config["mode"]["published"].rpartition("_")[2]
        assert init.startswith(f"edm2:edm2-img64-{size}-")
    elif text.startswith(("edm-cifar10", "TrigFlow teacher", "teacher")) and "(EDM)" not in text:
        assert init == "edm:edm-cifar10-32x32-uncond-vp"
    elif text.startswith(("edm-", "edm2-")):
        file = text.partition(" ")[0].removesuffix(".pkl")
        assert init == f"{file.partition('-')[0]}:{file}"
    else:
        assert "EDM" in text
        assert re.match(r"(jcm|openai):edm_", init)


def test_every_experiment_and_recipe_of_a_published_run_is_in_the_table() -> None:
    ours = {
        "cifar10_ect_1hour",
        "ct_cauchy",
        "ct_clean_pairs",
        "fashion_mnist_laptop",
        "lsun_bedroom_cd",
        "lsun_bedroom_ct",
    }
    experiments = {file.stem for file in (ROOT / "experiments").glob("*.yaml")} - ours
    assert experiments == RUNS.keys() - RECIPES
    small = ("digits", "fashion_mnist", "mnist")
    recipes = [p.stem for p in (ROOT / "conf" / "recipe").glob("*.yaml")]
    named = {f"{RUNS[run]['data']}_{RUNS[run]['mode']}" for run in RECIPES}
    assert {name for name in recipes if not name.startswith(small)} == named


def test_the_page_has_the_tables_of_the_files() -> None:
    """And a row for each published run."""
    page = recipes.PAGE.read_text()
    assert page == recipes.page(), "run python tests/tools/recipes.py"
    assert sorted(re.findall(r"^\| (\w+) \| \w+ \| \w+ \| `", page, re.MULTILINE)) == sorted(RUNS)


@pytest.mark.slow
def test_every_command_of_the_page_composes() -> None:
    """No option is unknown to the verb, sampler or data set."""
    blocks = re.findall(r"^```\n(.*?)^```", recipes.PAGE.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("python ")]
    assert len(commands) > 15
    for _, script, *options in commands:
        composed(Path(script).stem, *options)


@pytest.mark.slow
def test_the_run_of_an_hour_has_two_names() -> None:
    one, other = (f"experiment={name}" for name in ("ect_cifar10_1hour", "cifar10_ect_1hour"))
    assert composed("train", one) == composed("train", other)

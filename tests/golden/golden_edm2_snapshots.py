"""Comparisons with EDM2's own pickles: the networks that our reader opens give the numbers of those that EDM2 unpickled.

Weights are stored in half precision and used in float32, `*_fp32_params`.
"""

from typing import Any

import torch
from torch import Tensor

import consistency
from consistency.checkpoints import nvlabs
from consistency.checkpoints.pickle_reader import read_pickle
from consistency.tensors import NO_CLASS
from consistency.weightings import FourierWeighting
from golden_harness import Archive, Tolerance, read_json

# Section 4 of the golden README, row "snapshots", and float64 throughout.
OUTPUT, DOUBLE, DIGEST = Tolerance(of_norm=1e-6), Tolerance(of_norm=1e-9), Tolerance(of_norm=1e-9)


def compare_snapshots(archive: Archive) -> None:
    """The state, the card, the learned weighting and the outputs of each file of the JSON."""
    for name, entry in read_json(archive.path.with_suffix(".json")).items():
        path = archive.path.parent / entry["file"]
        content = read_pickle(path)
        assert [*content] == entry["keys"]
        assert content["encoder"].kind == entry["encoder"]
        assert content["loss_fn"].state.items() >= entry["loss"].items()
        assert content["dataset_kwargs"].items() >= entry["dataset_kwargs"].items()
        stored = nvlabs.tensors_below(content["ema"])
        assert set(stored) == set(entry["state"])
        digests = torch.stack([digest(stored[key]) for key in entry["state"]])
        archive.compare(f"{name}.state_digest", digests, DIGEST)
        model = consistency.load(path)
        assert (model.card.role, model.format) == ("teacher", "NVlabs EDM2")
        assert (model.card.latents is not None) is (entry["encoder"] == "StabilityVAEEncoder")
        _same_settings(entry["init_kwargs"], model)
        weighting = FourierWeighting(
            preconditioning=model.denoiser.preconditioning,
            width=len(stored["logvar_fourier.freqs"]),
        )
        kept = {k.removeprefix("logvar_"): v for k, v in stored.items() if k.startswith("logvar_")}
        weighting.load_state_dict(kept)
        logvar = weighting.log_variance(archive.tensor(f"{name}.sigma"))
        archive.compare(f"{name}.logvar_fp32_params", logvar[:, None, None, None], OUTPUT)
        compare_outputs(archive, name, model)


def digest(value: Tensor) -> Tensor:
    """Section 2 of the golden README."""
    flat = value.double().flatten()
    return torch.stack([flat.norm(), flat @ (0.7 * torch.arange(len(flat)).double() + 0.3).cos()])


def _same_settings(given: dict[str, Any], model: consistency.Model) -> None:
    side = given["img_resolution"]
    assert model.card.shape == (given["img_channels"], side, side)
    assert model.card.num_classes == (given["label_dim"] or None)
    sigma_data = given.get("sigma_data", 0.5)
    assert model.card.process.sigma_data == sigma_data
    scalings = {"_target_": "consistency.preconditioning.EDM", "c_noise_scale": 0.25}
    assert model.card.preconditioning == scalings | {"sigma_data": sigma_data}


def compare_outputs(archive: Archive, name: str, model: consistency.Model) -> None:
    """D with the labels of the file; a row of zeros is no class, and so are no rows."""
    x, sigma = archive.tensor(f"{name}.x"), archive.tensor(f"{name}.sigma")
    label = None
    if f"{name}.labels" in archive:
        rows = archive.tensor(f"{name}.labels")
        label = torch.where(rows.any(1), rows.argmax(1), NO_CLASS)
    with torch.no_grad():
        archive.compare(f"{name}.D_fp32_params", model.denoise(x, sigma, label), OUTPUT)
        model.denoiser.double()
        if f"{name}.D_fp32_params.f64" in archive:
            ours = model.denoise(x.double(), sigma.double(), label)
            archive.compare(f"{name}.D_fp32_params.f64", ours, DOUBLE)

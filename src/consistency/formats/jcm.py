"""openai/consistency_models_cifar10: the training state of the JAX code, written by flax, read without JAX.

The network is NCSN++, under the names of `SongUNet` here, with c_noise = 0.25 ln t. Convolutions are stored
(h, w, in, out), linear maps (in, out), and queries, keys and values apart. The file does not say whether it is a
denoiser or a consistency model, nor which feature maps have attention where all have the same width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from consistency.formats.opened import NVLABS, ContentError, Hints, Opened, describe, process
from consistency.networks.song import SongUNet
from consistency.networks.unet import UNetBlock, fir_filter

FORMAT = "JAX (flax)"
PARAMETERS = {"ema": "params_ema", "online": "params", "target": "target_params"}
TAPS = [1, 3, 3, 1]
SIZE = 32
"""Side of the images of every released file."""


def is_jcm(content: object) -> bool:
    """Whether a file's content is a training state of the JAX code."""
    return isinstance(content, dict) and isinstance(content.get("params_ema"), dict)


def open_state(state: dict[str, Any], weights: str, hints: Hints) -> Opened:
    """The network of a training state: its online, target or averaged (`ema`) parameters."""
    params = flattened(state[PARAMETERS[weights]])
    network, notes = settings(params, hints)
    with torch.device("meta"):
        arguments = {key: value for key, value in network.items() if key != "_target_"}
        shape = SongUNet(**arguments)
    noise = process(second_time=0.58535)
    card = describe(
        role=None, network=network, process=noise, c_noise_scale=NVLABS, num_classes=None
    )
    moved = song_weights(params, shape)
    return Opened(format=FORMAT, weights=moved, card=card, notes=notes)


def flattened(tree: object, prefix: str = "", depth: int = 0) -> dict[str, Tensor]:
    """The arrays of a nested dictionary by their dotted names."""
    if isinstance(tree, Tensor):
        return {prefix.removesuffix("."): tree}
    if not isinstance(tree, dict) or depth > 4:
        raise ContentError("parameters that are no arrays")
    found: dict[str, Tensor] = {}
    for name, branch in tree.items():
        found |= flattened(branch, f"{prefix}{name}.", depth + 1)
    return found


def settings(params: dict[str, Tensor], hints: Hints) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The arguments of `SongUNet` for these parameters, and what had to be assumed."""
    if not {"GaussianFourierProjection_0.W", "Downsample_0.Conv2d_0.weight"} <= params.keys():
        raise ContentError("parameters of a JAX network other than the released NCSN++")
    levels = 1 + _count(params, "Downsample_")
    blocks = _count(params, "ResnetBlockBigGANpp_")
    each, rest = divmod(blocks - 3 * levels, 2 * levels)
    if rest or each < 1:
        raise ContentError("parameters of a JAX network other than the released NCSN++")
    width = params["Conv_0.kernel"].shape[3]
    firsts = (f"ResnetBlockBigGANpp_{k * (each + 1)}" for k in range(levels))
    tops = [params[f"{name}.Conv_0.kernel"].shape[3] for name in firsts]
    size = hints.image_size or SIZE
    sides, notes = attention_sides(params, size, tops, each, hints)
    network = {
        "_target_": "consistency.networks.song.SongUNet",
        "image_size": size,
        "in_channels": params["Conv_0.kernel"].shape[2],
        "out_channels": params["Conv_1.kernel"].shape[3],
        "model_channels": width,
        "num_res_blocks": each,
        "attention_resolutions": sides,
        "channel_mult": [top // width for top in tops],
        "num_classes": None,
        "augment_dim": 0,
        "dropout": 0.0,
        "fourier_scale": 16.0,
        "residual_input": True,
        "skip_output": False,
        "channel_mult_noise": 2,
        "channel_mult_emb": 4,
        "resample_filter": TAPS,
    }
    if hints.image_size is None and (width, tops) != (128, [256, 256, 256]):
        notes.append(
            f"assumes images of {size} x {size} (the file does not say; image_size= sets it)"
        )
    return network, tuple(notes)


def attention_sides(
    params: dict[str, Tensor], size: int, tops: list[int], each: int, hints: Hints
) -> tuple[list[int], list[str]]:
    """Sides of the feature maps with attention: of the widths that fit, the second level, as in the released files."""
    if hints.attention_resolutions is not None:
        return list(hints.attention_resolutions), []
    number, rest = divmod(_count(params, "AttnBlockpp_") - 1, each + 1)
    if rest or number > len(tops):
        raise ContentError("parameters of a JAX network other than the released NCSN++")
    found: list[int] = []
    notes: list[str] = []
    for n in range(number):
        wanted = params[f"AttnBlockpp_{n * each}.NIN_0.W"].shape[1]
        first = 1 + max(found, default=-1)
        fitting = [k for k in range(first, len(tops)) if tops[k] == wanted]
        if not fitting:
            raise ContentError("parameters of a JAX network other than the released NCSN++")
        found.append(1 if 1 in fitting else fitting[0])
        if len(fitting) > 1 and (size, tops) != (SIZE, [256, 256, 256]):
            notes.append(
                f"assumes attention at {size >> found[-1]} x {size >> found[-1]} (the file does not say; "
                "attention_resolutions= sets it)"
            )
    return [size >> k for k in found], notes


def _count(params: dict[str, Tensor], prefix: str) -> int:
    """How many modules there are whose name begins so and ends with a number."""
    return len({name.split(".")[0] for name in params if name.startswith(prefix)})


def song_weights(params: dict[str, Tensor], network: SongUNet) -> dict[str, Tensor]:
    """Parameters of the JAX NCSN++ under the names of `SongUNet`, whose blocks stand in their order."""
    rest, ours = dict(params), {"map_noise.freqs": params["GaussianFourierProjection_0.W"]}
    del rest["GaussianFourierProjection_0.W"]

    def move(theirs: str, name: str, weight: str = "kernel") -> None:
        value = rest.pop(f"{theirs}.{weight}")
        if value.ndim > 1:
            value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T
        ours[f"{name}.weight"], ours[f"{name}.bias"] = value, rest.pop(f"{theirs}.bias")

    side = f"{network.sides[0]}x{network.sides[0]}"
    move("Dense_0", "map_layer0")
    move("Dense_1", "map_layer1")
    move("Conv_0", f"enc.{side}_conv")
    move("GroupNorm_0", f"dec.{side}_aux_norm", "scale")
    move("Conv_1", f"dec.{side}_aux_conv")
    for i, lower in enumerate(network.sides[1:]):
        move(f"Downsample_{i}.Conv2d_0", f"enc.{lower}x{lower}_aux_residual", "weight")
    blocks = [(n, m) for n, m in network.named_modules() if isinstance(m, UNetBlock)]
    for i, (name, block) in enumerate(blocks):
        theirs = f"ResnetBlockBigGANpp_{i}"
        move(f"{theirs}.GroupNorm_0", f"{name}.norm0", "scale")
        move(f"{theirs}.Conv_0", f"{name}.conv0")
        move(f"{theirs}.Dense_0", f"{name}.affine")
        move(f"{theirs}.GroupNorm_1", f"{name}.norm1", "scale")
        move(f"{theirs}.Conv_1", f"{name}.conv1")
        if not isinstance(block.skip, nn.Identity):
            move(f"{theirs}.Conv_2", f"{name}.skip")
    for i, name in enumerate(name for name, block in blocks if block.heads):
        theirs = f"AttnBlockpp_{i}"
        move(f"{theirs}.GroupNorm_0", f"{name}.norm2", "scale")
        weight = [rest.pop(f"{theirs}.NIN_{j}.W").T[:, :, None, None] for j in range(4)]
        bias = [rest.pop(f"{theirs}.NIN_{j}.b") for j in range(4)]
        for kind, (*qkv, proj) in (("weight", weight), ("bias", bias)):
            ours[f"{name}.qkv.{kind}"] = torch.stack(qkv, dim=1).flatten(0, 1)
            ours[f"{name}.proj.{kind}"] = proj
    if rest:
        raise ContentError(f"parameters without a place in NCSN++, such as {min(rest)[:80]}")
    constants = (name for name in network.state_dict() if name.endswith("resample_filter"))
    return ours | {name: fir_filter(TAPS) for name in constants}

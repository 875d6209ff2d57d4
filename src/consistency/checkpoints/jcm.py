"""openai/consistency_models_cifar10: the training state of the JAX code, written by flax, read without JAX and flax.

The network is NCSN++, our `SongUNet`, with c_noise = 0.25 ln t. Convolutions are stored (h, w, in, out), linear maps
(in, out), and q, k and v apart. The file does not record its role, nor the levels with attention if all are equally wide.

The file is MessagePack: maps, lists, plain values, and arrays in the extension of `flax.serialization`. `msgpack` holds every
length against that of the file before it takes memory.
"""

import math
import mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consistency.checkpoints import contents
from consistency.checkpoints.contents import ContentError, Hints, StateDict, assumes, check
from consistency.networks.song import SongUNet
from consistency.networks.unet import UNetBlock, fir_filter

DTYPES: dict[bytes, torch.dtype] = {
    name.encode(): getattr(torch, name)
    for name in "float32 float64 float16 bfloat16 int8 int16 int32 int64 uint8 uint32 bool".split()
}

FORMAT = "JAX (flax)"
PARAMETERS = {"ema": "params_ema", "online": "params", "target": "target_params"}
OTHER = "parameters of a JAX network other than the released NCSN++"
SIZE, TOPS = 32, [256, 256, 256]  # of the images and of the levels of every released file

TAPS = [1, 3, 3, 1]
NCSNPP = {
    "_target_": "consistency.networks.song.SongUNet",
    **{"num_classes": None, "augment_dim": 0, "dropout": 0.0, "fourier_scale": 16.0},
    **{"residual_input": True, "skip_output": False, "channel_mult_noise": 2},
    **{"channel_mult_emb": 4, "resample_filter": TAPS},
}
"""Arguments of `SongUNet` that every such network has."""

WEIGHTS = ("kernel", "scale", "weight")
BLOCK = {
    **{"norm0": "GroupNorm_0", "conv0": "Conv_0", "affine": "Dense_0"},
    **{"norm1": "GroupNorm_1", "conv1": "Conv_1", "skip": "Conv_2"},
}
"""Names in the JAX code of the weight of a layer, and of the layers of our residual blocks."""


def open_content(content: Any, path: Path, hints: Hints) -> contents.Checkpoint | None:
    """Return the averaged (`ema`), online and target parameters of a training state; None for any other content."""
    average = content.get("params_ema") if isinstance(content, dict) else None
    if not isinstance(average, dict) or any(isinstance(v, Tensor) for v in average.values()):
        return None  # other programs keep flat state dicts under this key
    trees = {name: content[key] for name, key in PARAMETERS.items() if key in content}
    network, notes = settings(flattened(trees["ema"]), hints)
    card = contents.card_of(network, contents.C_NOISE_NVLABS, second_time=0.58535)
    with torch.device("meta"):
        song = SongUNet(**{key: value for key, value in network.items() if key != "_target_"})

    def read(tree: Any) -> StateDict:
        return song_weights(flattened(tree), song)

    return contents.Checkpoint(
        path=path, format=FORMAT, card=card, sets=trees, read=read, notes=notes
    )


def flattened(tree: Any, prefix: str = "", depth: int = 0) -> dict[str, Tensor]:
    """Return the arrays of a nested dictionary by their dotted names."""
    if isinstance(tree, Tensor):
        return {prefix.removesuffix("."): tree}
    check(isinstance(tree, dict) and depth <= 4, "parameters that are no arrays")
    flat: dict[str, Tensor] = {}
    for name, branch in tree.items():
        flat |= flattened(branch, f"{prefix}{name}.", depth + 1)
    return flat


def settings(params: StateDict, hints: Hints) -> tuple[dict[str, Any], list[str]]:
    """Return the arguments of `SongUNet` for these parameters, and the assumptions made."""
    check({"GaussianFourierProjection_0.W", "Downsample_0.Conv2d_0.weight"} <= params.keys(), OTHER)
    levels = 1 + _count(params, "Downsample_")
    blocks = _count(params, "ResnetBlockBigGANpp_")
    each, rest = divmod(blocks - 3 * levels, 2 * levels)
    check(not rest and each >= 1, OTHER)
    width = params["Conv_0.kernel"].shape[3]
    firsts = (f"ResnetBlockBigGANpp_{k * (each + 1)}" for k in range(levels))
    tops = [params[f"{name}.Conv_0.kernel"].shape[3] for name in firsts]
    size = hints.image_size or SIZE
    notes: list[str] = []
    sides = list(hints.attention_resolutions or ())
    if hints.attention_resolutions is None:
        sides, notes = attention_sides(params, size, tops, each)
    if hints.image_size is None and (width, tops) != (128, TOPS):
        notes.append(assumes(f"images of {size} x {size}", "image_size="))
    network = {
        **{"image_size": size, "model_channels": width, "num_res_blocks": each},
        "in_channels": params["Conv_0.kernel"].shape[2],
        "out_channels": params["Conv_1.kernel"].shape[3],
        "attention_resolutions": sides,
        "channel_mult": [top // width for top in tops],
    }
    return NCSNPP | network, notes


def attention_sides(
    params: StateDict, size: int, tops: list[int], each: int
) -> tuple[list[int], list[str]]:
    """Return the sides of the feature maps with attention: of the levels that fit, the second, as in released files."""
    number, rest = divmod(_count(params, "AttnBlockpp_") - 1, each + 1)
    check(not rest and number <= len(tops), OTHER)
    levels: list[int] = []
    notes: list[str] = []
    for n in range(number):
        width = params[f"AttnBlockpp_{n * each}.NIN_0.W"].shape[1]
        fitting = [k for k in range(1 + max(levels, default=-1), len(tops)) if tops[k] == width]
        check(fitting, OTHER)
        levels.append(1 if 1 in fitting else fitting[0])
        side = size >> levels[-1]
        if len(fitting) > 1 and (size, tops) != (SIZE, TOPS):
            notes.append(assumes(f"attention at {side} x {side}", "attention_resolutions="))
    return [size >> k for k in levels], notes


def _count(params: StateDict, prefix: str) -> int:
    return len({name.split(".")[0] for name in params if name.startswith(prefix)})


def song_weights(params: StateDict, network: SongUNet) -> StateDict:
    """Return the parameters of the JAX NCSN++ under the names of `SongUNet`, whose blocks have the same order."""
    rest, own = dict(params), network.state_dict()
    blocks = {n: m for n, m in network.named_modules() if isinstance(m, UNetBlock)}
    attentions = [name for name, block in blocks.items() if block.heads]
    side, *lower = (f"{side}x{side}" for side in network.sides)
    names = {"map_layer0": "Dense_0", "map_layer1": "Dense_1", f"enc.{side}_conv": "Conv_0"}
    names |= {f"dec.{side}_aux_norm": "GroupNorm_0", f"dec.{side}_aux_conv": "Conv_1"}
    names |= {f"enc.{n}_aux_residual": f"Downsample_{i}.Conv2d_0" for i, n in enumerate(lower)}
    for i, name in enumerate(blocks):
        for our, their in BLOCK.items():
            names[f"{name}.{our}"] = f"ResnetBlockBigGANpp_{i}.{their}"
    names |= {f"{name}.norm2": f"AttnBlockpp_{i}.GroupNorm_0" for i, name in enumerate(attentions)}
    ours = {"map_noise.freqs": rest.pop("GaussianFourierProjection_0.W")}
    for name, theirs in names.items():
        if f"{name}.weight" not in own:  # a block without a projection of its input
            continue
        kind = next((kind for kind in WEIGHTS if f"{theirs}.{kind}" in rest), WEIGHTS[0])
        value = rest.pop(f"{theirs}.{kind}")
        if value.ndim > 1:
            value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T
        ours[f"{name}.weight"], ours[f"{name}.bias"] = value, rest.pop(f"{theirs}.bias")
    for i, name in enumerate(attentions):
        weights = [rest.pop(f"AttnBlockpp_{i}.NIN_{j}.W").T[:, :, None, None] for j in range(4)]
        biases = [rest.pop(f"AttnBlockpp_{i}.NIN_{j}.b") for j in range(4)]
        for kind, (*qkv, proj) in (("weight", weights), ("bias", biases)):
            ours[f"{name}.qkv.{kind}"] = torch.stack(qkv, dim=1).flatten(0, 1)
            ours[f"{name}.proj.{kind}"] = proj
    check(not rest, f"{OTHER}, such as {min(rest, default='')[:80]}")
    filters = (name for name in own if name.endswith("resample_filter"))
    return ours | {name: fir_filter(TAPS) for name in filters}


def read_messagepack(path: Path) -> Any:
    """Return the one value that a file consists of."""
    import msgpack  # needed for this format alone

    hooks = {"object_pairs_hook": _mapping, "ext_hook": _array, "strict_map_key": False}
    most = dict.fromkeys(("max_array_len", "max_map_len"), 100_000)  # more than any checkpoint has
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            return msgpack.unpackb(content, **hooks, **most)
        except ContentError:
            raise
        except ValueError as error:
            reason = f"{type(error).__name__} {error}".strip()
            fault = "ends early or late, or holds more values, or deeper ones, than any checkpoint"
            raise ContentError(f"a MessagePack file that {fault} ({reason[:120]})") from error


def _mapping(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    named = all(isinstance(key, str) for key, _ in pairs) and len(dict(pairs)) == len(pairs)
    check(named, "a map whose keys are not different names")
    return dict(pairs)


def _array(kind: int, content: bytes) -> Tensor:
    """Return an array (kind 1) or a scalar (3) of flax: (shape, name of its type, bytes), itself in MessagePack."""
    import msgpack

    check(kind in (1, 3), "a value that is no array")
    shape, name, values = msgpack.unpackb(content, raw=True)
    sides = shape if isinstance(shape, list) and len(shape) <= 8 else [None]
    possible = all(isinstance(n, int) and 0 <= n < 2**40 for n in sides)
    check(possible, "an array with an impossible shape")
    check(name in DTYPES, "an array of an unknown type")
    dtype = DTYPES[name]
    size = math.prod(shape) * dtype.itemsize
    check(len(values) == size, "an array of another size than its shape")
    if not size:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(values), dtype=dtype).reshape(shape)

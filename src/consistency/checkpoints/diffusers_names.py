"""The names of a `UNet2DModel` of diffusers and of our `ADM`, which are one network under these settings.

q, k and v are three linear maps in diffusers, in that order the thirds of our qkv.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from consistency.checkpoints.contents import ContentError, StateDict

FORMAT = "diffusers"
PIPELINE, UNET = "ConsistencyModelPipeline", "UNet2DModel"
SCHEDULER, SCHEDULER_FILE = "CMStochasticIterativeScheduler", "scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model"
"""Beginning of the names of files of weights."""

TIME_EMBEDDING = "time_embedding.safetensors"
"""The original layers of a rewritten time embedding, see `timetable`."""

FIXED: dict[str, Any] = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "add_attention": True,
    "class_embed_type": None,
}
"""Settings of `UNet2DModel` with one value in an ADM, which is also their default."""

RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ATTENTION = {"norm": "group_norm", "proj_out": "to_out.0", "qkv": "to_qkv"}


def block_type(way: str, attention: bool, in_blocks: bool) -> str:
    """Return the class of a block; way: Down or Up; in_blocks: whether residual blocks change the resolution."""
    if attention:
        return f"Attn{way}Block2D"
    return f"Resnet{way}sampleBlock2D" if in_blocks else f"{way}Block2D"


def our_weights(network: dict[str, Any], theirs: StateDict) -> StateDict:
    """Return the weights of a `UNet2DModel` under the names of `ADM`. Linear maps of attention become 1x1."""
    rest, ours = dict(theirs), {}
    for name, sources in parameters(network):
        missing = [source for source in sources if source not in rest]
        if missing:
            raise ContentError(f"a {UNET} without {missing[0]}")
        value = torch.cat([rest.pop(source) for source in sources])
        linear = ".attentions." in sources[0] and value.ndim == 2
        ours[name] = value[:, :, None, None] if linear else value
    if rest:
        raise ContentError(f"weights without a counterpart in {UNET}, such as {min(rest)[:80]}")
    return ours


def their_weights(network: dict[str, Any], ours: StateDict) -> dict[str, Tensor]:
    """Return the inverse of `our_weights`."""
    theirs: dict[str, Tensor] = {}
    for name, targets in parameters(network):
        value = ours[name]
        flat = value[:, :, 0, 0] if ".attentions." in targets[0] and value.ndim == 4 else value
        theirs |= dict(zip(targets, flat.chunk(len(targets)), strict=True))
    return theirs


def parameters(network: dict[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield our name of each parameter, and its name in diffusers or, for qkv, its three names."""
    for ours, theirs, kind in modules(network):
        names = {"residual": RESIDUAL, "attention": ATTENTION}.get(kind, {"": ""})
        for old, new in names.items():
            if old == "skip_connection" and not ours.endswith("*"):
                continue
            a, b = f"{ours.removesuffix('*')}.{old}".strip("."), f"{theirs}.{new}".strip(".")
            for part in ("weight",) if kind == "embedding" else ("weight", "bias"):
                three = tuple(b.replace("to_qkv", f"to_{letter}") for letter in "qkv")
                yield f"{a}.{part}", tuple(f"{n}.{part}" for n in dict.fromkeys(three))


def modules(network: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield our name, diffusers' name and the kind of every module.

    Our name of a residual block with a projection ends in `*`.
    """
    sides = [network["image_size"] >> k for k in range(len(network["channel_mult"]))]
    attention = [side in network["attention_resolutions"] for side in sides]
    widths = [int(mult * network["model_channels"]) for mult in network["channel_mult"]]
    blocks, last, in_blocks = network["num_res_blocks"], len(widths) - 1, network["resblock_updown"]
    change = ("", "", "residual") if in_blocks else (".op", ".conv", "plain")

    def residual(ours: str, theirs: str, channels: int, out: int) -> tuple[str, str, str]:
        return ours + ("*" if channels != out else ""), theirs, "residual"

    yield "time_embed.0", "time_embedding.linear_1", "plain"
    yield "time_embed.2", "time_embedding.linear_2", "plain"
    if network.get("num_classes") is not None:
        yield "label_emb", "class_embedding", "embedding"
    yield "input_blocks.0.0", "conv_in", "plain"
    index, width, skips = 1, widths[0], [widths[0]]
    for level, out in enumerate(widths):
        block = f"down_blocks.{level}"
        for i in range(blocks):
            yield residual(f"input_blocks.{index}.0", f"{block}.resnets.{i}", width, out)
            if attention[level]:
                yield f"input_blocks.{index}.1", f"{block}.attentions.{i}", "attention"
            index, width = index + 1, out
            skips.append(out)
        if level < last:
            ours, theirs, kind = change
            yield f"input_blocks.{index}.0{ours}", f"{block}.downsamplers.0{theirs}", kind
            index += 1
            skips.append(out)
    yield "middle_block.0", "mid_block.resnets.0", "residual"
    yield "middle_block.1", "mid_block.attentions.0", "attention"
    yield "middle_block.2", "mid_block.resnets.1", "residual"
    for index in range((last + 1) * (blocks + 1)):
        level, i = last - index // (blocks + 1), index % (blocks + 1)
        block, channels = f"up_blocks.{last - level}", width + skips.pop()
        width = widths[level]
        yield residual(f"output_blocks.{index}.0", f"{block}.resnets.{i}", channels, width)
        if attention[level]:
            yield f"output_blocks.{index}.1", f"{block}.attentions.{i}", "attention"
        if level > 0 and i == blocks:
            ours = f"output_blocks.{index}.{2 if attention[level] else 1}"
            _, theirs, kind = change
            yield f"{ours}{theirs}", f"{block}.upsamplers.0{theirs}", kind
    yield "out.0", "conv_norm_out", "plain"
    yield "out.2", "conv_out", "plain"

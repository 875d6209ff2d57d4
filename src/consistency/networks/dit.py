"""The diffusion transformer of Peebles and Xie (2022, arXiv:2212.09748) with adaLN-zero, and its form with two times.

The same network is SiT's (Ma et al. 2024, arXiv:2401.08740), and with a second time MeanFlow's (Geng et al. 2025,
arXiv:2505.13447). c_noise is t of 0..999 in DiT and t of [0, 1] in the others. Names and shapes are those of the released networks.
"""

from collections.abc import Iterator
from typing import ClassVar, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from consistency.networks import layers
from consistency.networks.layers import Embedding, zeroed
from consistency.tensors import NO_CLASS, Data, Label, Time

Tokens: TypeAlias = Float[Tensor, "b n d"]
"""One vector per patch, row by row."""

NewTokens: TypeAlias = Float[Tensor, "b n d2"]
"""Such of another width."""

FREQUENCIES = 256
"""Width of the features of a time."""

EPS = 1e-6
"""Of every layer normalisation."""


def position_embedding(width: int, side: int) -> Float[Tensor, "n width"]:
    """[sin, cos] of the column, then of the row, of each patch of side x side, in float64.

    The frequencies fall geometrically from 1 towards 1/10000, width / 4 of them.
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    phase = torch.outer(torch.arange(side, dtype=torch.float64), frequencies)
    line = torch.cat([phase.sin(), phase.cos()], dim=1)
    column, row = line.expand(side, -1, -1), line[:, None].expand(-1, side, -1)
    return torch.cat([column, row], dim=2).flatten(0, 1)


def normalised(h: Tokens) -> Tokens:
    """Layer normalisation without learned scale and shift, never in half precision [Ba et al. 2016, arXiv:1607.06450]."""
    x = h.to(layers.at_least_float32(h.dtype)).flatten(0, 1)
    # One group: the forward-mode derivative of PyTorch's layer_norm has wrong gradients (2.15), group_norm's is right.
    return functional.group_norm(x, 1, eps=EPS).to(h.dtype).unflatten(0, h.shape[:2])


def modulated(h: Tokens, shift: Float[Tensor, "b 1 d"], scale: Float[Tensor, "b 1 d"]) -> Tokens:
    """norm(h) (1 + scale) + shift ("adaptive layer normalisation")."""
    return torch.addcmul(shift, normalised(h), 1 + scale)


class Patches(nn.Module):
    """A linear map of each patch to a token, as a strided convolution."""

    def __init__(self, channels: int, width: int, side: int) -> None:
        super().__init__()
        self.proj = zeroed(nn.Conv2d(channels, width, side, stride=side))
        nn.init.xavier_uniform_(
            self.proj.weight.flatten(1)
        )  # a view, initialised as a linear layer

    def forward(self, x: Data) -> Tokens:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimeEmbedding(nn.Module):
    """Two layers on the cosines and sines of a time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, last = zeroed(nn.Linear(FREQUENCIES, width)), zeroed(nn.Linear(width, width))
        for layer in (first, last):
            nn.init.normal_(layer.weight, std=0.02)
        self.mlp = nn.Sequential(first, nn.SiLU(), last)

    def forward(self, c_noise: Time) -> Embedding:
        features = layers.sinusoidal_features(c_noise, FREQUENCIES)
        return self.mlp(features.to(next(self.parameters()).dtype))


class LabelEmbedding(nn.Module):
    """One vector per class, and after them one for no class, whose index here is -1."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, label: Int[Tensor, "b"]) -> Embedding:
        return self.embedding_table(torch.where(label < 0, self.num_classes, label))


class SelfAttention(nn.Module):
    """Self-attention over all tokens; rows of qkv stand in the order (three, head, dim)."""

    def __init__(self, width: int, heads: int, attention: layers.Attention) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.qkv, self.proj = linear(width, 3 * width), linear(width, width)

    def forward(self, h: Tokens) -> Tokens:
        q, k, v = self.qkv(h).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = layers.attend(q, k, v, self.attention)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Feedforward(nn.Module):
    """Two layers of each token alone, four times as wide in between, with the tanh form of GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = linear(width, 4 * width), linear(4 * width, width)

    def forward(self, h: Tokens) -> Tokens:
        return self.fc2(functional.gelu(self.fc1(h), approximate="tanh"))


class Modulation(nn.Sequential):
    """Vectors for all tokens of a sample from its time and class, `count` of them; zero at first ("adaLN-zero")."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__(nn.SiLU(), zeroed(nn.Linear(width, count * width)))
        self.count = count

    def vectors(self, c: Embedding) -> Iterator[Float[Tensor, "b 1 d"]]:
        return iter(self(c)[:, None].chunk(self.count, dim=2))


class Block(nn.Module):
    """Attention and layers of each token, each with adaptive normalisation before and a gate after it [Peebles and Xie 2022, Figure 3]."""

    def __init__(self, width: int, heads: int, attention: layers.Attention) -> None:
        super().__init__()
        self.attn = SelfAttention(width, heads, attention)
        self.mlp = Feedforward(width)
        self.adaLN_modulation = Modulation(width, 6)

    def forward(self, h: Tokens, c: Embedding) -> Tokens:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation.vectors(c)
        h = torch.addcmul(h, gate_a, self.attn(modulated(h, shift_a, scale_a)))
        return torch.addcmul(h, gate_m, self.mlp(modulated(h, shift_m, scale_m)))


class FinalLayer(nn.Module):
    """Adaptive normalisation, and a linear map of each token to the numbers of its patch, which starts at zero."""

    def __init__(self, width: int, numbers: int) -> None:
        super().__init__()
        self.linear = zeroed(nn.Linear(width, numbers))
        self.adaLN_modulation = Modulation(width, 2)

    def forward(self, h: Tokens, c: Embedding) -> NewTokens:
        return self.linear(modulated(h, *self.adaLN_modulation.vectors(c)))


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer with Xavier-uniform weight and zero bias."""
    layer = zeroed(nn.Linear(inputs, outputs))
    nn.init.xavier_uniform_(layer.weight)
    return layer


class DiT(nn.Module):
    """The network F of (c_in x_t, c_noise, label): a transformer on patches of `patch_size` x `patch_size`; starts at zero.

    `image_size` is the side of the images or latents, which the fixed position embedding belongs to. A label of -1 stands
    for "no class". `learn_sigma`: the last layer has twice the channels, of which the second half, in DiT a variance, is
    left out. `second_time` adds the embedding of a second time to that of the first.
    """

    no_class: ClassVar[int] = NO_CLASS
    """The class index that stands for no class."""

    pos_embed: Tensor

    def __init__(
        self,
        *,
        image_size: int,
        in_channels: int,
        patch_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        num_classes: int | None = None,
        learn_sigma: bool = False,
        attention: layers.Attention = "sdpa",
        checkpoint_activations: bool = False,
        second_time: layers.SecondTime = None,
    ) -> None:
        super().__init__()
        layers.check_attention(attention)
        require_parts(image_size, patch_size, hidden_size, num_heads)
        self.image_size, self.in_channels, self.patch_size = image_size, in_channels, patch_size
        self.num_classes, self.second_time = num_classes, second_time
        self.recompute = checkpoint_activations
        self.x_embedder = Patches(in_channels, hidden_size, patch_size)
        self.t_embedder = TimeEmbedding(hidden_size)
        if layers.times_of(second_time) == 2:
            self.r_embedder = TimeEmbedding(hidden_size)
        if num_classes is not None:
            self.y_embedder = LabelEmbedding(num_classes, hidden_size)
        positions = position_embedding(hidden_size, image_size // patch_size)
        self.register_buffer("pos_embed", positions.float()[None])
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, attention) for _ in range(depth))
        out_channels = 2 * in_channels if learn_sigma else in_channels
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * out_channels)

    def forward(
        self, x: Data, c_noise: Time, label: Label = None, *, r: Time | None = None
    ) -> Data:
        layers.check_label(label, self.num_classes)
        self._check_images(x)
        h = self.x_embedder(x.to(self.pos_embed.dtype)) + self.pos_embed
        c = self.t_embedder(c_noise)
        second = layers.second_of(c_noise, r, self.second_time)
        if second is not None:
            c = c + self.r_embedder(second)
        if label is not None:
            c = c + self.y_embedder(label)
        for block in self.blocks:
            h = layers.run(block, h, c, recompute=self.recompute)
        return self.images(self.final_layer(h, c))[:, : self.in_channels].to(x.dtype)

    def images(self, patches: Tokens) -> Float[Tensor, "b c h w"]:
        """The images of patches whose numbers stand in the order (row, column, channel)."""
        p, side = self.patch_size, self.image_size // self.patch_size
        parts = patches.unflatten(2, (p, p, -1)).unflatten(1, (side, side))
        return parts.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def _check_images(self, x: Data) -> None:
        """Refuse images of other channels or another side than the network is for."""
        expected = (self.in_channels, self.image_size, self.image_size)
        if x.shape[1:] != expected:
            raise ValueError(
                f"expected images of shape {expected}, to which the position embedding belongs; got "
                f"{tuple(x.shape[1:])}. Change the data, or image_size and in_channels of the network."
            )


def require_parts(image_size: int, patch_size: int, hidden_size: int, num_heads: int) -> None:
    """Refuse an image that is no whole number of patches, and a width that heads and positions do not divide."""
    if image_size % patch_size:
        raise ValueError(
            f"expected image_size divisible by patch_size={patch_size}; got {image_size}. "
            "Choose another patch_size, or resize the images."
        )
    if hidden_size % num_heads or hidden_size % 4:
        raise ValueError(
            f"expected hidden_size divisible by 4 and by num_heads={num_heads}; got {hidden_size}. "
            "Change hidden_size or num_heads."
        )

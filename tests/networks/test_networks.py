"""Laws that the networks obey, whatever their weights. Golden data check the numbers themselves."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import hydra
import pytest
import torch
import yaml
from torch import Tensor, nn

from consistency.networks.adm import ADM, AttentionBlock, ResBlock
from consistency.networks.dhariwal import DhariwalUNet
from consistency.networks.dit import DiT
from consistency.networks.edm2 import EDM2
from consistency.networks.layers import Dropout, attend, check_attention
from consistency.networks.mlp import MLP
from consistency.networks.song import SongUNet
from consistency.networks.unet import Resample

# PyTorch's own first use of forward-mode derivatives.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

MODELS = Path(__file__).parents[2] / "conf" / "model"
TEXTS = {path: path.read_text() for path in sorted(MODELS.glob("*.yaml"))}
PUBLISHED = [path for path, text in TEXTS.items() if "${" not in text and "_target_:" in text]
SIDE, CLASSES = 8, 5

Build = Callable[..., nn.Module]
shape = {"image_size": SIDE, "in_channels": 3, "num_res_blocks": 1, "attention_resolutions": [4]}
adm = partial(ADM, **shape, model_channels=8, channel_mult=[1, 2], num_groups=4)
imagenet = partial(adm, num_head_channels=8, use_scale_shift_norm=True, resblock_updown=True)
lsun = partial(adm, num_heads=2, num_head_channels=None, use_scale_shift_norm=False)
song = partial(SongUNet, **shape, model_channels=8, channel_mult=[1, 2], augment_dim=3)
UNETS: dict[str, Build] = {
    "adm_imagenet": imagenet,
    "adm_lsun": partial(lsun, resblock_updown=True),
    "adm_layers": partial(lsun, resblock_updown=False),
    "adm_pooling": partial(lsun, resblock_updown=False, conv_resample=False),
    "ddpmpp": partial(
        song,
        fourier_scale=None,
        residual_input=False,
        channel_mult_noise=1,
        resample_filter=[1, 1],
    ),
    "ncsnpp": partial(
        song,
        fourier_scale=1.0,
        residual_input=True,
        skip_output=True,
        channel_mult_noise=2,
        resample_filter=[1, 3, 3, 1],
    ),
    "dhariwal": partial(
        DhariwalUNet, **shape, model_channels=64, channel_mult=[1, 1], augment_dim=3
    ),
    "edm2": partial(EDM2, **shape, model_channels=16, channel_mult=[1, 2], num_head_channels=16),
}
dit = partial(
    DiT, image_size=SIDE, in_channels=3, patch_size=2, hidden_size=16, depth=2, num_heads=2
)
ALL: dict[str, Build] = UNETS | {
    "dit": dit,
    "mlp": partial(MLP, channels=3 * SIDE**2, width=16, depth=2),
}
unets = pytest.mark.parametrize("build", UNETS.values(), ids=UNETS.keys())
networks = pytest.mark.parametrize("build", ALL.values(), ids=ALL.keys())
plain = {
    name: build if name == "mlp" else partial(build, attention="plain")
    for name, build in ALL.items()
}
differentiable = pytest.mark.parametrize("build", plain.values(), ids=plain.keys())

Network = TypeVar("Network", bound=nn.Module)


def awake(network: Network) -> Network:
    """The network with random weights everywhere, also where it starts from zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return network


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Images, c_noise and labels."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, SIDE, SIDE, generator=generator, dtype=dtype)
    c_noise = torch.randn(2, generator=generator, dtype=dtype)
    return x, c_noise, torch.tensor([0, CLASSES - 1])


def gradients(network: nn.Module, seed: int) -> dict[str, Tensor]:
    x, c_noise, label = inputs()
    network.zero_grad()
    torch.manual_seed(seed)
    network(x, c_noise, label).square().sum().backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


@networks
def test_starts_from_zero(build: Build) -> None:
    x, c_noise, label = inputs()
    output = build(num_classes=CLASSES)(x, c_noise, label)
    assert output.shape == x.shape
    assert output.abs().max() < 1e-3


@networks
def test_time_and_class_matter(build: Build) -> None:
    network = awake(build(num_classes=CLASSES))
    x, c_noise, label = inputs()
    output = network(x, c_noise, label)
    for other in (network(x, c_noise + 0.1, label), network(x, c_noise, label.flip(0))):
        assert relative(other, output) > 1e-4


@networks
def test_the_output_of_a_sample_does_not_depend_on_the_others(build: Build) -> None:
    network = awake(build(num_classes=CLASSES))
    x, c_noise, label = inputs()
    both = network(x, c_noise, label)
    torch.testing.assert_close(network(x[1:], c_noise[1:], label[1:]), both[1:])


@unets
def test_both_kinds_of_attention_agree(build: Build) -> None:
    plain, fused = (awake(build(num_classes=CLASSES, attention=kind)) for kind in ("plain", "sdpa"))
    fused.load_state_dict(plain.state_dict())  # with random frequencies
    torch.testing.assert_close(plain(*inputs()), fused(*inputs()))
    ga, gb = (gradients(network, 0) for network in (plain, fused))
    assert ga.keys() == gb.keys()
    torch.testing.assert_close(ga, gb, rtol=1e-4, atol=1e-4)


def test_attention_weighs_values_by_similarity() -> None:
    """A query far along one key returns the value of that key."""
    k = torch.eye(4)[None, None]
    v = torch.randn(1, 1, 4, 4)
    torch.testing.assert_close(attend(1e3 * k, k, v, "plain"), v)


@differentiable
def test_forward_derivative_is_the_limit_of_differences(build: Build) -> None:
    network = awake(build(num_classes=CLASSES)).double()
    x, c_noise, label = inputs(torch.float64)
    dx, dc, h = torch.randn_like(x), torch.randn_like(c_noise), 1e-5
    _, tangent = torch.func.jvp(lambda x, c: network(x, c, label), (x, c_noise), (dx, dc))
    ahead, behind = (network(x + s * dx, c_noise + s * dc, label) for s in (h, -h))
    assert relative(tangent, (ahead - behind) / (2 * h)) < 1e-6


@differentiable
def test_forward_derivative_has_gradients(build: Build) -> None:
    """The gradient of |jvp|^2 along a random change of all weights, against differences."""
    network = awake(build(num_classes=CLASSES)).double()
    x, c_noise, label = inputs(torch.float64)
    dx, dc, h = torch.randn_like(x), torch.randn_like(c_noise), 1e-5

    def energy() -> Tensor:
        _, tangent = torch.func.jvp(lambda x, c: network(x, c, label), (x, c_noise), (dx, dc))
        return tangent.square().sum()

    parameters = list(network.parameters())
    change = [torch.randn_like(p) for p in parameters]
    found = torch.autograd.grad(energy(), parameters, allow_unused=True)
    slope = sum(float((g * d).sum()) for g, d in zip(found, change, strict=True) if g is not None)
    energies = []
    with torch.no_grad():
        for step in (h, -2 * h):
            for parameter, d in zip(parameters, change, strict=True):
                parameter += step * d
            energies.append(float(energy()))
    assert abs(slope / ((energies[0] - energies[1]) / (2 * h)) - 1) < 1e-5


@unets
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputed_activations_give_the_same_gradients(build: Build, dropout: float) -> None:
    kept, recomputed = (
        awake(build(num_classes=CLASSES, dropout=dropout, checkpoint_activations=recompute))
        for recompute in (False, True)
    )
    recomputed.load_state_dict(kept.state_dict())
    expected, found = gradients(kept, seed=2), gradients(recomputed, seed=2)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    if dropout:
        other = gradients(kept, seed=3)
        assert any(not torch.equal(expected[name], other[name]) for name in expected)


@unets
@pytest.mark.parametrize("largest", [None, 4])
def test_dropout_of_the_maps_up_to_a_resolution(build: Build, largest: int | None) -> None:
    network = awake(build(num_classes=CLASSES, dropout=0.5, dropout_resolution=largest)).train()
    dropped: dict[int, set[bool]] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        zeros = float((output == 0).float().mean())
        dropped.setdefault(inputs[0].shape[-1], set()).add(zeros > 0.25)

    layers = [part for part in network.modules() if isinstance(part, Dropout)]
    assert len(layers) > 4
    for layer in layers:
        layer.register_forward_hook(note)
    network(torch.randn(2, 3, SIDE, SIDE), torch.zeros(2), torch.zeros(2, dtype=torch.long))
    assert dropped == {SIDE: {largest is None}, SIDE // 2: {True}}


@unets
def test_every_parameter_has_a_gradient(build: Build) -> None:
    """Also without augmentation labels: data-parallel training waits for every gradient."""
    network = build(num_classes=CLASSES)
    assert gradients(network, 0).keys() == dict(network.named_parameters()).keys()


@networks
def test_half_precision(build: Build) -> None:
    network = awake(build(num_classes=CLASSES))
    x, c_noise, label = inputs()
    expected = network(x, c_noise, label)
    found = network.bfloat16()(x, c_noise, label)
    assert found.dtype == torch.float32
    assert relative(found, expected) < 0.05


@networks
def test_double_precision_images_pass_through_a_single_precision_network(build: Build) -> None:
    network = awake(build(num_classes=CLASSES))
    x, c_noise, label = inputs(torch.float64)
    output = network(x, c_noise, label)
    assert output.dtype == torch.float64
    torch.testing.assert_close(output.float(), network(x.float(), c_noise.float(), label))


@networks
def test_wrong_labels_and_shapes_are_refused(build: Build) -> None:
    x, c_noise, label = inputs()
    with pytest.raises(ValueError, match="Pass one label per image"):
        build(num_classes=CLASSES)(x, c_noise)
    network = build(num_classes=None)
    with pytest.raises(ValueError, match="Pass label=None"):
        network(x, c_noise, label)
    with pytest.raises(ValueError, match="expected"):
        network(x[:, :1], c_noise)
    with pytest.raises(ValueError, match="expected"):
        network(x[:, :, :-1], c_noise)


def test_unknown_attention_is_refused() -> None:
    with pytest.raises(ValueError, match='got "flash"'):
        check_attention("flash")


def attended(block: AttentionBlock, x: Tensor, heads: int) -> Tensor:
    """What the published attention gives: rows of qkv in the order (three, head, dim), softmax over the pixels."""
    b, c, h, w = x.shape
    rows = torch.nn.functional.conv2d(block.norm(x), block.qkv.weight, block.qkv.bias)
    q, k, v = rows.reshape(b, 3, heads, c // heads, h * w).unbind(1)
    share = torch.einsum("bhdi,bhdj->bhij", q, k).div((c // heads) ** 0.5).softmax(-1)
    mixed = torch.einsum("bhij,bhdj->bhdi", share, v).reshape(b, c, h, w)
    return x + torch.nn.functional.conv2d(mixed, block.proj_out.weight, block.proj_out.bias)


@pytest.mark.parametrize(
    ("heads", "up", "width", "expected"),
    [
        (2, 4, None, (2, 4)),
        (4, 1, None, (4, 1)),
        (2, None, None, (2, 2)),
        (2, -1, None, (2, 2)),
        (2, 4, 8, (4, 4)),
    ],
)
def test_the_decoder_may_have_its_own_number_of_heads(
    heads: int, up: int | None, width: int | None, expected: tuple[int, int]
) -> None:
    """As published: the middle belongs to the way down, and a width of the heads decides for both ways."""
    network = ADM(
        image_size=8,
        in_channels=3,
        model_channels=32,
        num_res_blocks=1,
        attention_resolutions=[8, 4],
        channel_mult=[1, 1],
        num_heads=heads,
        num_heads_upsample=up,
        num_head_channels=width,
        use_scale_shift_norm=True,
        resblock_updown=True,
    )
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    seen = {"input_blocks": 0, "middle_block": 0, "output_blocks": 0}

    def check(name: str, block: AttentionBlock, x: Tensor, output: Tensor) -> None:
        count = expected[name == "output_blocks"]
        torch.testing.assert_close(output, attended(block, x, count), rtol=1e-4, atol=1e-4)
        seen[name] += 1

    for name, module in network.named_modules():
        if isinstance(module, AttentionBlock):
            place = name.split(".")[0]
            module.register_forward_hook(lambda m, i, o, place=place: check(place, m, i[0], o))
    with torch.no_grad():
        network(torch.randn(2, 3, 8, 8), torch.ones(2))
    assert seen == {"input_blocks": 2, "middle_block": 1, "output_blocks": 4}


def test_heads_must_divide_channels() -> None:
    with pytest.raises(ValueError, match="num_head_channels"):
        adm(num_head_channels=5, use_scale_shift_norm=True, resblock_updown=True)
    with pytest.raises(ValueError, match="num_heads"):
        lsun(num_heads=3, resblock_updown=True)


@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp", "dhariwal"])
def test_augmentation_labels(name: str) -> None:
    network = awake(UNETS[name]())
    x, c_noise, _ = inputs()
    untold = network(x, c_noise)
    torch.testing.assert_close(network(x, c_noise, augment=torch.zeros(2, 3)), untold)
    assert relative(network(x, c_noise, augment=torch.ones(2, 3)), untold) > 1e-4
    with pytest.raises(ValueError, match="augment_dim=0"):
        UNETS[name](augment_dim=0)(x, c_noise, augment=torch.zeros(2, 3))


@pytest.mark.parametrize("taps", [[1, 1], [1, 3, 3, 1]])
def test_resampling_keeps_constants_and_sums(taps: list[int]) -> None:
    constant = torch.ones(1, 2, 8, 8)
    for up in (True, False):
        inner = Resample(taps, up=up)(constant)[:, :, 1:-1, 1:-1]
        torch.testing.assert_close(inner, torch.ones_like(inner))
    point = torch.zeros(1, 1, 8, 8)
    point[..., 4, 4] = 1
    assert float(Resample(taps, up=True)(point).sum()) == pytest.approx(4)


def test_both_forms_of_adm_are_the_same_function() -> None:
    """The weights of `ADM` under the names of `DhariwalUNet`, block by block in the same order."""
    common = {"image_size": 8, "in_channels": 3, "model_channels": 128, "num_res_blocks": 1}
    common |= {"attention_resolutions": [4], "channel_mult": [1, 1], "num_classes": CLASSES}
    ours = awake(
        ADM(**common, num_head_channels=64, use_scale_shift_norm=True, resblock_updown=True)
    )
    theirs = DhariwalUNet(**common)
    theirs.load_state_dict(theirs.state_dict() | dhariwal_weights(ours, theirs))
    torch.testing.assert_close(theirs(*inputs()), ours(*inputs()), rtol=1e-4, atol=1e-4)


def dhariwal_weights(ours: ADM, theirs: DhariwalUNet) -> dict[str, Tensor]:
    names = {"in_layers.0": "norm0", "in_layers.2": "conv0", "emb_layers.1": "affine"}
    names |= {"out_layers.0": "norm1", "out_layers.3": "conv1", "skip_connection": "skip"}
    names |= {"norm": "norm2", "proj_out": "proj", "qkv": "qkv"}
    blocks: list[tuple[nn.Module, nn.Module | None]] = []
    for module in ours.modules():
        if isinstance(module, ResBlock):
            blocks.append((module, None))
        if isinstance(module, AttentionBlock):
            blocks[-1] = (blocks[-1][0], module)
    places = [name for name, m in theirs.named_modules() if hasattr(m, "norm0")]
    pairs = {"time_embed.0": "map_layer0", "time_embed.2": "map_layer1"}
    pairs |= {"input_blocks.0.0": "enc.8x8_conv", "out.0": "out_norm", "out.2": "out_conv"}
    source = ours.state_dict()
    weights = {"map_label.weight": source["label_emb.weight"].T}
    for old, new in pairs.items():
        for kind in ("weight", "bias"):
            weights[f"{new}.{kind}"] = source[f"{old}.{kind}"]
    for place, (block, attention) in zip(places, blocks, strict=True):
        for part in (block, attention):
            for name, value in part.state_dict().items() if part is not None else ():
                old, kind = name.rsplit(".", 1)
                if old == "qkv":
                    heads = value.unflatten(0, (3, len(value) // 192, 64))
                    value = heads.movedim(0, 2).flatten(0, 2)
                weights[f"{place}.{names[old]}.{kind}"] = value
    return weights


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_models(path: Path) -> None:
    """Every argument is written out, and the number of parameters is the one in the first line."""
    text = path.read_text()
    config = yaml.safe_load(text)
    with torch.device("meta"):
        network = hydra.utils.instantiate(config["network"])
    count = sum(parameter.numel() for parameter in network.parameters())
    assert f" {count:,} parameters" in text.splitlines()[0]
    arguments = set(type(network).__init__.__kwdefaults__ or {})
    assert arguments <= set(config["network"]), "arguments left to their defaults"
    counted = re.search(r"([\d,]+) with augment_dim 9", text.splitlines()[0])
    if counted:
        with torch.device("meta"):
            network = hydra.utils.instantiate(config["network"], augment_dim=9)
        assert sum(p.numel() for p in network.parameters()) == int(counted[1].replace(",", ""))

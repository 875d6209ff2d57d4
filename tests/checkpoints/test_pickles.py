"""What pickles of checkpoints hold beside tensors is read as data: dictionaries of classes, arrays, settings."""

import collections
import os
import pathlib
import pickle
import struct
import sys
import types
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import consistency
import foreign
from consistency.checkpoints import load, nvlabs
from consistency.checkpoints.contents import ContentError, Object
from consistency.checkpoints.pickle_reader import Machine
from consistency.errors import UserError
from golden_harness import FOLDER, read_json
from hostile_programs import Call, nvlabs_meta, time_limit, write_persistent
from tiny_models import TINY_SONG, randomised, weights_of


class EasyDict(dict):  # type: ignore[type-arg]
    """NVlabs' dictionary, whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@contextmanager
def living_in(module: str) -> Iterator[None]:
    """Makes `EasyDict` a class of that module, which pickling by name needs."""
    names = [".".join(module.split(".")[: n + 1]) for n in range(module.count(".") + 1)]
    made = {name: types.ModuleType(name) for name in names}
    made[module].EasyDict = EasyDict  # type: ignore[attr-defined]
    before, EasyDict.__module__ = EasyDict.__module__, module
    sys.modules.update(made)
    try:
        yield
    finally:
        EasyDict.__module__ = before
        for name in names:
            del sys.modules[name]


def read(content: object, protocol: int) -> Any:
    stored = pickle.dumps(content, protocol)
    return Machine(len(stored)).run(stored)


def song(**changes: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of NVlabs' network and weights of ours."""
    kwargs = TINY_SONG | changes
    channels = {"in_channels": kwargs["img_channels"], "out_channels": kwargs["img_channels"]}
    settings = nvlabs.settings(kwargs["model_type"], kwargs | channels)
    state = randomised(load.build(settings, load.NETWORKS, nn.Module))
    return kwargs, {f"model.{name}": value for name, value in state.items()}


@pytest.mark.parametrize("module", ["dnnlib.util", "dnnlib", "training.misc", "my_code.easy"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_snapshot_in_dictionaries_of_nvlabs_opens(
    module: str, protocol: int, tmp_path: Path
) -> None:
    kwargs, weights = song()
    model = foreign.nvlabs_modules(kwargs, weights, "EDMPrecond")
    with foreign.persistence(), living_in(module):
        encoder = foreign.PlainPersistent("StabilityVAEEncoder", scale=np.float32([1, 2, 3]))
        content = EasyDict(
            encoder=encoder,
            dataset_kwargs=EasyDict(path="cifar.zip", use_labels=False),
            loss_fn=foreign.PlainPersistent("EDMLoss", P_mean=np.float32(-1.2)),
            ema=model,
            rng=np.random.default_rng(0).random((2, 3)),
        )
        (tmp_path / "snapshot.pkl").write_bytes(pickle.dumps(content, protocol))
    loaded = consistency.load(tmp_path / "snapshot.pkl")
    assert loaded.card.role == "teacher"
    found = loaded.denoiser.network.state_dict()
    assert all(torch.equal(found[name], weights[f"model.{name}"]) for name in found)


ARRAYS = {
    "float32": np.arange(6, dtype="<f4").reshape(2, 3),
    "float32 in reverse": np.arange(6, dtype=">f4").reshape(2, 3),
    "by columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "half": np.arange(4, dtype="f2"),
    "integers in reverse": np.arange(4, dtype=">i8"),
    "truths": np.array([True, False]),
    "no axis": np.array(3.5),
    "empty": np.zeros((0, 3), dtype="f4"),
    "unsigned": np.arange(3, dtype="u4"),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_are_data(name: str, protocol: int) -> None:
    found = read({"a": ARRAYS[name], "again": ARRAYS[name]}, protocol)
    for value in found.values():
        assert isinstance(value, Object)
        assert value.kind == "numpy.ndarray"
        assert np.array_equal(value.state.numpy(), ARRAYS[name])
        assert value.state.shape == ARRAYS[name].shape


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f8", ">i4", "<i8", "u1", "?", "<f2"])
def test_numbers_of_numpy_are_numbers(kind: str, protocol: int) -> None:
    assert read(np.array([1], dtype=kind)[0], protocol) == 1


def test_older_names_of_numpy_are_known() -> None:
    """Files from before numpy 2 have `numpy.core` where later ones have `numpy._core`, and the other way around."""
    stored = pickle.dumps({"a": ARRAYS["float32"], "b": np.float64(2.5)}, 2)
    for old, new in ((b"numpy._core.", b"numpy.core."), (b"numpy.core.", b"numpy._core.")):
        changed = stored.replace(old, new)
        found = Machine(len(changed)).run(changed)
        assert found["b"] == 2.5
        assert found["a"].state.shape == (2, 3)


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_stands_beside_weights_does_not_matter(protocol: int) -> None:
    content = {
        "size": torch.Size([2, 3]),
        "device": torch.device("cuda:0"),
        "dtype": torch.bfloat16,
        "ordered": collections.OrderedDict(a=1),
        "default": collections.defaultdict(list, b=[2]),
        "path": pathlib.PurePosixPath("/a/b"),
        "arguments": Namespace(lr=1e-4, inner=Namespace(steps=3)),
        "rng": np.random.get_state(),
    }
    found = read(content, protocol)
    assert found["size"] == (2, 3)
    assert found["ordered"] == {"a": 1}
    assert found["default"] == {"b": [2]}


def test_settings_of_omegaconf_do_not_matter(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    settings = OmegaConf.create(
        {"model": {"lr": 1e-4, "names": ["a", None], "path": "${model.lr}"}}
    )
    _, weights = song()
    own = {name.removeprefix("model."): value for name, value in weights.items()}
    torch.save({"state_dict": own, "hyper_parameters": settings}, tmp_path / "model.ckpt")
    consistency.load(tmp_path / "model.ckpt", "teacher")


def test_parameters_with_attributes_are_weights(tmp_path: Path) -> None:
    _, weights = song()
    marked = {name: nn.Parameter(value) for name, value in weights.items()}
    for parameter in marked.values():
        parameter.decay = False  # type: ignore[attr-defined]
    tensor = weights["model.map_layer0.bias"].clone()
    tensor.note = "mine"  # type: ignore[attr-defined]
    torch.save({"net": marked | {"model.map_layer0.bias": tensor}}, tmp_path / "model.pt")
    found = consistency.load(tmp_path / "model.pt", "teacher").denoiser.network.state_dict()
    assert all(torch.equal(found[name.removeprefix("model.")], weights[name]) for name in weights)


# ------------------------------------------------------------------------------ refused


@pytest.mark.parametrize("kind", ["VPPrecond", "VEPrecond", "iDDPMPrecond", "GPrecond"])
def test_other_preconditionings_of_nvlabs_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    kwargs, weights = song()
    path = foreign.write_nvlabs(tmp_path / "snapshot.pkl", kwargs, weights, kind)
    with pytest.raises(UserError, match=f"class {kind}"):
        consistency.load(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("encoder_type", "skip"),
        ("decoder_type", "residual"),
        ("embedding_type", "learned"),
        ("out_channels", 6),
        ("in_channels", 9),
    ],
)
def test_settings_of_nvlabs_networks_that_we_lack_are_refused_by_name_and_value(
    name: str, value: object, tmp_path: Path
) -> None:
    _, weights = song()
    model = foreign.nvlabs_modules(TINY_SONG, weights, "EDMPrecond")
    model.model.__dict__["_init_kwargs"][name] = value
    with pytest.raises(UserError, match=f"{name}.*{value}"):
        consistency.load(write_persistent(tmp_path / "snapshot.pkl", model))


def test_a_state_dict_of_nvlabs_with_a_variance_is_refused(tmp_path: Path) -> None:
    settings = nvlabs.settings("SongUNet", TINY_SONG | {"in_channels": 3, "out_channels": 3})
    network = load.build(settings | {"out_channels": 6}, load.NETWORKS, nn.Module)
    torch.save(network.state_dict(), tmp_path / "net.pt")
    with pytest.raises(UserError, match="out_channels=6 for in_channels=3"):
        consistency.load(tmp_path / "net.pt", "teacher")


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
FLOATS = (
    b"cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
)


def array_program(shape: bytes, content: bytes, kind: bytes = FLOATS) -> bytes:
    return b"\x80\x02" + RECONSTRUCT + b"(K\x01" + shape + kind + b"\x89" + content + b"tb."


MANY = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20)
BAD = {
    "more numbers than bytes": (array_program(b"\x8a\x04\x00\x00\x00\x10\x85", b"U\x04aaaa"), "shape"),
    "a negative side": (array_program(b"J\xff\xff\xff\xff\x85", b"U\x04aaaa"), "shape"),
    "half a number": (array_program(b"K\x01\x85", b"U\x03aaa"), "multiple"),
    "objects": (array_program(b"K\x01\x85", b"]", b"cnumpy\ndtype\nU\x02O8K\x00K\x01\x87R"), "type"),
    "texts": (array_program(b"K\x01\x85", b"]", b"cnumpy\ndtype\nU\x02U5K\x00K\x01\x87R"), "type"),
    "a wide type": (array_program(b"K\x01\x85", b"]", b"cnumpy\ndtype\nU\x0aV999999999\x85R"), "type"),
    "no description": (b"\x80\x02" + RECONSTRUCT + b"Nb.", "description"),
    "one buffer a thousand times": (
        b"\x80\x02" + FLOATS + b"q\x00" + MANY + b"q\x01"
        + (RECONSTRUCT + b"(K\x01J\x00\x00\x04\x00\x85h\x00\x89h\x01tb") * 1000 + b".",
        "over and over",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_arrays_that_are_none_are_refused(name: str) -> None:
    program, hint = BAD[name]
    with time_limit(20), pytest.raises((ContentError, ValueError), match=hint):
        Machine(len(program)).run(program)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Call(os.system, "true"), "system"),
        (Call(eval, "1"), "eval"),
        (Call(np.fromfile, "x"), "fromfile"),
        (Call(torch.load, "x"), "load"),
        (Call(list, (1,)), "list"),
        (Call(dict), "dict"),
    ],
)
def test_calls_stay_refused_inside_dictionaries_of_classes(
    call: Call, name: str, tmp_path: Path
) -> None:
    with living_in("dnnlib.util"):
        content = EasyDict(ema=EasyDict(value=call))
        (tmp_path / "snapshot.pkl").write_bytes(pickle.dumps(content, 4))
    with pytest.raises(UserError, match=name):
        consistency.load(tmp_path / "snapshot.pkl")


def test_a_dictionary_of_a_class_takes_no_arguments() -> None:
    program = b"\x80\x02cdnnlib.util\nEasyDict\nX\x04\x00\x00\x00true\x85R."
    with pytest.raises(ContentError, match="EasyDict"):
        Machine(len(program)).run(program)


def test_the_golden_networks_open_from_dictionaries_of_classes(tmp_path: Path) -> None:
    """The whole way: a released kind of network in EDM2's kind of file gives the published numbers."""
    kwargs = read_json(FOLDER / "ect" / "config.json")["ECMPrecond_kwargs"]
    model = foreign.nvlabs_modules(kwargs, weights_of("ect", "net"), "ECMPrecond")
    with foreign.persistence(), living_in("dnnlib.util"):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(EasyDict(ema=model)))
    plain = foreign.write_nvlabs(tmp_path / "b.pkl", kwargs, weights_of("ect", "net"), "ECMPrecond")
    a, b = consistency.load(tmp_path / "a.pkl"), consistency.load(plain)
    assert a.card == b.card
    x = torch.randn(2, *a.shape)
    assert torch.equal(a.denoise(x, torch.ones(2)), b.denoise(x, torch.ones(2)))


def test_modules_without_a_dictionary_keep_their_refusal(tmp_path: Path) -> None:
    path = write_persistent(tmp_path / "p", nvlabs_meta("EDMPrecond", {"_modules": 7}))
    with pytest.raises(UserError, match="_modules"):
        consistency.load(path)

"""Writers of tiny files in the layouts of the published programs.

NVlabs' `torch_utils.persistence` reduces every module to `_reconstruct_persistent_obj(meta)`, with the source of its
class as text and its `__dict__` as state; flax packs nested dictionaries as MessagePack with arrays as extension type
1; openai/consistency_models saves a flat state dict.
"""

import contextlib
import pickle
import struct
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SOURCE = "raise RuntimeError('the source inside an NVlabs pickle was executed')\n" * 3


# ------------------------------------------------------------------------------------- NVlabs


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> Any:
    raise RuntimeError("the original reader was called")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


@contextlib.contextmanager
def persistence() -> Iterator[None]:
    """Make `torch_utils.persistence` importable, as pickling by name requires."""
    package, module = types.ModuleType("torch_utils"), types.ModuleType("torch_utils.persistence")
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    names = {"torch_utils": package, "torch_utils.persistence": module}
    sys.modules.update(names)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


class Persistent(nn.Module):
    """A module of a decorated class: its pickle holds the class's name and source, and its state."""

    def __init__(self, class_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.__dict__["_init_args"] = ()
        self.__dict__["_init_kwargs"] = kwargs
        self.__dict__["class_name"] = class_name

    def __reduce__(self) -> tuple[Any, ...]:
        state = {key: value for key, value in self.__dict__.items() if key != "class_name"}
        meta = {"type": "class", "version": 6, "module_src": SOURCE}
        meta |= {"class_name": self.class_name, "state": state}
        return (_reconstruct_persistent_obj, (meta,), None)


class PlainPersistent:
    """An object of a decorated class that is not a module, such as EDM's loss."""

    def __init__(self, class_name: str, **attributes: Any) -> None:
        self.class_name, self.attributes = class_name, attributes

    def __reduce__(self) -> tuple[Any, ...]:
        state = {"_init_args": (), "_init_kwargs": dict(self.attributes), **self.attributes}
        meta = {"type": "class", "version": 6, "module_src": SOURCE}
        meta |= {"class_name": self.class_name, "state": state}
        return (_reconstruct_persistent_obj, (meta,), None)


class EctLoss:
    """ECT's loss, which holds a bound method of itself; this pickles as a call of `getattr`."""

    def __init__(self) -> None:
        self.q, self._init_args, self._init_kwargs = 2, (), {"q": 2}
        self.t_to_r = self.t_to_r_const

    def t_to_r_const(self, t: Tensor) -> Tensor:
        return t * (1 - 1 / self.q)

    def __reduce__(self) -> tuple[Any, ...]:
        meta = {"type": "class", "version": 6, "module_src": SOURCE}
        meta |= {"class_name": "ECMLoss", "state": self.__dict__}
        return (_reconstruct_persistent_obj, (meta,), None)


def nvlabs_modules(kwargs: dict[str, Any], weights: dict[str, Tensor], kind: str) -> Persistent:
    """Return the preconditioned network: `kwargs` of the constructor, weights by their dotted names."""
    outer = Persistent(kind, **kwargs)
    state = {"sigma_min": 0.003 if kind == "ECMPrecond" else 0, "sigma_max": float("inf")}
    outer.__dict__.update(state | {"sigma_data": 0.5, "use_fp16": False})
    inner_kwargs = {k: v for k, v in kwargs.items() if k not in ("model_type", "img_channels")}
    channels = kwargs["img_channels"]
    outer.model = Persistent(
        kwargs["model_type"], in_channels=channels, out_channels=channels, **inner_kwargs
    )
    outer.model.map_noise = Persistent("PositionalEmbedding", num_channels=8)
    for name, value in weights.items():
        _place(outer, name.split("."), value)
    return outer.eval().requires_grad_(False)


def _place(module: nn.Module, path: list[str], value: Tensor) -> None:
    if len(path) == 1:
        if path[0] in ("freqs", "resample_filter"):
            module.register_buffer(path[0], value.clone())
        else:
            setattr(module, path[0], nn.Parameter(value.clone()))
            if path[0] == "weight" and value.ndim == 4 and "resample_filter" not in module._buffers:
                module.register_buffer("resample_filter", None)
        return
    if path[0] not in module._modules:
        dictionary = path[0] in ("enc", "dec")
        child = nn.ModuleDict() if dictionary else Persistent("UNetBlock", in_channels=4)
        if not dictionary:
            child.__dict__["skip_scale"] = np.sqrt(0.5)
        module.add_module(path[0], child)
    _place(module._modules[path[0]], path[1:], value)


def write_nvlabs(
    path: Path, kwargs: dict[str, Any], weights: dict[str, Tensor], kind: str = "EDMPrecond"
) -> Path:
    """Write a `network-snapshot-*.pkl`."""
    with persistence():
        loss = PlainPersistent("EDMLoss", P_mean=-1.2, P_std=1.2, sigma_data=0.5)
        content = {
            "ema": nvlabs_modules(kwargs, weights, kind),
            "loss_fn": EctLoss() if kind == "ECMPrecond" else loss,
            "augment_pipe": PlainPersistent("AugmentPipe", p=0.12, xflip=1e8),
            "dataset_kwargs": {"class_name": "training.dataset.ImageFolderDataset", "xflip": False},
        }
        with path.open("wb") as file:
            pickle.dump(content, file)
    return path


def write_nvlabs_state(path: Path, kwargs: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    """Write a `training-state-*.pt`."""
    with persistence():
        net = nvlabs_modules(kwargs, weights, "EDMPrecond").train()
        torch.save({"net": net, "optimizer_state": {"state": {}, "param_groups": []}}, path)
    return path


# --------------------------------------------------------------------------------------- flax


def pack(value: Any) -> bytes:
    """Return the MessagePack of nested dictionaries, as `flax.serialization.to_bytes` writes it."""
    if isinstance(value, dict):
        body = b"".join(pack(key) + pack(item) for key, item in value.items())
        return _head(len(value), 0x80, 15, None, 0xDE, 0xDF) + body
    if isinstance(value, list | tuple):
        return _head(len(value), 0x90, 15, None, 0xDC, 0xDD) + b"".join(map(pack, value))
    if isinstance(value, str):
        return _head(len(value.encode()), 0xA0, 31, 0xD9, 0xDA, 0xDB) + value.encode()
    if isinstance(value, bytes):
        return _head(len(value), None, 0, 0xC4, 0xC5, 0xC6) + value
    if value is None or isinstance(value, bool):
        return bytes([{None: 0xC0, False: 0xC2, True: 0xC3}[value]])
    if isinstance(value, int):
        return bytes([value]) if value < 128 else b"\xce" + struct.pack(">I", value)
    if isinstance(value, float):
        return b"\xcb" + struct.pack(">d", value)
    array = np.asarray(value)
    inner = pack((array.shape, array.dtype.name, array.tobytes()))
    kind = struct.pack(">b", 1 if isinstance(value, np.ndarray) else 3)
    return _extension(len(inner)) + kind + inner


def _head(n: int, fix: int | None, most: int, one: int | None, two: int, four: int) -> bytes:
    if fix is not None and n <= most:
        return bytes([fix | n])
    if one is not None and n < 1 << 8:
        return bytes([one, n])
    if n < 1 << 16:
        return bytes([two]) + struct.pack(">H", n)
    return bytes([four]) + struct.pack(">I", n)


def _extension(n: int) -> bytes:
    fixed = {1: 0xD4, 2: 0xD5, 4: 0xD6, 8: 0xD7, 16: 0xD8}
    return bytes([fixed[n]]) if n in fixed else _head(n, None, 0, 0xC7, 0xC8, 0xC9)


def nested(flat: dict[str, Tensor]) -> dict[str, Any]:
    """Return nested dictionaries of arrays from dotted names."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[last] = value.numpy()
    return tree


def flax_state(params: dict[str, Tensor]) -> dict[str, Any]:
    """Return the state dict of the JAX code's training state; `params` are its averaged parameters."""
    zero = {name: torch.zeros_like(value) for name, value in params.items()}
    return {
        "step": 800000,
        "lr": 0.0004,
        "ema_rate": 0.9999,
        "params": nested(zero),
        "params_ema": nested(params),
        "model_state": {},
        "opt_state": {"0": {"count": np.int32(3), "mu": nested(zero)}, "1": {}},
        "rng_state": {"0": np.zeros(2, dtype=np.uint32), "1": {}},
    }


def write_flax(path: Path, params: dict[str, Tensor]) -> Path:
    path.write_bytes(pack(flax_state(params)))
    return path


# ------------------------------------------------------------------------------------- OpenAI


def write_openai(path: Path, weights: dict[str, Tensor]) -> Path:
    """Write the state dict of a module with the `_metadata` attribute that torch adds."""
    state = OrderedDict(weights)
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    torch.save(state, path)
    return path


def edm2_modules(kwargs: dict[str, Any], weights: dict[str, Tensor]) -> Persistent:
    """Return EDM2's preconditioned network in half precision: `kwargs` of the constructor, weights of the network inside."""
    outer = Persistent("Precond", **kwargs)
    outer.__dict__.update(sigma_data=kwargs.get("sigma_data", 0.5), use_fp16=True)
    outer.unet = Persistent("UNet", model_channels=8)
    for name, value in weights.items():
        _place(outer, ["unet", *name.split(".")], value.half())
    outer.logvar_linear = Persistent("MPConv", kernel=[])
    outer.logvar_linear.weight = nn.Parameter(torch.ones(1, 8).half())
    return outer.eval().requires_grad_(False)


def write_edm2(path: Path, ema: object, **others: Any) -> Path:
    """Write a snapshot of EDM2 with other entries than the usual ones, None for no entry."""
    with persistence():
        content = {
            "encoder": PlainPersistent("StandardRGBEncoder"),
            "dataset_kwargs": {"class_name": "training.dataset.ImageFolderDataset"},
            "loss_fn": PlainPersistent("EDM2Loss", P_mean=-0.4, P_std=1.0, sigma_data=0.5),
            "ema": ema,
        }
        path.write_bytes(
            pickle.dumps({k: v for k, v in (content | others).items() if v is not None})
        )
    return path

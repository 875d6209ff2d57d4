"""Compute the memory of a training step on a GPU, without one: `python tests/tools/memory.py [option=value ...]`.

The step of the configured mode runs on fake tensors, which have sizes and no content: online network, target, averages,
teacher and perceptual distance, gradients and optimizer. Counted are the bytes of all storages alive at once, each rounded
up to 512, at the peak of the second step. Not counted: what CUDA and its libraries take for themselves, and gaps between
allocations. Options are those of train.py; `batch=1,2,4,8` are the images on a device.
"""

import gc
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
import torchvision
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from consistency.averaging import update_average
from consistency.commands import schema
from consistency.denoiser import Denoiser
from consistency.distances import LPIPS
from consistency.runtime.devices import PRECISIONS
from consistency.runtime.files import ROOT
from consistency.training import lpips
from consistency.training.optimizers import choose_kernels

GIB = 2**30


class Storages(TorchDispatchMode):
    """The bytes of the storages that operators make, now and at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in tree_leaves(result):
            if isinstance(part, Tensor) and part.untyped_storage() not in self.known:
                self._count(part.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        size = -(-storage.nbytes() // 512) * 512
        self.known.add(storage)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.now -= size


def configured(options: Sequence[str]) -> Any:
    """Compose a configuration of train.py."""
    schema.register()
    schema.register_experiments(options)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", [*options, "output=/nowhere"])


def empty_lpips(*, backbone: lpips.BackboneName, variant: lpips.Variant) -> LPIPS:
    """Build a perceptual distance without its weights' values."""
    features = torchvision.models.get_model(backbone, weights=None).features
    for layer in features:
        layer.inplace = False
    widths = [m.out_channels for m in features if isinstance(m, nn.Conv2d)]
    taps = [sum(isinstance(m, nn.Conv2d) for m in features[: t + 1]) for t in lpips.TAPS[backbone]]
    weights = [torch.empty(widths[tap - 1]) for tap in taps]
    extractor = lpips.assemble(features, backbone, variant)
    return LPIPS(
        features=extractor, weights=weights, resize=lpips.RESIZING[variant]
    ).requires_grad_(False)


def channels_last(network: nn.Module) -> nn.Module:
    """Convert the weights as `Denoiser` does with `nn.Module.to`, which fake tensors refuse."""
    for module in network.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.ndim == 4:
                last = weight.detach().contiguous(memory_format=torch.channels_last)
                module._parameters[name] = nn.Parameter(last, weight.requires_grad)
    return network


as_it_is = patch.object(nn.Module, "to", lambda module, *_, **__: module)
"""`nn.Module.to` without effect."""


def steps(config: Any, batch: int) -> Callable[[], None]:
    """Build the parts of a run, and return its optimizer step for `batch` images on the device."""

    def denoiser(*, trained: bool = False) -> Denoiser:
        network = instantiate(config.model.network, _convert_="all").requires_grad_(trained)
        return Denoiser(channels_last(network), scalings)

    scalings = instantiate(config.mode.preconditioning)
    lpips.load_lpips = empty_lpips  # type: ignore[assignment]
    if teacher := config.mode.objective.get("step", {}).get("teacher"):
        teacher._target_, teacher.path = f"{__name__}.teacher_of", None
        TEACHERS["cd"] = denoiser
    online = denoiser(trained=True)
    objective = instantiate(config.mode.objective, _convert_="all").requires_grad_(False)
    target = denoiser() if "target_ema" in config.mode.callbacks else online
    ema = config.callbacks.evaluation_ema
    averages = [denoiser().network for _ in (*ema.decays, *ema.widths)]
    optimizer = instantiate(config.optimizer, _convert_="all")(online.parameters())
    choose_kernels(optimizer, "cuda")
    shape = (batch, config.data.channels, config.data.image_size, config.data.image_size)
    precision = PRECISIONS[config.trainer.precision]

    def step() -> None:
        x_0, draw = torch.zeros(shape), torch.Generator()
        label = None if config.data.num_classes is None else torch.zeros(batch, dtype=torch.long)
        with torch.autocast("cpu", dtype=precision, enabled=precision is not None):
            losses = objective(online, target, x_0, label, 100, draw)
            loss = losses.loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for average in (*averages, *([target.network] if target is not online else [])):
            update_average(average, online.network, 0.9)

    return step


TEACHERS: dict[str, Callable[[], Denoiser]] = {}


def teacher_of(**_: Any) -> Denoiser:
    """Build the teacher of the configuration."""
    return TEACHERS["cd"]()


def peak(config: Any, batch: int) -> float:
    """Return the peak of a step in GiB, computed with fake tensors."""
    sys.modules.setdefault("memory", sys.modules[__name__])
    with as_it_is, FakeTensorMode(), Storages() as storages:
        step = steps(config, batch)
        step()
        storages.peak = storages.now
        step()
    gc.collect()
    return storages.peak / GIB


def averages_of(config: Any) -> float:
    """Return the size of the averages in GiB."""
    ema = config.callbacks.evaluation_ema
    with torch.device("meta"):
        network = instantiate(config.model.network, _convert_="all")
    return len([*ema.decays, *ema.widths]) * sum(p.nbytes for p in network.parameters()) / GIB


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    given = dict(argument.split("=", 1) for argument in arguments)
    batches = [int(n) for n in given.pop("batch", "1,2,4,8").split(",")]
    options = [f"{key}={value}" for key, value in given.items()]
    config = configured(options)
    print(f"GiB at the peak of a step, computed; {' '.join(options)}")
    print(
        "| precision | checkpointing | averages | "
        + " | ".join(f"batch {n}" for n in batches)
        + " |"
    )
    print("|---|---|---|" + "--:|" * len(batches))
    for precision in ("32-true", "bf16-mixed"):
        for recompute in (False, True):
            config.trainer.precision = precision
            key = "model.network.checkpoint_activations"
            OmegaConf.update(config, key, recompute, force_add=True)
            peaks = [peak(config, n) for n in batches]
            for place, less in (("GPU", 0.0), ("host", averages_of(config))):
                row = [f"{value - less:.1f}" for value in peaks]
                names = (precision, "on" if recompute else "off", place)
                print(f"| {' | '.join(names)} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

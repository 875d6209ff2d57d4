"""Compiled networks with the channels last against golden numbers and uncompiled runs: a process without the type checker.

`PYTHONPATH=src:tests:tests/support:tests/golden:tests/tools python tests/support/compiled.py <golden|modes|law|resume> <cpu|cuda> [name ...]`
prints how near they come, and ends with 1 where they do not.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import oracle
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

import consistency
import golden_networks as networks
from configurations import composed
from conftest import ROOT, TINY
from golden_harness import FOLDER, Archive

PATHS = os.pathsep.join(
    str(ROOT / name) for name in ("src", "tests", "tests/support", "tests/golden", "tests/tools")
)
"""PYTHONPATH of the process."""

GOLDEN: dict[str, Callable[[Archive], None]] = {
    "openai_unet/adm64_classcond_convresample": networks.compare_openai_unet,
    "edm/ddpmpp": networks.compare_nvlabs,
    "edm/ncsnpp": networks.compare_nvlabs,
    "edm/adm": networks.compare_nvlabs,
}
"""Networks whose outputs and gradients are compared: one of each kind."""

MODES = ("ct", "ect", "edm", "progdist", "ct_continuous")
LAW_STEPS = 64


def placed(network: nn.Module, device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Move a network to a device and precision, its channels last; it takes and returns float32 on the CPU as before."""

    def there(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(device, dtype if x.is_floating_point() else x.dtype)

    def moved(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        return tuple(map(there, inputs)), {name: there(x) for name, x in named.items()}

    network.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.register_forward_pre_hook(moved, with_kwargs=True)
    network.register_forward_hook(lambda module, inputs, output: output.float().cpu())
    return network


def golden(device: str, *names: str) -> None:
    """Compare output, gradients and inner statistics with the published code's."""
    load = networks.loaded

    def compiled(*arguments: Any) -> nn.Module:
        network = placed(load(*arguments), device)
        network.compile()
        return network

    networks.loaded = compiled
    for name in names or GOLDEN:
        archive = Archive(FOLDER / f"{name}.npz")
        GOLDEN[name](archive)
        used, array = max((used, array) for array, used in archive.compared.items())
        print(
            f"{name}: {len(archive.compared)} arrays, {used:.1%} of the tolerance at most: {array}"
        )


def trained(device: str, mode: str, folder: Path, *overrides: str) -> dict[str, Tensor]:
    """Train a few steps, and return weights, target and averages."""
    dropout = "model.network.dropout=0.1"
    given = [
        *TINY,
        f"mode={mode}",
        dropout,
        f"trainer.accelerator={device}",
        "callbacks.samples=null",
    ]
    if mode == "progdist":
        given.append(f"teacher={folder.parent / 'edm'}")
    config = composed("train", *given, *overrides)
    config.output = str(folder)
    consistency.train(config)
    content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    averages = next(s["averages"] for s in content["callbacks"].values() if "averages" in s)
    return content["state_dict"] | {
        f"{n}.{k}": v for n, a in averages.items() for k, v in a.items()
    }


def apart(one: dict[Any, Tensor], other: dict[Any, Tensor]) -> float:
    """The largest difference of two states, relative to the largest weight of each tensor."""
    assert one.keys() == other.keys()
    return max(
        float((w - other[n]).abs().max() / w.abs().max().clamp_min(1e-3)) for n, w in one.items()
    )


def modes(device: str, *names: str) -> None:
    """Compare runs of four steps without dropout, in which the compiled masks differ, with uncompiled ones."""
    with tempfile.TemporaryDirectory() as folder:
        short = ["trainer.max_steps=4", "model.network.dropout=0.0"]
        trained(device, "edm", Path(folder) / "edm", *short)
        for mode in names or MODES:
            runs = [
                trained(
                    device, mode, Path(folder) / f"{mode}_{choice}", f"compile={choice}", *short
                )
                for choice in ("false", "true")
            ]
            print(f"{mode}: weights {apart(*runs):.1e} apart after 4 steps")
            assert apart(*runs) < 1e-3, mode


class Losses(Callback):
    """The loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.values.append(float(outputs["loss"]))


def law(device: str, mode: str = "ct") -> None:
    """Compare a run on the law with exact answers, with a target and an N(k) that moves, with an uncompiled one.

    Losses, weights and errors against the law are at most one rounding of float32 a step apart.
    """
    assert device == "cpu", "the oracle draws its points there"
    losses, states, errors = [], [], []
    for compilation in (False, True):
        seen = Losses()
        known = oracle.ORACLES[mode]
        module = oracle.train(mode, known, LAW_STEPS, seen, compilation=compilation)
        assert (module.online.network._compiled_call_impl is not None) is compilation
        losses.append(dict(enumerate(torch.tensor(seen.values))))
        states.append(module.state_dict())
        reached, _ = oracle.measured(oracle.sampling(module), known)
        errors.append(dict(enumerate(torch.tensor(reached))))
    found = [apart(*losses), apart(*states), apart(*errors)]
    numbers = "losses {:.1e}, weights {:.1e}, errors {:.1e}".format(*found)
    print(f"law, {mode}: {numbers} apart after {LAW_STEPS} steps")
    assert max(found) < LAW_STEPS * torch.finfo(torch.float32).eps


def resume(device: str) -> None:
    """Compare a compiled run of four steps, with dropout, with one that was resumed after two: the same bits."""
    with tempfile.TemporaryDirectory() as folder:
        given = ["compile=true", "mode.total_steps=4", "trainer.deterministic=true"]
        whole = trained(device, "ct", Path(folder) / "whole", *given, "trainer.max_steps=4")
        part = Path(folder) / "part"
        trained(device, "ct", part, *given, "trainer.max_steps=2")
        torch._dynamo.reset()
        resumed = trained(device, "ct", part, *given, f"resume={part}", "trainer.max_steps=4")
        print(f"resumed: weights {apart(whole, resumed):.1e} apart")
        assert apart(whole, resumed) == 0


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    checks = {"golden": golden, "modes": modes, "law": law, "resume": resume}
    checks[sys.argv[1]](*sys.argv[2:])

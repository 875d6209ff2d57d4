"""The device of a process, its threads, and the precision of the network."""

import os
import sys

import torch
from torch import nn

from consistency.errors import UserError, require
from consistency.runtime.ranks import this_launch
from consistency.tensors import Denoise

PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Types that the network computes in, by the names of `trainer.precision`."""

BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
"""Instructions for bfloat16 of x86 and ARM, by torch's names."""

CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
COMPILING = ("default", *CUDA_GRAPHS, "max-autotune-no-cudagraphs")
"""The modes of `torch.compile`, and those that replay CUDA graphs."""


def chosen_device(name: str, devices: int = 1, precision: str = "32-true") -> torch.device:
    """Return the device of that name; `auto` is the accelerator of this machine, else the CPU.

    Refuse more devices than this machine has, and a precision that the device lacks.
    """
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        got = f"device={name} ({str(error).splitlines()[0]})"
        raise UserError("a device of this machine", got, "use device=auto") from error
    names = [n for n in PRECISIONS if device.type != "cpu" or n != "16-mixed"]
    wanted = f"precision among {', '.join(names)} on {device.type}"
    require(precision in names, wanted, precision, "choose one")
    count = torch.accelerator.device_count()
    require(
        device.type == "cpu" or devices == 1 or (device.index is None and devices <= count),
        f"devices=1 to {count} on this machine, and a device without a number",
        f"devices={devices} device={device}",
        f"say devices={count} device={device.type}",
    )
    if precision.startswith("bf16"):
        warn_of_slow(device)
    return device


def warn_of_slow(device: torch.device) -> None:
    """Print a warning of bfloat16 on a CPU without instructions for it, which computes it through float32."""
    known = torch.cpu.get_capabilities()
    slow = device.type == "cpu" and not any(map(known.get, BFLOAT16))
    if slow and this_launch().first:
        text = "this CPU has no instructions for bfloat16 (AVX512-BF16, AMX, ARM BF16)"
        print(f"warning: {text}: precision=32-true is many times faster", file=sys.stderr)


def share_threads(device: torch.device, processes: int) -> None:
    """Give this process its share of the CPU's threads, unless OMP_NUM_THREADS sets their number."""
    if device.type == "cpu" and processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


def require_compiling(choice: bool | str) -> None:
    """Refuse an unknown value of `compile=`."""
    expected = f"compile among false, true, {', '.join(COMPILING)}"
    require(isinstance(choice, bool) or choice in COMPILING, expected, choice, "choose one")


def compile_in_place(network: nn.Module, choice: bool | str) -> None:
    """Compile the calls of a network as `compile=` says; its weights keep their names, and copies of it are not compiled.

    A CUDA graph overwrites its output in the next call: use the output before it, as `Denoiser` does.
    """
    require_compiling(choice)
    if choice:
        network.compile(mode=None if choice is True else choice)


def set_float32_matmul(precision: str) -> None:
    """Set the precision of matrix products and convolutions of float32 on a GPU: TF32 for `high`, float32 for `highest`."""
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"


def in_precision(denoise: Denoise, precision: str, device: torch.device) -> Denoise:
    """Return the denoiser with its network in that precision; the state of the sampler stays float32."""
    half = PRECISIONS[precision]
    return torch.autocast(device.type, dtype=half)(denoise) if half else denoise  # type: ignore[no-any-return]

"""Moments at which a step waits for the device: counted on a GPU, and on the CPU as reads of a tensor's value."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.equal, aten.nonzero, aten.is_nonzero, aten.masked_select}
METHODS = {Tensor.tolist, Tensor.numpy, Tensor.cpu}
ON_THE_CPU = (
    "torch/optim/",
    "training/optimizers.py",
    "consistency/data/",
    "torch/utils/data/",
    "logger_connector/result",
)
"""Code whose tensors are on the CPU on every machine: an optimizer's counts of steps, the order of the data, and the
numbers of the progress bar, which Lightning reads in every step.
"""

Places = list[str]


def _note(waits: "Waits") -> None:
    frame, stack = sys._getframe(2), list[str]()
    while frame is not None:
        stack.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    if not any(part in line for part in ON_THE_CPU for line in stack):
        source = str(Path("src", "consistency"))
        waits.places.append(next((line for line in stack if source in line), stack[0]))


class Methods(TorchFunctionMode):
    def __init__(self, waits: "Waits") -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in METHODS:
            _note(self.waits)
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __init__(self, waits: "Waits") -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in READS:
            _note(self.waits)
        return func(*args, **(kwargs or {}))


class Waits(Callback):
    """The places in the code at which the host waits for the device, from the start of each step to that of the next."""

    def __init__(self) -> None:
        self.places: Places = []
        self.steps: list[Places] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.steps.append([])
        self.places = self.steps[-1]

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count on a GPU by its driver's own report, otherwise the reads of values."""
        with ExitStack() as stack:
            if torch.cuda.is_available():
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("always")
                warnings.showwarning = self._warned
                torch.cuda.set_sync_debug_mode("warn")
                stack.callback(torch.cuda.set_sync_debug_mode, "default")
            else:
                stack.enter_context(Methods(self))
                stack.enter_context(Operators(self))
            yield

    def _warned(self, message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            self.places.append(f"{filename}:{lineno}")

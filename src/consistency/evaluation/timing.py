"""Speed: windows of repeated work, ratios of neighbouring ones, memory, and the peak rate of the machine."""

import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import conv2d

DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
"""Types that the network computes in, by the beginning of `trainer.precision`; the others are float32."""


def now(device: torch.device) -> float:
    """Return the clock in seconds, after the work that the device has been given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


class Window:
    """Repetitions of some work during about `seconds`, at least one.

    window = Window(3.0, device)
    while window.open():
        work()
    """

    def __init__(self, seconds: float, device: torch.device) -> None:
        self.limit, self.device = seconds, device
        self.count, self.seconds, self._began = -1, 0.0, 0.0

    def open(self) -> bool:
        """Return whether to do the work once more; the last call reads the clock."""
        self.count += 1
        if self.count == 0:
            self._began = now(self.device)
        elif time.perf_counter() - self._began >= self.limit:
            self.seconds = now(self.device) - self._began
            return False
        return True

    def rate(self, each: int) -> float:
        """Return the images a second, of `each` in every repetition."""
        return self.count * each / self.seconds


def repeated(work: Callable[[], object], each: int, seconds: float, device: torch.device) -> float:
    """Return the images a second of one window of `work`, of `each` images."""
    window = Window(seconds, device)
    while window.open():
        work()
    return window.rate(each)


@dataclass
class Speed:
    """The measured speed of some work on batches.

    flops: counted floating-point operations of a batch, two for a multiplication and its addition. memory: peak in MiB.
    rates, baseline_rates: images a second of each window, the two in turn.
    """

    batch: int
    flops: int = 0
    memory: float = 0.0
    rates: list[float] = field(default_factory=list)
    baseline_rates: list[float] = field(default_factory=list)

    def figures(self, device: torch.device, precision: str) -> dict[str, Any]:
        """Return all figures by name and unit, with the machine's peak rates, which are measured here."""
        rate, peaks = spread(self.rates), peak_rates(device, precision, seconds=1.0)
        achieved = self.flops / self.batch * rate["median"] / 1e9
        figures: dict[str, Any] = {"batch": self.batch, "images_per_second": rate}
        if self.baseline_rates:
            figures["baseline_images_per_second"] = spread(self.baseline_rates)
            figures["ratio"] = spread(ratios(self.rates, self.baseline_rates))
        return figures | {
            "peak_memory_mib": self.memory,
            "gflop_per_image": self.flops / self.batch / 1e9,
            "gflop_per_second": achieved,
            "peak_gflop_per_second": peaks,
            "share_of_peak": achieved / max(peaks.values()),
        }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return median, minimum, maximum and the values themselves."""
    middle, ends = statistics.median(values), {"min": min(values), "max": max(values)}
    return {"median": middle, **ends, "windows": list(values)}


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Return ours / theirs of all neighbours in the sequence ours[0], theirs[0], ours[1], theirs[1], ..."""
    pairs = [*zip(ours, theirs, strict=False), *zip(ours[1:], theirs, strict=False)]
    return [a / b for a, b in pairs]


def begin_peak_memory(device: torch.device) -> None:
    """Forget the peak so far; on a CPU only Linux can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """Return the peak in MiB: allocated by torch on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def peak_rates(device: torch.device, precision: str, seconds: float) -> dict[str, float]:
    """Return the best GFLOP/s of a matrix product and of a 3x3 convolution in the type of a `trainer.precision`."""
    dtype = DTYPES.get(precision.split("-")[0], torch.float32)
    cpu = device.type == "cpu"
    side, batch, channels, pixels = (1536, 8, 128, 32) if cpu else (8192, 64, 256, 64)
    a = torch.randn(side, side, dtype=dtype, device=device)
    x = torch.randn(batch, channels, pixels, pixels, dtype=dtype, device=device)
    kernel = torch.randn(channels, channels, 3, 3, dtype=dtype, device=device)
    x, kernel = (tensor.to(memory_format=torch.channels_last) for tensor in (x, kernel))
    work: dict[str, tuple[Callable[[], object], int]] = {
        "matrix product": (lambda: a @ a, 2 * side**3),
        "3x3 convolution": (
            lambda: conv2d(x, kernel, padding=1),
            18 * batch * channels**2 * pixels**2,
        ),
    }
    best = {}
    for name, (run, flops) in work.items():
        run()
        until, rate = now(device) + seconds, 0.0
        while now(device) < until or rate == 0:
            rate = max(rate, repeated(run, 1, 0, device))
        best[name] = rate * flops / 1e9
    return best


def machine(device: torch.device) -> dict[str, str | int]:
    """Describe the machine: processor, cores, threads, device and torch."""
    processor = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
        processor = next(models, processor)
    accelerated = device.type == "cuda"
    return {
        "processor": f"{processor}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if accelerated else device.type,
        "torch": torch.__version__,
    }

"""Speed: windows of repeated work in turn with a baseline's, memory, and the peak rate of the machine."""

import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import conv2d

DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
"""Types that the network computes in, by the beginning of `trainer.precision`; the others are float32."""

Work = Callable[[], object]
RATE = "images a second"


def now(device: torch.device) -> float:
    """Return the clock in seconds, after the work that the device has been given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


class Window:
    """Repetitions of some work during about `seconds`, at least one: `while window.open(): work()`."""

    def __init__(self, seconds: float, device: torch.device) -> None:
        self.limit, self.device, self.count = seconds, device, -1
        self.seconds = self.processor_seconds = 0.0

    def open(self) -> bool:
        """Return whether to do the work once more; the last call reads the clocks."""
        self.count += 1
        if self.count == 0:
            self.seconds, self.processor_seconds = -now(self.device), -time.process_time()
        elif time.perf_counter() + self.seconds >= self.limit:
            self.seconds += now(self.device)
            self.processor_seconds += time.process_time()
            return False
        return True


@dataclass
class Speed:
    """The measured speed of some work on batches, and of a baseline in windows in turn.

    flops: counted floating-point operations of a batch, two for a multiplication and its addition. memory: peak in MiB.
    """

    batch: int
    flops: int = 0
    memory: float = 0.0
    windows: list[Window] = field(default_factory=list)
    baseline: list[Window] = field(default_factory=list)

    def measured(
        self, count: int, seconds: float, device: torch.device, baseline: Callable[[], Work] | None
    ) -> Iterator[bool]:
        """Measure `count` windows; at every step of the iterator the caller does the work once.

        baseline: builds the work of the windows in between, after the first one and its peak of memory.
        """
        begin_peak_memory(device)
        other: Work | None = None
        for _ in range(count):
            self.windows.append(window := Window(seconds, device))
            while window.open():
                yield False
            self.memory = self.memory or peak_memory(device)
            if baseline is not None:
                if other is None:
                    other = baseline()
                    other()
                self.baseline.append(window := Window(seconds, device))
                while window.open():
                    other()

    def figures(self, device: torch.device, precision: str, seconds: float) -> dict[str, Any]:
        """Return all figures by name and unit, with the machine's peak rates, which are measured here."""
        ours, theirs = ([w.seconds / w.count for w in ws] for ws in (self.windows, self.baseline))
        rate = spread([self.batch / s for s in ours])
        figures: dict[str, Any] = {"batch, images": self.batch, RATE: rate}
        if theirs:
            figures["baseline, images a second"] = spread([self.batch / s for s in theirs])
            figures["ratio to the baseline"] = spread(ratios(theirs, ours))
        if theirs and device.type == "cpu":
            busy = (
                [w.processor_seconds / w.count for w in ws] for ws in (self.baseline, self.windows)
            )
            figures["ratio of processor time"] = spread(ratios(*busy))
        peaks = peak_rates(device, precision, seconds)
        achieved = self.flops / self.batch * rate["median"] / 1e9
        return figures | {
            "peak memory, MiB": self.memory,
            "operations an image, GFLOP": self.flops / self.batch / 1e9,
            "achieved, GFLOP/s": achieved,
            **peaks,
            "achieved, share of the better": achieved / max(peaks.values()),
        }


def figure(value: float) -> str:
    """Three digits and the thousands apart: 0.0123, 1.23, 1,230,000."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"


def table(title: str, figures: Mapping[str, Any]) -> str:
    """Return figures by name as text: numbers, spreads, and groups of them."""
    rows: list[tuple[str, str, str]] = []

    def add(name: str, value: Any) -> None:
        if not isinstance(value, dict):
            rows.append((name, value if isinstance(value, str) else figure(value), ""))
        elif "median" in value:
            ends = f"{figure(value['min'])} .. {figure(value['max'])} of {len(value['values'])}"
            rows.append((name, figure(value["median"]), ends))
        elif "ms" in value:
            busy = f"{value['share']:>6.1%}, {figure(value['processor_ms'])} ms of processor"
            rows.extend([(name, figure(value["ms"]), busy)] if value["ms"] else [])
        else:
            rows.append((name, "", ""))
            for inner, each in value.items():
                add(f"  {inner}", each)

    for name, value in figures.items():
        add(name, value)
    width = max(len(name) for name, *_ in rows)
    return "\n".join([title, *(f"{n:<{width}}{v:>12}  {c}".rstrip() for n, v, c in rows)])


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return median, minimum, maximum and the values themselves."""
    ends = {"min": min(values), "max": max(values)}
    return {"median": statistics.median(values), **ends, "values": list(values)}


def ratios(baseline: Sequence[float], ours: Sequence[float]) -> list[float]:
    """Return baseline / ours of all neighbours in the sequence ours[0], baseline[0], ours[1], baseline[1], ..."""
    pairs = [*zip(baseline, ours, strict=False), *zip(baseline, ours[1:], strict=False)]
    return [a / b for a, b in pairs]


def begin_peak_memory(device: torch.device) -> None:
    """Forget the peak so far; on a CPU only Linux can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """Return the peak in MiB: allocated by torch on a GPU, resident in the process on a CPU; NaN on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def peak_rates(device: torch.device, precision: str, seconds: float) -> dict[str, float]:
    """Return the best GFLOP/s of a matrix product and of a 3x3 convolution in the type of a `trainer.precision`.

    On a CPU the clock is the main thread's own, so that other programs lower no peak.
    """
    dtype = DTYPES.get(precision.split("-")[0], torch.float32)
    clock: Callable[[], float] = partial(now, device)
    side, batch, channels, pixels = 8192, 64, 256, 64
    if device.type == "cpu":
        threads, clock = torch.get_num_threads(), time.thread_time
        side, batch, channels, pixels = round(768 * threads**0.5), 4 * threads, 256, 16
    a = torch.randn(side, side, dtype=dtype, device=device)
    shapes = (batch, channels, pixels, pixels), (channels, channels, 3, 3)
    x, kernel = (torch.randn(shape, dtype=dtype, device=device) for shape in shapes)
    x, kernel = (tensor.to(memory_format=torch.channels_last) for tensor in (x, kernel))
    product, convolution = 2 * side**3, 18 * batch * channels**2 * pixels**2
    work: dict[str, tuple[Work, int]] = {
        "peak of a matrix product, GFLOP/s": (lambda: a @ a, product),
        "peak of a 3x3 convolution, GFLOP/s": (lambda: conv2d(x, kernel, padding=1), convolution),
    }
    best = {}
    for name, (run, flops) in work.items():
        run()
        window, shortest = Window(seconds, device), float("inf")
        while window.open():
            began = clock()
            run()
            shortest = min(shortest, clock() - began)
        best[name] = flops / shortest / 1e9
    return best


def machine(device: torch.device) -> dict[str, str | int]:
    """Describe the machine: processor, threads, device and torch."""
    processor = platform.processor()
    with suppress(OSError, IndexError):
        processor = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].splitlines()[0]
    return {
        "processor": f"{processor}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
    }

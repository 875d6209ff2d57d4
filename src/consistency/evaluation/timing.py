"""The time that the parts of a measurement take."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Sums of seconds by name. On a GPU it records events in the stream and waits for nothing."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._spans: dict[str, list[Callable[[], float]]] = defaultdict(list)

    @contextmanager
    def running(self, name: str, device: torch.device) -> Iterator[None]:
        """Count the body under `name`."""
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._spans[name].append(lambda: first.elapsed_time(last) / 1000)
            return
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self._spans[name].append(lambda: seconds)

    def read(self) -> dict[str, float]:
        """Return the seconds since the start or the last reading, by name and in `total`."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds = {name: sum(span() for span in spans) for name, spans in self._spans.items()}
        seconds["total"] = now - self._start
        self._spans.clear()
        self._start = now
        return seconds

"""Where the time of a measurement goes."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """Sums the seconds of what runs under a name. On a GPU it notes events in the stream, so that nothing waits."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._spans: dict[str, list[Callable[[], float]]] = defaultdict(list)

    @contextmanager
    def running(self, name: str, device: torch.device) -> Iterator[None]:
        """Counts what happens inside under `name`."""
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

    def timed(
        self, name: str, call: Callable[..., Any], device: torch.device
    ) -> Callable[..., Any]:
        """The same function, counted under `name`."""

        def counted(*arguments: Any) -> Any:
            with self.running(name, device):
                return call(*arguments)

        return counted

    def read(self) -> dict[str, float]:
        """Seconds by name since the start or the last reading, and `total` of all that passed."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        found = {name: sum(span() for span in spans) for name, spans in self._spans.items()}
        found["total"] = now - self._start
        self._spans.clear()
        self._start = now
        return found

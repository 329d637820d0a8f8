"""What training costs, measured from outside: the time of optimizer steps and the peak of memory."""

from __future__ import annotations

import contextlib
import platform
import resource
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


@contextlib.contextmanager
def step_times() -> Iterator[list[float]]:
    """Seconds between the optimizer steps inside, of whatever optimizer; the first step is not among them."""
    times: list[float] = []
    last: float | None = None

    def note(*_: Any) -> None:
        nonlocal last
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        now = time.perf_counter()
        if last is not None:
            times.append(now - last)
        last = now

    handle = register_optimizer_step_post_hook(note)
    try:
        yield times
    finally:
        handle.remove()


def peak_memory() -> float:
    """MiB: the accelerator's largest allocation; without one, the largest resident size of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if platform.system() == "Darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

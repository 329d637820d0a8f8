"""Measuring variants against each other in one process: interleaved rounds, ratios within a round, saved bytes."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

# glibc gives freed blocks back to the system and faults them in again at the next step; on virtual machines that costs
# more than arithmetic and hides what is measured. Both sides of every ratio run under the same settings.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "34359738368",
    "MALLOC_TOP_PAD_": "268435456",
}


def keep_freed_memory() -> None:
    """Start the program again under an allocator that keeps freed memory, unless it already does."""
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})


def interleave(
    steps: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[], float], warmup: int = 2
) -> dict[str, list[float]]:
    """Call every step once per round, in rotating order; returns seconds, one number per step and round."""
    names = list(steps)
    for name in names:
        for _ in range(warmup):
            steps[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                start = clock()
                steps[name]()
                synchronise()
                seconds[name].append(clock() - start)
            gc.collect()
    finally:
        gc.enable()
    return seconds


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(seconds: Mapping[str, list[float]], name: str, reference: str) -> dict[str, float]:
    """Median and quartiles of the ratios within rounds: drift of the machine cancels."""
    ratios = sorted(a / b for a, b in zip(seconds[name], seconds[reference], strict=True))
    low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"median": round(median, 4), "low": round(low, 4), "high": round(high, 4)}


def saved_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes of the distinct storages that autograd keeps for backward after ``forward``, parameters left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would make a cycle with its graph

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    total = sum(kept.values())
    del output
    return total


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return function(*args, **(kwargs or {}))


def operations(step: Callable[[], Any]) -> int:
    """How many of torch's operations ``step`` calls, the same at every run; views and casts count."""
    step()
    with _Counter() as counter:
        step()
    return counter.calls


def cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def machine(threads: int, clock: str) -> dict[str, Any]:
    """What a reader needs to place the numbers."""
    import peft
    import transformers

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "clock": clock,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }

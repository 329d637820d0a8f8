"""Processes that are forks of one in which the heavy libraries are loaded: as real as others, without the wait."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# What is loaded before the first fork.
WARM = [
    *("moa.library", "moa.cli", "moa.training.sft", "moa.report.spans", "moa.spans.evidence.calibration"),
    *("moa.spans.evidence.influence", "moa.spans.search.plans", "moa.studies.conduct", "moa.studies.report"),
    *("transformers.models.llama.modeling_llama", "scipy.optimize", "torch.distributed.fsdp"),
    *("moa.cli.train", "moa.cli.bench", "moa.cli.spans", "frozen"),
]


def context() -> ForkServerContext:
    """Makes such processes; the first one in a run of the tests waits for the imports."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(WARM)
    return found


def started(function: Callable[..., object], *arguments: Any, log: Path) -> BaseProcess:
    """A process that calls a function of a module; what it prints goes into the file ``log``."""
    process = context().Process(target=_logged, args=(function, arguments, log))
    process.start()
    return process


def _logged(function: Callable[..., object], arguments: tuple[Any, ...], log: Path) -> None:
    out = log.open("w", buffering=1)
    os.dup2(out.fileno(), 1)
    os.dup2(out.fileno(), 2)
    sys.stdout = sys.stderr = out
    function(*arguments)

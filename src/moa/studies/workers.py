"""Processes that run cells: a fresh one per cell, so that no cell sees another's memory, seeds or caches.

They are forked from a server that has the libraries loaded already. A worker ends with the process that asked for it,
also if that is killed, so that a study that is started again does not meet its own past.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from moa.studies.runner import Job, run

_THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Failure:
    """A cell that could not be run; ``log`` has what it printed and the trace."""

    message: str
    log: Path


def run_all(jobs: Mapping[str, Job], logs: Path, workers: int) -> Iterator[tuple[str, dict[str, Any] | Failure]]:
    """Run jobs by name, ``workers`` at a time, each on one thread; yields them as they finish.

    No more processes are there than run, so that a stop loses nothing but what is running.
    """
    logs.mkdir(parents=True, exist_ok=True)
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(kind)
    if kind == "forkserver":
        context.set_forkserver_preload([__name__])
    left = iter(jobs.items())
    running: dict[Any, tuple[str, Any]] = {}
    try:
        with _one_thread():
            while True:
                while len(running) < workers and (entry := next(left, None)):
                    receiver, sender = context.Pipe(duplex=False)
                    process = context.Process(target=_work, args=(entry[1], _log(logs, entry[0]), sender))
                    process.start()
                    sender.close()
                    running[receiver] = (entry[0], process)
                if not running:
                    return
                for receiver in connection.wait(list(running)):
                    name, process = running.pop(receiver)
                    yield name, _outcome(receiver, process, _log(logs, name))
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()


def _log(logs: Path, name: str) -> Path:
    return logs / f"{name}.log"


def _outcome(receiver: Any, process: Any, log: Path) -> dict[str, Any] | Failure:
    with receiver:
        try:
            outcome: dict[str, Any] | Failure = receiver.recv()
        except EOFError:
            process.join()
            outcome = Failure(f"the process ended with exit code {process.exitcode} (out of memory?)", log)
    process.join()
    return outcome


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Libraries read these when they are loaded, in the server that workers are forked from."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(_THREADS)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _work(job: Job, log: Path, sender: Any) -> None:
    import torch

    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an orderly end, which leaves no semaphores behind
    torch.set_num_threads(1)
    with log.open("w", encoding="utf-8", buffering=1) as file, sender:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        try:
            sender.send(run(job))
        except Exception as error:
            traceback.print_exc(file=file)
            sender.send(Failure(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}", log))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

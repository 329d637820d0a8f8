"""Where cells run: joblib hands them out, here or on a Ray cluster, and each gets a fresh process on one thread.

A process of its own lets no cell see another's memory, seeds or caches, and one that is killed costs its own cell. On
a cluster a lost machine's cells start again on another: their actors are restarted and take their tasks with them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from moa.choices import check_choice, first_line
from moa.extras import extra

with extra("bench"):
    from joblib import Parallel, delayed, parallel_config

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Engine:
    """What runs cells.

    Attributes:
        kind: one of `ENGINES`.
        workers: cells at a time; None: one here, or one for every processor of the cluster.
        address: of the cluster, as ``ray.init`` takes it; None: the one of the environment, or a new one here.

    Raises:
        ValueError: another ``kind``.
        MissingExtra: ray is not installed.
    """

    kind: str = "local"
    workers: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        check_choice("engine", self.kind, ENGINES)
        if self.kind == "ray":
            with extra("ray"):
                import ray  # noqa: F401 - it is missed now, not after the first half of the work

    @contextmanager
    def entered(self) -> Iterator[int]:
        """Parallel calls inside run on it; yields how many cells at a time."""
        if self.kind == "local":
            with parallel_config("threading"):  # each thread waits for its cell's process
                yield self.workers or 1
            return
        with extra("ray"):
            import ray
            from ray.util.joblib import register_ray
        register_ray()
        ray.init(address=self.address, ignore_reinit_error=True, log_to_driver=False)
        # A share of a processor: the actors of a lost machine find room on those that are left.
        actors = {"max_restarts": -1, "max_task_retries": -1, "num_cpus": 0.1, "scheduling_strategy": "SPREAD"}
        with parallel_config("ray", ray_remote_args=actors):
            yield self.workers or int(ray.cluster_resources()["CPU"])


class Failure(NamedTuple):
    """A task that could not be run; ``log`` has what it printed and the trace."""

    message: str
    log: Path


class Task(NamedTuple):
    """``work``, of a function of a module, is called in a fresh process; what it prints goes into ``log``."""

    work: partial[Any]
    log: Path


def run_all(tasks: list[Task], engine: Engine, told: Callable[[], object]) -> list[Any]:
    """What tasks return, or a `Failure`; ``told`` is called after each.

    All machines need the same files under the same paths; relative ones count from this process's folder.
    """

    class Telling(Parallel):  # type: ignore[misc]
        def print_progress(self) -> None:
            told()

    if not tasks:
        return []
    with engine.entered() as workers:
        found = Telling(n_jobs=max(2, workers) if engine.kind == "ray" else workers, batch_size=1)(
            delayed(_in_process)(task, Path.cwd()) for task in tasks
        )
    return list(found)


def run_whole(tasks: list[Task], engine: Engine, told: Callable[[], object]) -> list[Any]:
    """As `run_all`, for tasks of which none is worth anything without the others.

    Raises:
        RuntimeError: one of them failed; has the name of its log.
    """
    found = run_all(tasks, engine, told)
    for failure in found:
        if isinstance(failure, Failure):
            raise RuntimeError(f"{failure.log.stem}: {failure.message} ({failure.log})")
    return found


def _in_process(task: Task, folder: Path) -> Any:
    """What a worker does with a task: start a process, wait for it, keep what it found."""
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(kind)
    if kind == "forkserver":
        context.set_forkserver_preload([__name__, task.work.func.__module__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(task, folder, sender), daemon=True)
    process.start()
    sender.close()
    with receiver:
        try:
            outcome = receiver.recv()
        except EOFError:
            process.join()
            killed = " (out of memory?)" if process.exitcode == -signal.SIGKILL else ""
            outcome = Failure(f"the process ended with exit code {process.exitcode}{killed}", task.log)
    process.join()
    return outcome


def _work(task: Task, folder: Path, sender: Any) -> None:
    import torch

    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an orderly end, which leaves no semaphores behind
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    os.chdir(folder)
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with task.log.open("w", encoding="utf-8", buffering=1) as file, sender:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        try:
            sender.send(task.work())
        except Exception as error:
            traceback.print_exc(file=file)
            sender.send(Failure(f"{type(error).__name__}: {first_line(error)}", task.log))


def _end_with_parent() -> None:
    """A study that was killed and is started again does not meet its own past."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)

"""Command lines of a few seconds that can be run again and again in forks of a warm process, under one fault each."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import resource
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

import warm
import yaml
from safetensors import safe_open

from moa.files import LOCK

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree", "os.listdir"}
TIMES = {"seconds", "cpu_seconds", "step_seconds", "peak_memory_mib", "versions", "finished"}  # of a study's results

STUDY = """
methods: {lora: {}, soft-moa: {size: 4, length: 2}}
budgets: [3000]
tolerance: 0.2
claims: [{better: soft-moa, than: lora}]
data: {train_rows: 32, validation_rows: 4, test_rows: 4, max_length: 64}
tuning: {learning_rates: [1.0e-3, 1.0e-2], seeds: [7]}
training: {dtype: float32}
seeds: [0]
snapshots: 2
steps: 4
batch_size: 4
"""
SPANS = """
data: {source: "tasks:lines"}
lengths: [96, 192]
extend: [320]
validate_length: 256
items: 3
validate_items: 1
max_new_tokens: 4
signal: 0.0
dtype: float32
step: 32
slopes: 5
intervals: 3
sink: 16
block: 16
density: [0.4, 0.6]
"""


@dataclass
class Command:
    """A command line under torture.

    Attributes:
        arguments: of ``moa``.
        folder: where it writes.
        result: what of its folder must be the same.
        again: what is added to the command line when it has begun before.
        before: what its folder holds at the start.
        seconds, events: of the last run, how long it took and how often it touched the file system.
    """

    arguments: list[str]
    folder: Path
    result: Callable[[Path], Any]
    again: Callable[[Path], list[str]] = lambda folder: []
    before: Path | None = None
    seconds: float = field(default=0.0, init=False)
    events: int = field(default=0, init=False)

    def reset(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.before:
            shutil.copytree(self.before, self.folder)

    @cached_property
    def unbroken(self) -> Unbroken:
        """A run without a fault, made once for all tests; the folder is left as it was at the start."""
        self.reset()
        with watched(self.folder) as most:
            finish(self)
        found = Unbroken(self.result(self.folder), self.seconds, self.events, *most)
        self.reset()
        return found


class Unbroken(NamedTuple):
    """What a run is like that nothing happens to.

    Attributes:
        result: of its folder.
        seconds: that it took.
        events: touches of the file system.
        bytes: the most that its folder holds at any time, in whole blocks.
        largest: bytes of the largest file at any time.
    """

    result: Any
    seconds: float
    events: int
    bytes: int
    largest: int


def in_blocks(files: list[os.stat_result]) -> int:
    """Bytes that files take on a disk."""
    return sum(one.st_blocks * 512 for one in files)


def files_in(folder: Path) -> list[os.stat_result]:
    """What there is to say of every file; they may come and go meanwhile."""
    found = []
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):
            found.append(file.stat())
    return [one for one in found if stat.S_ISREG(one.st_mode)]


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """Yields the most bytes that the folder holds in all and in one file, known at the end."""
    most, done = [0, 0], Event()

    def watch() -> None:
        while not done.wait(0.02):
            with suppress(FileNotFoundError):  # of a folder that goes while it is listed
                found = files_in(folder)
                most[0] = max(most[0], in_blocks(found))
                most[1] = max([most[1], *(one.st_size for one in found)])

    watcher = Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        done.set()
        watcher.join()


def work(arguments: list[str], kill_at: int | None, largest: int | None, count: Any) -> None:
    """Run a command line in this process; it kills itself at a given touch of the file system."""
    real = multiprocessing.get_context
    multiprocessing.get_context = lambda kind=None: real("fork")  # a study's cells are as warm as this process
    owner = os.getpid()

    def touch(event: str, _: Any) -> None:
        if event in EVENTS and os.getpid() == owner:
            count.value += 1
            if count.value == kill_at:
                os.kill(owner, signal.SIGKILL)

    from moa.cli import app

    sys.addaudithook(touch)
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    app(arguments, prog_name="moa")


def run(
    command: Command, *, after: float | None = None, at: int | None = None, largest: int | None = None
) -> tuple[int, str]:
    """Run it in a fork of the warm process; gives its exit code and what it said.

    Args:
        command: what.
        after: kill it after so many seconds.
        at: it is killed at so many touches of the file system.
        largest: no file may grow beyond so many bytes.
    """
    count = warm.context().Value("L", 0, lock=False)
    arguments = [*command.arguments, *command.again(command.folder)]
    log = command.folder.with_name(f"{command.folder.name}.log")
    log.unlink(missing_ok=True)
    process = warm.started(work, arguments, at, largest, count, log=log)
    began = time.monotonic()
    process.join(after)
    if process.is_alive():
        process.kill()
        process.join()
    if process.exitcode == -signal.SIGKILL:
        wait_for_cells(command.folder)
    command.seconds, command.events = time.monotonic() - began, count.value
    return process.exitcode or 0, log.read_text() if log.exists() else ""


def check_whole(folder: Path) -> None:
    """No file has its own name before it is whole."""
    for file in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if hidden or not file.is_file() or "work" in file.relative_to(folder).parts:
            continue
        if file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".yaml":
            assert isinstance(yaml.safe_load(file.read_text()), dict), file
        elif file.suffix == ".jsonl":
            for line in file.read_text().split("\n")[:-1]:
                json.loads(line)
        elif file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                assert tensors.keys()


def without(tree: Any, names: set[str]) -> Any:
    if isinstance(tree, dict):
        return {key: without(value, names) for key, value in tree.items() if key not in names}
    return [without(value, names) for value in tree] if isinstance(tree, list) else tree


def trained(folder: Path) -> Any:
    names = ("adapter_model.safetensors", "adapter_config.json", "recipe.yaml", "README.md", "progress.json")
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return {name: (folder / name).read_bytes() for name in names} | {"log": log, "rest": sorted(os.listdir(folder))}


def compared(folder: Path) -> Any:
    cells = {file.name: without(json.loads(file.read_text()), TIMES) for file in (folder / "cells").glob("*.json")}
    return cells | {"results": without(json.loads((folder / "results.json").read_text()), TIMES)}


def files(*patterns: str) -> Callable[[Path], Any]:
    return lambda folder: {
        file.name: file.read_bytes() for pattern in patterns for file in sorted(folder.rglob(pattern))
    }


def wait_for_cells(folder: Path) -> None:
    """Those of a study that was killed end by themselves; here they hold its lock, since they are forks of it."""
    if (folder / LOCK).exists():
        with (folder / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)


def finish(command: Command) -> None:
    """Run it to its end, without a fault."""
    code, said = run(command)
    assert code == 0, said[-3000:]


def prepared(folder: Path, tiny_base: Path, tiny_rows: Path) -> dict[str, Command]:
    """`moa train`, `bench`, `spans profile` and `spans search`, which write below ``folder``."""
    (folder / "study.yaml").write_text(STUDY)
    (folder / "spans.yaml").write_text(SPANS)
    asked = [{"instruction": f"{n} - 1 = ?", "output": str(n - 1)} for n in range(20, 28)]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    rows, base = ["--data.train", str(tiny_rows)], ["--base", str(tiny_base)]
    steps = ["--max_steps", "6", "--save_steps", "2", "--log_steps", "1", "--batch_size", "2", "--dtype", "float32"]
    spans = ["--base", str(tiny_base), "--output", str(folder / "spans")]

    def resume(run: Path) -> list[str]:
        return ["--resume"] if (run / "recipe.yaml").exists() else []

    train = ["train", "embedded-soft-moa", *base, *rows, *steps, "--output", str(folder / "run")]
    study = [*base, *rows, "--data.test", str(folder / "asked.jsonl"), "--output", str(folder / "study")]
    found = {
        "train": Command(train, folder / "run", trained, resume),
        "bench": Command(["bench", str(folder / "study.yaml"), *study], folder / "study", compared),
        "profile": Command(
            ["spans", "profile", str(folder / "spans.yaml"), *spans], folder / "spans", files("*.safetensors")
        ),
        "search": Command(["spans", "search", str(folder / "spans.yaml"), *spans], folder / "spans", files("*.json*")),
    }
    calibrate = Command(["spans", "calibrate", *found["profile"].arguments[2:]], folder / "spans", files())
    for step, name in ((calibrate, "calibrated"), (found["profile"], "profiled")):
        step.reset()
        finish(step)
        shutil.copytree(folder / "spans", folder / name)
        found["search" if name == "profiled" else "profile"].before = folder / name
    return found

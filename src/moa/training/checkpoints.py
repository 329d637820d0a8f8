"""Checkpoints that are there whole or not at all.

A checkpoint is written in `WRITING` and then renamed, which is atomic, so a process that is killed in between leaves
nothing that looks like one. `last_complete` still looks inside, since copies and full disks know no such rule.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from moa.files import read_json
from moa.training.stops import DiskFull

WRITING = ".writing"
WEIGHTS = "adapter_model.safetensors"
_NEEDED = ("trainer_state.json", "adapter_config.json", WEIGHTS)
_OPTIMIZER = ("optimizer*", "global_step*")  # the second is DeepSpeed's
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(folder: Path) -> list[Path]:
    """Folders named ``checkpoint-N``, lowest step first."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is called ``checkpoint-N``."""
    return _NAME.fullmatch(folder.name) is not None


def last_complete(folder: Path) -> Path | None:
    """The checkpoint of the highest step that can be resumed from, or None."""
    return next((path for path in reversed(checkpoints(folder)) if _is_complete(path)), None)


def _is_complete(checkpoint: Path) -> bool:
    try:
        if not all((checkpoint / name).stat().st_size for name in _NEEDED):
            return False
        if not any(path.stat().st_size for pattern in _OPTIMIZER for path in checkpoint.glob(pattern)):
            return False
        read_json(checkpoint / "trainer_state.json")
        with safe_open(checkpoint / WEIGHTS, framework="pt"):  # checks the header against the file's size
            return True
    except (OSError, ValueError, SafetensorError):
        return False


def publish(folder: Path, name: str, *, keep: int) -> None:
    """Give the checkpoint ``name`` that lies in ``folder/.writing`` its final place; delete all but ``keep``."""
    final = folder / name
    if final.exists():  # incomplete: a complete one would have been resumed from
        shutil.rmtree(final)
    (folder / WRITING / name).rename(final)
    (folder / WRITING).rmdir()
    delete_old(folder, keep)


def delete_old(folder: Path, keep: int) -> None:
    """Delete all checkpoints but the last ``keep``."""
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


@contextmanager
def room_on_disk(folder: Path, what: str) -> Iterator[None]:
    """Turn the several errors that writing to a full disk raises into one.

    Raises:
        DiskFull: naming the folder, what was being saved, and the checkpoint that is left to resume from.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_full(error, folder):
            raise
        shutil.rmtree(folder / WRITING, ignore_errors=True)
        last = last_complete(folder)
        kept = f"{last} is intact: free some space and run again with --resume" if last else "nothing was saved before"
        raise DiskFull(f"no space left in {folder} while saving {what}; {kept}") from error


def _is_full(error: Exception, folder: Path) -> bool:
    """Whether a failed write was for want of space; torch reports that as a RuntimeError about file positions."""
    wants = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a quota, a limit of the process
    if getattr(error, "errno", None) in wants or any(os.strerror(number) in str(error) for number in wants):
        return True
    # Those of torch.save; the last of them is C++'s own, for what is written when the file is closed.
    writer = any(name in str(error) for name in ("PytorchStreamWriter", "inline_container.cc", "iostream"))
    return writer or shutil.disk_usage(folder).free < 2**20

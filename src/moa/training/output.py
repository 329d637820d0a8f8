"""The folder of a run: who may write into it, and how the finished adapter gets there."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

from moa.files import LOCK
from moa.spans import SpanPlan
from moa.training.callbacks import LOG_NAME
from moa.training.checkpoints import WEIGHTS, WRITING, checkpoints, delete_old, last_complete
from moa.training.progress import PROGRESS_NAME
from moa.training.recipe import FILE_NAME, Recipe
from moa.training.spans import FILE_NAME as PLAN_NAME

# What a run, its trackers and the demo leave in their folder, besides checkpoints.
_WRITTEN = (
    *("adapter_config.json", WEIGHTS, "README.md", FILE_NAME, LOG_NAME, PROGRESS_NAME, PLAN_NAME),
    *("accuracy_before.json", "accuracy_after.json", "runs"),
)
# Settings that may differ between a run and its continuation. Of a plan its content counts, not its path.
_FREE = {"output", "epochs", "max_steps", "save_steps", "keep_checkpoints", "log_steps", "report_to", "spans"}


def check_output(recipe: Recipe, *, resume: bool, overwrite: bool) -> Path | None:
    """Decide about the output folder without touching it.

    Returns:
        The checkpoint to resume from, or None to start at the first step.

    Raises:
        ValueError: the folder is in use, or holds no run to resume.
    """
    folder = Path(recipe.output).expanduser()
    if folder.is_file():
        raise ValueError(f"output={str(folder)!r} is a file, not a folder")
    ours = (folder / FILE_NAME).is_file()
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    if resume:
        if not ours:
            raise ValueError(f"nothing to resume: {folder} holds no run (there is no {FILE_NAME} in it)")
        return _to_resume_from(folder)
    if folder.is_dir() and any(entry.name != LOCK for entry in folder.iterdir()):
        if not ours:
            raise ValueError(
                f"output folder {folder} is not empty and was not made by moa; choose another with --output"
            )
        if not overwrite:
            raise ValueError(f"output folder {folder} holds a run: continue it with --resume, or give --overwrite")
    return None


def clear_output(folder: Path, checkpoint: Path | None, keep: int) -> None:
    """Make the folder, without what an earlier run left after ``checkpoint``; whatever else lies in it stays.

    Of the checkpoints up to there ``keep`` stay: a run that was killed just after it saved one deleted no other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / WRITING, ignore_errors=True)
    found = checkpoints(folder)
    for beyond in found[found.index(checkpoint) + 1 :] if checkpoint else found:
        shutil.rmtree(beyond)
    delete_old(folder, keep)
    if checkpoint is None:
        for path in (folder / name for name in _WRITTEN):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def move_into(folder: Path, written: Path) -> None:
    """Move each file of ``written`` to its place in ``folder``; the configuration last, as it makes an adapter."""
    for file in sorted(written.iterdir(), key=lambda file: file.name == "adapter_config.json"):
        file.replace(folder / file.name)
    written.rmdir()
    written.parent.rmdir()


def _to_resume_from(folder: Path) -> Path | None:
    """The last complete checkpoint; None if the run was stopped before its first one."""
    checkpoint = last_complete(folder)
    if checkpoint is None and checkpoints(folder):
        raise ValueError(f"no checkpoint in {folder} is complete; give --overwrite to start over")
    if checkpoint is None and (folder / WEIGHTS).exists():
        raise ValueError(f"the run in {folder} is finished and its checkpoints are gone: there is nothing to resume")
    return checkpoint


def check_same(recipe: Recipe, plan: SpanPlan | None, folder: Path) -> None:
    """Raise ValueError unless the run in ``folder`` has the same settings, as far as they matter for its result."""
    file = folder / FILE_NAME
    saved = Recipe.load(file)
    now = asdict(recipe)
    for key, before in asdict(saved).items():
        if key not in _FREE and before != now[key]:
            raise ValueError(
                f"cannot resume with another setting: {key} was {before} in {file}, now it is {now[key]}; "
                f"give --overwrite or another --output to start over"
            )
    before = SpanPlan.load(folder / PLAN_NAME) if (folder / PLAN_NAME).is_file() else None
    if before != plan:
        raise ValueError(
            f"cannot resume with another setting: the run learned under "
            f"{'no span plan' if before is None else f'the span plan in {folder / PLAN_NAME}'}, "
            f"spans={recipe.spans!r} now names {'none' if plan is None else 'another one'}; "
            f"give --overwrite or another --output to start over"
        )

"""Where a run stands, for whoever looks at it while it goes on: one small file beside the log."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moa.files import write_text
from moa.training.checkpoints import room_on_disk

PROGRESS_NAME = "progress.json"


class Progress(TrainerCallback):
    """Keeps ``progress.json``: ``step``, ``steps``, and what is known of every router.

    Args:
        folder: of the run.
        routers: asked for one JSON object per router.
    """

    def __init__(self, folder: Path, routers: Callable[[], list[dict[str, Any]]]):
        self.path = folder / PROGRESS_NAME
        self.routers = routers

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        text = json.dumps({"step": state.global_step, "steps": state.max_steps, "routers": self.routers()})
        with room_on_disk(self.path.parent, self.path.name):
            write_text(self.path, text)

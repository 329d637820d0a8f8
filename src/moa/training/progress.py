"""Where a run stands, for whoever looks at it while it goes on: one small file beside the log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moa.files import write_text
from moa.training.checkpoints import room_on_disk
from moa.training.routing import RouterCallback

PROGRESS_NAME = "progress.json"


class Progress(TrainerCallback):
    """Keeps ``progress.json``: ``step``, ``steps``, and what `RouterCallback.seen` says of every router.

    Args:
        folder: of the run.
        router: what counts the gates, or None for an adapter without a router.
    """

    def __init__(self, folder: Path, router: RouterCallback | None):
        self.path = folder / PROGRESS_NAME
        self.router = router

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        routers = self.router.seen if self.router else []
        text = json.dumps({"step": state.global_step, "steps": state.max_steps, "routers": routers})
        with room_on_disk(self.path.parent, self.path.name):
            write_text(self.path, text)

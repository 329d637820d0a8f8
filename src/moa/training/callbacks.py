"""What happens around the steps: a log file that survives resuming, and a Ctrl-C that loses nothing."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moa.training.checkpoints import room_on_disk

LOG_NAME = "training_log.jsonl"


class LogFile(TrainerCallback):
    """Keeps ``training_log.jsonl`` equal to the trainer's history, which a resumed run gets from its checkpoint."""

    def __init__(self, folder: Path):
        self.path = folder / LOG_NAME

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            lines = "".join(json.dumps(entry) + "\n" for entry in state.log_history)
            with room_on_disk(self.path.parent, self.path.name):
                self.path.write_text(lines, encoding="utf-8")


class StopOnInterrupt(TrainerCallback):
    """First Ctrl-C: finish the step, save, stop. Second: stop at once. A context manager around training.

    Attributes:
        asked: whether there was one.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> StopOnInterrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nfinishing this step and saving; press Ctrl-C again to stop at once", flush=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = True
            control.should_training_stop = True

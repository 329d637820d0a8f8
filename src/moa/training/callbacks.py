"""What happens around the steps: a log that survives resuming, a Ctrl-C that loses nothing, data that stay the same."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from array import array
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from moa.data.tokens import Tokens
from moa.files import read_json, write_text
from moa.training.checkpoints import room_on_disk

LOG_NAME = "training_log.jsonl"


class LogFile(TrainerCallback):
    """Keeps ``training_log.jsonl`` equal to the trainer's history, which a resumed run gets from its checkpoint."""

    def __init__(self, folder: Path):
        self.path = folder / LOG_NAME

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_log |= state.global_step >= state.max_steps  # the last losses, too

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            lines = "".join(json.dumps(entry) + "\n" for entry in state.log_history)
            with room_on_disk(self.path.parent, self.path.name):
                write_text(self.path, lines)


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


class SameData(TrainerCallback, ExportableState):
    """Keeps in every checkpoint what it was trained on, since files change under their names.

    Attributes:
        digest: of the tokens of all rows, in their order.
    """

    def __init__(self, digest: str):
        self.digest = digest

    @classmethod
    def of(cls, examples: Iterable[Tokens]) -> SameData:
        """For these rows."""
        found = hashlib.sha256()
        for prompt, answer in examples:
            found.update(array("q", [len(prompt), *prompt, len(answer), *answer]).tobytes())
        return cls(found.hexdigest()[:16])

    def state(self) -> dict[str, Any]:
        return {"args": {"digest": self.digest}, "attributes": {}}

    def check(self, checkpoint: Path) -> None:
        """Raise ValueError if the checkpoint was trained on other data. One that does not say on which may go on."""
        saved = read_json(checkpoint / "trainer_state.json")
        before = saved.get("stateful_callbacks", {}).get(type(self).__name__)
        if before is not None and before["args"]["digest"] != self.digest:
            raise ValueError(
                f"cannot resume on other data: the rows of data.train, or their tokens, are not those of {checkpoint}; "
                f"give --overwrite or another --output to start over"
            )

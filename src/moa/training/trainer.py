"""TRL's SFTTrainer, careful: atomic checkpoints, a stop at the first loss that is not finite, no pickled arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moa.extras import extra
from moa.training.checkpoints import WRITING, last_complete, publish, room_on_disk
from moa.training.stops import Diverged, TrainingStopped

with extra("train"):
    from trl import SFTTrainer


class Trainer(SFTTrainer):
    """As its base class; ``keep_checkpoints`` is how many stay on disk."""

    def __init__(self, *args: Any, keep_checkpoints: int, **kwargs: Any):
        self.keep_checkpoints = keep_checkpoints
        self._writing = False
        super().__init__(*args, **kwargs)

    @property
    def folder(self) -> Path:
        """The run's output."""
        return Path(self.args.output_dir)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """On one CPU process, the loss from the logits of answers alone.

        There TRL projects every position to the vocabulary, prompts and padding too, and masks afterwards: on a small
        model nearly half of a step. Logs lack its entropy and token count then.
        """
        alone = self.accelerator.num_processes == 1 and inputs["labels"].device.type == "cpu"
        if return_outputs or not alone or getattr(self, "aux_loss_enabled", False):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        after, wanted = _answers(inputs.pop("labels"))
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, states: (states[0][after],))
        try:
            logits = model(**inputs, use_cache=False).logits
        finally:
            hook.remove()
        right = (logits.detach().argmax(-1) == wanted).sum().item() / max(len(wanted), 1)
        self._metrics["train" if model.training else "eval"]["mean_token_accuracy"].append(right)
        number = torch.as_tensor(len(wanted) if num_items_in_batch is None else num_items_in_batch)
        return cross_entropy(logits.float(), wanted, reduction="sum") / number.clamp(min=1)  # 0 without any answer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            loss = super().training_step(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise TrainingStopped(
                f"out of accelerator memory at step {self.state.global_step + 1}: lower batch_size (and raise "
                f"gradient_accumulation_steps by as much), or set gradient_checkpointing to true"
            ) from error
        if not torch.isfinite(loss).all():
            self._diverged(f"the loss is {loss.item()}")
        return loss

    def _diverged(self, what: str) -> None:
        last = last_complete(self.folder)
        kept = f"the last good checkpoint is {last}" if last else "there was no checkpoint yet"
        raise Diverged(
            f"{what} at step {self.state.global_step + 1} of {self.state.max_steps}: training stopped and {kept}. "
            f"Try a lower learning_rate, a longer warm-up, or max_grad_norm=1; look for odd rows in the data"
        )

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Also exempt vectors (the prompt expert's head gates), as the official training does."""
        vectors = {name for name, parameter in model.named_parameters() if parameter.ndim < 2}
        return [name for name in super().get_decay_parameter_names(model) if name not in vectors]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Without the summary at the end, which is of this process: a run may have had several."""
        if "train_loss" not in logs:
            super().log(logs, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.folder / WRITING) if self._writing else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not torch.isfinite(parameter).all():
                self._diverged(f"{name} is not finite")
        checkpoint = f"checkpoint-{self.state.global_step}"
        self._writing = True
        try:
            with room_on_disk(self.folder, checkpoint):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    publish(self.folder, checkpoint, keep=self.keep_checkpoints)
        finally:
            self._writing = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The adapter alone: the base class adds the tokenizer and its arguments as a pickle, which nobody reads.

        Without ``save_embedding_layers=False`` PEFT asks the hub, at every checkpoint, how large the base's vocabulary
        is. No expert touches the embeddings.
        """
        self.model.save_pretrained(
            output_dir, state_dict=state_dict, is_main_process=self.args.should_save, save_embedding_layers=False
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None beside the checkpoints; `moa.training.card` writes the adapter's."""


def _answers(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where an answer's token comes next, (batch, tokens) bool, and these tokens, (answers,), of (batch, tokens)."""
    following = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    after = following != -100
    return after, following[after]

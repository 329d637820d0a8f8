"""`train`: one recipe in, one adapter folder out."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import TrainerState, set_seed

from moa.adapters.config import MoAConfig
from moa.adapters.presets import adapter_config
from moa.data import example_tokens, form_of, load_rows
from moa.data.tokens import Tokens, check_template
from moa.extras import extra
from moa.files import alone
from moa.settings import save
from moa.spans import SpanPlan
from moa.training.base import load_base, resolve_dtype
from moa.training.callbacks import LogFile, SameData, StopOnInterrupt
from moa.training.card import write_card
from moa.training.checkpoints import WEIGHTS, WRITING, room_on_disk
from moa.training.output import check_output, check_same, clear_output, move_into
from moa.training.progress import Progress
from moa.training.recipe import FILE_NAME, Recipe
from moa.training.routing import log_router
from moa.training.spans import FILE_NAME as PLAN_NAME
from moa.training.spans import plan_from, under
from moa.training.stops import Interrupted
from moa.training.trainer import Trainer

with extra("train"):
    import datasets
    from trl import SFTConfig

# Renamed in transformers 5; the old name still works there, with a warning.
_NEW_NAME = "activation_checkpointing"
_CHECKPOINTING = _NEW_NAME if _NEW_NAME in SFTConfig.__dataclass_fields__ else "gradient_checkpointing"


def train(recipe: Recipe, *, resume: bool = False, overwrite: bool = False, start: Path | None = None) -> Path:
    """Fine-tune a base model and save the adapter.

    Args:
        recipe: what to do.
        resume: continue the run in ``recipe.output`` from its last complete checkpoint. The result is the same as
            without the interruption.
        overwrite: replace the run in ``recipe.output``.
        start: folder of an adapter of the same configuration that is trained further; None: a fresh one.

    Returns:
        The output folder: ``adapter_config.json``, ``adapter_model.safetensors``, ``README.md``, ``recipe.yaml``,
        ``training_log.jsonl`` and the last checkpoints.

    Raises:
        ValueError: something in the recipe, the data, the base model or the output folder cannot be used.
        TrainingStopped: the loss diverged, the disk is full, or the user pressed Ctrl-C.
    """
    checkpoint = check_output(recipe, resume=resume, overwrite=overwrite)
    folder = Path(recipe.output).expanduser()
    plan = plan_from(recipe.spans)
    rows = [row for source in recipe.data.train for row in _rows(recipe, source)]
    recipe = replace(recipe, data=replace(recipe.data, template=form_of(rows, recipe.data.template)))
    if resume:
        check_same(recipe, plan, folder)
    model, tokenizer = load_base(recipe.base, recipe.dtype, four_bit=recipe.four_bit)
    check_template(tokenizer, recipe.data.template, recipe.base)
    with under(model, plan):
        pass  # whether the plan fits, before anything is written
    examples = _examples(rows, recipe, tokenizer)
    interrupt, data = StopOnInterrupt(), SameData.of(examples)
    if checkpoint:
        data.check(checkpoint)
    if start is not None:
        model = PeftModel.from_pretrained(model, str(start), is_trainable=True)
    trainer = _trainer(recipe, model, tokenizer, _dataset(examples, recipe), [LogFile(folder), interrupt, data])
    mixture = isinstance(trainer.model.active_peft_config, MoAConfig)  # a recipe may name a method of PEFT's own
    router = log_router(trainer) if mixture else None
    trainer.add_callback(Progress(folder, lambda: router.seen if router else []))
    if trainer.is_world_process_zero():
        _tell_sizes(trainer, examples, recipe.data.max_length)
    with alone(folder) if trainer.is_world_process_zero() else nullcontext():
        if trainer.is_world_process_zero():
            if check_output(recipe, resume=resume, overwrite=overwrite) != checkpoint:
                raise ValueError(f"another process has written into {folder} meanwhile: give the command again")
            _begin(recipe, plan, folder, checkpoint)
            if resume:
                print(f"resuming from {checkpoint}" if checkpoint else "no checkpoint yet: starting at the first step")
        trainer.accelerator.wait_for_everyone()
        with interrupt, under(model, plan):
            if checkpoint is None or not _take_finished(trainer, recipe, checkpoint):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if interrupt.asked and trainer.state.global_step < trainer.state.max_steps:
            raise Interrupted(
                f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}, which is saved in "
                f"{folder}; run the same command with --resume to continue"
            )
        _save(trainer, recipe, folder)
    return folder


def _begin(recipe: Recipe, plan: SpanPlan | None, folder: Path, checkpoint: Path | None) -> None:
    """Make the folder this run's."""
    clear_output(folder, checkpoint, recipe.keep_checkpoints)
    save(recipe, folder / FILE_NAME)
    if plan is not None:
        plan.save(folder / PLAN_NAME)


def _rows(recipe: Recipe, source: str) -> list[dict[str, Any]]:
    return load_rows(source, split="train", limit=recipe.data.limit, seed=recipe.seed)


def _examples(rows: Sequence[dict[str, Any]], recipe: Recipe, tokenizer: Any) -> list[Tokens]:
    """The tokens of every row.

    Raises:
        ValueError: a row that the template cannot take, or ``max_length`` leaves no answer.
    """
    examples = [example_tokens(tokenizer, row, recipe.data.template) for row in rows]
    if not any(len(example.prompt) < recipe.data.max_length for example in examples):
        raise ValueError(
            f"data.max_length={recipe.data.max_length} is shorter than every prompt: no answer is left to learn"
        )
    return examples


def _dataset(examples: Sequence[Tokens], recipe: Recipe) -> datasets.Dataset:
    """What TRL takes as tokenised: ids cut to ``max_length`` and where the answer is, where one is left."""
    longest = recipe.data.max_length
    return datasets.Dataset.from_list(
        [
            {
                "input_ids": [*prompt, *answer][:longest],
                "completion_mask": ([0] * len(prompt) + [1] * len(answer))[:longest],
            }
            for prompt, answer in examples
            if len(prompt) < longest
        ]
    )


def _trainer(recipe: Recipe, model: Any, tokenizer: Any, dataset: datasets.Dataset, callbacks: list[Any]) -> Trainer:
    if recipe.report_to != "none" and importlib.util.find_spec(recipe.report_to) is None:
        raise ValueError(f"report_to={recipe.report_to!r} needs that package: pip install {recipe.report_to}")
    half = resolve_dtype(recipe.dtype) is torch.bfloat16
    arguments = SFTConfig(
        output_dir=str(Path(recipe.output).expanduser()),
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup_ratio if recipe.warmup_steps is None else recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.beta1,
        adam_beta2=recipe.beta2,
        max_grad_norm=recipe.max_grad_norm,
        seed=recipe.seed,
        data_seed=recipe.seed,
        bf16=half,
        **{_CHECKPOINTING: recipe.gradient_checkpointing},
        save_strategy="steps",
        save_steps=recipe.save_steps,
        logging_steps=recipe.log_steps,
        logging_nan_inf_filter=False,
        report_to=recipe.report_to,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        max_length=None,  # `_dataset` has cut the rows
        completion_only_loss=True,
    )
    set_seed(recipe.seed)
    datasets.disable_progress_bars()
    try:
        return Trainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=None if isinstance(model, PeftModel) else adapter_config(recipe.adapter),
            callbacks=callbacks,
            keep_checkpoints=recipe.keep_checkpoints,
        )
    finally:
        datasets.enable_progress_bars()


def _tell_sizes(trainer: Trainer, examples: Sequence[Tokens], max_length: int) -> None:
    """Say what is trained on how much of the data."""
    dropped = sum(len(prompt) >= max_length for prompt, _ in examples)
    cut = sum(len(prompt) < max_length < len(prompt) + len(answer) for prompt, answer in examples)
    if dropped or cut:
        print(
            f"note: data.max_length={max_length} drops {dropped} of {len(examples)} rows, whose prompt alone is that "
            f"long, and cuts the answer of {cut} more"
        )
    trainable, everything = trainer.model.get_nb_trainable_parameters()
    print(f"trainable params: {trainable:,} || all params: {everything:,} || trainable: {trainable / everything:.2%}")


def _take_finished(trainer: Trainer, recipe: Recipe, checkpoint: Path) -> bool:
    """Whether the checkpoint is of the last step; then it is loaded. The trainer would take one step more."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if state.global_step < recipe.max_steps if recipe.max_steps else (state.epoch or 0.0) < recipe.epochs:
        return False
    trainer.state = state
    set_peft_model_state_dict(trainer.model, load_file(checkpoint / WEIGHTS))
    return True


def _save(trainer: Trainer, recipe: Recipe, folder: Path) -> None:
    """Write the adapter aside and move it into place, so that a full disk leaves no half adapter."""
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    written = folder / WRITING / "adapter"
    with room_on_disk(folder, "the adapter"):
        trainer.save_model(str(written))
        if trainer.is_world_process_zero():
            write_card(
                written,
                recipe,
                name=folder.resolve().name,
                steps=trainer.state.global_step,
                loss=losses[-1] if losses else math.nan,  # of a run by a version that logged less
                trainable=trainer.model.get_nb_trainable_parameters()[0],
                log=next((entry for entry in reversed(trainer.state.log_history) if "router/gate" in entry), None),
            )
            move_into(folder, written)

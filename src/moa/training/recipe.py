"""`Recipe`: everything a training run depends on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from moa.data.templates import TemplateName
from moa.recipes import find
from moa.settings import Several, knob, load, settings

FILE_NAME = "recipe.yaml"


@settings
class Data:
    """What is learned."""

    train: Several[str] = knob(
        lambda: ["tasks:all"],
        "sources: tasks:all, tasks:NAME[,NAME], a .json or .jsonl file, a folder, or owner/name on the hub",
    )
    limit: int | None = knob(
        None, "at most this many rows of each source, drawn at random (tasks: 1000 of each if empty)", ge=1
    )
    template: TemplateName = knob("alpaca", "prompt of rows with an instruction; chat is the base model's own template")
    max_length: int = knob(512, "tokens of prompt and answer together; longer rows are cut at the end", ge=8)


def _by_name(given: Any) -> Any:
    return {"preset": given} if isinstance(given, str) else given


Adapter = Annotated[dict[str, Any], BeforeValidator(_by_name, json_schema_input_type=str | dict[str, Any])]
"""The section of the adapter; a name alone is a preset's."""


@settings
class Recipe:
    """A training run."""

    base: str = knob(
        "embedded", "model: smollm2, a folder, a .gguf file, owner/name on the hub, embedded or embedded-long"
    )
    adapter: Adapter = knob(
        lambda: {"preset": "soft-moa"},
        "a preset's name, a preset with changes (adapter.preset, adapter.r, adapter.router.level, ...), "
        "or fields of MoAConfig (adapter.experts, adapter.router, adapter.gating)",
    )
    data: Data = knob(Data, "what is learned")
    output: str = knob("moa-adapter", "folder for the adapter, its checkpoints and its log")
    spans: str | None = knob(None, "span plan (JSON) whose attention the adapter learns under; copied beside it")

    epochs: float = knob(1.0, "passes over the data", gt=0)
    max_steps: int | None = knob(None, "stop after this many optimizer steps instead of epochs", ge=1)
    batch_size: int = knob(8, "rows per device and forward pass", ge=1)
    gradient_accumulation_steps: int = knob(1, "forward passes per optimizer step", ge=1)
    learning_rate: float = knob(7.5e-4, "peak learning rate of AdamW", gt=0, le=1)
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = knob(
        "cosine", "course of the learning rate after warm-up"
    )
    warmup_ratio: float = knob(0.0, "share of all steps with linear warm-up", ge=0, le=0.99)
    warmup_steps: int | None = knob(None, "number of warm-up steps, instead of the ratio", ge=0)
    weight_decay: float = knob(0.02, "of matrices only; biases and vectors have none", ge=0, le=1)
    beta1: float = knob(0.9, "AdamW: decay of the gradient's mean", ge=0, le=0.999999)
    beta2: float = knob(0.95, "AdamW: decay of the squared gradient's mean", ge=0, le=0.999999)
    max_grad_norm: float = knob(0.0, "clip the gradient to this norm; 0 does not clip", ge=0)
    seed: int = knob(0, "of initial weights, data order and dropout", ge=0, le=2**32 - 1)

    dtype: Literal["auto", "float32", "bfloat16"] = knob(
        "auto", "of the frozen base; adapters stay float32. auto: bfloat16 where the accelerator has it, else float32"
    )
    four_bit: bool = knob(False, "load the base in 4 bits (needs an accelerator and bitsandbytes)")
    gradient_checkpointing: bool = knob(False, "recompute activations in backward: less memory, slower")

    save_steps: int = knob(100, "steps between checkpoints; training resumes from the last one", ge=1)
    keep_checkpoints: int = knob(2, "how many checkpoints to keep", ge=1)
    log_steps: int = knob(10, "steps between lines of training_log.jsonl", ge=1)
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = knob("none", "experiment tracker")

    def __post_init__(self) -> None:
        if not self.data.train:
            raise ValueError("data.train=[] names no source to learn from")
        from moa.adapters.presets import adapter_config  # loads torch: after all that can be told without

        adapter_config(self.adapter)

    @classmethod
    def load(cls, source: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
        """A recipe from a file, or one that ships with moa by its name, with flags laid over it.

        Args:
            source: path of a YAML file, or a name from ``moa recipes ls``.
            overrides: as for `moa.settings.load`.

        Raises:
            FileNotFoundError: no such recipe; names near ones.
            ValueError: as `moa.settings.load`.
        """
        return load(cls, find(source), overrides)

"""`Recipe`: everything a training run depends on. The same dataclass is the YAML file and the command line's flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from moa.adapters.choices import nearest
from moa.data.templates import TEMPLATE_NAMES
from moa.recipes import find
from moa.training.adapter import adapter_config
from moa.training.knobs import Range, check, knob, knobs, numbers, parse

FILE_NAME = "recipe.yaml"

SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")
TRACKERS = ("none", "tensorboard", "trackio", "wandb")


@dataclass
class Data:
    """What is learned."""

    train: list[str] = field(
        default_factory=lambda: ["tasks:all"],
        metadata={
            "doc": "sources: tasks:all, tasks:NAME[,NAME], a .json or .jsonl file, a folder, or owner/name on the hub"
        },
    )
    limit: int | None = knob(
        None, "at most this many rows of each source, drawn at random (tasks: 1000 of each if empty)", within=Range(1)
    )
    template: str = knob(
        "alpaca", "prompt of rows with an instruction; chat is the base model's own template", choices=TEMPLATE_NAMES
    )
    max_length: int = knob(512, "tokens of prompt and answer together; longer rows are cut at the end", within=Range(8))


@dataclass
class Recipe:
    """A training run. `knobs` lists every key with its documentation."""

    base: str = knob(
        "embedded", "model: smollm2, a folder, a .gguf file, owner/name on the hub, embedded or embedded-long"
    )
    adapter: dict[str, Any] = field(
        default_factory=lambda: {"preset": "soft-moa"},
        metadata={
            "doc": "a preset's name, a preset with changes (adapter.preset, adapter.r, adapter.router.level, ...), "
            "or fields of MoAConfig (adapter.experts, adapter.router, adapter.gating)"
        },
    )
    data: Data = field(default_factory=Data)
    output: str = knob("moa-adapter", "folder for the adapter, its checkpoints and its log")
    spans: str | None = knob(None, "span plan (JSON) whose attention the adapter learns under; copied beside it")

    epochs: float = knob(1.0, "passes over the data", within=Range(0, open_low=True))
    max_steps: int | None = knob(None, "stop after this many optimizer steps instead of epochs", within=Range(1))
    batch_size: int = knob(8, "rows per device and forward pass", within=Range(1))
    gradient_accumulation_steps: int = knob(1, "forward passes per optimizer step", within=Range(1))
    learning_rate: float = knob(7.5e-4, "peak learning rate of AdamW", within=Range(0, 1, open_low=True))
    schedule: str = knob("cosine", "course of the learning rate after warm-up", choices=SCHEDULES)
    warmup_ratio: float = knob(0.0, "share of all steps with linear warm-up", within=Range(0, 0.99))
    warmup_steps: int | None = knob(None, "number of warm-up steps, instead of the ratio", within=Range(0))
    weight_decay: float = knob(0.02, "of matrices only; biases and vectors have none", within=Range(0, 1))
    beta1: float = knob(0.9, "AdamW: decay of the gradient's mean", within=Range(0, 0.999999))
    beta2: float = knob(0.95, "AdamW: decay of the squared gradient's mean", within=Range(0, 0.999999))
    max_grad_norm: float = knob(0.0, "clip the gradient to this norm; 0 does not clip", within=Range(0))
    seed: int = knob(0, "of initial weights, data order and dropout", within=Range(0, 2**32 - 1))

    dtype: str = knob(
        "auto",
        "of the frozen base; adapters stay float32. auto: bfloat16 where the accelerator has it, else float32",
        choices=("auto", "float32", "bfloat16"),
    )
    four_bit: bool = knob(False, "load the base in 4 bits (needs an accelerator and bitsandbytes)")
    gradient_checkpointing: bool = knob(False, "recompute activations in backward: less memory, slower")

    save_steps: int = knob(100, "steps between checkpoints; training resumes from the last one", within=Range(1))
    keep_checkpoints: int = knob(2, "how many checkpoints to keep", within=Range(1))
    log_steps: int = knob(10, "steps between lines of training_log.jsonl", within=Range(1))
    report_to: str = knob("none", "experiment tracker", choices=TRACKERS)

    def __post_init__(self) -> None:
        if isinstance(self.adapter, str):
            self.adapter = {"preset": self.adapter}
        if isinstance(self.data, Mapping):
            self.data = Data(**self.data)
        check(self)
        check(self.data, "data.")
        if not self.data.train:
            raise ValueError("data.train=[] names no source to learn from")
        adapter_config(self.adapter)

    @classmethod
    def load(cls, source: str | Path, overrides: Mapping[str, str] | None = None) -> Recipe:
        """A recipe from a file, or one that ships with moa by its name, with flags laid over it.

        Args:
            source: path of a YAML file, or a name from ``moa recipes ls``.
            overrides: dotted key to text, e.g. ``{"learning_rate": "1e-4", "adapter.r": "16"}``.

        Raises:
            FileNotFoundError: no such recipe; names near ones.
            ValueError: not YAML, an unknown key (the nearest valid one is offered), or a value outside of its range.
        """
        path = find(source)
        try:
            tree = numbers(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(tree, dict):
            raise ValueError(f"{path}: a recipe is a mapping of keys to values, not {type(tree).__name__}")
        for key, text in (overrides or {}).items():
            _override(tree, key, text)
        try:
            _check_keys(tree)
            return cls(**tree)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `Recipe` can be built from again."""
        return dataclasses.asdict(self)

    def save(self, folder: Path) -> None:
        """Write ``recipe.yaml`` with every key, so that the run can be repeated."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        (folder / FILE_NAME).write_text(text, encoding="utf-8")


def _override(tree: dict[str, Any], key: str, text: str) -> None:
    """Set a dotted key; ``adapter`` and its sections may be given by name alone before."""
    *sections, last = key.split(".")
    for section in sections:
        if isinstance(tree.get(section), str):
            tree[section] = {"preset" if section == "adapter" else "kind": tree[section]}
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ValueError(f"--{key}: {section!r} is not a section of the recipe")
    tree[last] = parse(text)


def _check_keys(tree: Mapping[str, Any]) -> None:
    """Raise ValueError for keys that no recipe has. The adapter section checks its own."""
    allowed = [name for name, _ in knobs(Recipe)]
    given = [key for key in tree if key != "data"]
    section = tree.get("data", {})
    if not isinstance(section, Mapping):
        raise ValueError(f"data={section!r} must be a section with keys of its own, such as data.train")
    for key in [*given, *(f"data.{key}" for key in section)]:
        if key not in allowed:
            raise ValueError(f"recipes have no key {key!r}{nearest(key, allowed)}; keys are {allowed}")

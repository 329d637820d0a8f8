"""`MoAConfig`: every knob of a mixture, checked when it is built.

A mixture is three ideas: *experts* (what sits where), a *router* (what the decision reads) and a *gating* rule (how
logits become weights). Each is a small dataclass; all of them survive a round trip through JSON.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig

from moa.adapters.architectures import Architecture
from moa.adapters.card import finish_card
from moa.adapters.experts import EXPERTS, ExpertConfig, LoraExpert, ParallelExpert, PromptExpert
from moa.adapters.gating import GATINGS, Soft
from moa.adapters.registration import MOA
from moa.adapters.routers import Router
from moa.choices import build, check_fields, check_flag, check_range, from_fields, numbers, plain

FORMAT_VERSION = 1


def _paper_experts() -> list[ExpertConfig]:
    return [LoraExpert(optional=True), PromptExpert(optional=True), ParallelExpert(optional=True)]


@dataclass
class MoAConfig(PeftConfig):
    """Configuration of a Mixture of Adapters (arXiv 2506.05928); the default is Soft MoA, `preset("soft-moa")`.

    Experts, router and gating may be given as objects, as dicts, or (gating) by name alone.

    Attributes:
        experts: what sits in every block, e.g. ``[LoraExpert(targets=["q", "v"], r=8), ParallelExpert(size=16)]``.
        router: one per block, shared by its experts. None: no router, every expert is simply added.
        gating: ``"soft"``, ``"softmax"``, ``"topk"``, ``"threshold"``, or e.g. ``Threshold(gamma_max=0.2)``.
        layers_to_transform: numbers of the blocks that get experts at all, as in PEFT: one, or a list; None: all.
        architecture: module paths that MoA does not find by itself, see `moa.adapters.architectures.Architecture`.
        modules_to_save: modules outside of the mixture to train and save in full, as in PEFT.
        trainable_token_indices: rows of the embedding to train, as in PEFT; TRL sets it for tokens of a chat template.
        init_weights: start as the base model, bit for bit. False draws every weight at random (for tests).
        format_version: version of this file format; newer files than this release reads are refused.

    Raises:
        ValueError: unknown kind or field, or a value outside of its range; the message names both.
    """

    target_modules: ClassVar[None] = None
    """PEFT reads this on every configuration; in MoA the experts name their own places."""

    experts: list[Any] = field(default_factory=_paper_experts)
    router: Any = field(default_factory=Router)
    gating: Any = field(default_factory=Soft)
    layers_to_transform: Any = None
    architecture: dict[str, Any] | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    init_weights: bool = True
    format_version: int = FORMAT_VERSION

    def __new__(cls, *args: Any, **given: Any) -> MoAConfig:
        """Refuse what ``__init__`` does not know before it can: PEFT takes its TypeError for a file of a newer PEFT,
        and drops the unknown keys with no more than a warning.
        """
        _check_format(given.get("format_version", FORMAT_VERSION))
        check_fields("MoAConfig", cls, given)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.task_type: str = self.task_type or "CAUSAL_LM"
        super().__post_init__()
        self.peft_type = MOA
        kinds = {kind: expert.config for kind, expert in EXPERTS.items()}
        if not isinstance(self.experts, list | tuple):
            raise ValueError(f"experts={self.experts!r} must be a list")
        self.experts = [build("experts", kinds, expert) for expert in self.experts]
        if not self.experts:
            raise ValueError("experts=[] leaves nothing to train; give at least one, e.g. LoraExpert()")
        self.gating = build("gating", GATINGS, self.gating)
        if self.router is not None and not isinstance(self.router, Router):
            self.router = from_fields("router", Router, self.router)
        if self.layers_to_transform is not None:
            self.layers_to_transform = numbers("layers_to_transform", self.layers_to_transform, "a block")
        if self.architecture is not None:
            from_fields("architecture", Architecture, self.architecture)
        check_flag("init_weights", self.init_weights)
        _check_saved(self.modules_to_save)
        _check_tokens(self.trainable_token_indices)

    def to_dict(self) -> dict[str, Any]:
        return {entry.name: plain(getattr(self, entry.name)) for entry in fields(self)}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's; besides, the model card that PEFT may have written there is completed."""
        super().save_pretrained(save_directory, **kwargs)
        finish_card(Path(save_directory), self)


def _check_saved(given: Any) -> None:
    if given is not None and not (isinstance(given, list | tuple) and all(isinstance(n, str) and n for n in given)):
        raise ValueError(f"modules_to_save={given!r} must be a list of names of modules, e.g. ['lm_head']")


def _check_tokens(given: Any) -> None:
    for rows in (given or {}).values() if isinstance(given, dict | None) else (given,):
        if rows:
            numbers("trainable_token_indices", rows, "a token")
        elif not isinstance(rows, list | tuple):
            raise ValueError(f"trainable_token_indices={given!r} must be a list of numbers of tokens, or None")


def _check_format(version: Any) -> None:
    check_range("format_version", version, low=1)
    if version > FORMAT_VERSION:
        raise ValueError(
            f"this adapter was saved in MoA format {version}, but this release reads formats up to {FORMAT_VERSION}: "
            "upgrade moa to load it"
        )

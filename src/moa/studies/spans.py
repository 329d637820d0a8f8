"""Attention spans as methods of a study: a plan for a share of the KV cache, or a press of kvpress, on a loaded model.

- ``searched``: calibrated, profiled, searched and validated as `moa spans` does it, once per seed and share.
- ``uniform``, ``two-class``, ``layers``: the baselines of `moa.spans.baselines`, made for the length of each test set,
  so that their share is right at every length; the last two by the influence that the search takes.
- ``kvpress:CLASS``: a press with its own defaults besides the ratio. It reads the prompt densely, then drops keys
  by what it saw, the question included, so it changes answers only, never a loss.

Everything that is measured on the way lies in a folder of the study, one for each seed, and is resumed from there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor

from moa.spans import SpanPlan
from moa.spans.baselines import far_influence, layer_only, two_class, uniform_window
from moa.spans.evidence.calibration import calibrate, load_items
from moa.spans.evidence.influence import influence
from moa.spans.evidence.sources import Source
from moa.spans.evidence.validation import validate
from moa.spans.search.plans import Limits, search
from moa.studies.methods import BUILT, DENSE, PRESS
from moa.studies.study import Calibration
from moa.training.spans import plan_from, under


@dataclass(frozen=True)
class Spans:
    """How a model attends while it is measured.

    Attributes:
        name: as `moa.studies.methods.Method.spans`; empty: as it is.
        share: of the KV cache.
        calibration: what plans are made from.
        folder: where what is measured for them is kept, for this seed.
        seed: of the calibration texts.
    """

    name: str
    share: float
    calibration: Calibration
    folder: Path
    seed: int

    @property
    def pressed(self) -> bool:
        """Whether it acts on answers alone."""
        return self.name.startswith(PRESS)

    def prepared(self, model: Any, tokenizer: Any) -> Callable[[int], SpanPlan | None]:
        """The plan by the length of what is read, in tokens; None: dense attention."""
        if self.name not in BUILT:
            fixed = None if self.name in ("", DENSE) or self.pressed else plan_from(self.name)
            return lambda length: fixed
        if self.name == "uniform":
            return lambda length: uniform_window(model, self.share, length)
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):  # cells of one seed share what is measured
            influences = self._influences(model, tokenizer)
            if self.name == "searched":
                plan = self._searched(model, influences)
                return lambda length: plan
        longest = influences[max(influences)]
        if self.name == "two-class":
            return lambda length: two_class(model, self.share, length, longest)
        return lambda length: layer_only(model, self.share, length, far_influence(longest))

    def _influences(self, model: Any, tokenizer: Any) -> dict[int, Tensor]:
        """Mean influence of every profiled length."""
        own, source = self.calibration, Source(self.calibration.source, seed=self.seed)
        wanted = {
            "calibration.jsonl": (dict.fromkeys(sorted(own.lengths), False), own.items),
            "held_out.jsonl": ({own.validate_length: True}, own.validate_items),
        }
        for name, (lengths, number) in wanted.items():
            path = self.folder / name
            calibrate(model, tokenizer, source, lengths, path, items=number, max_new_tokens=own.max_new_tokens)
        return {
            length: influence(
                model,
                load_items(self.folder / "calibration.jsonl", length),
                length,
                save_to=self.folder / f"influence-{length}.safetensors",
            ).mean()
            for length in sorted(own.lengths)
        }

    def _searched(self, model: Any, influences: dict[int, Tensor]) -> SpanPlan:
        path, length = self.folder / f"plan-{self.share:g}.json", self.calibration.validate_length
        if not path.exists():
            limits = Limits(density=self.share, step=self.calibration.step, extend=tuple(self.calibration.extend))
            front = search(influences, limits, save_to=self.folder / f"search-{self.share:g}.jsonl")
            items = load_items(self.folder / "held_out.jsonl", length)
            validate(model, [candidate.plan for candidate in front], items, length).plan.save(path)
        return SpanPlan.load(path)

    def applied(self, model: Any, plan: SpanPlan | None) -> AbstractContextManager[Any]:
        """The model attends so inside."""
        return press(self.name, self.share)(model) if self.pressed else under(model, plan)


def press(name: str, share: float) -> Any:
    """A press of kvpress that keeps ``share``; ``kvpress:AdaKVPress+SnapKVPress`` wraps one in another.

    Raises:
        ValueError: kvpress is not installed, or has no such class.
    """
    try:
        import kvpress  # no extra has it: it needs an older transformers
    except ImportError as error:
        raise ValueError(f"spans={name!r} needs kvpress, in an environment of its own: pip install kvpress") from error
    outer, _, inner = name.removeprefix(PRESS).partition("+")
    for wanted in filter(None, (outer, inner)):
        if not hasattr(kvpress, wanted):
            raise ValueError(f"spans={name!r}: kvpress has no {wanted!r}")
    made = getattr(kvpress, inner or outer)(compression_ratio=1 - share)
    return getattr(kvpress, outer)(made) if inner else made

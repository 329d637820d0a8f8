"""`SpanRecipe`: what all steps of `moa spans` depend on, as a YAML file and as flags; and where their files are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moa.choices import check_range
from moa.recipes import find
from moa.settings import Several, knob, load, save, settings

if TYPE_CHECKING:
    from moa.spans.evidence.sources import Source
    from moa.spans.search.plans import Limits


@settings
class Data:
    """What the model is asked about."""

    source: str = knob(
        "tasks:lines,needle,copying",
        "facts: (in the built-in text) or facts:FILE; tasks:NAME[,NAME] of lines, needle, copying; a .jsonl file; or "
        "owner/name[:configuration] on the hub",
    )
    split: str = knob("train", "split of a hub data set")
    context: str = knob("context", "field with the long text")
    question: str = knob("question", "field with the question about it")
    ask: str | None = knob(None, "one question for all rows, instead of a field")
    answer: str | None = knob(None, "field with the right answer, if there is one; it is only counted")
    start: str = knob("", "how every answer begins; given to the model")


@settings
class SpanRecipe:
    """A span search from the model to the plan."""

    base: str = knob("embedded", "model: smollm2, a folder, a .gguf file, owner/name on the hub, or embedded")
    output: str = knob("moa-spans", "folder for everything the steps write")
    evidence: str | None = knob(None, "folder with calibration items and influence; default: output")
    dtype: Literal["auto", "float32", "bfloat16"] = knob(
        "auto", "of the model. auto: bfloat16 where the accelerator has it, else float32"
    )
    seed: int = knob(0, "of the order of texts and of generated ones", ge=0, le=2**31 - 1)

    data: Data = knob(Data, "what the model is asked about")
    lengths: Several[int] = knob(lambda: [2048, 4096, 8192], "profiled lengths, tokens")
    extend: Several[int] = knob(lambda: [16384], "lengths bounded but not profiled, tokens")
    validate_length: int = knob(12288, "longer length on which plans are compared, tokens", ge=1)
    items: int = knob(50, "calibration items per profiled length", ge=1)
    validate_items: int = knob(20, "held-out items of the longer length", ge=1)
    max_new_tokens: int = knob(128, "longest answer of the dense model, tokens", ge=1)
    signal: float = knob(0.5, "least share of items that must need their far context; 0: any", ge=0, le=1)

    density: Several[float] = knob(
        lambda: [0.5], "greatest mean share of the dense KV cache; several, and each gets plans of its own"
    )
    floor: float = knob(0.9, "least mean density, as a share of density", ge=0, le=1)
    rules_per_layer: int = knob(2, "most distinct rules in a layer", ge=1, le=3)
    step: int = knob(1024, "tokens between offsets of the rule grid", ge=1)
    slopes: int = knob(9, "slopes of the rule grid, evenly from 0 to 1", ge=2)
    intervals: int = knob(2, "pieces of every loss's range; more make a finer front", ge=1)
    sink: int = knob(64, "first tokens that every head keeps", ge=1)
    block: int = knob(64, "granularity of spans, tokens", ge=1)
    seconds: float = knob(60.0, "longest time for one goal before pricing takes over", gt=0)

    def __post_init__(self) -> None:
        if not self.lengths:
            raise ValueError("lengths=[] names no length to profile")
        if not self.density:
            raise ValueError("density=[] names no share of the cache to keep")
        for share in self.density:
            check_range("density", share, low=0, high=1, open_low=True)
        for length in [*self.lengths, *self.extend]:
            if length < self.block or length % self.block:
                raise ValueError(f"length {length} is not a multiple of block={self.block}")
        if self.sink % self.block:
            raise ValueError(f"sink={self.sink} is not a multiple of block={self.block}")
        if self.validate_length <= max(self.lengths):
            longest = max(self.lengths)
            raise ValueError(f"validate_length={self.validate_length} must be longer than the profiled {longest}")

    @classmethod
    def load(cls, source: str, overrides: Mapping[str, Any] | None = None) -> SpanRecipe:
        """A recipe from a file or a shipped one's name, with flags laid over it.

        Raises:
            FileNotFoundError: no such recipe; names those that ship.
            ValueError: as `moa.settings.load`.
        """
        return load(cls, find(source, "span recipe"), overrides)

    def save(self, folder: Path) -> None:
        """Write every key beside what a step has made, so that the step can be repeated."""
        save(self, folder / "recipe.yaml")

    def source(self) -> Source:
        from moa.spans.evidence.sources import Source

        return Source(**dataclasses.asdict(self.data), seed=self.seed)

    def limits(self, density: float) -> Limits:
        from moa.spans.search.plans import Limits

        names = [entry.name for entry in dataclasses.fields(Limits) if hasattr(self, entry.name)]
        own = {"extend": tuple(self.extend), "density": density}
        return Limits(**{name: getattr(self, name) for name in names} | own)

    @property
    def folder(self) -> Path:
        return Path(self.output).expanduser()

    @property
    def profiled(self) -> Path:
        """Folder of items and influence, which plans of all densities share."""
        return self.folder if self.evidence is None else Path(self.evidence).expanduser()

    @property
    def items_file(self) -> Path:
        return self.profiled / "calibration.jsonl"

    @property
    def held_out_file(self) -> Path:
        return self.profiled / "held_out.jsonl"

    def influence_file(self, length: int) -> Path:
        return self.profiled / "influence" / f"length-{length}.safetensors"

    def plans(self, density: float) -> PlanFolder:
        return PlanFolder(self.folder / f"density-{density:g}")


@dataclass(frozen=True)
class PlanFolder:
    """Where the plans of one density are."""

    path: Path

    @property
    def search_file(self) -> Path:
        return self.path / "search.jsonl"

    @property
    def validation_file(self) -> Path:
        return self.path / "validation.jsonl"

    @property
    def plan_file(self) -> Path:
        return self.path / "span_plan.json"

    @property
    def report_file(self) -> Path:
        return self.path / "report.html"

    def plan(self, place: int) -> Path:
        return self.path / f"plan-{place:02}.json"

    def front(self) -> list[Path]:
        """Files of the plans that the search has found."""
        return sorted(self.path.glob("plan-*.json"), key=lambda file: (len(file.name), file.name))

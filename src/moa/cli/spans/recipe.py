"""`SpanRecipe`: what all steps of `moa spans` depend on, as a YAML file and as flags; and where their files are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from moa.adapters.choices import check_range, nearest
from moa.spans.evidence.sources import Source
from moa.spans.search.plans import Limits
from moa.training.knobs import Range, check, knob, knobs, numbers, parse

FOLDER = Path(str(files("moa.recipes"))) / "spans"


@dataclass
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


@dataclass
class SpanRecipe:
    """A span search from the model to the plan."""

    base: str = knob("embedded", "model: smollm2, a folder, a .gguf file, owner/name on the hub, or embedded")
    output: str = knob("moa-spans", "folder for everything the steps write")
    evidence: str | None = knob(None, "folder with calibration items and influence; default: output")
    dtype: str = knob(
        "auto",
        "of the model. auto: bfloat16 where the accelerator has it, else float32",
        choices=("auto", "float32", "bfloat16"),
    )
    seed: int = knob(0, "of the order of texts and of generated ones", within=Range(0, 2**31 - 1))

    data: Data = field(default_factory=Data)
    lengths: list[int] = field(
        default_factory=lambda: [2048, 4096, 8192], metadata={"doc": "profiled lengths, tokens", "within": None}
    )
    extend: list[int] = field(
        default_factory=lambda: [16384], metadata={"doc": "lengths bounded but not profiled, tokens"}
    )
    validate_length: int = knob(12288, "longer length on which plans are compared, tokens", within=Range(1))
    items: int = knob(50, "calibration items per profiled length", within=Range(1))
    validate_items: int = knob(20, "held-out items of the longer length", within=Range(1))
    max_new_tokens: int = knob(128, "longest answer of the dense model, tokens", within=Range(1))
    signal: float = knob(0.5, "least share of items that must need their far context; 0: any", within=Range(0, 1))

    density: list[float] = field(
        default_factory=lambda: [0.5],
        metadata={"doc": "greatest mean share of the dense KV cache; several, and each gets plans of its own"},
    )
    floor: float = knob(0.9, "least mean density, as a share of density", within=Range(0, 1))
    rules_per_layer: int = knob(2, "most distinct rules in a layer", within=Range(1, 3))
    step: int = knob(1024, "tokens between offsets of the rule grid", within=Range(1))
    slopes: int = knob(9, "slopes of the rule grid, evenly from 0 to 1", within=Range(2))
    intervals: int = knob(2, "pieces of every loss's range; more make a finer front", within=Range(1))
    sink: int = knob(64, "first tokens that every head keeps", within=Range(1))
    block: int = knob(64, "granularity of spans, tokens", within=Range(1))
    seconds: float = knob(60.0, "longest time for one goal before pricing takes over", within=Range(0, open_low=True))

    def __post_init__(self) -> None:
        if isinstance(self.data, Mapping):
            self.data = Data(**self.data)
        check(self)
        check(self.data, "data.")
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
    def load(cls, source: str, overrides: Mapping[str, str] | None = None) -> SpanRecipe:
        """A recipe from a file or a shipped one's name, with flags laid over it.

        Raises:
            FileNotFoundError: no such recipe; names those that ship.
            ValueError: not YAML, an unknown key (the nearest valid one is offered), or a value outside of its range.
        """
        path = _find(source)
        try:
            tree = numbers(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(tree, dict) or not isinstance(tree.setdefault("data", {}), dict):
            raise ValueError(f"{path}: a recipe is a mapping of keys to values, and its data section is one, too")
        for key, text in (overrides or {}).items():
            section, _, name = key.rpartition(".")
            (tree["data"] if section == "data" else tree)[name if section == "data" else key] = parse(text)
        allowed = [name for name, _ in knobs(cls)]
        for key in [*(key for key in tree if key != "data"), *(f"data.{key}" for key in tree["data"])]:
            if key not in allowed:
                raise ValueError(f"{path.name}: there is no key {key!r}{nearest(key, allowed)}; keys are {allowed}")
        try:
            return cls(**tree)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from None

    def save(self, folder: Path) -> None:
        """Write every key beside what a step has made, so that the step can be repeated."""
        folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)
        (folder / "recipe.yaml").write_text(text, encoding="utf-8")

    def source(self) -> Source:
        return Source(**dataclasses.asdict(self.data), seed=self.seed)

    def limits(self, density: float) -> Limits:
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
        return sorted(self.path.glob("plan-*.json"))


def shipped() -> list[str]:
    """Names of the span recipes that ship with moa."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def _find(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if source in shipped():
        return FOLDER / f"{source}.yaml"
    raise FileNotFoundError(
        f"there is no span recipe {source!r}{nearest(source, shipped())}; give a YAML file, or one of {shipped()}"
    )


def overrides_of(arguments: list[str]) -> dict[str, Any]:
    """Flags of a command line that are keys of the recipe; several values after one flag are a list."""
    from moa.cli.train import flags

    joined: list[str] = []
    for flag, values in grouped(arguments):
        joined += [flag, f"[{', '.join(values)}]"] if len(values) > 1 else [flag, *values]
    return dict(flags(joined))


def grouped(arguments: list[str]) -> list[tuple[str, list[str]]]:
    """Every flag with the values that follow it."""
    found: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if argument.startswith("--") or not found:
            found.append((argument, []))
        else:
            found[-1][1].append(argument)
    return found

"""A span plan: one elastic rule per layer and head, what it was searched for, and what it costs.

Plans of ours are per KV head (``heads="kv"``) and have one meaning, `moa.spans.rule.span`. Published plans are per
query head and keep the reference's two meanings (``convention="published"``): densities are those of its search, spans
those of its deployment. `SpanPlan.for_model` puts either on the real KV heads of a model.

A file is data, nothing in it is executed. Ours says everything needed to apply it; a published one holds ``alphas`` and
``betas`` per query head and leaves the rest to its reader: sink and block are 64.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from moa.choices import named
from moa.files import read_json, write_text
from moa.spans.model import ModelShape
from moa.spans.rule import CONVENTIONS, Rule, causal_pairs, search_blocks, span

VERSION = 1
OURS = "span_plan.json"
PUBLISHED = "moa_alpha_beta.json"
RULE_KEYS = {"alphas", "betas"}
LARGEST = 2.0**53  # of a rule's numbers: tokens are counted without rounding up to here
HEADS = {"kv": "KV head", "query": "query head"}


@dataclass
class SpanPlan:
    """Rules ``alpha + beta * length`` for every layer and head.

    Args:
        alphas: layers x heads, offsets in tokens.
        betas: layers x heads, slopes.
        heads: "kv", or "query" for a published file.
        sink: first tokens every head always sees; a multiple of ``block``.
        block: granularity of spans in tokens.
        model: id of the model it was searched for; `apply_spans` refuses others.
        searched: the evidence: lengths, densities, losses, tool versions, validation. Plain JSON data.
        format_version: of the file.
        convention: "native", or "published" for the meaning of a published file.
        embeddings: digest of the model's input embeddings (`moa.spans.model.family`), by which it is known under any
            name and with any adapter.

    Raises:
        ValueError: ragged, empty or non-finite rules (the message names layer and head), or unknown settings.
    """

    alphas: list[list[float]]
    betas: list[list[float]]
    heads: str = "kv"
    sink: int = 64
    block: int = 64
    model: str | None = None
    searched: dict[str, Any] = field(default_factory=dict)
    format_version: int = VERSION
    convention: str = "native"
    embeddings: str | None = None

    def __post_init__(self) -> None:
        _check_choice("heads", self.heads, tuple(HEADS))
        _check_choice("convention", self.convention, tuple(CONVENTIONS))
        for name in ("sink", "block"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"SpanPlan: {name}={value!r} must be a positive number of tokens")
        if self.sink % self.block:
            raise ValueError(f"SpanPlan: sink={self.sink} must be a multiple of block={self.block}")
        if not isinstance(self.searched, dict):
            raise ValueError(f"SpanPlan: searched must be a dict, not {type(self.searched).__name__}")
        for name in ("model", "embeddings"):
            if not isinstance(value := getattr(self, name), str | None):
                raise ValueError(f"SpanPlan: {name}={value!r} must be text or None")
        self.alphas, self.betas = self._table("alphas"), self._table("betas")
        if [len(row) for row in self.alphas] != [len(row) for row in self.betas]:
            raise ValueError(f"SpanPlan: alphas are {_shape(self.alphas)}, betas {_shape(self.betas)}; they must agree")

    def _table(self, name: str) -> list[list[float]]:
        rows = getattr(self, name)
        if not isinstance(rows, list | tuple) or not rows:
            raise ValueError(f"SpanPlan: {name} must be a non-empty list with one list per layer")
        table = []
        for layer, row in enumerate(rows):
            if not isinstance(row, list | tuple) or not row:
                raise ValueError(
                    f"SpanPlan: {name} of layer {layer} must be a non-empty list of numbers, got {row!r:.60}"
                )
            if len(row) != len(rows[0]):
                raise ValueError(f"SpanPlan: {name} of layer {layer} has {len(row)} heads, layer 0 has {len(rows[0])}")
            table.append([_number(v, f"{name} of layer {layer}, {HEADS[self.heads]} {h}") for h, v in enumerate(row)])
        return table

    @classmethod
    def load(cls, path: str | PathLike[str]) -> SpanPlan:
        """Read a plan: our JSON, a published two-key file, or a directory that holds either.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: not a plan; the message names the file and what is wrong.
        """
        file = _find(Path(path))
        content = _read(file)
        allowed = [f.name for f in dataclasses.fields(cls)]
        if unknown := [key for key in content if key not in allowed]:
            raise ValueError(f"{file}: unknown keys {unknown[:5]}; a plan has {allowed}")
        with named(str(file)):
            return cls(**content)

    def save(self, path: str | PathLike[str]) -> Path:
        """Write our format to ``path``, or to ``span_plan.json`` in it if it is a directory; return the file."""
        file = Path(path)
        if file.is_dir():
            file = file / OURS
        _write(file, dataclasses.asdict(self))
        return file

    @classmethod
    def uniform(
        cls,
        layers: int,
        kv_heads: int,
        density: float = 0.5,
        *,
        alpha: float = 0.0,
        beta: float | None = None,
        **fields: Any,
    ) -> SpanPlan:
        """The same rule everywhere: ``density`` of every text, or ``alpha + beta * length``."""
        slope = density if beta is None else beta
        return cls([[alpha] * kv_heads for _ in range(layers)], [[slope] * kv_heads for _ in range(layers)], **fields)

    @classmethod
    def dense(cls, layers: int, kv_heads: int, **fields: Any) -> SpanPlan:
        """Full spans everywhere."""
        return cls.uniform(layers, kv_heads, beta=1.0, **fields)

    def rules(self) -> list[list[Rule]]:
        """Layers x heads."""
        return [[Rule(*rule) for rule in zip(a, b, strict=True)] for a, b in zip(self.alphas, self.betas, strict=True)]

    def spans(self, length: int) -> list[list[int]]:
        """Layers x heads: tokens kept of a text of ``length`` tokens, sink included."""
        if length < 1:
            raise ValueError(f"length={length} must be a positive number of tokens")
        return [[span(*rule, length, sink=self.sink, block=self.block) for rule in layer] for layer in self.rules()]

    def kv_density(self, length: int) -> float:
        """Kept share of the keys and values of a text of ``length`` tokens, mean over the plan's own heads.

        Of a published plan: its search layout (facts of the reference: ``lut_kv_cache_density``).
        """
        return self._density(length, lambda kept, rows: kept)

    def attention_density(self, length: int) -> float:
        """Kept share of the causal pairs of a prefill of ``length`` tokens, mean over the plan's own heads.

        Of a published plan: its search layout, in blocks (the reference's ``lut_attention_density``).
        """
        return self._density(length, causal_pairs)

    def _density(self, length: int, count: Callable[[int, int], int]) -> float:
        """Mean over layers of the layer's share; whole numbers up to one division each, so that it is reproducible."""
        if CONVENTIONS[self.convention].sink_on_top:
            rows = length // self.block
            kept = [[search_blocks(*rule, length, self.block) for rule in layer] for layer in self.rules()]
        else:
            rows, kept = length, self.spans(length)
        whole = count(rows, rows)
        return sum(sum(count(k, rows) for k in layer) / (len(layer) * whole) for layer in kept) / len(kept)

    def for_model(self, model_or_config: Any, length: int | None = None) -> SpanPlan:
        """The plan on the KV heads of a model, ``heads="kv"``.

        Query heads that share a KV head share its keys, so that KV head needs the longest of their spans. Which rule
        gives the longest depends on the text: it is chosen at ``length`` tokens (default: the model's context).

        Raises:
            ValueError: the plan has other layers or heads than the model; the message says which.
        """
        shape = ModelShape.of(model_or_config)
        wanted = shape.kv_heads if self.heads == "kv" else shape.query_heads
        if len(self.alphas) != shape.layers:
            raise ValueError(f"the plan has {len(self.alphas)} layers, the model {shape.layers}")
        for layer, row in enumerate(self.alphas):
            if len(row) != wanted:
                kind = HEADS[self.heads]
                raise ValueError(
                    f"the plan has {len(row)} {kind}s in layer {layer}, the model {wanted} "
                    f"({shape.query_heads} query heads on {shape.kv_heads} KV heads)"
                )
        if self.heads == "kv":
            return self
        at = length or shape.context or 8192
        chosen = [
            [
                max(row[i : i + shape.group], key=lambda rule: rule.alpha + rule.beta * at)
                for i in range(0, len(row), shape.group)
            ]
            for row in self.rules()
        ]
        return dataclasses.replace(
            self,
            heads="kv",
            alphas=[[rule.alpha for rule in row] for row in chosen],
            betas=[[rule.beta for rule in row] for row in chosen],
        )

    def kv_bytes(self, model_or_config: Any, length: int, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """Bytes our cache holds for this model after a text of ``length`` tokens, for ``batch`` rows.

        Real KV heads count: of a query-head plan, the longest span of those that share one. Layers with a sliding
        window of their own keep that instead of a span.

        Args:
            model_or_config: a model, or its configuration.
            length: tokens of the whole text, those to be generated included.
            batch: rows.
            dtype: of the cache; default the model's.
        """
        shape = ModelShape.of(model_or_config)
        config = getattr(model_or_config, "config", model_or_config)
        dtype = (
            dtype
            or getattr(model_or_config, "dtype", None)
            or config.get_text_config(decoder=True).dtype
            or torch.float32
        )
        tokens = 0
        for window, row in zip(shape.windows, self.for_model(config, length).spans(length), strict=True):
            tokens += sum(row) if window is None else len(row) * min(length, window - 1)
        return 2 * tokens * shape.head_dim * batch * dtype.itemsize

    def kv_share(self, model_or_config: Any, length: int) -> float:
        """Share of the dense cache's bytes that `kv_bytes` counts, in (0, 1].

        Unlike `kv_density` it is the model's: of a query-head plan real KV heads count, and layers with a sliding
        window of their own hold what they hold without a plan.
        """
        shape = ModelShape.of(model_or_config)
        dense = SpanPlan.dense(shape.layers, shape.kv_heads)
        return self.kv_bytes(model_or_config, length) / dense.kv_bytes(model_or_config, length)


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"SpanPlan: {name}={value!r} is not one of {list(allowed)}")


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"SpanPlan: {where}: {value!r:.60} is not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= LARGEST:
        raise ValueError(f"SpanPlan: {where}: {number} is not a finite number of at most {LARGEST:.0e}")
    return number


def _shape(table: list[list[float]]) -> str:
    return f"{len(table)} layers x {len(table[0])} heads"


def _find(path: Path) -> Path:
    """The plan file that ``path`` means: itself, or the one a directory or output folder of `moa spans` holds.

    Raises:
        FileNotFoundError: there is no such path, or its directory holds no plan or several.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such plan file or directory")
    if not path.is_dir():
        return path
    for name in (OURS, PUBLISHED):
        if (path / name).is_file():
            return path / name
    below = sorted(path.glob(f"density-*/{OURS}"))
    if len(below) > 1:
        raise FileNotFoundError(f"{path}: plans of several densities, name one of {[str(file) for file in below]}")
    if below:
        return below[0]
    raise FileNotFoundError(f"{path}: a directory without {OURS} or {PUBLISHED}; name the file itself")


def _read(path: Path) -> dict[str, Any]:
    """The fields of a plan in ``path``, of either format.

    Raises:
        ValueError: not JSON, not an object, or keys of neither format; the message names the file.
    """
    content = read_json(path, "span plan")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a plan is a JSON object, not {type(content).__name__}")
    if missing := sorted(RULE_KEYS - content.keys()):
        raise ValueError(f"{path}: not a span plan, no {' and no '.join(missing)}; it has {sorted(content)[:10]}")
    if content.keys() == RULE_KEYS:
        return {**content, "heads": "query", "convention": "published"}
    if content.get("format_version") != VERSION:
        found = content.get("format_version")
        raise ValueError(
            f"{path}: format_version {found!r}; this version of moa reads {VERSION}, and files with exactly "
            f"{sorted(RULE_KEYS)}"
        )
    return content


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a plan file, creating its folder; it appears whole or not at all."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")

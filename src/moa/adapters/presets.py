"""Named configurations. A preset has no code of its own: it is experts, a router and a gating rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from moa.adapters.choices import nearest
from moa.adapters.config import MoAConfig
from moa.adapters.experts import Copies, ExpertConfig, LoraExpert, ParallelExpert, PromptExpert
from moa.adapters.gating import Soft, Softmax, Threshold, TopK
from moa.adapters.routers import Router

TARGETS = ["q", "k", "v", "o", "down"]


def _mixture(*experts: ExpertConfig, **fields: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"experts": [dataclasses.replace(expert) for expert in experts], **fields}


def _copies(number: int, gating: Any, *, shared: bool = False, bias: bool = False) -> LoraExpert:
    return LoraExpert(targets=TARGETS, copies=Copies(number, shared=shared, gating=gating, bias=bias))


# The recorded settings of the official repository: r = alpha = 8 on q, k, v, o, down; adapter 16; prompt 10.
PRESETS: dict[str, Callable[[], dict[str, Any]]] = {
    "soft-moa": _mixture(LoraExpert(), PromptExpert(), ParallelExpert(), router=Router(), gating=Soft()),
    "sparse-moa": _mixture(LoraExpert(), ParallelExpert(), router=Router(), gating=Threshold()),
    "instance-moa": _mixture(
        LoraExpert(), PromptExpert(), ParallelExpert(), router=Router(level="instance"), gating=Soft()
    ),
    "lora": _mixture(LoraExpert(r=16, alpha=16), router=None),
    "prompt": _mixture(PromptExpert(), router=None),
    "parallel-adapter": _mixture(ParallelExpert(), router=None),
    "molora": _mixture(_copies(8, Softmax()), router=None),
    "hydralora": _mixture(_copies(8, Softmax(), shared=True), router=None),
    "adamole": _mixture(
        _copies(
            8,
            Threshold(gamma_max=1 / 8, score="softmax", train_threshold="shifted", renormalise=True),
            bias=True,
        ),
        router=None,
    ),
    "topk-molora": _mixture(_copies(8, TopK(k=2), bias=True), router=None),
    "unipelt": _mixture(
        LoraExpert(gate="lora"),
        PromptExpert(),
        ParallelExpert(),
        router=Router(hidden_per_expert=0, level="instance"),
        gating=Soft(),
    ),
}


def preset(name: str, **overrides: Any) -> MoAConfig:
    """A configuration by name, with some of its settings changed.

    Args:
        name: one of `PRESETS`.
        **overrides: fields of `MoAConfig`, or settings of experts, which then hold for every expert that has them:
            ``preset("soft-moa", r=16, targets=["q", "v"], size=32)``.

    Raises:
        ValueError: unknown preset, or a setting that neither the configuration nor any of its experts has; the
            message offers the nearest valid name.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}{nearest(name, PRESETS)}; presets are {sorted(PRESETS)}")
    fields = PRESETS[name]()
    own = {field.name for field in dataclasses.fields(MoAConfig)}
    settings = {key: value for key, value in overrides.items() if key not in own}
    fields |= {key: value for key, value in overrides.items() if key in own}
    fields["experts"] = [_with(expert, settings) for expert in fields["experts"]]
    unused = settings.keys() - {field.name for expert in fields["experts"] for field in dataclasses.fields(expert)}
    if unused:
        known = own | {field.name for expert in fields["experts"] for field in dataclasses.fields(expert)}
        first = sorted(unused)[0]
        raise ValueError(f"preset {name!r} has no setting {first!r}{nearest(first, known)}; it has {sorted(known)}")
    return MoAConfig(**fields)


def _with(expert: Any, settings: dict[str, Any]) -> Any:
    if not isinstance(expert, ExpertConfig):
        return expert
    names = {field.name for field in dataclasses.fields(expert)}
    return dataclasses.replace(expert, **{key: value for key, value in settings.items() if key in names})

"""Named configurations. A preset has no code of its own: it is experts, a router and a gating rule.

`adapter_config` reads what files say of an adapter: a preset with changes, or a whole configuration.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import peft
from peft import PeftConfig

from moa.adapters.config import MoAConfig
from moa.adapters.experts import Copies, ExpertConfig, LoraExpert, ParallelExpert, PromptExpert
from moa.adapters.gating import Softmax, Threshold, TopK
from moa.adapters.routers import PAPER_ROUTER, Router
from moa.choices import check_choice, from_fields, nearest, plain


def _copies(number: int, gating: Any, *, shared: bool = False, bias: bool = False) -> LoraExpert:
    return LoraExpert(copies=Copies(number, shared=shared, gating=gating, bias=bias))


# Experts have the recorded settings of the official repository: r = alpha = 8 on q, k, v, o, down; adapter 16; prompt
# 10. Its router is that of the `paper-` presets; the others depart from it, see docs/results.md.
PRESETS: dict[str, dict[str, Any]] = {
    "soft-moa": {"experts": [LoraExpert(), PromptExpert(), ParallelExpert()]},
    "sparse-moa": {
        "experts": [LoraExpert(), ParallelExpert()],
        "router": Router(initial_logit=0.0),
        "gating": Threshold(),
    },
    "paper-soft-moa": {
        "experts": [LoraExpert(), PromptExpert(), ParallelExpert()],
        "router": Router(**PAPER_ROUTER),
    },
    "paper-sparse-moa": {
        "experts": [LoraExpert(), ParallelExpert()],
        "router": Router(**PAPER_ROUTER),
        "gating": Threshold(),
    },
    "instance-moa": {
        "experts": [LoraExpert(), PromptExpert(), ParallelExpert()],
        "router": Router(**PAPER_ROUTER, level="instance"),
    },
    "lora": {"experts": [LoraExpert(r=16, alpha=16)], "router": None},
    "prompt": {"experts": [PromptExpert()], "router": None},
    "parallel-adapter": {"experts": [ParallelExpert()], "router": None},
    "molora": {"experts": [_copies(8, Softmax())], "router": None},
    "hydralora": {"experts": [_copies(8, Softmax(), shared=True)], "router": None},
    "adamole": {
        "experts": [
            _copies(
                8,
                Threshold(gamma_max=1 / 8, score="softmax", train_threshold="shifted", renormalise=True),
                bias=True,
            )
        ],
        "router": None,
    },
    "topk-molora": {"experts": [_copies(8, TopK(k=2), bias=True)], "router": None},
    "unipelt": {
        "experts": [LoraExpert(gate="lora"), PromptExpert(), ParallelExpert()],
        "router": Router(hidden_per_expert=0, level="instance", input="block", initial_logit=0.0),
    },
}


# What is compared with from outside; the places are those of moa's presets, as most families call them.
PEFT_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft:lora": ("LoraConfig", {}),
    "peft:dora": ("LoraConfig", {"use_dora": True}),
    "peft:lily": ("LilyConfig", {}),
}
_PLACES = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")


def preset(name: str, **overrides: Any) -> MoAConfig:
    """A configuration by name, with some of its settings changed.

    Args:
        name: one of `PRESETS`.
        **overrides: fields of `MoAConfig`, or settings of experts, which then hold for every expert that has them:
            ``preset("soft-moa", r=16, targets=["q", "v"], size=32)``. A dict for ``router`` or ``gating`` changes
            the fields it names: ``preset("instance-moa", router={"hidden_per_expert": 0})`` keeps the level.

    A preset's experts are ``optional``: what a model family cannot host of them is left out with a warning. ``targets``
    that are named here are not, nor are ``experts``.

    Raises:
        ValueError: unknown preset, or a setting that neither the configuration nor any of its experts has; the
            message offers the nearest valid name.
    """
    if name not in list(PRESETS):  # which asks no hash of a value that has none
        raise ValueError(f"there is no preset {name!r}{nearest(name, PRESETS)}; presets are {sorted(PRESETS)}")
    own = {field.name for field in dataclasses.fields(MoAConfig)}
    fields = {key: value for key, value in overrides.items() if key in own}
    settings = {key: value for key, value in overrides.items() if key not in own}
    config = MoAConfig(**copy.deepcopy(PRESETS[name]))
    config.experts = [dataclasses.replace(expert, optional=True) for expert in config.experts]
    for part in ("router", "gating"):
        if part in fields:
            fields[part] = _merged(getattr(config, part), fields[part])
    config = dataclasses.replace(config, **fields)
    known = {field.name for expert in config.experts for field in dataclasses.fields(expert)}
    for setting in settings:
        if setting not in known:
            allowed = sorted(own | known)
            raise ValueError(f"preset {name!r} has no setting {setting!r}{nearest(setting, allowed)}; it has {allowed}")
    config.experts = [_with(expert, settings) for expert in config.experts]
    return config


def _merged(ours: Any, given: Any) -> Any:
    """A mapping changes some fields of the preset's router or gating; one of another ``kind`` starts over."""
    if ours is None or not isinstance(given, Mapping):
        return given
    old = plain(ours)
    return old | given if given.get("kind") in (None, old.get("kind")) else given


def _with(expert: ExpertConfig, settings: dict[str, Any]) -> ExpertConfig:
    names = {field.name for field in dataclasses.fields(expert)}
    if "targets" in settings and "targets" in names:
        settings = {"optional": False, **settings}
    return dataclasses.replace(expert, **{key: value for key, value in settings.items() if key in names})


def adapter_config(section: Mapping[str, Any]) -> PeftConfig:
    """A fresh configuration from the ``adapter`` section of a recipe, or the ``moa`` section of another tool's file.

    Args:
        section: with the key ``preset``, its other keys are changes to that preset, or, for a preset such as
            ``peft:lora``, fields of PEFT's own configuration. Without it, the fields of `MoAConfig`.

    Raises:
        ValueError: an unknown preset, key or kind, or a value outside of its range.
    """
    fields = dict(section)
    name = fields.pop("preset", None)
    if name is None:
        return from_fields("adapter", MoAConfig, fields)
    if str(name).startswith("peft:"):
        return _of_peft(str(name), fields)
    return preset(str(name), **fields)


def _of_peft(name: str, fields: dict[str, Any]) -> PeftConfig:
    check_choice("preset", name, PEFT_METHODS)
    kind, fixed = PEFT_METHODS[name]
    if not hasattr(peft, kind):
        raise ValueError(f"preset {name!r} needs a newer PEFT than {peft.__version__}")
    defaults = {"task_type": "CAUSAL_LM", "target_modules": list(_PLACES)}
    config: PeftConfig = from_fields(f"preset {name!r}", getattr(peft, kind), defaults | fixed | fields)
    return config

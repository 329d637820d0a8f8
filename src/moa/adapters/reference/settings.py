"""The official implementation's settings (github.com/DCDmllm/MoA, commit d1a17ed) as `MoAConfig`.

Its method is chosen by its folder: every folder has its own copy of `llama/llama.py`, and the transformers path has its
own modeling files. What those files differ in is one row of `VARIANTS`. Everything is reproduced as it computes, bugs
included: thresholds that never learn, instance-level gates that see the future, UniPEFT's parallel adapter under the
prompt's gate. Left out: the clamp of a block's output to +-65500 when bf16 is off, which no sane model reaches.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moa.adapters.config import MoAConfig
from moa.adapters.experts import Copies, ExpertConfig, LoraExpert, ParallelExpert, PromptExpert
from moa.adapters.gating import Gating, Soft, Softmax, Threshold, TopK
from moa.adapters.routers import Router
from moa.choices import check_choice, check_range, nearest

TARGETS = {"Q": "q", "K": "k", "V": "v", "O": "o", "FFN_UP": "up", "FFN_GATE": "gate", "FFN_DOWN": "down"}

# Command-line defaults of the native path, `LLaMA3_*/main_finetune.py:48-70`.
NATIVE: dict[str, Any] = {
    "lora_layers": "0-0",
    "lora_rank": 16,
    "lora_targets": "Q,V",
    "lora_alpha": 8,
    "hydra_moe": False,
    "p_adapter_layers": "0-0",
    "p_adapter_size": 16,
    "p_adapter_hydra": False,
    "prompt_layers": "0-0",
    "prompt_len": 10,
    "expert_num": 1,
    "swi_x": 0,
    "max_threshold": 0.5,
    "const_threshold": False,
    "top_k": 1,
    "adamole": False,
    "lb_loss_coeff": 0.001,
    "noisy_router": False,
    "w_bias": False,
}

# What the transformers path has in its modeling files, `modeling_llama.py:249-250,329-338,453-486`. Layers None: all.
TRANSFORMERS: dict[str, Any] = {
    **NATIVE,
    "lora_layers": None,
    "lora_rank": 8,
    "lora_targets": "Q,K,V,O,FFN_DOWN",
    "p_adapter_layers": None,
    "prompt_layers": None,
    "prompt_len": None,
    "swi_x": 4,
}

# Settings that describe, or that the official code reads and does not use.
INERT = (
    *("scaling", "bf16", "flash_attention2", "max_seq_len", "max_batch_size", "expert_weight", "bool_weights"),
    *("adapter_noisy", "p_adapter_act", "router", "router_input", "gate", "threshold", "moe"),
)


@dataclass(frozen=True)
class Variant:
    """What one of the official model files can do.

    Attributes:
        defaults: value of every setting that is not given.
        gating: settings -> the rule of the block's router; None: no router.
        copies: settings -> the rule that mixes LoRA's copies; None: the file has no copies.
        level: see `Router`.
        input: see `Router`.
        without: targets that the file does not know.
        shared_gates: kind of expert -> the gate that all its sites have in common; other kinds: one for every site.
    """

    defaults: Mapping[str, Any]
    gating: Callable[[Mapping[str, Any]], Gating] | None
    copies: Callable[[Mapping[str, Any]], Gating] | None = None
    level: str = "token"
    input: str = "block"
    without: tuple[str, ...] = ()
    shared_gates: Mapping[str, str] = field(default_factory=dict)


def _soft(settings: Mapping[str, Any]) -> Gating:
    return Soft()


def _softmax(settings: Mapping[str, Any]) -> Gating:
    return Softmax()


def _frozen_threshold(settings: Mapping[str, Any]) -> Gating:
    """`LLaMA3_sparse_moa/llama/llama.py:553-567`."""
    constant, gamma_max = settings["const_threshold"], settings["max_threshold"]
    if isinstance(constant, float) and 0 < constant < 1:  # the official flag is a yes or no; a number names the value
        constant, gamma_max = True, constant
    if isinstance(gamma_max, bool):  # says that there is a maximum, not which
        gamma_max = NATIVE["max_threshold"]
    return Threshold(gamma_max=gamma_max, constant=bool(constant), train_threshold="frozen")


def _sparse(settings: Mapping[str, Any]) -> Gating:
    """`LLaMA3_sparse_moe/llama/sparse_moe.py`: AdaMoLE (:79-141) or top-k (:7-75)."""
    balance = settings["lb_loss_coeff"]
    if not settings["adamole"]:
        return TopK(k=settings["top_k"], balance=balance)
    return Threshold(
        gamma_max=1 / settings["expert_num"],
        train_threshold="shifted",
        score="softmax",
        renormalise=True,
        balance=balance,
    )


INSTANCE = "reference-instance"
# The adapter's gate is computed with the prompt's layer (`LLaMA3_UniPEFT/llama/llama.py:633-635`).
UNIPEFT_GATES = {"lora": "lora", "prompt": "prompt", "parallel": "prompt"}

VARIANTS: dict[str, Variant] = {
    "soft": Variant(TRANSFORMERS, _soft, input="attention"),
    "sparse": Variant(TRANSFORMERS, _frozen_threshold, input="attention"),
    "LLaMA3_soft_moa": Variant(NATIVE, _soft, _softmax),
    "LLaMA3_sparse_moa": Variant(NATIVE, _frozen_threshold),
    "LLaMA3_soft_moa_instance": Variant(NATIVE, _soft, _softmax, level=INSTANCE, without=("FFN_GATE",)),
    "LLaMA3_UniPEFT": Variant(
        NATIVE, _soft, _softmax, level=INSTANCE, without=("FFN_GATE",), shared_gates=UNIPEFT_GATES
    ),
    "LLaMA3_soft_moe": Variant(NATIVE, None, _softmax, without=("FFN_GATE",)),
    "LLaMA3_sparse_moe": Variant(NATIVE, None, _sparse, without=("FFN_GATE",)),
}


def reference_config(variant: str, settings: Mapping[str, Any]) -> MoAConfig:
    """The configuration that computes what the official implementation computes with its own ``settings``.

    Args:
        variant: ``"soft"`` or ``"sparse"`` for its transformers path, or the name of a folder of its native path:
            ``"LLaMA3_soft_moa"``, ``"LLaMA3_sparse_moa"``, ``"LLaMA3_soft_moa_instance"``, ``"LLaMA3_UniPEFT"``,
            ``"LLaMA3_soft_moe"`` or ``"LLaMA3_sparse_moe"``.
        settings: under their official names, as in `adapter_params.json`. One that is missing or None has the official
            default: in the native path the command line's, in the transformers path what its files hard-code (with a
            prompt only if ``prompt_len`` is given). Layer ranges such as ``"0-1,2-3"`` exclude their ends. Settings
            that only describe are ignored.

    Raises:
        ValueError: unknown variant, a misspelt setting, or one that the official code cannot run or that has no
            counterpart here (``w_bias``, ``noisy_router``).

    Example:
        >>> moa.reference_config("LLaMA3_soft_moa", {"lora_layers": "0-32", "lora_targets": "Q,V", "swi_x": 4})
    """
    check_choice("variant", variant, VARIANTS)
    kind = VARIANTS[variant]
    given = _resolved(kind, settings)
    experts = [*_lora(variant, given), *_prompt(kind, given), *_parallel(kind, given)]
    if not experts:
        raise ValueError(f"these settings of {variant} put no expert into any layer; set e.g. lora_layers='0-32'")
    if kind.gating is None:
        return MoAConfig(experts=experts, router=None)
    if kind.shared_gates:
        _check_unipeft(given)
    width = 0 if kind.shared_gates else given["swi_x"]
    router = Router(hidden_per_expert=width, level=kind.level, input=kind.input, initial_logit=0.0)
    return MoAConfig(experts=experts, router=router, gating=kind.gating(given))


def _resolved(kind: Variant, settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings, with defaults for what is missing or None."""
    for name in settings:
        # Descriptions may have any name, so only what looks like a setting is taken for one.
        if name not in kind.defaults and name not in INERT and difflib.get_close_matches(name, kind.defaults, 1, 0.85):
            raise ValueError(f"the official implementation has no setting {name!r}{nearest(name, kind.defaults)}")
    given = {**kind.defaults, **{name: value for name, value in settings.items() if value is not None}}
    for name, why in (
        ("w_bias", "it trains biases and norms of the base model"),
        ("noisy_router", "it adds noise to the routers, in evaluation too"),
    ):
        if given[name]:
            raise ValueError(f"{name}={given[name]!r} has no counterpart in a MoAConfig: {why}")
    if kind.copies is None:
        given["expert_num"] = 1
    check_range("expert_num", given["expert_num"], low=1)
    return given


def layer_range(name: str, spans: str | None) -> list[int] | None:
    """``"0-2,4-6"`` -> [0, 1, 4, 5], as the official code reads it (`llama.py:675`); None stays None (all layers).

    Raises:
        ValueError: not of this form; the message has the setting's ``name``.
    """
    if spans is None:
        return None
    try:
        ends = [[int(end) for end in span.split("-")] for span in spans.split(",")]
        return sorted({layer for first, stop in ends for layer in range(first, stop)})
    except (AttributeError, ValueError):
        raise ValueError(f"{name}={spans!r} must be ranges of layers such as '0-32' or '0-8,24-32'") from None


def _lora(variant: str, given: Mapping[str, Any]) -> list[ExpertConfig]:
    kind = VARIANTS[variant]
    layers = layer_range("lora_layers", given["lora_layers"])
    targets = [] if layers == [] else _targets(variant, given["lora_targets"])
    if not targets:
        return []
    sparse = kind.copies is _sparse
    gating = Softmax() if kind.copies is None or given["expert_num"] == 1 else kind.copies(given)
    copies = Copies(given["expert_num"], shared=bool(given["hydra_moe"]) and not sparse, gating=gating, bias=sparse)
    gate = kind.shared_gates.get("lora")
    return [
        LoraExpert(
            targets=targets, r=given["lora_rank"], alpha=given["lora_alpha"], layers=layers, gate=gate, copies=copies
        )
    ]


def _targets(variant: str, targets: str) -> list[str]:
    """Our names of ``"Q,K,..."``, without those that the official file silently leaves out."""
    kind, names = VARIANTS[variant], [name.strip() for name in targets.split(",")]
    for name in names:
        check_choice("lora_targets", name, TARGETS)
    if kind.gating is not None and not kind.shared_gates and set(names) & set(kind.without):
        # Its router has an output for them that gates nothing, and a width to match.
        raise ValueError(f"lora_targets={targets!r}: {variant} cannot adapt {list(kind.without)}; leave it out")
    return [TARGETS[name] for name in names if name not in kind.without]


def _prompt(kind: Variant, given: Mapping[str, Any]) -> list[ExpertConfig]:
    layers, length = layer_range("prompt_layers", given["prompt_layers"]), given["prompt_len"]
    if layers == [] or length is None:
        return []
    copies = Copies(given["expert_num"], bias=True)
    return [PromptExpert(length=length, layers=layers, gate=kind.shared_gates.get("prompt"), copies=copies)]


def _parallel(kind: Variant, given: Mapping[str, Any]) -> list[ExpertConfig]:
    layers, size = layer_range("p_adapter_layers", given["p_adapter_layers"]), given["p_adapter_size"]
    if layers == []:
        return []
    copies = Copies(given["expert_num"], shared=bool(given["p_adapter_hydra"]), bias=True)
    return [ParallelExpert(size=size, layers=layers, gate=kind.shared_gates.get("parallel"), copies=copies)]


def _check_unipeft(given: Mapping[str, Any]) -> None:
    """Its blocks always compute LoRA's and the prompt's gate (`LLaMA3_UniPEFT/llama/llama.py:633-635`)."""
    layers = {name: layer_range(name, given[name]) for name in ("lora_layers", "prompt_layers", "p_adapter_layers")}
    lora, prompt, parallel = (set(value or []) for value in layers.values())
    if lora != prompt or not parallel <= prompt:
        raise ValueError(
            f"LLaMA3_UniPEFT runs only with LoRA and a prompt in the same layers, and the adapter in none besides: "
            f"lora_layers={given['lora_layers']!r}, prompt_layers={given['prompt_layers']!r}, "
            f"p_adapter_layers={given['p_adapter_layers']!r}"
        )

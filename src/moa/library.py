"""What ``import moa`` gives: every public name, and MOA registered with PEFT. Loads torch, transformers and PEFT."""

import moa.adapters  # noqa: F401  (registers MOA with PEFT)
from moa.adapters.config import MoAConfig
from moa.adapters.experts import AdapterExpert, Copies, Ia3Expert, LoraExpert, ParallelExpert, PromptExpert
from moa.adapters.gating import Soft, Softmax, Threshold, TopK
from moa.adapters.presets import preset
from moa.adapters.reference import load_reference, reference_config
from moa.adapters.routers import Router
from moa.adapters.telemetry import gate_values
from moa.spans import SpanPlan, apply_spans

__all__ = [
    "AdapterExpert",
    "Copies",
    "Ia3Expert",
    "LoraExpert",
    "MoAConfig",
    "ParallelExpert",
    "PromptExpert",
    "Router",
    "Soft",
    "Softmax",
    "SpanPlan",
    "Threshold",
    "TopK",
    "apply_spans",
    "gate_values",
    "load_reference",
    "preset",
    "reference_config",
]

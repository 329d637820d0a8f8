"""The kinds of experts, by the name they have in a configuration."""

from moa.adapters.experts.adapter import AdapterExpert, AdapterLayer, ParallelExpert, ParallelLayer
from moa.adapters.experts.base import Copies, ExpertConfig, ExpertLayer, Site
from moa.adapters.experts.ia3 import Ia3Expert, Ia3Layer
from moa.adapters.experts.lora import LoraExpert, LoraLayer
from moa.adapters.experts.prompt import PromptExpert, PromptLayer

EXPERTS: dict[str, type[ExpertLayer]] = {
    layer.config.kind: layer for layer in (LoraLayer, PromptLayer, ParallelLayer, Ia3Layer, AdapterLayer)
}

__all__ = [
    "EXPERTS",
    "AdapterExpert",
    "Copies",
    "ExpertConfig",
    "ExpertLayer",
    "Ia3Expert",
    "LoraExpert",
    "ParallelExpert",
    "PromptExpert",
    "Site",
]

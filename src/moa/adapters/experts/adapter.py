"""Adapter: a gated bottleneck behind the attention module, ``y + g * (U act(D y + b) + c)`` of what attention puts out.

Serial (Houlsby et al. 2019; Pfeiffer et al. 2021): it reads what it adds to, after attention's output projection and
before the residual stream. LoRA experts on that projection come first. Its weights are those of the parallel adapter.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moa.adapters.context import Forward
from moa.adapters.experts.base import ExpertLayer, Site
from moa.adapters.experts.forms import Reads
from moa.adapters.experts.parallel import ParallelExpert, ParallelLayer


@dataclass
class AdapterExpert(ParallelExpert):
    """A bottleneck behind attention, which reads attention's output (Houlsby et al. 2019).

    Attributes:
        size: width of the bottleneck.
        activation: a name from transformers' ``ACT2FN``.
    """

    kind = "adapter"

    def sites(self) -> list[Site]:
        return [Site("adapter", "attention")]


class AdapterLayer(ParallelLayer):
    """Weights as a `ParallelLayer`'s, from and to the width of attention's output."""

    config = AdapterExpert
    reads = Reads.OUTPUT

    def apply_to(self, now: Forward, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Out of place: ``y`` is also ``x``, which backward needs as it was."""
        return ExpertLayer.apply_to(self, now, adapter, x, y)

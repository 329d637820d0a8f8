"""Routers: from what a token looks like to one logit per expert, and through a gating rule to its weights.

`RouterLayer` serves twice: as a block's router over its experts, and inside an expert as the router over its
homogeneous copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa import _hosts
from moa.adapters.auxiliary import add_auxiliary_loss
from moa.adapters.context import BlockContext
from moa.adapters.gating import Gates, Gating
from moa.adapters.low_rank import read
from moa.adapters.sharding import Split
from moa.adapters.tuner import Attached
from moa.choices import check_choice, check_flag, check_range


@dataclass
class Router:
    """How the decision is made.

    Attributes:
        hidden_per_expert: 0 for one linear layer; otherwise a SwiGLU ``W2(silu(W1 x) * W3 x)`` whose hidden width is
            this times the number of experts (official `swi_x`; 4 in the recorded runs, nearly a third of the weights).
        bias: whether its linear layers have one.
        level: ``token``; ``instance``: one decision for the text up to each token, from the running mean of the
            router's input (causal, the same in cached decoding); ``reference-instance``: the official mean over the
            whole sequence, padding and future included, frozen while decoding. For reproducing its numbers only.
        input: ``attention``: what the attention module reads, after the norm if the family normalises first (official
            transformers path); a hybrid's blocks without attention read as ``block`` does. ``block``: the block's raw
            input (paper, official native path), which grows by orders of magnitude from a pretrained model's first
            block to its last.
        initial_logit: added to every output's bias at the start; with sigmoid gates, 0 lets experts start at about half
            their strength (paper), 2 at 0.88. None: 2, or 0 without biases.

    The defaults are those that a pretrained model learned best with, see ``docs/results.md``; `PAPER_ROUTER` has the
    paper's.
    """

    hidden_per_expert: int = 0
    bias: bool = True
    level: str = "token"
    input: str = "attention"
    initial_logit: float | None = None

    def __post_init__(self) -> None:
        check_range("router: hidden_per_expert", self.hidden_per_expert, low=0, whole=True)
        check_flag("router: bias", self.bias)
        check_choice("router: level", self.level, ["token", "instance", "reference-instance"])
        check_choice("router: input", self.input, ["block", "attention"])
        if self.initial_logit is None:
            self.initial_logit = 2.0 if self.bias else 0.0
        check_range("router: initial_logit", self.initial_logit, low=-10, high=10)
        if self.initial_logit and not self.bias:
            raise ValueError(f"router: initial_logit={self.initial_logit} needs bias=True, it is where the bias starts")


PAPER_ROUTER: dict[str, Any] = {"hidden_per_expert": 4, "input": "block", "initial_logit": 0.0}
"""What the paper's recorded runs say of the router (official `LLaMA3_soft_moa`)."""


class RouterLayer(Attached):
    """A router and its gating rule, one per adapter, reading ``in_features`` wide tokens."""

    adapter_layer_names: ClassVar[tuple[str, ...]] = ("moa_w1", "moa_w2", "moa_w3", "moa_threshold")
    other_param_names: ClassVar[tuple[str, ...]] = ("gating",)

    def __init__(self, host: nn.Module, in_features: int, context: BlockContext, split: Split | None = None):
        super().__init__(host, split)
        self.in_features = in_features
        self.context = context
        self.moa_w1 = nn.ModuleDict()
        self.moa_w2 = nn.ModuleDict()
        self.moa_w3 = nn.ModuleDict()
        self.moa_threshold = nn.ModuleDict()
        self.gating: dict[str, Gating] = {}
        self._inputs: dict[str, list[nn.Linear]] = {}

    def width(self, router: Router) -> int:
        """Of the tokens that ``router`` reads here."""
        return self.in_features

    def add_router(self, adapter: str, router: Router, gating: Gating, n_outputs: int) -> None:
        """Create the weights for ``adapter``: linear layers' default initialisation, biases of a SwiGLU zero, and
        ``initial_logit`` on top.
        """
        width = self.width(router)
        self.gating[adapter] = gating
        self._inputs.pop(adapter, None)
        hidden = router.hidden_per_expert * n_outputs
        if hidden:
            self.moa_w1[adapter] = nn.Linear(width, hidden, bias=router.bias)
            self.moa_w3[adapter] = nn.Linear(width, hidden, bias=router.bias)
        self.moa_w2[adapter] = nn.Linear(hidden or width, n_outputs, bias=router.bias)
        if hidden and router.bias:
            for layer in (self.moa_w1, self.moa_w2, self.moa_w3):
                nn.init.zeros_(layer[adapter].bias)
        if router.initial_logit:
            with torch.no_grad():
                self.moa_w2[adapter].bias.add_(router.initial_logit)
        if gating.learns_threshold:
            self.moa_threshold[adapter] = nn.Linear(width, 1)

    def has(self, adapter: str) -> bool:
        """Whether the adapter has a router here."""
        return adapter in self.moa_w2

    def number_of_outputs(self, adapter: str) -> int:
        """How many experts the adapter's router decides about."""
        return len(self.moa_w2[adapter].weight)

    def split_along(self, adapter: str) -> Mapping[str, Mapping[str, int]]:
        """What reads a share of the features, by columns."""
        if self.split is None or not self.split.reads_share:
            return {}
        names = ["moa_w1", "moa_w3"] if adapter in self.moa_w1 else ["moa_w2"]
        return {name: {"weight": 1} for name in (*names, "moa_threshold")}

    def _freeze_what_never_trains(self) -> None:
        for adapter, threshold in self.moa_threshold.items():
            if getattr(self.gating[adapter], "train_threshold", None) == "frozen":
                threshold.requires_grad_(False)

    def input_layers(self, adapter: str) -> list[nn.Linear]:
        """What reads the router's input: w1 and w3, or w2 if it is linear, then the threshold's layer if it has one."""
        if adapter not in self._inputs:
            first = [self.moa_w1, self.moa_w3] if adapter in self.moa_w1 else [self.moa_w2]
            self._inputs[adapter] = [layers[adapter] for layers in (*first, self.moa_threshold) if adapter in layers]  # type: ignore[misc]
        return self._inputs[adapter]

    def forward(self, features: Tensor, adapter: str, tokens: Tensor | None = None) -> Gates:
        """Route.

        Args:
            features: (batch, tokens, in_features).
            adapter: whose router.
            tokens: (batch, tokens), True where there is text and not padding; read by the auxiliary losses only.

        Returns:
            `Gates`, each tensor (batch, tokens, outputs).
        """
        gating = self.gating[adapter]
        first = self._first(features, adapter)
        threshold = first.pop() if gating.learns_threshold else None
        logits = first[0] if len(first) == 1 else self._second(F.silu(first[0]) * first[1], adapter)
        now = self.context.forward
        if now is not None and now.few:
            logits = logits.view(*features.shape[:-1], -1)
            threshold = None if threshold is None else threshold.view(*features.shape[:-1], 1)
            if gating.selects and logits.device.type == "cpu" and logits.dtype is torch.float32:
                return gating.of_few(logits, threshold)
        gates = gating(logits, threshold)
        if self.training and gating.has_auxiliary_loss:
            gates = add_auxiliary_loss(gates, logits, tokens, gating)
        return gates

    def _first(self, features: Tensor, adapter: str) -> list[Tensor]:
        """Outputs of the `input_layers` (..., out), in the dtype of their weights; of few tokens (n, out), float32."""
        layers, now = self.input_layers(adapter), self.context.forward
        if _hosts.is_watched(*layers):
            features = features.to(layers[0].weight.dtype)
            return [layer(features) for layer in layers]
        if now is not None and now.few:
            rows = now.rows(features)
            return [_linear(layer, rows) for layer in layers]
        low = self._read(features, adapter, [layer.weight for layer in layers])
        if self.split is not None and self.split.reads_share:
            low = [self.split.summed(x) for x in low]
        dtype = layers[0].weight.dtype
        return [x.to(dtype) if b.bias is None else x.to(dtype) + b.bias for x, b in zip(low, layers, strict=True)]

    def _read(self, features: Tensor, adapter: str, matrices: Sequence[Tensor]) -> list[Tensor]:
        return read(features, matrices, features.dtype)

    def _second(self, hidden: Tensor, adapter: str) -> Tensor:
        layer: nn.Linear = self.moa_w2[adapter]  # type: ignore[assignment]
        if self.split is not None or _hosts.is_watched(layer):
            return layer(hidden)  # type: ignore[no-any-return]
        return _linear(layer, hidden)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    own = _hosts.parameters(layer)
    weight, bias = own["weight"], own["bias"]
    if weight.dtype is not x.dtype:  # type: ignore[union-attr]
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)  # type: ignore[union-attr,assignment]
    return F.linear(x, weight, bias)  # type: ignore[arg-type]

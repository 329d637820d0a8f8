"""From router logits to expert weights: one small class per rule.

Every rule is a dataclass that is called with ``logits`` (..., experts) and, if it has ``learns_threshold``, with
``threshold_logit`` (..., 1), and returns `Gates`. Rules act on the last dimension only, so the same rule gates the
experts of a block and the copies inside one expert. Scores are computed in float32 or wider.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from moa.choices import check_choice, check_flag, check_range


class Gates(NamedTuple):
    """What a rule decided.

    Attributes:
        weights: (..., experts), what multiplies each expert's output; exactly 0 where an expert is off.
        scores: (..., experts), the router's opinion before selection, read by the load-balance loss.
        threshold: (..., 1), or None for rules without one.
    """

    weights: Tensor
    scores: Tensor
    threshold: Tensor | None = None


def _wide(logits: Tensor) -> Tensor:
    if logits.dtype is torch.float32:
        return logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _sum_to_one(weights: Tensor) -> Tensor:
    """Divide by the sum over experts; a token without any active expert keeps its zeros."""
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, torch.ones_like(total), total)


@dataclass(kw_only=True)
class Gating:
    """Base of all rules.

    Attributes:
        kind: the rule's name in a saved configuration.
        selects: whether weights may be exactly 0, so that work can be skipped.
        balance: weight of the load-balance loss ``E * sum_e share_e * mean_score_e`` (Switch Transformer, eq. 4), see
            `load`; 0 switches it off. Its gradient is added in backward, the reported loss stays the model's own.
        z_loss: weight of the squared log-sum-exp of the logits (ST-MoE, eq. 5); 0 switches it off.
    """

    kind: ClassVar[str]
    selects: ClassVar[bool] = False
    learns_threshold: ClassVar[bool] = False
    balance: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        check_range(f"{self.kind} gating: balance", self.balance, low=0)
        check_range(f"{self.kind} gating: z_loss", self.z_loss, low=0)

    @property
    def has_auxiliary_loss(self) -> bool:
        return self.balance > 0 or self.z_loss > 0

    def __call__(self, logits: Tensor, threshold_logit: Tensor | None = None) -> Gates:
        raise NotImplementedError

    def decides(self, outputs: int) -> bool:
        """Whether the weights of so many experts depend on their logits; else a router gets no gradient from them."""
        return True

    def load(self, gates: Gates) -> tuple[Tensor, Tensor]:
        """``share`` and ``mean_score`` of the balance loss, both (experts,), of gates (tokens, experts).

        A rule that selects is balanced by how often it takes an expert. Where every expert takes part, that is always,
        and the loss would be blind (softmax) or push all gates down alike (sigmoid); what is balanced there is how a
        token's scores divide among experts: ``E * sum_e mean_e^2`` is least when the means are equal.
        """
        if self.selects:
            return (gates.weights.detach() != 0).to(gates.scores.dtype).mean(0), gates.scores.mean(0)
        mean = _sum_to_one(gates.scores).mean(0)
        return mean.detach(), mean

    def of_few(self, logits: Tensor, threshold_logit: Tensor | None = None) -> Gates:
        """As a call, for few float32 tokens on a CPU: a rule that sorts is faster on numbers than on tensors there."""
        shape, thresholds = logits.shape, [None] * logits.shape[:-1].numel()
        if threshold_logit is not None:
            thresholds = threshold_logit.flatten().tolist()
        table = [self.of_token(row, t) for row, t in zip(logits.view(-1, shape[-1]).tolist(), thresholds, strict=True)]
        weights = torch.tensor(table, dtype=torch.float32).view(shape)
        return Gates(weights, weights, self.threshold(weights, threshold_logit))

    def threshold(self, scores: Tensor, threshold_logit: Tensor | None) -> Tensor | None:
        """The level (..., 1) that scores are compared with; None for a rule without one."""
        return None

    def of_token(self, logits: list[float], threshold_logit: float | None = None) -> list[float]:
        """One token's weights as numbers."""
        threshold = None if threshold_logit is None else torch.tensor([threshold_logit])
        weights: list[float] = self(torch.tensor(logits), threshold).weights.tolist()
        return weights


@dataclass
class Soft(Gating):
    """All experts, each with its own sigmoid weight, not normalised (Soft MoA; official `llama.py:637`)."""

    kind: ClassVar[str] = "soft"

    def __call__(self, logits: Tensor, threshold_logit: Tensor | None = None) -> Gates:
        weights = torch.sigmoid(_wide(logits))
        return Gates(weights, weights)


@dataclass
class Softmax(Gating):
    """All experts, weights summing to one (MoLoRA, HydraLoRA)."""

    kind: ClassVar[str] = "softmax"

    def decides(self, outputs: int) -> bool:
        return outputs > 1

    def __call__(self, logits: Tensor, threshold_logit: Tensor | None = None) -> Gates:
        weights = torch.softmax(_wide(logits), dim=-1)
        return Gates(weights, weights)


@dataclass
class TopK(Gating):
    """The ``k`` experts of highest softmax score, renormalised to sum to one (top-k MoE-LoRA)."""

    kind: ClassVar[str] = "topk"
    selects: ClassVar[bool] = True
    k: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("topk gating: k", self.k, low=1, whole=True)

    def decides(self, outputs: int) -> bool:
        return min(self.k, outputs) > 1  # one that is taken alone has a weight of one

    def __call__(self, logits: Tensor, threshold_logit: Tensor | None = None) -> Gates:
        scores = torch.softmax(_wide(logits), dim=-1)
        values, chosen = torch.topk(scores, self.k, dim=-1)
        return Gates(torch.zeros_like(scores).scatter(-1, chosen, _sum_to_one(values)), scores)


@dataclass
class Threshold(Gating):
    """Experts whose score reaches a threshold that is learned per token (Sparse MoA; AdaMoLE).

    ``Gamma = gamma_max * sigmoid(w x + b)``, or ``gamma_max`` itself if ``constant``. With scores ``s``:

    - ``frozen``: weight ``s * [s >= Gamma]``. Gamma gets no gradient and stays at its random start, as in the
      official code (`LLaMA3_sparse_moa/llama/llama.py:548-567`).
    - ``straight-through``: the same weights; in backward the step is replaced by a sigmoid of ``s - Gamma``.
    - ``shifted``: weight ``max(s - Gamma, 0)`` (AdaMoLE, eq. 6), continuous at the threshold.
    - ``closed-form``: sparsegen, the Euclidean projection of ``s / (1 - Gamma)`` onto the simplex (Laha et al. 2018,
      as in LD-MoLE), times ``sum(s)`` so that the total weight is that of Soft MoA. Gamma then says how sparse to
      be and is no longer a level that scores are compared with. The default, by experiment (`docs/concepts.md`).

    Attributes:
        gamma_max: upper end of the threshold, in (0, 1].
        constant: use ``gamma_max`` for every token; no threshold is learned.
        train_threshold: how the threshold learns, see above.
        score: ``sigmoid`` (MoA) or ``softmax`` (AdaMoLE).
        renormalise: make the weights of a token sum to one (AdaMoLE).
    """

    kind: ClassVar[str] = "threshold"
    selects: ClassVar[bool] = True
    gamma_max: float = 0.5
    constant: bool = False
    train_threshold: str = "closed-form"
    score: str = "sigmoid"
    renormalise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("threshold gating: gamma_max", self.gamma_max, low=0, high=1, open_low=True)
        check_flag("threshold gating: constant", self.constant)
        check_flag("threshold gating: renormalise", self.renormalise)
        check_choice("threshold gating: train_threshold", self.train_threshold, list(ESTIMATORS))
        check_choice("threshold gating: score", self.score, ["sigmoid", "softmax"])

    @property
    def learns_threshold(self) -> bool:  # type: ignore[override]
        return not self.constant

    def decides(self, outputs: int) -> bool:
        return outputs > 1 or (self.score == "sigmoid" and not self.renormalise)

    def __call__(self, logits: Tensor, threshold_logit: Tensor | None = None) -> Gates:
        logits = _wide(logits)
        scores = torch.sigmoid(logits) if self.score == "sigmoid" else torch.softmax(logits, dim=-1)
        threshold = self.threshold(scores, threshold_logit)
        weights = ESTIMATORS[self.train_threshold](scores, threshold)
        # AdaMoLE balances the part of the score above the threshold, MoA (no such loss upstream) the score itself: see
        # `load`, whose division needs scores that are positive.
        balanced = scores - threshold if self.train_threshold == "shifted" and self.score == "softmax" else scores
        return Gates(_sum_to_one(weights) if self.renormalise else weights, balanced, threshold)

    def threshold(self, scores: Tensor, threshold_logit: Tensor | None) -> Tensor:
        if self.constant:
            return torch.full_like(scores[..., :1], self.gamma_max)
        if threshold_logit is None:
            raise ValueError("threshold gating needs the threshold's logit for every token")
        return self.gamma_max * torch.sigmoid(_wide(threshold_logit))

    def load(self, gates: Gates) -> tuple[Tensor, Tensor]:
        """As for every rule that selects; sigmoid scores are divided by their sum, or all would be pushed down."""
        share, mean = super().load(gates)
        return (share, _sum_to_one(gates.scores).mean(0)) if self.score == "sigmoid" else (share, mean)

    def of_token(self, logits: list[float], threshold_logit: float | None = None) -> list[float]:
        if self.score != "sigmoid" or self.renormalise or self.constant or threshold_logit is None:
            return super().of_token(logits, threshold_logit)
        scores = [_sigmoid(logit) for logit in logits]
        threshold = self.gamma_max * _sigmoid(threshold_logit)
        if self.train_threshold == "closed-form":
            spread, total, tau = max(1 - threshold, 1e-3), 0.0, -math.inf
            for rank, score in enumerate(sorted(scores, reverse=True), start=1):
                total += score
                tau = max(tau, (total - spread) / rank)
            return [max((score - tau) / spread, 0.0) * total for score in scores]
        if self.train_threshold == "shifted":
            return [max(score - threshold, 0.0) for score in scores]
        return [score if score >= threshold else 0.0 for score in scores]


def _sigmoid(x: float) -> float:
    return 0.5 + 0.5 * math.tanh(0.5 * x)


def _frozen(scores: Tensor, threshold: Tensor) -> Tensor:
    return scores * (scores - threshold >= 0)


def _straight_through(scores: Tensor, threshold: Tensor) -> Tensor:
    margin = scores - threshold
    step = (margin >= 0).to(scores.dtype)
    smooth = torch.sigmoid(margin)
    return scores * (step + (smooth - smooth.detach()))


def _shifted(scores: Tensor, threshold: Tensor) -> Tensor:
    return torch.relu(scores - threshold)


def _closed_form(scores: Tensor, threshold: Tensor) -> Tensor:
    """Sparsegen: ``p_i = max((s_i - tau) / (1 - Gamma), 0)`` with tau such that the p sum to one.

    That tau is the largest of ``(sum of the k best scores - (1 - Gamma)) / k`` over k.
    """
    spread = (1 - threshold).clamp_min(1e-3)
    with torch.no_grad():  # who is in the support; gradients need not pass through the sorting
        best = scores.sort(dim=-1, descending=True).values.cumsum(-1)
        rank = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
        support = (scores > ((best - spread) / rank).amax(-1, keepdim=True)).to(scores.dtype)
    tau = ((scores * support).sum(-1, keepdim=True) - spread) / support.sum(-1, keepdim=True)
    return torch.relu((scores - tau) / spread) * scores.sum(-1, keepdim=True)


ESTIMATORS = {
    "frozen": _frozen,
    "straight-through": _straight_through,
    "shifted": _shifted,
    "closed-form": _closed_form,
}

GATINGS: dict[str, type[Gating]] = {cls.kind: cls for cls in (Soft, Softmax, TopK, Threshold)}

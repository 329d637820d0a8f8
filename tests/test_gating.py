"""Gating rules against numbers worked out by hand, and their gradients against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moa.adapters.gating import ESTIMATORS, GATINGS, Gating, Soft, Softmax, Threshold, TopK

LOGITS = torch.tensor([[0.0, math.log(3), -math.log(3)]], dtype=torch.float64)
"""Sigmoids 1/2, 3/4, 1/4; softmax proportional to 3, 9, 1."""
HALF = torch.zeros(1, 1, dtype=torch.float64)
"""A threshold logit that puts Gamma at half of its maximum."""


def weights(gating: Gating, threshold_logit: Tensor | None = HALF) -> list[float]:
    return gating(LOGITS, threshold_logit).weights[0].tolist()


def test_soft_is_a_sigmoid_per_expert() -> None:
    assert weights(Soft()) == pytest.approx([0.5, 0.75, 0.25])


def test_softmax_sums_to_one() -> None:
    assert weights(Softmax()) == pytest.approx([3 / 13, 9 / 13, 1 / 13])


def test_topk_renormalises_what_it_keeps() -> None:
    assert weights(TopK(k=2)) == pytest.approx([3 / 12, 9 / 12, 0])


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("frozen", [0.5, 0.75, 0]),
        ("straight-through", [0.5, 0.75, 0]),
        ("shifted", [0.1, 0.35, 0]),
        # Gamma = 0.4: (s - tau) / 0.6 sums to one over all three at tau = (1.5 - 0.6) / 3 = 0.3, which drops the
        # third; over two, tau = (1.25 - 0.6) / 2 = 0.325. Times sum(s) = 1.5.
        ("closed-form", [0.175 / 0.6 * 1.5, 0.425 / 0.6 * 1.5, 0]),
    ],
)
def test_threshold_estimators(estimator: str, expected: list[float]) -> None:
    assert weights(Threshold(gamma_max=0.8, train_threshold=estimator)) == pytest.approx(expected)


def test_an_expert_exactly_at_the_threshold_is_on() -> None:
    gates = Threshold(gamma_max=0.5, constant=True, train_threshold="frozen")(LOGITS)
    assert gates.weights[0].tolist() == pytest.approx([0.5, 0.75, 0])
    assert gates.threshold is not None
    assert gates.threshold.item() == 0.5


def test_adamole_is_a_configuration() -> None:
    gating = Threshold(gamma_max=1 / 3, score="softmax", train_threshold="shifted", renormalise=True)
    kept = [3 / 13 - 1 / 6, 9 / 13 - 1 / 6]
    assert weights(gating) == pytest.approx([kept[0] / sum(kept), kept[1] / sum(kept), 0])


def test_a_token_without_active_experts_keeps_its_zeros() -> None:
    gates = Threshold(constant=True, gamma_max=1.0, renormalise=True, train_threshold="frozen")(LOGITS)
    assert gates.weights.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name != "frozen"])
def test_the_threshold_learns(estimator: str) -> None:
    threshold = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    Threshold(train_threshold=estimator, gamma_max=0.8)(LOGITS, threshold).weights.square().sum().backward()
    assert threshold.grad is not None
    assert threshold.grad.abs().item() > 0


def test_the_official_threshold_does_not_learn() -> None:
    threshold = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    logits = LOGITS.clone().requires_grad_()
    Threshold(train_threshold="frozen")(logits, threshold).weights.sum().backward()
    assert threshold.grad is None


EXACT = [Soft(), Softmax(), TopK(k=2), Threshold(train_threshold="shifted"), Threshold(train_threshold="closed-form")]


@pytest.mark.parametrize("gating", EXACT, ids=lambda gating: f"{gating.kind}-{getattr(gating, 'train_threshold', '')}")
def test_gradients_match_finite_differences(gating: Gating) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    threshold = torch.randn(4, 1, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, t: gating(x, t).weights, (logits, threshold))


def test_closed_form_weights_sum_to_those_of_soft() -> None:
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    threshold = torch.randn(50, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sparse = Threshold(train_threshold="closed-form", gamma_max=1.0)(logits, threshold).weights
    torch.testing.assert_close(sparse.sum(-1), Soft()(logits).weights.sum(-1))
    assert (sparse == 0).any()


@pytest.mark.parametrize("kind", sorted(GATINGS))
def test_half_precision_logits_are_gated_in_float32(kind: str) -> None:
    gates = GATINGS[kind]()(LOGITS.to(torch.bfloat16), HALF.to(torch.bfloat16))
    assert gates.weights.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma_max": 0}, "gamma_max=0 is outside of (0, 1]"),
        ({"gamma_max": float("nan")}, "gamma_max=nan is outside"),
        ({"train_threshold": "shift"}, "did you mean 'shifted'"),
        ({"score": "tanh"}, r"score='tanh' is not one of ['sigmoid', 'softmax']"),
        ({"balance": -1}, "balance=-1 is outside"),
    ],
)
def test_values_out_of_range_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is checked below)
        Threshold(**arguments)  # type: ignore[arg-type]
    assert message in str(error.value)

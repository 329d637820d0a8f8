"""The experts' arithmetic against formulas written out one expert at a time, and against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moa.adapters import ops


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)


def lora(x: Tensor, a: Tensor, b: Tensor, weights: Tensor | None) -> Tensor:
    return F.linear(ops.rank_space(F.linear(x, a), b.shape[-1], weights), b)


@pytest.mark.parametrize("shared", [False, True])
def test_copies_of_lora_are_a_weighted_sum(shared: bool) -> None:
    x, route, b = draw(2, 3, 5, seed=0), draw(2, 3, 4, seed=1), draw(6, 4 * 2, seed=2)
    a = draw(2 if shared else 4 * 2, 5, seed=3)
    expected = sum(
        route[..., c : c + 1] * (x @ (a if shared else a[2 * c : 2 * c + 2]).T @ b[:, 2 * c : 2 * c + 2].T)
        for c in range(4)
    )
    torch.testing.assert_close(lora(x, a, b, route), expected)


@pytest.mark.parametrize("shared", [False, True])
def test_copies_of_a_bottleneck_are_a_weighted_sum(shared: bool) -> None:
    route, up, bias = draw(2, 3, 4, seed=1), draw(6, 4 * 2, seed=2), draw(4, 6, seed=3)
    hidden = draw(2, 3, 2 if shared else 4 * 2, seed=0)
    expected = sum(
        route[..., c : c + 1]
        * ((hidden if shared else hidden[..., 2 * c : 2 * c + 2]) @ up[:, 2 * c : 2 * c + 2].T + bias[c])
        for c in range(4)
    )
    torch.testing.assert_close(ops.bottleneck(hidden, up, bias, route), expected)


def test_prompt_attention_is_gated_attention_per_query_head() -> None:
    query, key, value = draw(2, 4, 3, 5, seed=0), draw(2, 6, 5, seed=1), draw(2, 6, 7, seed=2)
    head_gate, route = draw(4, seed=3), draw(2, 3, 2, seed=4)
    out = ops.prompt_attention(query, key, value, 0.3, head_gate, route)
    assert out.shape == (2, 3, 4, 7)
    for head in range(4):
        shares = torch.softmax(query[:, head] @ key[head // 2].T * 0.3, dim=-1) * head_gate[head]
        halves = [shares[..., :3] @ value[head // 2, :3], shares[..., 3:] @ value[head // 2, 3:]]
        expected = route[..., :1] * halves[0] + route[..., 1:] * halves[1]
        torch.testing.assert_close(out[:, :, head], expected)


@pytest.mark.parametrize("copies", [None, 1, 2])
def test_gradients_match_finite_differences(copies: int | None) -> None:
    route = None if copies is None else draw(2, 3, copies, seed=9)
    inputs = [draw(2, 3, 5, seed=0), draw(4, 5, seed=1), draw(6, 4, seed=2), route]
    assert torch.autograd.gradcheck(lora, inputs)
    inputs = [draw(2, 3, 4, seed=0), draw(6, 4, seed=1), draw(copies or 1, 6, seed=2), route]
    assert torch.autograd.gradcheck(ops.bottleneck, inputs)
    attention = [draw(2, 4, 3, 5, seed=0), draw(2, 6, 5, seed=1), draw(2, 6, 5, seed=2), 1 / math.sqrt(5)]
    assert torch.autograd.gradcheck(ops.prompt_attention, [*attention, draw(4, seed=3), route])

"""Narrow products are the same, through a library and written out for the compiler."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from moa.adapters.prompt_attention import Prompt
from moa.serving import products


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def prompt() -> Prompt:
    return Prompt(random(2, 5, 8), random(2, 5, 8, seed=1), random(6))


CASES: dict[str, tuple[Callable[..., Tensor], tuple[object, ...]]] = {
    "read": (products.read, (random(3, 12), random(4, 12))),
    "read-with-bias": (products.read, (random(3, 12), random(4, 12), random(4))),
    "add": (products.add, (random(3, 12), random(3, 4), random(4, 12))),
    "attend": (products.attend, (random(2, 6, 3, 8), prompt(), 0.3, None)),
    "attend-weighted": (products.attend, (random(2, 6, 3, 8), prompt(), 0.3, random(2, 3, 1))),
    "attend-copies": (products.attend, (random(2, 6, 3, 8), prompt(), 0.3, random(2, 3, 5))),
}


def compiled(function: Callable[..., Tensor], *arguments: object) -> tuple[Tensor, set[str]]:
    """What the traced function gives, and what it calls."""
    called: set[str] = set()

    def look(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        called.update(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
        return graph.forward

    return torch.compile(function, backend=look, fullgraph=True)(*arguments), called


@pytest.mark.parametrize(("function", "arguments"), CASES.values(), ids=CASES)
def test_what_is_written_out_is_the_product(function, arguments):
    written_out, called = compiled(function, *arguments)
    assert any("sum" in name for name in called)
    assert not any(name in target for target in called for name in ("linear", "addmm", "matmul"))
    expected = function(*arguments)
    assert written_out.shape == expected.shape
    torch.testing.assert_close(written_out, expected)


def test_what_is_wide_stays_a_product():
    wide = random(products.NARROW + 1, 12)
    _, called = compiled(products.read, random(3, 12), wide)
    assert not any("sum" in name for name in called)
    _, called = compiled(products.add, random(3, 12), random(3, len(wide)), wide)
    assert not any("sum" in name for name in called)

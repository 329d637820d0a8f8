"""Masks: those of the published search, and what a query sees when a plan runs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from planned import BLOCK, SINK
from safetensors.torch import load_file

from moa.spans.layout import HIDDEN, Sight, positions, published_layout

GOLDEN = load_file(Path(__file__).parent.parent / "golden" / "spans" / "masks.safetensors")


@pytest.mark.parametrize("name", [name for name in GOLDEN if name.endswith(".layout")])
def test_published_search_layout(name: str) -> None:
    length, alpha, beta = re.fullmatch(r"n(\d+)_a(-?\d+)_b(\w+)\.layout", name).groups()
    layout = published_layout(float(alpha), float(beta.replace("p", ".")), int(length))
    assert torch.equal(layout, GOLDEN[name].bool())
    packed = GOLDEN.get(name.replace(".layout", ".mask_packed"))
    if packed is not None:
        mask = torch.from_numpy(np.unpackbits(packed.numpy(), axis=1)).bool()
        tokens = layout.repeat_interleave(64, 0).repeat_interleave(64, 1).tril()
        assert torch.equal(tokens, mask)


@pytest.mark.parametrize("blockwise", [False, True])
@pytest.mark.parametrize("span", [8, 12, 24, 40, 43])
def test_sight(span: int, blockwise: bool) -> None:
    """One row after the other, by the words of the definition."""
    place = torch.arange(43)
    mask = Sight(SINK, BLOCK, blockwise).visible(place, place, span)
    for row in range(43):
        blocks = -(-(span - SINK) // BLOCK)
        first = (row // BLOCK + 1 - blocks) * BLOCK if blockwise else row + 1 - (span - SINK)
        assert mask[row].nonzero()[:, 0].tolist() == [k for k in range(row + 1) if k < SINK or k >= first]
    assert mask[-1].sum() == span or blockwise


def test_padding_takes_no_position() -> None:
    tokens = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 0, 1, 0, 1]], dtype=torch.bool)
    query, key = positions(torch.tensor([0, 3, 10]), 5, tokens, torch.device("cpu"))
    assert query.tolist() == [[-1, -1, 0, 1, 2], [3, 4, 5, 6, 7], [10, 10, 11, 11, 12]]
    assert key.tolist() == [[HIDDEN, HIDDEN, 0, 1, 2], [3, 4, 5, 6, 7], [10, HIDDEN, 11, HIDDEN, 12]]
    assert positions(2, 3, None, torch.device("cpu"))[0].tolist() == [[2, 3, 4]]

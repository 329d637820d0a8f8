"""Masks: those of the published search, and what a query sees when a plan runs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from planned import BLOCK, SINK
from safetensors.torch import load_file

from moa.spans.rule import search_band
from moa.spans.runtime.visibility import Padding, Sight

GOLDEN = load_file(Path(__file__).parent.parent / "golden" / "spans" / "masks.safetensors")


@pytest.mark.parametrize("name", [name for name in GOLDEN if name.endswith(".layout")])
def test_published_search_layout(name: str) -> None:
    length, alpha, beta = re.fullmatch(r"n(\d+)_a(-?\d+)_b(\w+)\.layout", name).groups()
    blocks = int(length) // 64
    band = search_band(float(alpha), float(beta.replace("p", ".")), blocks, 64)
    row, column = torch.arange(blocks)[:, None], torch.arange(blocks)[None]
    layout = (column <= row) & ((column < 1) | (column > row - band))  # next to the diagonal, and the first block
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


def test_padding_goes_behind_the_tokens_and_back() -> None:
    tokens = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 0, 1, 0, 1]], dtype=torch.bool)
    padding, columns = Padding(tokens), torch.arange(5.0)[None, None, :, None].expand(3, 2, -1, 4)
    packed = padding.pack(columns)
    assert padding.tokens.tolist() == [3, 5, 3]
    assert packed[:, 1, :, 3].tolist() == [[2, 3, 4, 0, 1], [0, 1, 2, 3, 4], [0, 2, 4, 1, 3]]
    assert torch.equal(padding.unpack(packed), columns)

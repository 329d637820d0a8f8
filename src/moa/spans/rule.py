"""How long a head's span is, and what a plan's kind makes of it: the numbers that everything else asks for.

A head keeps the first ``sink`` tokens of a text and a window of the latest ones; its span is both together. The span
is elastic: ``alpha + beta * length``, cut to whole tokens and rounded up to whole blocks (Mixture of Attention spans,
arXiv 2406.14909, equation 2). Search, masks, cache and densities all call `span`.

A plan of ours has one meaning: a token at position ``t`` of a text that gets ``N`` tokens long sees the sink and the
last ``span(N) - sink`` tokens, itself included. A published plan keeps what its authors' code does with it, which
differs in three places (`Convention`); its densities are those of its search's layout, in the last functions here.
"""

from __future__ import annotations

from typing import NamedTuple


class Rule(NamedTuple):
    """An elastic rule: a span of ``alpha + beta * length`` tokens."""

    alpha: float
    beta: float


def span(rule_alpha: float, rule_beta: float, length: int, *, sink: int, block: int) -> int:
    """Tokens that the last row of a text of ``length`` tokens sees, the sink included.

    Whole blocks, at least ``sink + block``, and never more than ``length``: a text that is not longer than its span is
    dense.

    Args:
        rule_alpha: offset in tokens.
        rule_beta: slope, tokens per token.
        length: tokens of the whole text, those still to be generated included.
        sink: first tokens that are always seen, a multiple of ``block``.
        block: granularity in tokens.
    """
    wanted = max(int(rule_alpha + rule_beta * length), sink + block)
    return min(-(-wanted // block) * block, length)


class Convention(NamedTuple):
    """How a kind of plan is read.

    Attributes:
        sink_on_top: densities are those of a layout with the sink next to the span, at the prompt's length.
        blockwise_prefill: rows of a prefill see whole blocks only (between ``span - sink - block + 1`` and ``span -
            sink`` of the latest tokens), while decoding is exact to the token.
        to_come: tokens expected after a prefill when nobody says how long the text gets.
    """

    sink_on_top: bool
    blockwise_prefill: bool
    to_come: int


CONVENTIONS = {
    "native": Convention(sink_on_top=False, blockwise_prefill=False, to_come=0),
    "published": Convention(sink_on_top=True, blockwise_prefill=True, to_come=1024),
}


def search_band(alpha: float, beta: float, blocks: int, block: int) -> int:
    """Latest blocks a row keeps in the published search (thu-nics/MoA ``elastic_block_sparse.py:75-98``)."""
    return max(int(alpha // block + beta * blocks), 1)


def search_blocks(alpha: float, beta: float, length: int, block: int) -> int:
    """Most blocks a row keeps in the published search: the band, and the sink block on top of it."""
    blocks = length // block
    if blocks < 1:
        raise ValueError(f"length={length}: a published plan's density needs at least one block of {block} tokens")
    return min(search_band(alpha, beta, blocks, block) + 1, blocks)


def causal_pairs(kept: int, rows: int) -> int:
    """Pairs (row, key) that are seen if every row sees ``kept`` keys, or all it has; ``kept <= rows``."""
    return kept * (kept + 1) // 2 + (rows - kept) * kept

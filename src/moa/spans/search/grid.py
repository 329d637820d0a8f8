"""The rules a search may choose from: a grid of offsets and slopes that fit every length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moa.spans.rule import Rule


def rules(lengths: Sequence[int], extend: Sequence[int] = (), *, step: int = 1024, slopes: int = 9) -> list[Rule]:
    """All rules ``alpha + beta * N`` that neither vanish at the shortest length nor exceed the longest ones.

    Offsets go from minus the shortest length to the longest profiled one in steps of ``step``, slopes evenly from 0 to
    1. Kept are pairs with a positive span at the shortest length, and a span within the text at the longest profiled
    and the longest of all lengths. Ordered by span at the longest of all lengths; equal spans by offset. This is the
    official code's grid and order (``elastic_generate.py:137-161``, ``elastic_block_sparse.py:46-63``).

    Args:
        lengths: profiled lengths, in tokens.
        extend: further lengths that the plan must fit, in tokens.
        step: tokens between two offsets.
        slopes: how many slopes.

    Raises:
        ValueError: no lengths, a number below its least value, or no rule that fits.
    """
    if not lengths or min([*lengths, *extend]) < 1:
        raise ValueError(
            f"lengths={list(lengths)} and extend={list(extend)} must hold positive lengths, the first at least one"
        )
    if step < 1 or slopes < 2:
        raise ValueError(f"step={step} must be at least 1 and slopes={slopes} at least 2")
    shortest, profiled, longest = min([*lengths, *extend]), max(lengths), max([*lengths, *extend])
    offsets = np.linspace(-shortest, profiled, (profiled + shortest) // step + 1)
    fitting = [
        Rule(float(alpha), float(beta))
        for alpha in offsets
        for beta in np.linspace(0, 1, slopes)
        if alpha + beta * profiled <= profiled and alpha + beta * longest <= longest and alpha + beta * shortest > 0
    ]
    if not fitting:
        raise ValueError(f"no rule fits lengths {sorted({*lengths, *extend})} with step={step} and slopes={slopes}")
    return sorted(fitting, key=lambda rule: rule.alpha + rule.beta * longest)

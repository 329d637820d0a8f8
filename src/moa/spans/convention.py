"""The one place where a published plan means something else than ours.

A plan of ours has one meaning: a token at position ``t`` of a text that gets ``N`` tokens long sees the sink and the
last ``span(N) - sink`` tokens, itself included. Search, prefill, training and decoding agree on it.

A published plan keeps what its authors' code does with it (thu-nics/MoA, facts in the documentation):

- its *search* counted the sink block on top of the span, at the prompt's length: densities are of that layout;
- its *deployment* counts the sink in, and takes ``N`` as the prompt and 1024 tokens more unless told;
- its *prefill* cuts the window at whole blocks (a row sees between ``span - sink - block + 1`` and ``span - sink`` of
  the latest tokens), while its decoding is exact to the token like ours.
"""

from __future__ import annotations

from typing import NamedTuple


class Convention(NamedTuple):
    """How a kind of plan is read.

    Attributes:
        sink_on_top: densities are those of a layout with the sink next to the span.
        blockwise_prefill: rows of a prefill see whole blocks only.
        to_come: tokens expected after a prefill when nobody says how long the text gets.
    """

    sink_on_top: bool
    blockwise_prefill: bool
    to_come: int


CONVENTIONS = {
    "native": Convention(sink_on_top=False, blockwise_prefill=False, to_come=0),
    "published": Convention(sink_on_top=True, blockwise_prefill=True, to_come=1024),
}

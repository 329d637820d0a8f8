"""What an expert is while its weights stay as they are: tensors that an engine can put beside those of others.

Every kind gives one of these forms from `moa.adapters.experts.base.ExpertLayer.form`; a prompt's form is its
`moa.adapters.prompt_attention.Prompt`. `moa.serving.packing` computes them.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import NamedTuple, TypeAlias

from torch import Tensor

from moa.adapters.prompt_attention import Prompt


class Reads(Enum):
    """What an expert reads: its host's input or output, or the input of another module that comes before its host."""

    INPUT = "input"
    OUTPUT = "output"
    SOURCE = "source"


class Bottleneck(NamedTuple):
    """``y + (w * [act(D x + b), 1, ...]) U``, with weights ``w`` that are alike within each copy.

    Attributes:
        reads: what ``x`` is.
        down: D, (rows, in); fewer rows than ``width`` if copies share them.
        down_bias: b, (rows,), or None.
        activation: between the two, or None.
        up: U, (width + biases, out) with ``out`` all of the host's output, scaled. Its last rows are biases.
        width: of the bottleneck, all copies side by side.
        biases: how many rows of ``up`` are biases, one per copy; 0: none.
    """

    reads: Reads
    down: Tensor
    down_bias: Tensor | None
    activation: Callable[[Tensor], Tensor] | None
    up: Tensor
    width: int
    biases: int


class Rescaling(NamedTuple):
    """``y * (1 + w d)`` of the host's output, or of its input.

    Attributes:
        of_input: which of the two.
        change: d, (copies, features), features being all of the host's.
    """

    of_input: bool
    change: Tensor


Form: TypeAlias = Bottleneck | Rescaling | Prompt

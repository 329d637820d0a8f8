"""How the forms of a mixture are split where a tensor-parallel engine splits the base.

An engine gives every process some rows or columns of a projection, and some heads. What an expert adds has to be split
alike: a bottleneck writes the columns that its host puts out here; one whose host reads a part of its input here reads
that part, and the narrow products of all processes are summed before anything else happens to them, so that what goes
over the wire is as wide as the bottleneck and no wider. Routers, and experts beside or behind a whole module, read what
every process has, and are whole everywhere; a router over copies reads what its expert's host reads.

`moa.serving.packing` applies the rules; an engine says by `Processes` how it splits its modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moa.adapters.experts.forms import Bottleneck, Form, Reads, Rescaling
from moa.adapters.prompt_attention import Prompt


class Share(NamedTuple):
    """What one process holds of a module.

    Attributes:
        inputs: numbers of the features that it reads here, (in_here,); None: all.
        outputs: numbers of the features that it puts out here, (out_here,); None: all.
        heads: of attention, numbers of the query heads that it computes here; None: all.
    """

    inputs: Tensor | None = None
    outputs: Tensor | None = None
    heads: Tensor | None = None


class Processes(NamedTuple):
    """An engine's processes, as one of them sees them.

    Attributes:
        share: what this one holds of a module.
        total: the sum of all processes' tensors (n, width); it may be put into the tensor that was given.
    """

    share: Callable[[nn.Module], Share]
    total: Callable[[Tensor], Tensor]


class Shard(NamedTuple):
    """A form for one process.

    Attributes:
        form: what it computes.
        read: numbers of the features of its input that are here, (in_here,), of a router over its copies as well: what
            a matrix makes of them has to be summed over all processes, before its bias is added. None: all of them.
    """

    form: Form
    read: Tensor | None


def part(size: int, rank: int, ranks: int) -> Tensor:
    """Numbers of the features, or heads, that process ``rank`` of ``ranks`` has: neighbours, equally many for all.

    Fewer KV heads than processes are held by several, as engines do it.

    Raises:
        ValueError: they cannot be dealt out evenly.
    """
    if size % ranks == 0:
        own = size // ranks
        return torch.arange(rank * own, (rank + 1) * own)
    if ranks % size == 0:
        return torch.tensor([rank * size // ranks])
    raise ValueError(f"{size} features or heads cannot be dealt out evenly to {ranks} processes")


def columns(heads: Tensor, width: int) -> Tensor:
    """Numbers of the features of some heads of that width."""
    return (heads[:, None] * width + torch.arange(width)).flatten()


def beside(parts: Sequence[Tensor], widths: Sequence[int]) -> Tensor:
    """Of projections merged into one: which of its columns, given those of each and how many each has in all."""
    before = [sum(widths[:place]) for place in range(len(widths))]
    return torch.cat([own + start for own, start in zip(parts, before, strict=True)])


def shard(form: Form, host: Share, source: Share) -> Shard:
    """A form's share.

    Args:
        form: of the whole, but for a prompt's keys and values, which the base's own projections have made of their
            heads here.
        host: what its process holds of the host.
        source: likewise of the module whose input a bottleneck with ``Reads.SOURCE`` reads.
    """
    if isinstance(form, Rescaling):
        held = host.inputs if form.of_input else host.outputs
        return Shard(form._replace(change=_of(form.change, held)), host.inputs)
    if isinstance(form, Prompt):
        return Shard(form._replace(head_gate=_of(form.head_gate, host.heads)), None)
    return _bottleneck(form, host, source)


def _bottleneck(form: Bottleneck, host: Share, source: Share) -> Shard:
    read = {Reads.INPUT: host.inputs, Reads.OUTPUT: host.outputs, Reads.SOURCE: source.inputs}[form.reads]
    return Shard(form._replace(down=_of(form.down, read), up=_of(form.up, host.outputs)), read)


def _of(tensor: Tensor, numbers: Tensor | None) -> Tensor:
    """``tensor`` (..., features) -> those of its last dimension that have these numbers."""
    return tensor if numbers is None else tensor[..., numbers]

"""How the forms of a mixture are split where a tensor-parallel engine splits the base.

An engine gives every process some rows or columns of a projection, and some heads. What an expert adds has to be split
alike: a bottleneck writes the columns that its host puts out here; one whose host reads a part of its input here reads
that part, and the narrow products of all processes are summed before anything else happens to them, so that what goes
over the wire is as wide as the bottleneck and no wider. Routers, and experts beside or behind a whole module, read what
every process has, and are whole everywhere.

These are the rules alone: `moa.serving.vllm` refuses tensor parallelism, since it packs from a forward of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moa.adapters.experts.forms import Bottleneck, Form, Reads, Rescaling
from moa.adapters.prompt_attention import Prompt


class Share(NamedTuple):
    """What one process holds of a host.

    Attributes:
        inputs: numbers of the features that it reads here, (in_here,); None: all.
        outputs: numbers of the features that it puts out here, (out_here,); None: all.
        heads: numbers of the query heads that it computes here; None: all.
        kv_heads: likewise of the KV heads.
    """

    inputs: Tensor | None = None
    outputs: Tensor | None = None
    heads: Tensor | None = None
    kv_heads: Tensor | None = None


class Shard(NamedTuple):
    """A form for one process.

    Attributes:
        form: what it computes.
        summed: the product with ``down`` has to be summed over all processes, before its bias is added.
    """

    form: Form
    summed: bool


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


def shard(form: Form, host: Share, source: Share | None = None) -> Shard:
    """A form's share.

    Args:
        form: of the whole.
        host: what its process holds of the host.
        source: likewise of the module whose input a bottleneck with ``Reads.SOURCE`` reads.
    """
    if isinstance(form, Rescaling):
        held = host.inputs if form.of_input else host.outputs
        return Shard(form if held is None else form._replace(change=form.change[:, held]), False)
    if isinstance(form, Prompt):
        return Shard(
            Prompt(_of(form.key, host.kv_heads), _of(form.value, host.kv_heads), _of(form.head_gate, host.heads)), False
        )
    return _bottleneck(form, host, source)


def _bottleneck(form: Bottleneck, host: Share, source: Share | None) -> Shard:
    if form.reads is Reads.OUTPUT:
        read = host.outputs
    elif form.reads is Reads.INPUT:
        read = host.inputs
    else:
        assert source is not None
        read = source.inputs
    down = form.down if read is None else form.down[:, read]
    up = form.up if host.outputs is None else form.up[:, host.outputs]
    return Shard(form._replace(down=down, up=up), read is not None)


def _of(tensor: Tensor, heads: Tensor | None) -> Tensor:
    return tensor if heads is None else tensor[heads]

"""What the processes of a tensor-parallel engine compute together is what one computes alone, without any engine."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moa.adapters.experts.forms import Bottleneck, Reads, Rescaling
from moa.adapters.prompt_attention import Prompt, prompt_alone
from moa.serving.shards import Share, beside, columns, part, shard

TOKENS, IN, OUT, WIDTH, HEAD = 5, 16, 24, 6, 4
RANKS = [1, 2, 4]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bottleneck(reads: Reads, activation=None, biases: int = 0, out: int = OUT) -> Bottleneck:
    read = out if reads is Reads.OUTPUT else IN
    bias = normal(WIDTH, seed=3) if activation else None
    return Bottleneck(
        reads, normal(WIDTH, read, seed=1), bias, activation, normal(WIDTH + biases, out, seed=2), WIDTH, biases
    )


def added(form: Bottleneck, low: Tensor, gate: Tensor) -> Tensor:
    """What a bottleneck adds, given its narrow product without bias."""
    inner = low if form.down_bias is None else low + form.down_bias
    inner = inner if form.activation is None else form.activation(inner)
    return (gate * F.pad(inner, (0, form.biases), value=1.0)) @ form.up


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("split", ["columns", "rows", "whole"])
@pytest.mark.parametrize("reads", Reads)
@pytest.mark.parametrize("activation", [None, F.silu])
def test_bottlenecks(ranks, split, reads, activation):
    form = bottleneck(reads, activation, biases=1)
    x, y, gate = normal(TOKENS, IN), normal(TOKENS, OUT, seed=4), normal(TOKENS, 1, seed=5)
    read = y if reads is Reads.OUTPUT else x
    expected = added(form, read @ form.down.t(), gate)
    shares = {
        "columns": lambda rank: Share(outputs=part(OUT, rank, ranks)),
        "rows": lambda rank: Share(inputs=part(IN, rank, ranks)),
        "whole": lambda rank: Share(),
    }
    hosts = [shares[split](rank) for rank in range(ranks)]
    # A module whose input is read before the host has run: split by rows, as a down projection is.
    sources = [Share(inputs=part(IN, rank, ranks)) for rank in range(ranks)]
    shards = [shard(form, host, source) for host, source in zip(hosts, sources, strict=True)]
    held = {Reads.INPUT: [h.inputs for h in hosts], Reads.OUTPUT: [h.outputs for h in hosts]}
    held[Reads.SOURCE] = [s.inputs for s in sources]
    lows = [
        (read if own is None else read[:, own]) @ piece.form.down.t()
        for own, piece in zip(held[reads], shards, strict=True)
    ]
    for host, piece, low in zip(hosts, shards, lows, strict=True):
        total = low if piece.read is None else sum(lows)
        own = expected if host.outputs is None else expected[:, host.outputs]
        torch.testing.assert_close(added(piece.form, total, gate), own)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("of_input", [True, False])
def test_rescalings(ranks, of_input):
    form = Rescaling(of_input, normal(3, OUT))
    y, weights = normal(TOKENS, OUT, seed=1), normal(TOKENS, 3, seed=2)
    expected = y * (1 + weights @ form.change)
    found = []
    for rank in range(ranks):
        own = part(OUT, rank, ranks)
        piece = shard(form, Share(inputs=own) if of_input else Share(outputs=own), Share())
        assert (piece.read is own) is of_input  # by a router over copies, which reads what the host reads
        found.append(y[:, own] * (1 + weights @ piece.form.change))
    torch.testing.assert_close(torch.cat(found, dim=-1), expected)
    whole = shard(form, Share(), Share())
    assert whole.form.change is form.change
    assert whole.read is None


@pytest.mark.parametrize(("ranks", "kv_heads"), [(1, 2), (2, 2), (4, 4), (4, 2), (2, 1)])
def test_prompts(ranks, kv_heads):
    """By heads, of which the base's own projections make those here; several processes may have the same KV head."""
    heads = 4
    prompt = Prompt(normal(kv_heads, 3, HEAD), normal(kv_heads, 3, HEAD, seed=1), normal(heads, seed=2))
    query = normal(1, heads, TOKENS, HEAD, seed=3)
    expected = prompt_alone(query, prompt, 0.5, None)
    found = []
    for rank in range(ranks):
        own, kv = part(heads, rank, ranks), part(kv_heads, rank, ranks)
        here = Prompt(prompt.key[kv], prompt.value[kv], prompt.head_gate)
        piece = shard(here, Share(heads=own), Share())
        assert piece.read is None
        found.append(prompt_alone(query[:, own], piece.form, 0.5, None))
    torch.testing.assert_close(torch.cat(found, dim=2), expected)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_merged_projections(ranks):
    """Queries, keys and values in one layer: every process has some heads of each."""
    heads, kv_heads = 4, 2
    widths = [heads * HEAD, kv_heads * HEAD, kv_heads * HEAD]
    form = bottleneck(Reads.INPUT, out=sum(widths))
    x, gate = normal(TOKENS, IN), normal(TOKENS, 1, seed=5)
    whole = added(form, x @ form.down.t(), gate).split(widths, dim=-1)
    for rank in range(ranks):
        own = [columns(part(n, rank, ranks), HEAD) for n in (heads, kv_heads, kv_heads)]
        piece = shard(form, Share(outputs=beside(own, widths)), Share())
        expected = torch.cat([part_of[:, places] for part_of, places in zip(whole, own, strict=True)], dim=-1)
        torch.testing.assert_close(added(piece.form, x @ piece.form.down.t(), gate), expected)


@pytest.mark.parametrize(("size", "ranks"), [(6, 4), (3, 2)])
def test_what_cannot_be_dealt_out_is_named(size, ranks):
    with pytest.raises(ValueError, match=f"{size} features or heads cannot be dealt out evenly to {ranks} processes"):
        part(size, 0, ranks)

"""Rings keep what the official cache keeps, slot by slot, and survive what generation does to a cache."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from planned import BLOCK, KV_HEADS, LAYERS, SINK, decoded, ids, logits, mixed_plan, tiny
from safetensors.torch import load_file

from moa.spans import SpanPlan, apply_spans, cache_bytes
from moa.spans.runtime.ring import Ring
from moa.spans.runtime.visibility import HIDDEN, Padding

GOLDEN = Path(__file__).parent.parent / "golden" / "spans"
CASES = json.loads((GOLDEN / "cache.json").read_text())
POSITIONS = load_file(GOLDEN / "cache.safetensors")


def empty(heads: tuple[int, ...], span: int, sink: int, rows: int) -> Ring:
    """A ring of which every slot says that it was never written."""
    keys, values = (torch.full((rows, len(heads), span, 1), -1.0) for _ in range(2))
    return Ring(heads, span, sink, keys, values)


@pytest.mark.parametrize("case", ["long_prefill", "short_prefill", "tiny", "left_padded"])
def test_positions_of_the_official_cache(case: str) -> None:
    """Every token's key is its own column, so that the content tells which ones survive, and where."""
    settings = CASES[case]
    prefill, steps = settings["prefill"], settings["decode"]
    mask = settings["left_pad_mask"]
    rows = 1 if mask is None else len(mask)
    padding = None if mask is None else Padding(torch.tensor(mask, dtype=torch.bool))
    ends = POSITIONS[f"{case}.head_index"].tolist()
    columns = torch.arange(prefill + steps).float()[None, None, :, None].expand(rows, 1, -1, 1)
    for head, (size, sink) in enumerate(zip(settings["cache_size"][0], settings["static_size"][0], strict=True)):
        ring = empty((0,), size, sink, rows)
        count = prefill if padding is None else padding.tokens
        first = columns[:, :, :prefill] if padding is None else padding.pack(columns[:, :, :prefill])
        ring.store(first, first, 0, ring.places(count))
        for step in range(steps + 1):
            if step:
                new = columns[:, :, prefill + step - 1 : prefill + step]
                ring.put(new, new, count)
                count = count + 1
            if step % settings["every"] == 0:
                at = step // settings["every"]
                golden = POSITIONS[f"{case}.positions"][at, :, ends[head] : ends[head + 1]]
                assert torch.equal(ring.keys[:, 0, :, 0].to(golden.dtype), golden), (head, step)
                used = torch.as_tensor(ring.filled(count)).expand(rows)
                assert used.tolist() == POSITIONS[f"{case}.valid_length"][at, :, head].tolist()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("count", [3, 9, 20, 41])
def test_what_is_held_and_growth(count: int, padded: bool) -> None:
    """A ring knows which token is where; a longer one takes over all of them."""
    blank = min(5, count - 1) if padded else 0
    counts = torch.tensor([count, count - blank]) if padded else count
    columns = torch.arange(60.0)[None, None, :, None].expand(2, 2, -1, 1)
    ring = empty((0, 2), 16, SINK, 2)
    ring.store(columns[:, :, :count], columns[:, :, :count], 0, ring.places(counts))
    longer = empty((2,), 24, SINK, 2)
    longer.take_over(ring, counts)
    for part in (ring, longer):
        places = part.places(counts).expand(2, -1)
        for row in range(2):
            end = int(torch.as_tensor(counts).expand(2)[row])
            held = places[row] < HIDDEN
            assert torch.equal(part.keys[row, 0, held, 0].long(), places[row, held])
            assert (part.keys[row, 0, ~held] == -1).all()
            assert places[row, held].sort().values.tolist() == [
                p for p in range(end) if p < SINK or p >= end - (16 - SINK)
            ]
            assert int(torch.as_tensor(part.filled(counts)).expand(2)[row]) == held.sum() == held[: held.sum()].sum()
    new = torch.full((2, 1, 1, 1), 99.0)
    longer.put(new, new, counts)
    assert (longer.keys == 99).sum() == 2
    assert torch.equal(
        torch.as_tensor(longer.filled(counts + 1)).expand(2), torch.as_tensor(ring.filled(counts)).expand(2) + 1
    )


def test_padding_is_not_stored() -> None:
    """A row that has no token in a column keeps what it holds."""
    ring = empty((0,), 8, SINK, 2)
    new = torch.full((2, 1, 1, 1), 7.0)
    ring.put(new, new, torch.tensor([5, 5]), torch.tensor([1, 0]))
    assert (ring.keys == 7).nonzero().tolist() == [[0, 0, 5, 0]]


@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("plan", [mixed_plan(), SpanPlan.dense(LAYERS, KV_HEADS)], ids=["mixed", "dense"])
def test_rows_can_be_chosen(plan: SpanPlan, padding: int) -> None:
    """Beam search reorders rows, sampling repeats them, and a cache may be copied."""
    model, tokens = tiny(), ids(3, 40)
    mask = torch.ones_like(tokens)
    mask[1, :padding] = 0
    rows = torch.tensor([2, 0, 0, 1])
    with apply_spans(model, plan, length=40):
        expected = decoded(model, tokens, 30, attention_mask=mask)[0][:, 30:]
        _, cache = decoded(model, tokens[:, :30], 30, attention_mask=mask[:, :30])
        for change, want in (
            (lambda c: c.reorder_cache(rows), rows),
            (lambda c: c.batch_select_indices(rows), rows),
            (lambda c: c.batch_repeat_interleave(2), torch.arange(3).repeat_interleave(2)),
        ):
            mine = copy.deepcopy(cache)
            change(mine)
            place = (mask.cumsum(1) - 1)[want]
            with torch.no_grad():
                for step in range(30, 40):
                    got = model(
                        tokens[want, step : step + 1],
                        past_key_values=mine,
                        attention_mask=mask[want, : step + 1],
                        position_ids=place[:, step : step + 1],
                    ).logits
            torch.testing.assert_close(got[:, 0], expected[want, -1], rtol=1e-4, atol=2e-5)


def test_reset_starts_a_new_text() -> None:
    model, plan, tokens = tiny(), mixed_plan(), ids(length=40)
    with apply_spans(model, plan, length=40):
        expected, cache = decoded(model, tokens, 30)
        cache.reset()
        assert cache.get_seq_length() == 0
        torch.testing.assert_close(decoded(model, tokens, 30, cache)[0], expected)


def test_bytes_do_not_depend_on_what_was_generated() -> None:
    """A uniform plan of half the text holds half of the dense bytes, and never more on the way."""
    model, tokens = tiny(), ids(length=64)
    plan = SpanPlan.uniform(LAYERS, KV_HEADS, 0.5, sink=SINK, block=BLOCK)
    dense_bytes = cache_bytes(decoded(model, tokens, 64)[1])
    with torch.no_grad(), apply_spans(model, plan, length=64):
        cache = model(tokens[:, :1]).past_key_values
        sizes = [cache_bytes(cache)]
        for step in range(1, 64):
            model(tokens[:, step : step + 1], past_key_values=cache)
            sizes.append(cache_bytes(cache))
    assert set(sizes) == {dense_bytes // 2} == {plan.kv_bytes(model, 64, batch=2)}


def test_a_bigger_window_of_the_same_text_gives_other_logits() -> None:
    """The cache really forgets: a token outside of every span changes nothing, one inside changes something."""
    model = tiny(num_hidden_layers=1)
    plan = SpanPlan.uniform(1, KV_HEADS, alpha=16, beta=0.0, sink=SINK, block=BLOCK)
    tokens = ids(1, 40)
    outside, inside = tokens.clone(), tokens.clone()
    outside[0, 20], inside[0, 30] = 7 + (tokens[0, 20] == 7), 7 + (tokens[0, 30] == 7)
    with apply_spans(model, plan):
        base = decoded(model, tokens, 39)[0][:, -1]
        assert torch.equal(decoded(model, outside, 39)[0][:, -1], base)
        assert not torch.allclose(decoded(model, inside, 39)[0][:, -1], base)
    assert not torch.allclose(logits(model, outside)[:, -1], logits(model, tokens)[:, -1])

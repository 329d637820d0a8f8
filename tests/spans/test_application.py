"""`apply_spans` does what the plan means, everywhere, and leaves no trace."""

from __future__ import annotations

import copy
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from peft import PromptTuningConfig, get_peft_model
from planned import BLOCK, FAMILIES, KV_HEADS, LAYERS, SINK, by_definition, decoded, ids, logits, mixed_plan, tiny
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import CacheLayerMixin

from moa.spans import SpanPlan, apply_spans, cache_bytes
from moa.spans.model import family
from moa.spans.runtime.cache import SpanLayer

LENGTH = 40


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def plan_of(model: torch.nn.Module) -> SpanPlan:
    return mixed_plan(getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("host", ["sdpa", "eager"])
def test_forward_is_the_definition(family: str, host: str) -> None:
    model = tiny(family)
    if family == "gemma2" and host == "sdpa":
        pytest.skip("gemma2 has soft-capped scores, which sdpa cannot do")
    model.set_attn_implementation(host)
    plan, tokens = plan_of(model), ids(length=LENGTH)
    dense = logits(model, tokens)
    with by_definition(model, plan.spans(LENGTH)):
        expected = logits(model, tokens)
    assert (expected - dense).abs().max() > 0.01
    with apply_spans(model, plan):
        close(logits(model, tokens, use_cache=False), expected)
        close(logits(model, tokens), expected)
    with apply_spans(model, plan, length=LENGTH):
        for prefill in (1, 3, 17, 39):
            got, cache = decoded(model, tokens, prefill)
            close(got, expected)
    assert torch.equal(logits(model, tokens), dense)
    bytes_expected = plan.kv_bytes(model, LENGTH, batch=2)
    assert cache_bytes(cache) == bytes_expected


@pytest.mark.parametrize("family", FAMILIES)
def test_full_spans_are_dense_to_the_bit(family: str) -> None:
    model = tiny(family)
    kv_heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    plan = SpanPlan.dense(LAYERS, kv_heads, sink=SINK, block=BLOCK)
    tokens, mask = ids(length=LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :7] = 0
    for inputs in ({}, {"attention_mask": mask}):
        dense, dense_steps = logits(model, tokens, **inputs), decoded(model, tokens, 30, **inputs)[0]
        with apply_spans(model, plan):
            assert torch.equal(logits(model, tokens, **inputs), dense)
            assert torch.equal(decoded(model, tokens, 30, **inputs)[0], dense_steps)


def test_short_text_is_dense_to_the_bit() -> None:
    model, tokens = tiny(), ids(length=SINK + BLOCK)
    dense = decoded(model, tokens, 5)[0]
    plan = SpanPlan.uniform(LAYERS, KV_HEADS, 0.1, sink=SINK, block=BLOCK)
    with apply_spans(model, plan, length=SINK + BLOCK):
        assert torch.equal(decoded(model, tokens, 5)[0], dense)


@pytest.mark.parametrize("padding", [1, 5, 13, 33])
def test_padding_changes_nothing(padding: int) -> None:
    model, plan, row = tiny(), mixed_plan(), ids(1, LENGTH - padding)
    other = ids(1, LENGTH, seed=1)
    batch = torch.cat([other, torch.cat([torch.zeros(1, padding, dtype=torch.long), row], 1)])
    mask = torch.ones_like(batch)
    mask[1, :padding] = 0
    place = (mask.cumsum(1) - 1).clamp(min=0)
    with apply_spans(model, plan, length=LENGTH):
        alone, first = logits(model, row, use_cache=False), logits(model, other, use_cache=False)
        whole = logits(model, batch, attention_mask=mask, position_ids=place, use_cache=False)
        steps = [decoded(model, batch, prefill, attention_mask=mask)[0] for prefill in (34, 39)]
    for got in (whole, *steps):
        close(got[:1], first)
        close(got[1:, padding:], alone)


def test_padding_on_the_right_is_not_stored() -> None:
    model, plan, row, padding = tiny(), mixed_plan(), ids(1, LENGTH), 6
    blank = torch.zeros(1, padding, dtype=torch.long)
    tokens = torch.cat([row[:, :30], blank, row[:, 30:]], 1)
    mask = torch.ones_like(tokens)
    mask[:, 30:36] = 0
    with apply_spans(model, plan, length=LENGTH + padding):
        alone = logits(model, row, use_cache=False)
        got = decoded(model, tokens, 36, attention_mask=mask)[0]
    close(torch.cat([got[:, :30], got[:, 36:]], 1), alone)


@pytest.mark.parametrize("turns", [(20, 20), (1, 39), (5, 30, 5), (13, 1, 1, 12, 13)])
def test_several_turns_are_one_text(turns: tuple[int, ...]) -> None:
    model, plan, tokens = tiny(), mixed_plan(), ids(length=LENGTH)
    with torch.no_grad(), apply_spans(model, plan, length=LENGTH):
        expected = model(tokens).logits
        cache, got, start = None, [], 0
        for turn in turns:
            output = model(tokens[:, start : start + turn], past_key_values=cache)
            cache, start = output.past_key_values, start + turn
            got.append(output.logits)
    close(torch.cat(got, 1), expected)


def test_several_turns_of_a_padded_batch() -> None:
    model, plan = tiny(), mixed_plan()
    rows = [ids(1, 33, seed=1), ids(1, 34, seed=2)]
    first, second = (18, 15), (9, 19)  # tokens of either row in either turn
    blocks, masks = [], []
    for turn, start in ((first, (0, 0)), (second, first)):
        width = max(turn)
        parts = [
            torch.cat([torch.zeros(1, width - n, dtype=torch.long), row[:, s : s + n]], 1)
            for row, n, s in zip(rows, turn, start, strict=True)
        ]
        blocks.append(torch.cat(parts))
        masks.append(torch.tensor([[0] * (width - n) + [1] * n for n in turn]))
    with torch.no_grad(), apply_spans(model, plan, length=40):
        alone = [model(row[:, : a + b]).logits for row, a, b in zip(rows, first, second, strict=True)]
        cache, seen = None, torch.zeros(2, 0, dtype=torch.long)
        for tokens, mask in zip(blocks, masks, strict=True):
            seen = torch.cat([seen, mask], 1)
            place = (seen.cumsum(1) - 1).clamp(min=0)[:, -mask.shape[1] :]
            output = model(tokens, attention_mask=seen, position_ids=place, past_key_values=cache)
            cache = output.past_key_values
        for row, n in enumerate(second):
            close(output.logits[row, -n:], alone[row][0, -n:])


@pytest.mark.parametrize("seed", range(12))
def test_any_conversation_of_any_batch(seed: int) -> None:
    """Turns of any length, rows padded on either side in any of them, rows reordered: each row as if it were alone."""
    chance = random.Random(seed)
    model, rows = tiny(chance.choice(["llama", "qwen3"])), chance.choice([1, 2, 3])
    rules = [
        [(chance.choice([-16, 0, 8, 16, 40]), chance.choice([0, 0.3, 0.5, 1.0])) for _ in range(2)] for _ in range(2)
    ]
    plan = SpanPlan([[a for a, _ in r] for r in rules], [[b for _, b in r] for r in rules], sink=SINK, block=BLOCK)
    widths = [chance.choice([1, 2, 9, 17]) for _ in range(4)] + [1] * 6
    turns = [[chance.randint(turn == 0, width) for _ in range(rows)] for turn, width in enumerate(widths)]
    texts = [ids(1, sum(turn[row] for turn in turns), seed=seed + row)[0] for row in range(rows)]
    with by_definition(model, plan.spans(sum(widths))):
        expected = [logits(model, text[None])[0] for text in texts]
    order, used = list(range(rows)), [0] * rows
    cache, seen = None, torch.zeros(rows, 0, dtype=torch.long)
    with torch.no_grad(), apply_spans(model, plan, length=sum(widths)):
        for width, turn in zip(widths, turns, strict=True):
            tokens, mask = torch.zeros(rows, width, dtype=torch.long), torch.zeros(rows, width, dtype=torch.long)
            left = chance.random() < 0.7
            for place, row in enumerate(order):
                part = slice(width - turn[row], width) if left else slice(0, turn[row])
                tokens[place, part], mask[place, part] = texts[row][used[row] : used[row] + turn[row]], 1
            seen = torch.cat([seen, mask], 1)
            at = (seen.cumsum(1) - 1).clamp(min=0)[:, -width:]
            output = model(tokens, attention_mask=seen, position_ids=at, past_key_values=cache)
            cache = output.past_key_values
            for place, row in enumerate(order):
                close(output.logits[place][mask[place].bool()], expected[row][used[row] : used[row] + turn[row]])
                used[row] += turn[row]
            swap = torch.tensor(chance.sample(range(rows), rows))
            cache.reorder_cache(swap)
            order, seen = [order[i] for i in swap], seen[swap]


def test_spans_grow_with_a_text_of_unknown_length() -> None:
    model, plan, tokens = tiny(), mixed_plan(), ids(length=80)
    with apply_spans(model, plan):
        _, cache = decoded(model, tokens[:, :30], 30)
        assert cache_bytes(cache) == plan.kv_bytes(model, 30, 2)
        got, cache = decoded(model, tokens, 30)
        assert cache_bytes(cache) == plan.kv_bytes(model, 80, 2)  # 80 is a multiple of four blocks
    tight = by_definition(
        model, [[min(s) for s in zip(*rows, strict=True)] for rows in zip(plan.spans(30), plan.spans(80), strict=True)]
    )
    assert torch.isfinite(got).all()
    with tight:
        close(got[:, :30], logits(model, tokens[:, :30]))


@pytest.mark.parametrize("padded", [False, True])
def test_dense_layers_turn_into_rings(padded: bool) -> None:
    """A rule of 24 tokens is dense for a text of 20 and a window for one of 60."""
    model, tokens = tiny(), ids(length=60)
    plan = SpanPlan.uniform(LAYERS, KV_HEADS, alpha=24, beta=0.0, sink=SINK, block=BLOCK)
    mask = torch.ones_like(tokens)
    mask[1, : 5 * padded] = 0
    inputs = {"attention_mask": mask} if padded else {}
    with apply_spans(model, plan, length=60):
        expected, _ = decoded(model, tokens, 20, **inputs)
    with apply_spans(model, plan):
        got, cache = decoded(model, tokens, 20, **inputs)
    close(got[0], expected[0])
    close(got[1, 5:], expected[1, 5:])
    assert cache_bytes(cache) == plan.kv_bytes(model, 60, 2)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"num_beams": 3},
        {"do_sample": True, "top_k": 5},
        {"num_beams": 2, "num_return_sequences": 2},
    ],
    ids=["greedy", "beams", "sampling", "sequences"],
)
@pytest.mark.parametrize("padding", [0, 6])
def test_generate(settings: dict, padding: int) -> None:
    """With the cache as without it; the length is told, because without a cache nobody says it."""
    model, plan, prompt = tiny(), mixed_plan(), ids(length=30)
    mask = torch.ones_like(prompt)
    mask[1, :padding] = 0
    found = []
    with apply_spans(model, plan, length=50):
        for use_cache in (True, False):
            torch.manual_seed(0)
            found.append(
                model.generate(prompt, attention_mask=mask, max_new_tokens=20, use_cache=use_cache, **settings)
            )
    assert torch.equal(*found)


def test_generate_says_how_long_the_text_gets() -> None:
    model, plan, prompt = tiny(), mixed_plan(), ids(length=30)
    with apply_spans(model, plan):
        output = model.generate(prompt, max_new_tokens=20, return_dict_in_generate=True)
        assert cache_bytes(output.past_key_values) == plan.kv_bytes(model, 50, batch=2)
        more = torch.cat([output.sequences, ids(2, 10, seed=3)], 1)
        again = model.generate(
            more, past_key_values=output.past_key_values, max_new_tokens=20, return_dict_in_generate=True
        )
        assert cache_bytes(again.past_key_values) == plan.kv_bytes(model, 80, batch=2)
        assert again.sequences.shape == (2, 80)


def test_empty_cache_of_the_user_is_filled_in_place() -> None:
    model, plan = tiny(), mixed_plan()
    cache = DynamicCache()
    with torch.no_grad(), apply_spans(model, plan, length=LENGTH):
        model(ids(length=30), past_key_values=cache)
        assert cache.get_seq_length() == 30
        assert cache_bytes(cache) == plan.kv_bytes(model, LENGTH, 2)


def test_kept_cache_goes_on_under_the_same_plan_only() -> None:
    model, plan, tokens = tiny(), mixed_plan(), ids(length=LENGTH)
    with torch.no_grad():
        with apply_spans(model, plan, length=LENGTH):
            expected = model(tokens).logits
            cache = model(tokens[:, :30]).past_key_values
        with pytest.raises(RuntimeError, match="no longer applied"):
            model(tokens[:, 30:], past_key_values=copy.deepcopy(cache))
        with apply_spans(model, SpanPlan.dense(LAYERS, KV_HEADS)), pytest.raises(ValueError, match="another span plan"):
            model(tokens[:, 30:], past_key_values=cache)
        with apply_spans(model, plan):
            close(model(tokens[:, 30:], past_key_values=cache).logits, expected[:, 30:])


def test_removal_leaves_the_model_as_it_was() -> None:
    model, tokens = tiny(), ids()
    dense = logits(model, tokens)
    before = {name: (dict(vars(module)), type(module)) for name, module in model.named_modules()}
    config = copy.deepcopy(vars(model.config))
    applied = apply_spans(model, mixed_plan())
    assert not torch.equal(logits(model, tokens), dense)
    with pytest.raises(ValueError, match="already applied"):
        apply_spans(model, mixed_plan())
    applied.remove()
    applied.remove()
    assert {name: (dict(vars(module)), type(module)) for name, module in model.named_modules()} == before
    assert vars(model.config) == config
    assert torch.equal(logits(model, tokens), dense)


def test_two_models_under_two_plans_and_one_beside_them() -> None:
    models, tokens = [tiny(), tiny(), tiny()], ids(length=LENGTH)
    plans = [mixed_plan(), SpanPlan.uniform(LAYERS, KV_HEADS, 0.25, sink=SINK, block=BLOCK)]
    expected = []
    for model, plan in zip(models, plans, strict=False):
        with by_definition(model, plan.spans(LENGTH)):
            expected.append(logits(model, tokens))
    dense = logits(models[2], tokens)
    models[2].config = models[0].config  # the same object, as for two models made from one configuration
    with apply_spans(models[0], plans[0]), apply_spans(models[1], plans[1]):
        for model, want in zip(models, expected, strict=False):
            close(logits(model, tokens), want)
        assert torch.equal(logits(models[2], tokens), dense)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training(checkpointing: bool) -> None:
    """Gradients under a plan are those of the definition."""
    model, plan, tokens = tiny().train(), mixed_plan(), ids(length=LENGTH)
    with by_definition(model, plan.spans(LENGTH)):
        model(tokens, labels=tokens).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable()
    with apply_spans(model, plan):
        model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_packed_texts_are_texts_of_their_own() -> None:
    model, plan = tiny(), mixed_plan()
    one, two = ids(1, 24, seed=1), ids(1, 24, seed=2)
    place = torch.arange(24).repeat(2)[None]
    with apply_spans(model, plan, length=24):
        packed = logits(model, torch.cat([one, two], 1), position_ids=place, use_cache=False)
        close(packed, torch.cat([logits(model, one), logits(model, two)], 1))


def test_packed_texts_with_padding_have_gradients() -> None:
    """A custom mask with empty rows, as packing with padding makes it."""
    model, plan, tokens = tiny().train(), mixed_plan(), ids(1, 40)
    mask = torch.ones(40, 40, dtype=torch.bool).tril()
    mask[20:, :20] = mask[35:] = False
    with apply_spans(model, plan, length=40):
        output = model(tokens, attention_mask=mask[None, None]).logits
        output[:, :35].sum().backward()
        close(output[:, :20].detach(), logits(model, tokens[:, :20], use_cache=False))
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_another_attention_under_a_plan_is_refused() -> None:
    """It would read rings as whole texts."""
    model, tokens = tiny(), ids(length=40)
    applied = apply_spans(model, mixed_plan())
    expected = logits(model, tokens)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"'eager' was set while a span plan is applied, which runs as 'spans\|sdpa'"):
        model.generate(tokens, max_new_tokens=2)
    applied.remove()
    with apply_spans(model, mixed_plan()):
        close(logits(model, tokens), expected)


def test_a_model_that_was_copied_under_a_plan_takes_one() -> None:
    model, tokens = tiny(), ids(length=40)
    dense = logits(model, tokens)
    with apply_spans(model, mixed_plan()):
        expected, twin = logits(model, tokens), copy.deepcopy(model)
        with apply_spans(twin, mixed_plan()):
            close(logits(twin, tokens), expected)
            close(logits(model, tokens), expected)
    assert torch.equal(logits(twin, tokens), dense)
    assert twin.config._attn_implementation == "sdpa"


def test_soft_capped_scores_need_eager() -> None:
    model = tiny("gemma2")
    model.config._attn_implementation = "sdpa"
    with apply_spans(model, mixed_plan()), pytest.raises(ValueError, match="softcap"):
        logits(model, ids(length=40))


def test_refusals() -> None:
    model, plan = tiny(), mixed_plan()
    with pytest.raises(ValueError, match="3 layers, the model 2"):
        apply_spans(model, SpanPlan.dense(3, KV_HEADS))
    with pytest.raises(ValueError, match=r"layer 0.*model 2"):
        apply_spans(model, SpanPlan.dense(LAYERS, 3))
    with pytest.raises(ValueError, match="sliding window of its own"):
        apply_spans(tiny("mistral", sliding_window=8), plan)
    with pytest.raises(ValueError, match="transformers model"):
        apply_spans(torch.nn.Linear(2, 2), plan)
    with torch.no_grad(), apply_spans(model, plan):
        cache = model(ids()).past_key_values
        with pytest.raises(NotImplementedError, match="cannot be cropped"):
            cache.crop(-1)
        with pytest.raises(ValueError, match="StaticCache"):
            model(ids(), past_key_values=StaticCache(model.config, max_cache_len=50))
    with torch.no_grad():
        dense = model(ids()).past_key_values
        with apply_spans(model, plan), pytest.raises(ValueError, match="before the plan"):
            model(ids(2, 1), past_key_values=dense)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="flex_attention"):
        apply_spans(model, plan)


def test_an_older_transformers_is_refused_by_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(CacheLayerMixin, "get_max_length")
    with pytest.raises(RuntimeError, match=f"than transformers {transformers.__version__} has"):
        apply_spans(tiny(), mixed_plan())


def test_a_prompt_given_as_embeddings_has_the_same_length() -> None:
    model, plan, prompt = tiny(), mixed_plan(), ids(length=30)
    settings = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad(), apply_spans(model, plan):
        by_ids = model.generate(prompt, **settings)
        by_vectors = model.generate(inputs_embeds=model.get_input_embeddings()(prompt), **settings)
        assert cache_bytes(by_vectors.past_key_values) == cache_bytes(by_ids.past_key_values)
        again = torch.cat([by_ids.sequences, ids(2, 10, seed=3)], 1)
        turns = [
            model.generate(**{name: value}, past_key_values=cache.past_key_values, **settings)
            for name, value, cache in (
                ("input_ids", again, by_ids),
                ("inputs_embeds", model.get_input_embeddings()(again), by_vectors),
            )
        ]
    close(torch.stack(by_vectors.logits), torch.stack(by_ids.logits))
    close(torch.stack(turns[0].logits), torch.stack(turns[1].logits))
    assert cache_bytes(turns[0].past_key_values) == cache_bytes(turns[1].past_key_values)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_virtual_tokens_of_prompt_tuning_count() -> None:
    model, plan = tiny(), mixed_plan()
    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)).eval()
    asked = {"input_ids": ids(length=30), "max_new_tokens": 10, "return_dict_in_generate": True}
    if tuned.generate(**asked).past_key_values.get_seq_length() != 45:
        pytest.skip("PEFT 0.21 looks for the cache under its old name and puts virtual tokens before every new token")
    with apply_spans(tuned, plan):
        output = tuned.generate(**asked)
    assert cache_bytes(output.past_key_values) == plan.kv_bytes(model, 46, batch=2)


def test_threads_do_not_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every thread waits for the others between its cache's update and its attention."""
    model, plan, threads = tiny(), mixed_plan(), 3
    together, update = threading.Barrier(threads, timeout=60), SpanLayer.update

    def waiting(*args: object, **kwargs: object) -> object:
        found = update(*args, **kwargs)
        together.wait()
        return found

    tokens = [ids(1, LENGTH, seed=seed) for seed in range(threads)]
    with apply_spans(model, plan, length=LENGTH):
        expected = [decoded(model, row, 30)[0] for row in tokens]
        monkeypatch.setattr(SpanLayer, "update", waiting)
        with ThreadPoolExecutor(threads) as pool:
            got = list(pool.map(lambda row: decoded(model, row, 30)[0], tokens))
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_a_cache_given_by_position_is_used() -> None:
    model, plan, tokens = tiny(), mixed_plan(), ids(length=LENGTH)
    with torch.no_grad(), apply_spans(model, plan, length=LENGTH):
        expected = model.model(tokens).last_hidden_state
        cache = model.model(tokens[:, :30]).past_key_values
        close(model.model(tokens[:, 30:], None, None, cache).last_hidden_state, expected[:, 30:])


def test_drafted_tokens_are_refused_before_the_prompt_is_read() -> None:
    model, plan, read = tiny(), mixed_plan(), []
    model.model.register_forward_pre_hook(lambda *args: read.append(args))
    other = tiny()
    with apply_spans(model, plan):
        for settings in ({"assistant_model": other}, {"prompt_lookup_num_tokens": 3}):
            with pytest.raises(NotImplementedError, match="without an assistant"):
                model.generate(ids(1), max_new_tokens=5, **settings)
        assert not read
        with pytest.raises(NotImplementedError, match="without an assistant"):
            other.generate(ids(1), max_new_tokens=5, assistant_model=model)
        assert not read


@pytest.mark.parametrize("host", ["sdpa", "eager"])
def test_attention_weights_are_refused(host: str) -> None:
    model = tiny()
    model.set_attn_implementation(host)
    with apply_spans(model, mixed_plan()):
        with pytest.raises(ValueError, match=r"output_attentions=True.*without the plan"):
            model(ids(), output_attentions=True)
        with pytest.raises(ValueError, match="output_attentions=True"):
            model.generate(ids(), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
    if host == "eager":
        model.config.output_attentions = True
        with apply_spans(model, mixed_plan()), pytest.raises(ValueError, match="output_attentions=True"):
            model(ids())


def test_only_held_tokens_count_as_used() -> None:
    model, plan = tiny(), mixed_plan()
    with torch.no_grad(), apply_spans(model, plan, length=80):
        cache = model(ids(length=8)).past_key_values
        assert cache_bytes(cache) == plan.kv_bytes(model, 80, 2)
        assert cache_bytes(cache, used=True) == SpanPlan.dense(LAYERS, KV_HEADS).kv_bytes(model, 8, 2)
        mask = torch.ones(2, 8, dtype=torch.long)
        mask[1, :5] = 0
        padded = model(ids(length=8), attention_mask=mask).past_key_values
    assert cache_bytes(padded, used=True) < cache_bytes(cache, used=True)


def test_what_an_outgrown_length_costs_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model, plan, tokens = tiny(), mixed_plan(), ids(length=80)
    with torch.no_grad():
        with apply_spans(model, plan, length=80):
            cache = model(tokens[:, :40]).past_key_values
            model(tokens[:, 40:], past_key_values=cache)
        assert not caplog.records
        with apply_spans(model, plan):
            cache = model(tokens[:, :40]).past_key_values
            model(tokens[:, 40:], past_key_values=cache)
    assert ["length=..." in record.getMessage() for record in caplog.records] == [True]


def test_a_plan_knows_its_model(tmp_path: Path) -> None:
    model, plan = tiny(), mixed_plan()
    plan.model, plan.embeddings = "someone/else", family(model)
    plan = SpanPlan.load(plan.save(tmp_path / "plan.json"))
    apply_spans(model, plan).remove()  # its embeddings say so, whatever it is called
    apply_spans(model.to(torch.bfloat16), plan).remove()
    other = tiny(initializer_range=0.2)
    other.config._name_or_path = "somewhere/other"
    with pytest.raises(ValueError, match=r"searched for the model 'someone/else', this is 'somewhere/other'"):
        apply_spans(other, plan)
    apply_spans(other, plan, any_model=True).remove()
    other.config._name_or_path = "/models/else"
    apply_spans(other, plan).remove()  # a fine-tuned model under its old name
    other.config._name_or_path = ""
    with pytest.raises(ValueError, match="a model without a name"):
        apply_spans(other, plan)


@pytest.mark.parametrize("plan", [mixed_plan(), SpanPlan.dense(LAYERS, KV_HEADS, sink=SINK, block=BLOCK)])
@pytest.mark.parametrize("static", [False, True])
def test_a_cache_of_inference_mode_goes_on_outside_of_it(plan: SpanPlan, static: bool) -> None:
    model, tokens, mask = tiny(), ids(length=LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :3] = 0
    with apply_spans(model, plan, length=LENGTH, static=static):
        expected = logits(model, tokens, attention_mask=mask)
        with torch.inference_mode():
            cache = model(tokens[:, :20], attention_mask=mask[:, :20]).past_key_values
        parts = []
        with torch.no_grad():
            for start, end in ((20, 38), (38, 39), (39, 40)):
                output = model(tokens[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
                parts.append(output.logits)
    close(torch.cat(parts, 1), expected[:, 20:])


@pytest.mark.parametrize("plan", [mixed_plan(), SpanPlan.dense(LAYERS, KV_HEADS, sink=SINK, block=BLOCK)])
@pytest.mark.parametrize("cut", [30, LENGTH - 1])
def test_gradients_do_not_end_in_a_cache_without_a_word(plan: SpanPlan, cut: int) -> None:
    model, tokens = tiny(), ids(length=LENGTH)
    with apply_spans(model, plan, length=LENGTH):
        with torch.no_grad():
            expected = model(tokens).logits[:, cut:]
            cache = model(tokens[:, :cut]).past_key_values
        with pytest.raises(ValueError, match=r"no keys and values with gradients.*no_grad"):
            model(tokens[:, cut:], past_key_values=copy.deepcopy(cache))
        model.requires_grad_(False)
        close(model(tokens[:, cut:], past_key_values=cache).logits, expected)


def test_heads_that_are_not_those_of_the_configuration_are_refused() -> None:
    """JetMoE repeats its KV heads for every expert of its attention."""
    config = transformers.JetMoeConfig(
        **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS},
        **{"num_key_value_heads": KV_HEADS, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    )
    model = transformers.JetMoeForCausalLM(config).eval()
    with apply_spans(model, mixed_plan()), pytest.raises(ValueError, match=r"attends to 4 KV heads.*has 2"):
        logits(model, ids(length=LENGTH))


def test_a_model_that_attends_twice_to_its_keys_needs_no_cache() -> None:
    """DiffLlama gives attention half of the values at a time, of which a ring would keep one half."""
    settings = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS}
    config = transformers.DiffLlamaConfig(
        **settings, num_attention_heads=4, num_key_value_heads=KV_HEADS, attn_implementation="sdpa"
    )
    model, plan, tokens = transformers.DiffLlamaForCausalLM(config).eval(), mixed_plan(), ids(length=LENGTH)
    with by_definition(model, plan.spans(LENGTH)):
        expected = logits(model, tokens, use_cache=False)
    with apply_spans(model, plan, length=LENGTH):
        close(logits(model, tokens, use_cache=False), expected)
        with pytest.raises(ValueError, match=r"layer 0 attends twice.*use_cache=False"):
            logits(model, tokens)

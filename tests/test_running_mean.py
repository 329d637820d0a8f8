"""Instance-level routing over documents and caches: a document reads the same wherever and however it is run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import build_family
from peft import get_peft_model
from tiny import tiny_llama, tiny_moa, tokens
from torch import Tensor
from transformers import DynamicCache, StaticCache

import moa
from moa.adapters.documents import document_starts, text_positions
from moa.adapters.running_mean import KEPT, RunningMeans

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
CONFIGS = {
    "instance-moa": {"router": moa.Router(level="instance")},
    "before attention": {"router": moa.Router(level="instance", input="attention", hidden_per_expert=0)},
    "unipelt": {
        "experts": [moa.LoraExpert(gate="lora"), moa.PromptExpert(3), moa.ParallelExpert(4)],
        "router": moa.Router(hidden_per_expert=0, level="instance"),
        "gating": "soft",
    },
}


def adapted(name: str = "instance-moa", **base: Any) -> Any:
    settings = {"experts": [moa.LoraExpert(r=2), moa.PromptExpert(3), moa.ParallelExpert(4)], "gating": "soft"}
    return tiny_moa(moa.MoAConfig(**{**settings, **CONFIGS[name]}), **base)


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


FIRST, SECOND = tokens(1, 7, seed=1), tokens(1, 9, seed=2)
PACKED = torch.cat([FIRST, SECOND], dim=1)
PLACES = torch.cat([torch.arange(7), torch.arange(9)])[None]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("mark", ["position ids", "block mask", "cumulative lengths"])
def test_a_packed_document_is_the_document_alone(name: str, mark: str) -> None:
    model = adapted(name)
    blocks = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    blocks[..., :7, :7], blocks[..., 7:, 7:] = True, True
    inputs: dict[str, Any] = {"input_ids": PACKED, "position_ids": PLACES, "use_cache": False}
    if mark != "position ids":
        inputs["attention_mask"] = blocks & torch.ones(16, 16, dtype=torch.bool).tril()
    if mark == "cumulative lengths":
        inputs["cu_seq_lens_q"] = torch.tensor([0, 7, 16], dtype=torch.int32)
    packed = logits(model, **inputs)
    torch.testing.assert_close(packed[:, :7], logits(model, input_ids=FIRST, use_cache=False), **TOLERANCE)
    torch.testing.assert_close(packed[:, 7:], logits(model, input_ids=SECOND, use_cache=False), **TOLERANCE)


def test_gradients_of_packed_documents_are_those_of_the_documents() -> None:
    model = adapted().train()

    def gradients(*batches: dict[str, Tensor]) -> list[Tensor]:
        model.zero_grad()
        sum(model(**batch, use_cache=False).logits.square().sum() for batch in batches).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    packed = gradients({"input_ids": PACKED, "position_ids": PLACES})
    for ours, alone in zip(packed, gradients({"input_ids": FIRST}, {"input_ids": SECOND}), strict=True):
        torch.testing.assert_close(ours, alone, rtol=1e-3, atol=1e-3 * float(alone.abs().max()))


def test_a_mask_alone_marks_where_documents_begin() -> None:
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    mask[3:, :3] = False
    starts = document_starts(torch.zeros(2, 6, 4), {}, mask[None, None], None, 0)
    assert starts.tolist() == [[True, False, False, True, False, False]] * 2


def test_a_text_goes_on_after_padding_on_its_right() -> None:
    model, text = adapted(), tokens(1, 10)
    full = logits(model, input_ids=text)
    ids = torch.cat([text[:, :6], torch.zeros(1, 2, dtype=torch.long), text[:, 6:]], dim=1)
    mask = torch.tensor([[1] * 6 + [0] * 2 + [1] * 4])
    places = torch.tensor([[*range(6), 5, 5, *range(6, 10)]])
    cache = DynamicCache()
    logits(model, input_ids=ids[:, :8], attention_mask=mask[:, :8], position_ids=places[:, :8], past_key_values=cache)
    rest = logits(model, input_ids=ids[:, 8:], attention_mask=mask, position_ids=places[:, 8:], past_key_values=cache)
    torch.testing.assert_close(rest, full[:, 6:], **TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("how", ["prompt lookup", "assistant", "early exit"])
def test_assisted_decoding_is_greedy_decoding(name: str, how: str) -> None:
    model = adapted(name)
    ids = torch.tensor([[7, 8, 9, 10, 11, 12, 7, 8, 9, 10, 11, 12, 7, 8, 9]])
    settings = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    extra = {
        "prompt lookup": {"prompt_lookup_num_tokens": 4},
        "assistant": {"assistant_model": tiny_llama()},
        "early exit": {
            "assistant_early_exit": 1
        },  # the blocks after it do not run, and its cache has no layers for them
    }[how]
    assert torch.equal(model.generate(input_ids=ids, **settings, **extra), model.generate(input_ids=ids, **settings))


def test_tokens_that_are_taken_back_are_forgotten_up_to_a_limit() -> None:
    model, text = adapted(max_position_embeddings=512), tokens(1, KEPT + 40)
    full, cache = logits(model, input_ids=text), DynamicCache()
    logits(model, input_ids=text[:, : KEPT + 30], past_key_values=cache)
    cache.crop(-20)
    again = logits(model, input_ids=text[:, KEPT + 10 :], past_key_values=cache)
    torch.testing.assert_close(again, full[:, KEPT + 10 :], rtol=1e-3, atol=1e-4)
    cache.crop(-KEPT - 5)
    with pytest.raises(ValueError, match="cropped by more than"):
        logits(model, input_ids=text[:, :1], past_key_values=cache)


def test_tokens_that_others_put_in_the_place_of_cropped_ones_are_noticed() -> None:
    model, cache = adapted(), DynamicCache()
    logits(model, input_ids=tokens(1, 10), past_key_values=cache)
    cache.crop(-5)
    with model.disable_adapter():
        logits(model, input_ids=tokens(1, 5, seed=9), past_key_values=cache)
    with pytest.raises(ValueError, match="filled without the adapter"):
        logits(model, input_ids=tokens(1, 2), past_key_values=cache)


@pytest.mark.parametrize("level", ["token", "instance"])
def test_gradients_reach_through_a_cache(level: str) -> None:
    model, text = adapted(), tokens(1, 12)
    if level == "token":
        model = tiny_moa()

    def gradients(*stops: int) -> dict[str, Tensor]:
        model.zero_grad()
        cache, start, found = DynamicCache(), 0, []
        for stop in stops:
            found.append(model(input_ids=text[:, start:stop], past_key_values=cache).logits)
            start = stop
        torch.cat(found, dim=1)[:, 8:].square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(12)
    for name, gradient in gradients(4, 8, 12).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5 * float(expected[name].abs().max()))


def test_a_mask_with_a_bias_on_far_tokens_hides_nothing() -> None:
    """Such as ALiBi's, which some families add to their mask."""
    visible = torch.ones(6, 6).tril()
    visible[3:, :3] = 0
    places = torch.arange(6)
    bias = -0.5 * (places[:, None] - places).abs()
    for hidden in (torch.finfo(torch.float32).min, -torch.inf, -10000.0):
        mask = bias.where(visible.bool(), torch.tensor(hidden))[None, None]
        starts = document_starts(torch.zeros(1, 6, 4), {}, mask, None, 0)
        assert starts.tolist() == [[True, False, False, True, False, False]]
        assert text_positions(torch.zeros(1, 6, 4), mask, 0).all()  # type: ignore[union-attr]


def test_beams_carry_their_sums() -> None:
    model = adapted()
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "num_beams": 3, "do_sample": False}
    cached = model.generate(input_ids=tokens(2, 6), **settings)
    assert torch.equal(cached, model.generate(input_ids=tokens(2, 6), use_cache=False, **settings))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_that_was_reset_starts_anew(kind: str) -> None:
    model = adapted()
    inner = model.get_base_model()
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=inner.config, max_cache_len=32)
    logits(model, input_ids=tokens(2, 5, seed=3), past_key_values=cache)
    cache.reset()
    first = logits(model, input_ids=tokens(2, 6), past_key_values=cache)
    torch.testing.assert_close(first, logits(model, input_ids=tokens(2, 6)), **TOLERANCE)


def test_a_copied_cache_goes_its_own_way() -> None:
    model, text = adapted(), tokens(1, 8)
    full, cache = logits(model, input_ids=text), DynamicCache()
    logits(model, input_ids=text[:, :5], past_key_values=cache)
    copied = copy.deepcopy(cache)
    logits(model, input_ids=tokens(1, 3, seed=9), past_key_values=cache)
    torch.testing.assert_close(logits(model, input_ids=text[:, 5:], past_key_values=copied), full[:, 5:], **TOLERANCE)


def test_nothing_but_a_layer_is_put_on_a_cache() -> None:
    model, cache = adapted(), DynamicCache()
    before = set(vars(cache))
    logits(model, input_ids=tokens(), past_key_values=cache)
    assert type(cache) is DynamicCache
    assert set(vars(cache)) == before
    assert [type(layer) is RunningMeans for layer in cache.layers] == [False, False, True]


def test_a_cache_that_the_adapter_has_not_seen_is_refused() -> None:
    model, cache = adapted(), DynamicCache()
    with model.disable_adapter():
        logits(model, input_ids=tokens(), past_key_values=cache)
    with pytest.raises(ValueError, match="filled without the adapter"):
        logits(model, input_ids=tokens(), past_key_values=cache)


def test_continuous_batching_is_refused_by_name() -> None:
    hidden = torch.zeros(1, 4, 32)
    block = adapted().get_base_model().model.layers[0]
    with pytest.raises(ValueError, match="continuous batching"):
        block(hidden, block_table=torch.zeros(1), position_embeddings=None)


def test_a_compiled_block_with_a_static_cache_is_one_graph() -> None:
    torch.compiler.reset()
    model = adapted()
    base, config = model.get_base_model().model, model.get_base_model().config
    hidden = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))

    def run(block: Any) -> Tensor:
        cache, found = StaticCache(config=config, max_cache_len=8), []
        with torch.no_grad():
            for start, stop in ((0, 4), (4, 5), (5, 6)):
                places = torch.arange(start, stop)[None]
                mask = (torch.arange(8) <= places[0, :, None])[None, None]
                rotary = base.rotary_emb(hidden, places)
                part = hidden[:, start:stop]
                found.append(block(part, attention_mask=mask, past_key_values=cache, position_embeddings=rotary))
        return torch.cat(found, dim=1)

    block = base.layers[0]
    expected = run(block)
    torch.testing.assert_close(run(torch.compile(block, fullgraph=True, backend="eager")), expected, **TOLERANCE)


def test_sliding_windows_and_full_attention_beside_each_other() -> None:
    torch.manual_seed(0)
    settings = {"experts": [moa.LoraExpert(["q", "v"], r=2)], "init_weights": False}
    config = moa.MoAConfig(router=moa.Router(level="instance"), **settings)
    model = get_peft_model(build_family("gemma2"), config).eval()
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = model.generate(input_ids=tokens(2, 6), **settings)
    assert torch.equal(cached, model.generate(input_ids=tokens(2, 6), use_cache=False, **settings))

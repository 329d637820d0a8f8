"""The official code's whole-model logits, chunked prefill, and life beside adapters."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from planned import KV_HEADS, LAYERS, by_definition, decoded, ids, logits, mixed_plan, tiny
from safetensors.torch import load_file
from tiny import perturb, tiny_config
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import moa
from moa.spans import SpanPlan, apply_spans
from moa.spans.layout import Sight, positions
from moa.spans.runtime import columns

GOLDEN = Path(__file__).parent.parent / "golden" / "spans"


@pytest.mark.parametrize("host", ["sdpa", "eager"])
def test_logits_of_the_official_code(tmp_path: Path, host: str) -> None:
    """A published plan as its authors deploy it: 320 tokens of prefill by blocks, 24 steps by tokens."""
    meta, golden = json.loads((GOLDEN / "e2e.json").read_text()), load_file(GOLDEN / "e2e.safetensors")
    config = dict(meta["config"])
    theta = config.pop("rope_theta")
    rope = {"rope_type": "default", "rope_theta": theta}
    model = LlamaForCausalLM(LlamaConfig(**config, rope_parameters=rope, attn_implementation=host)).eval()
    model.load_state_dict({k[7:]: v.float() for k, v in golden.items() if k.startswith("weight.")})
    (tmp_path / "plan.json").write_text(json.dumps(meta["plan"]))
    plan, prefill, tokens = SpanPlan.load(tmp_path / "plan.json"), meta["prefill"], golden["input_ids"]
    length = prefill + meta["max_new_token"]
    assert plan.spans(length) == meta["cache_size"]
    with apply_spans(model, plan, length=length):
        got, _ = decoded(model, tokens, prefill)
    torch.testing.assert_close(got[:, ::4], golden["logits_own_fp32_every_4th"], rtol=0, atol=2e-5)
    assert (got[:, :prefill:4] - golden["prefill_fp16_every_4th"].float()).abs().max() < 1.5e-2
    assert (got[:, prefill:] - golden["decode_fp16"].float()).abs().max() < 1.0e-2


def test_published_plans_expect_1024_more_tokens(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"alphas": [[0.0] * 4] * LAYERS, "betas": [[0.5] * 4] * LAYERS}))
    plan, model, prompt = SpanPlan.load(tmp_path / "plan.json"), tiny(max_position_embeddings=512), ids(1, 256)
    with torch.no_grad(), apply_spans(model, plan):
        cache = model(prompt).past_key_values
        assert moa.spans.cache_bytes(cache) == plan.kv_bytes(model, 256 + 1024)
        output = model.generate(prompt, max_new_tokens=64, return_dict_in_generate=True)
        assert moa.spans.cache_bytes(output.past_key_values) == plan.kv_bytes(model, 256 + 64)


@pytest.mark.parametrize("blockwise", [False, True])
@pytest.mark.parametrize("padded", ["", "one of two rows", "one row"])
@pytest.mark.parametrize("old", [0, 23])
def test_chunks_are_one_masked_attention(
    monkeypatch: pytest.MonkeyPatch, blockwise: bool, padded: str, old: int
) -> None:
    """However the queries are cut, and whatever chunks skip."""
    monkeypatch.setattr(columns, "SMALLEST", 5)
    monkeypatch.setattr(columns, "LARGEST", 9)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, h, n, 8, generator=generator) for h, n in ((4, 70), (2, 70 + old), (2, 70 + old))
    )
    tokens = None
    if padded:
        tokens = torch.ones(2, 70 + old, dtype=torch.bool)
        tokens[1, :11] = tokens[1, 40:43] = False  # on the left, and in the middle as in a second turn
        tokens = tokens[-1 if padded == "one row" else 0 :]
        query, key, value = query[: len(tokens)], key[: len(tokens)], value[: len(tokens)]
    at, place = positions(0, 70 + old, tokens, query.device)
    at = at if old == 0 else at[:, old:]
    sight = Sight(4, 4, blockwise)
    lengths = []

    class Kernel:
        def prepare(self, mask: torch.Tensor, shared: int) -> torch.Tensor:
            assert shared == 2
            return mask

        def __call__(self, q: Any, k: Any, v: Any, mask: Any, causal: bool = False) -> torch.Tensor:
            lengths.append(k.shape[2])
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)

    got = columns.attend(Kernel(), query, key, value, at, place, 24, sight)
    whole = sight.visible(at, place, 24)[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, whole, enable_gqa=True)
    real = (place[:, old:] < 1000)[:, None, :, None].expand_as(got)
    torch.testing.assert_close(got[real], expected[real])
    assert max(lengths) <= 24 + 9 + 4 + 14 * bool(padded)  # the span, a chunk, a block, and padding


@pytest.mark.parametrize("order", ["spans first", "adapters first"])
def test_with_mixture_of_adapters(order: str) -> None:
    model, plan, tokens = tiny(), mixed_plan(), ids(length=40)
    with_adapters = None
    if order == "adapters first":
        with_adapters = perturb(get_peft_model(model, tiny_config()).eval())
    applied = apply_spans(with_adapters or model, plan, length=40)
    if with_adapters is None:
        with_adapters = perturb(get_peft_model(model, tiny_config()).eval())
    got, cache = decoded(with_adapters, tokens, 30)
    whole = logits(with_adapters, tokens, use_cache=False)
    generated = with_adapters.generate(input_ids=tokens, max_new_tokens=5)
    applied.remove()
    dense = logits(with_adapters, tokens, use_cache=False)
    with by_definition(model, plan.spans(40)):
        expected = logits(with_adapters, tokens, use_cache=False)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)
    assert (dense - expected).abs().max() > 0.01
    assert moa.spans.cache_bytes(cache) == plan.kv_bytes(model, 40, batch=2)
    assert generated.shape == (2, 45)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_learn_under_a_plan(checkpointing: bool) -> None:
    plan, tokens = mixed_plan(), ids(length=40)
    for config in (LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False), tiny_config()):
        base = tiny()
        model = perturb(get_peft_model(base, config)).train()
        with by_definition(base, plan.spans(40)):
            model(input_ids=tokens, labels=tokens).loss.backward()
        expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        model.zero_grad()
        if checkpointing:
            base.gradient_checkpointing_enable()
        with apply_spans(model, plan):
            model(input_ids=tokens, labels=tokens).loss.backward()
        assert expected
        for name, parameter in model.named_parameters():
            if name in expected:
                torch.testing.assert_close(parameter.grad, expected[name], rtol=2e-3, atol=2e-5, msg=name)


def test_gradients_on_means_an_ordinary_cache_and_the_same_logits() -> None:
    model, plan, tokens = tiny(), mixed_plan(), ids(length=40)
    with apply_spans(model, plan, length=40):
        expected = logits(model, tokens)
        cache = DynamicCache(config=model.config)
        first = model(tokens[:, :30], past_key_values=cache).logits
        parts = [model(tokens[:, s : s + 1], past_key_values=cache).logits for s in range(30, 40)]
    got = torch.cat([first, *parts], 1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)
    got.sum().backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


def test_a_copied_model_is_dense() -> None:
    model, plan, tokens = tiny(), SpanPlan.uniform(LAYERS, KV_HEADS, 0.1), ids(length=40)
    dense = logits(model, tokens)
    with apply_spans(model, plan):
        twin = copy.deepcopy(model)
        assert torch.equal(logits(twin, tokens), dense)
        assert torch.equal(
            twin.generate(tokens, max_new_tokens=3), twin.generate(tokens, max_new_tokens=3, use_cache=False)
        )

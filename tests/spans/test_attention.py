"""The official code's whole-model logits, chunked prefill, and life beside adapters."""

from __future__ import annotations

import copy
import json
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from planned import KV_HEADS, LAYERS, by_definition, decoded, ids, logits, mixed_plan, tiny
from safetensors.torch import load_file
from tiny import perturb, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import moa
from moa.spans import SpanPlan, apply_spans
from moa.spans.layout import Sight, positions
from moa.spans.runtime import columns, kernels

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
    at = at[:, old:]
    text = columns.Places(at, place) if padded else columns.Run(0, 0, old, 70, query.device)
    sight = Sight(4, 4, blockwise)
    lengths = []

    class Kernel:
        dtype = torch.float32

        def prepare(self, mask: torch.Tensor, shared: int) -> torch.Tensor:
            assert shared == 2
            return mask

        def __call__(self, q: Any, k: Any, v: Any, mask: Any, causal: bool = False) -> torch.Tensor:
            lengths.append(k.shape[2])
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)

    got = columns.attend(Kernel(), query, key, value, text, 24, sight)
    whole = sight.visible(at, place, 24)[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, whole, enable_gqa=True)
    real = (place[:, old:] < 1000)[:, None, :, None].expand_as(got)
    torch.testing.assert_close(got[real], expected[real])
    assert max(lengths) <= 24 + 9 + 4 + 14 * bool(padded)  # the span, a chunk, a block, and padding


class Asked(TorchDispatchMode):
    """What the host asks of a tensor's values: on an accelerator it would wait there."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select")):
            self.found.append("".join(traceback.format_stack(limit=12)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("length", [0, 200], ids=["growing", "told"])
def test_nothing_is_asked_of_the_accelerator(length: int) -> None:
    """Prefill, a second turn and single tokens of a batch without padding, rings that wrap and grow included."""
    model, plan, tokens = tiny(), mixed_plan(), ids(length=200)
    with torch.no_grad(), apply_spans(model, plan, length=length), Asked() as asked:
        cache = model(tokens[:, :100]).past_key_values
        cache = model(tokens[:, 100:150], past_key_values=cache).past_key_values
        for place in range(150, 200):
            model(tokens[:, place : place + 1], past_key_values=cache)
    assert not asked.found, asked.found[0]


def test_padding_asks_once_a_forward() -> None:
    """Whether there is padding among the new columns; not once a layer or group."""
    tokens, mask = ids(length=60), torch.ones(2, 60, dtype=torch.long)
    mask[1, :7] = 0
    counts = []
    for layers in (1, 4):
        model = tiny(num_hidden_layers=layers)
        plan = SpanPlan([[0.0, 0.0]] * layers, [[0.3, 0.6]] * layers, sink=4, block=4)
        with torch.no_grad(), apply_spans(model, plan, length=60):
            cache = model(tokens[:, :40], attention_mask=mask[:, :40]).past_key_values
            with Asked() as asked:
                for place in range(40, 60):
                    step = {"attention_mask": mask[:, : place + 1], "past_key_values": cache}
                    model(tokens[:, place : place + 1], **step)
        counts.append(len(asked.found))
    assert counts[0] == counts[1] <= 2 * 20, asked.found[0]


@pytest.mark.slow
def test_reading_and_writing_are_one_graph() -> None:
    """The compiler finds no break in a prefill, nor in a token after it."""
    model, plan, tokens = tiny(), mixed_plan(), ids(1, 60)
    with torch.no_grad(), apply_spans(model, plan, length=60):
        expected, _ = decoded(model, tokens[:, :41], 40)
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        output = compiled(tokens[:, :40])
        step = compiled(tokens[:, 40:41], past_key_values=output.past_key_values)
    torch.compiler.reset()
    torch.testing.assert_close(torch.cat([output.logits, step.logits], 1), expected, rtol=1e-4, atol=2e-5)


def test_masks_are_made_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "SMALLEST", 8)
    monkeypatch.setattr(columns, "LARGEST", 8)
    prepared, original = [], kernels.Sdpa.prepare
    monkeypatch.setattr(kernels.Sdpa, "prepare", lambda *args: prepared.append(1) or original(*args))
    plan = SpanPlan.uniform(4, KV_HEADS, 0.2, sink=4, block=4)
    counts = []
    for layers in (1, 4):
        model, prepared[:] = tiny(num_hidden_layers=layers), []
        own = SpanPlan(plan.alphas[:layers], plan.betas[:layers], sink=4, block=4)
        with apply_spans(model, own):
            for use_cache in (True, False):
                logits(model, ids(length=103), use_cache=use_cache)
        counts.append(len(prepared))
    assert counts == [2 * 2] * 2  # of whole chunks and of the last one, in either forward


def test_half_precision_decodes_plain_layers_by_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(num_hidden_layers=1).to(torch.bfloat16)
    plan, tokens = SpanPlan.dense(1, KV_HEADS, sink=4, block=4), ids(length=20)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    shapes, original = [], kernels.Sdpa.__call__
    for inputs in ({}, {"attention_mask": mask}):
        dense = decoded(model, tokens, 18, **inputs)[0]
        with apply_spans(model, plan), monkeypatch.context() as patch:
            patch.setattr(kernels.Sdpa, "__call__", lambda *args: shapes.append(args[1].shape) or original(*args))
            got = decoded(model, tokens, 18, **inputs)[0]
        torch.testing.assert_close(got[0], dense[0], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(got[1, 5:], dense[1, 5:], rtol=2e-2, atol=2e-2)
    assert shapes == [(2, 4, 1, 8)] * 4  # two tokens each, with padding and without


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

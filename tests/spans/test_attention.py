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
from moa.spans.runtime import kernels
from moa.spans.runtime.ring import Ring
from moa.spans.runtime.visibility import Sight, TextMask

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
@pytest.mark.parametrize("counted", ["by the host", "on the device"])
@pytest.mark.parametrize("old", [0, 2, 23, 40])
def test_chunks_are_one_masked_attention(
    monkeypatch: pytest.MonkeyPatch, blockwise: bool, counted: str, old: int
) -> None:
    """However the queries are cut, and whatever chunks skip; on the device, the second row has three tokens less."""
    monkeypatch.setattr(kernels, "SMALLEST", 5)
    monkeypatch.setattr(kernels, "LARGEST", 9)
    generator, span, sink = torch.Generator().manual_seed(0), 24, 4
    query = torch.randn(2, 4, 70, 8, generator=generator)
    key, value = (torch.randn(2, 2, 70 + old, 8, generator=generator) for _ in range(2))
    counts = [old, max(old - 3 * (counted == "on the device"), 0)]
    count = old if counted == "by the host" else torch.tensor(counts)
    sight, ring, lengths = Sight(sink, 4, blockwise), None, []
    if old:
        ring = Ring((0, 1), span, sink, *(torch.zeros(2, 2, span, 8) for _ in range(2)))
        ring.store(key[:, :, :old], value[:, :, :old], 0, ring.places(count))

    class Kernel:
        dtype = torch.float32

        def prepare(self, mask: torch.Tensor, shared: int) -> torch.Tensor:
            assert shared == 2
            return mask

        def __call__(self, q: Any, k: Any, v: Any, mask: Any, causal: bool = False) -> torch.Tensor:
            lengths.append(k.shape[2])
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)

    prompt = kernels.Prompt(Kernel(), sight, count if old else 0, TextMask(None, lambda: None))
    got = prompt.attend(query, key[:, :, old:], value[:, :, old:], span, ring)
    for row, before in enumerate(counts):
        keys, values = (torch.cat([t[row, :, :before], t[row, :, old:]], 1)[None] for t in (key, value))
        place = torch.arange(before + 70)
        held = (place < sink) | (place >= before - span + sink)
        seen = sight.visible(place[before:], place, span) & held
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[row : row + 1], keys, values, seen, enable_gqa=True
        )
        torch.testing.assert_close(got[row], expected[0])
    assert max(lengths) <= span + 9 + 4 + (span + sink if old else 0)  # the span, a chunk, a block, and what is kept


CROSSINGS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "lift_fresh")


class Asked(TorchDispatchMode):
    """What the host asks of a tensor's values, or makes of its own numbers: an accelerator is waited for there."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in CROSSINGS):
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
    assert counts == [20, 20], asked.found[0]


def padded_batch(length: int = 60) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Tokens of two rows, and a mask with padding on the left of the second."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, :7] = 0
    return ids(length=length), {"attention_mask": mask}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("plan", [mixed_plan(), SpanPlan.dense(LAYERS, KV_HEADS)], ids=["mixed", "dense"])
def test_static_caches_compute_the_same(plan: SpanPlan, padded: bool) -> None:
    """Prompts, turns and tokens; a second text on the same tensors, too."""
    model, (tokens, mask) = tiny(), padded_batch()
    inputs = mask if padded else {}
    with apply_spans(model, plan, length=70):
        expected = decoded(model, tokens, 40, **inputs)[0]
    with torch.no_grad(), apply_spans(model, plan, length=70, static=True):
        got, cache = decoded(model, tokens, 40, **inputs)
        tensors = [layer.keys for layer in cache.layers]
        assert moa.spans.cache_bytes(cache) == plan.kv_bytes(model, 70, batch=2)
        cache.reset()
        again = decoded(model, tokens, 40, cache, **inputs)[0]
        assert all(layer.keys is tensor for layer, tensor in zip(cache.layers, tensors, strict=True))
        if not padded:
            turn = model(tokens[:, :33], past_key_values=DynamicCache()).past_key_values
            rest = model(tokens[:, 33:], past_key_values=turn).logits
            torch.testing.assert_close(rest, expected[:, 33:], rtol=1e-4, atol=2e-5)
    real = mask["attention_mask"].bool() if padded else torch.ones_like(tokens, dtype=torch.bool)
    torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=2e-5)
    assert torch.equal(again, got)


def test_static_caches_ask_nothing_even_of_padding() -> None:
    model, (tokens, mask) = tiny(), padded_batch()
    with apply_spans(model, mixed_plan(), length=60, static=True), Asked() as asked:
        decoded(model, tokens, 40, **mask)
    assert not asked.found, asked.found[0]


@pytest.mark.slow
def test_one_static_graph_decodes_every_token() -> None:
    """No break, no second graph and no number of the host among its inputs, so that a CUDA graph could replay it."""
    model, plan, tokens, graphs = tiny(), mixed_plan(), ids(length=60), []

    def counted(graph: Any, inputs: Any) -> Any:
        graphs.append(inputs)
        return graph.forward

    with torch.no_grad(), apply_spans(model, plan, length=60, static=True):
        expected = decoded(model, tokens, 40)[0][:, 40:]
        cache = model(tokens[:, :40]).past_key_values
        torch.compiler.reset()
        compiled = torch.compile(model, backend=counted, fullgraph=True, dynamic=False)
        steps = [compiled(tokens[:, at : at + 1], past_key_values=cache).logits for at in range(40, 60)]
    torch.compiler.reset()
    assert len(graphs) == 1
    assert all(isinstance(value, torch.Tensor) for value in graphs[0])
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=2e-5)


def test_static_refusals() -> None:
    model, plan, tokens = tiny(), mixed_plan(), ids(length=40)
    with pytest.raises(ValueError, match=r"static=True needs length=\.\.\."):
        apply_spans(model, plan, static=True)
    with pytest.raises(ValueError, match="static=True, but layers with a sliding window"):
        apply_spans(tiny("gemma3"), mixed_plan(), length=40, static=True)
    with torch.no_grad(), apply_spans(model, plan, length=40, static=True):
        assert model.generate(tokens[:, :30], max_new_tokens=10).shape == (2, 40)
        with pytest.raises(ValueError, match=r"50 tokens long.*length=40"):
            model.generate(tokens, max_new_tokens=10)
        cache = model(tokens).past_key_values
        with pytest.raises(ValueError, match=r"41 tokens long.*length=40"):
            model(tokens[:, :1], past_key_values=cache)


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


@pytest.mark.parametrize("padded", [False, True])
def test_masks_are_made_once_for_all_layers_and_rows(monkeypatch: pytest.MonkeyPatch, padded: bool) -> None:
    monkeypatch.setattr(kernels, "SMALLEST", 8)
    monkeypatch.setattr(kernels, "LARGEST", 8)
    prepared, original = [], kernels.Sdpa.prepare
    monkeypatch.setattr(kernels.Sdpa, "prepare", lambda *args: prepared.append(1) or original(*args))
    plan = SpanPlan.uniform(4, KV_HEADS, 0.2, sink=4, block=4)
    tokens, counts, inputs = ids(length=103), [], padded_batch(103)[1] if padded else {}
    for layers in (1, 4):
        model, prepared[:] = tiny(num_hidden_layers=layers), []
        own = SpanPlan(plan.alphas[:layers], plan.betas[:layers], sink=4, block=4)
        with apply_spans(model, own):
            for use_cache in (True, False):
                logits(model, tokens, use_cache=use_cache, **inputs)
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

"""Plans for engines: heads that moved compute what they did, and whole layers get the windows that they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from planned import BLOCK, SINK, decoded, ids, logits, mixed_plan, tiny
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moa.cli import app
from moa.spans import SpanPlan, apply_spans
from moa.spans.evidence.items import Item
from moa.spans.export import FILE, layer_windows, measured, save, two_class
from moa.spans.journal import Journal

LENGTH = 40
# One row per layer: everything, or a window of 16 tokens with its sink.
TWO = SpanPlan([[16, 0.0], [16, 16]], [[0.0, 1.0], [0.0, 0.0]], sink=SINK, block=BLOCK)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_heads_that_moved_compute_what_they_did(family: str, tmp_path: Path) -> None:
    model, tokens = tiny(family), ids(length=LENGTH)
    for name, parameter in model.named_parameters():  # biases too
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    dense = logits(model, tokens)
    with apply_spans(model, TWO, length=LENGTH):
        planned = decoded(model, tokens, 30)[0]
    before = model.model.layers[0].self_attn.k_proj.weight.clone()
    export = two_class(model, TWO, LENGTH)
    assert not torch.equal(model.model.layers[0].self_attn.k_proj.weight, before)
    save(model, export, tmp_path, {"length": LENGTH})
    loaded, plan = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), SpanPlan.load(tmp_path)
    loaded.generation_config.eos_token_id = None
    torch.testing.assert_close(logits(loaded, tokens), dense, rtol=1e-4, atol=2e-5)
    with apply_spans(loaded, plan, length=LENGTH):
        torch.testing.assert_close(decoded(loaded, tokens, 30)[0], planned, rtol=1e-4, atol=2e-5)
    assert plan.spans(LENGTH) == [[40, 16], [16, 16]]
    written = json.loads((tmp_path / FILE).read_text())
    assert [layer["full_kv_heads"] for layer in written["layers"]] == [1, 0]
    assert written["layers"][0] == {
        "kv_heads_in_order_of_the_original": [1, 0],
        "full_kv_heads": 1,
        "sink": SINK,
        "window": 12,
    }
    assert written["kv_bytes"]["exported"] == plan.kv_bytes(loaded, LENGTH) < written["kv_bytes"]["dense"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_whole_layers_have_the_windows_that_the_configuration_says(family: str, tmp_path: Path) -> None:
    """Beside a computation of its own: with one layer, a window alone decides what a token can depend on."""
    model, tokens = tiny(family, num_hidden_layers=1), ids(1, LENGTH)
    plan = SpanPlan.uniform(1, 2, alpha=16, beta=0.0, sink=SINK, block=BLOCK)
    export = layer_windows(model, plan, LENGTH)
    assert export.layers == [{"kind": "sliding_attention", "window": 16}]
    save(model, export, tmp_path, {})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    outside, inside = tokens.clone(), tokens.clone()
    outside[0, 23], inside[0, 24] = 7 + (tokens[0, 23] == 7), 7 + (tokens[0, 24] == 7)
    last = decoded(loaded, tokens, 30)[0][:, -1]
    torch.testing.assert_close(decoded(loaded, outside, 30)[0][:, -1], last)
    assert not torch.allclose(decoded(loaded, inside, 30)[0][:, -1], last)
    torch.testing.assert_close(logits(loaded, tokens)[:, -1], last, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(logits(loaded, tokens[:, :16]), logits(model, tokens[:, :16]), rtol=1e-4, atol=2e-5)


def test_layers_keep_to_the_bytes_of_the_plan() -> None:
    spans = [[16, 16], [16, 40], [40, 40], [16, 16]]
    plan = SpanPlan(
        [[0.0 if s == 40 else s for s in row] for row in spans],
        [[float(s == 40) for s in row] for row in spans],
        sink=SINK,
        block=BLOCK,
    )
    export = layer_windows(tiny(num_hidden_layers=4), plan, LENGTH)
    kinds = [layer["kind"].split("_")[0] for layer in export.layers]
    assert kinds == ["sliding", "sliding", "full", "sliding"]  # 200 tokens for 4 layers of 2 heads, 48 left over
    assert export.kv_bytes["exported"] <= export.kv_bytes["plan"] < export.kv_bytes["dense"]


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"windows of \[12, 16\].*'two-class'"):
        two_class(tiny(), SpanPlan([[16, 12], [0, 0]], [[0.0, 0.0], [1.0, 1.0]], sink=SINK, block=BLOCK), LENGTH)
    with pytest.raises(ValueError, match=r"layer 0: .*'q_proj'.*Phi3Attention has \{\}"):
        two_class(tiny("phi3"), TWO, LENGTH)
    adapted = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="merge adapters"):
        two_class(adapted.base_model.model, TWO, LENGTH)
    with pytest.raises(ValueError, match="windows of their own"):
        layer_windows(tiny("gemma3"), mixed_plan(), LENGTH)
    with pytest.raises(ValueError, match=r"phi3: its layers cannot have windows"):
        layer_windows(tiny("phi3"), mixed_plan(), LENGTH)


def test_the_command_measures_what_it_has_written(tmp_path: Path, tiny_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    plan = SpanPlan.uniform(layers, heads, alpha=32, beta=0.0, sink=16, block=16)
    plan.save(tmp_path / "plan.json")
    tokens = torch.randint(5, 64, (96,), generator=torch.Generator().manual_seed(0)).tolist()
    item = Item(tuple(tokens), (False,) * 90 + (True,) * 6)
    Journal(tmp_path / "items.jsonl", {}).append({"length": 96, **item.to_dict()})
    said = {}
    for form in ("heads", "layers"):
        command = ["spans", "export", tmp_path / "plan.json", "--base", tiny_base, "--output", tmp_path / form]
        command += ["--to", form, "--length", 96, "--items", tmp_path / "items.jsonl", "--dtype", "float32"]
        result = CliRunner().invoke(app, [str(part) for part in command])
        assert result.exit_code == 0, result.output
        said[form] = json.loads((tmp_path / form / FILE).read_text())
    price = said["heads"]["price"]
    assert price["dense"] == measured(model.eval(), [item])
    assert price["exported"]["loss"] == pytest.approx(price["plan"]["loss"], rel=1e-4)
    assert said["layers"]["price"]["plan"] == price["plan"] != said["layers"]["price"]["exported"]
    again = CliRunner().invoke(app, [str(part) for part in command])
    assert again.exit_code != 0
    assert "name a new folder" in " ".join(again.output.split())


@pytest.mark.serve
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("default")
def test_vllm_gives_layers_the_windows_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy tokens of prompts on either side of the window; the dense model writes others."""
    vllm = pytest.importorskip("vllm")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    shape = {"hidden_size": 192, "head_dim": 32, "num_attention_heads": 6, "num_key_value_heads": 3}
    model = tiny(num_hidden_layers=4, vocab_size=256, max_position_embeddings=512, initializer_range=0.15, **shape)
    rules = [[48.0] * 3, [300.0] * 3, [48.0] * 3, [300.0, 48.0, 300.0]]
    plan = SpanPlan(rules, [[0.0] * 3] * 4, sink=16, block=16)
    save(model, layer_windows(model, plan, 300), tmp_path, {})
    windowed = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    windowed.generation_config.eos_token_id = None
    prompts = [ids(1, n, seed=n) for n in (20, 60, 110, 200, 240)]
    expected, dense = (
        [m.generate(p, max_new_tokens=24, do_sample=False)[0, p.shape[1] :].tolist() for p in prompts]
        for m in (windowed, model)
    )
    settings = {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 512, "enforce_eager": True}
    engine = vllm.LLM(str(tmp_path), max_num_seqs=8, **settings)
    sampling = vllm.SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": p[0].tolist()} for p in prompts], sampling, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected
    assert expected[0] == dense[0]
    assert expected[1:] != dense[1:]

"""Plans: files, meaning, densities, bytes."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from planned import BLOCK, KV_HEADS, LAYERS, SINK, mixed_plan, tiny
from transformers import LlamaConfig, MistralConfig

from moa.spans import Rule, SpanPlan, span

GOLDEN = Path(__file__).parent.parent / "golden" / "spans"
PUBLISHED = json.loads((GOLDEN / "densities.json").read_text())
SIZES = json.loads((GOLDEN / "cache.json").read_text())["cache_sizes"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_densities_of_published_plans_to_the_last_digit(name: str) -> None:
    plan, golden = SpanPlan.load(GOLDEN / name), PUBLISHED[name]
    assert (plan.heads, plan.convention, plan.sink, plan.block) == ("query", "published", 64, 64)
    assert (len(plan.alphas), len(plan.alphas[0])) == (golden["layers"], golden["heads"])
    for length in golden["kv"]:
        assert plan.kv_density(int(length)) == golden["kv"][length]
        assert plan.attention_density(int(length)) == golden["attention"][length]


@pytest.mark.parametrize("name", SIZES)
def test_deployed_spans_of_published_plans(name: str) -> None:
    """Cache sizes of the official code at its N, prompt and new tokens; it rounds full spans up, we keep the text."""
    plan = SpanPlan.load(GOLDEN / name)
    for case, golden in SIZES[name].items():
        length = sum(int(part.lstrip("new")) for part in case.split("_"))
        spans = plan.spans(length)
        if golden["max"] <= length:
            assert [sum(row) for row in spans] == golden["per_layer_total"]
            assert (min(map(min, spans)), max(map(max, spans))) == (golden["min"], golden["max"])
        else:
            assert max(map(max, spans)) == length


@pytest.mark.parametrize("name", [name for name in PUBLISHED if PUBLISHED[name]["per_kv_head"]])
def test_published_plans_on_real_kv_heads(name: str) -> None:
    plan, golden = SpanPlan.load(GOLDEN / name), PUBLISHED[name]
    group = golden["group"]
    config = LlamaConfig(
        num_hidden_layers=golden["layers"],
        num_attention_heads=golden["heads"],
        num_key_value_heads=golden["heads"] // group,
        hidden_size=golden["heads"] * 64,
    )
    for length, density in golden["per_kv_head"].items():
        n = int(length)
        dense = golden["layers"] * (golden["heads"] // group) * n * 64 * 2 * 2
        assert round(plan.kv_bytes(config, n, dtype=torch.float16) / dense, 4) == density
        fitted = plan.for_model(config, n)
        assert (fitted.heads, len(fitted.alphas[0])) == ("kv", golden["heads"] // group)


@pytest.mark.parametrize(
    ("alpha", "beta", "length", "expected"),
    [
        (0, 0.5, 8192, 4096),
        (0, 0.5, 8193, 4096),  # 4096.5 tokens are 4096
        (0, 0.5, 8194, 4160),  # 4097 tokens need one block more
        (0, 0.0, 8192, 128),  # at least the sink and one block
        (-1024, 0.125, 8192, 128),
        (8192, 0.0, 4096, 4096),  # at most the text
        (0, 1.0, 100, 100),
        (0, 0.1, 128, 128),
        (0, 0.1, 127, 127),
        (1000.9, 0.0, 4096, 1024),
    ],
)
def test_span(alpha: float, beta: float, length: int, expected: int) -> None:
    assert span(alpha, beta, length, sink=64, block=64) == expected


def test_native_densities_are_counted_from_masks() -> None:
    plan, length = mixed_plan(), 48
    seen = torch.arange(length)
    kept, pairs = [], []
    for row in plan.spans(length):
        for tokens in row:
            near = seen[None] > seen[:, None] - (tokens - SINK)
            mask = (seen[None] <= seen[:, None]) & (near | (seen[None] < SINK))
            kept.append(int(mask[-1].sum()))
            pairs.append(int(mask.sum()))
    assert plan.kv_density(length) == pytest.approx(float(Fraction(sum(kept), len(kept) * length)), abs=1e-15)
    whole = length * (length + 1) // 2
    assert plan.attention_density(length) == pytest.approx(float(Fraction(sum(pairs), len(pairs) * whole)), abs=1e-15)


def test_round_trip(tmp_path: Path) -> None:
    plan = mixed_plan()
    plan.model, plan.searched = "some/model", {"lengths": [1024], "losses": {"1024": 0.5}}
    assert SpanPlan.load(plan.save(tmp_path / "deep" / "plan.json")) == plan
    assert SpanPlan.load(plan.save(tmp_path).parent) == plan
    published = SpanPlan.load(GOLDEN / "Llama-3.2-1B-Instruct.json")
    assert SpanPlan.load(published.save(tmp_path / "published.json")) == published
    assert not list(tmp_path.glob(".*"))


def test_directory_with_a_published_file(tmp_path: Path) -> None:
    (tmp_path / "moa_alpha_beta.json").write_text('{"alphas": [[0.0]], "betas": [[0.5]]}')
    assert SpanPlan.load(tmp_path).rules() == [[Rule(0.0, 0.5)]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1, 2]", "a plan is a JSON object"),
        ('{"alphas": [[0.0]]}', "no betas"),
        ('{"alphas": [[0]], "betas": [[0]], "gamma": 1}', "format_version None"),
        ('{"alphas": [[0]], "betas": [[0]], "format_version": 9}', "format_version 9"),
        ('{"alphas": [[0]], "betas": [[0]], "format_version": 1, "gamma": 1}', "unknown keys"),
        ('{"alphas": [[0, 1], [0]], "betas": [[0, 1], [0]]}', "layer 1 has 1 heads"),
        ('{"alphas": [[0, 1]], "betas": [[0]]}', "must agree"),
        ('{"alphas": [], "betas": []}', "non-empty"),
        ('{"alphas": [[0], 3], "betas": [[0], [0]]}', "alphas of layer 1"),
        ('{"alphas": [[0, NaN]], "betas": [[0, 0]]}', "alphas of layer 0, query head 1: nan"),
        ('{"alphas": [[0, 0]], "betas": [[0, 1e999]]}', "betas of layer 0, query head 1: inf"),
        ('{"alphas": [[0, 1' + "0" * 400 + ']], "betas": [[0, 0]]}', "alphas of layer 0, query head 1: inf"),
        ('{"alphas": [[true]], "betas": [[0]]}', "query head 0: True"),
        ('{"alphas": [["0"]], "betas": [[0]]}', "query head 0: '0'"),
        ('{"alphas": [[0]], "betas": [[0]], "format_version": 1, "sink": 0}', "sink=0"),
        ('{"alphas": [[0]], "betas": [[0]], "format_version": 1, "sink": 100}', "multiple of block=64"),
        ('{"alphas": [[0]], "betas": [[0]], "format_version": 1, "heads": "both"}', "heads='both'"),
        ('{"alphas": [[0]], "betas": [[0]], "format_version": 1, "convention": "x"}', "convention='x'"),
        ('{"alphas": [[0]], "betas": [[0]], "format_version": 1, "searched": []}', "searched must be a dict"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"bad\.json") as error:
        SpanPlan.load(file)
    assert message in str(error.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        SpanPlan.load(tmp_path / "nothing.json")
    with pytest.raises(FileNotFoundError, match=r"moa_alpha_beta\.json"):
        SpanPlan.load(tmp_path)


def test_interrupted_save_keeps_the_old_file(tmp_path: Path) -> None:
    plan = mixed_plan()
    file = plan.save(tmp_path / "plan.json")
    plan.searched = {"loss": float("nan")}
    with pytest.raises(ValueError, match="JSON"):
        plan.save(file)
    assert SpanPlan.load(file) == mixed_plan()


def test_plans_of_other_models_are_refused() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="3 layers, the model 2"):
        SpanPlan.dense(3, KV_HEADS).for_model(model)
    with pytest.raises(ValueError, match="4 KV heads in layer 0, the model 2"):
        SpanPlan.dense(LAYERS, 4).for_model(model)
    with pytest.raises(ValueError, match="2 query heads in layer 0, the model 4"):
        SpanPlan.dense(LAYERS, 2, heads="query").for_model(model)


def test_the_longest_span_of_a_group_depends_on_the_length() -> None:
    rules = [[24.0, 0.0, 0.0, 0.0]] * LAYERS, [[0.0, 0.5, 1.0, 0.0]] * LAYERS
    plan = SpanPlan(*rules, heads="query", sink=SINK, block=BLOCK)
    assert plan.for_model(tiny(), 32).spans(32) == [[24, 32]] * LAYERS
    assert plan.for_model(tiny(), 96).spans(96) == [[48, 96]] * LAYERS


def test_bytes() -> None:
    model, plan = tiny(), mixed_plan()
    slots = sum(map(sum, plan.spans(40)))
    assert plan.kv_bytes(model, 40) == slots * 8 * 4 * 2
    assert plan.kv_bytes(model, 40, batch=3, dtype=torch.bfloat16) == slots * 8 * 2 * 2 * 3
    with pytest.raises(ValueError, match="length=0"):
        plan.kv_bytes(model, 0)


def test_share_of_the_bytes_is_the_models() -> None:
    """Of a query-head plan the longest of a group counts, and a layer with a window of its own keeps that."""
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    by_query = SpanPlan([[0.0] * 4] * 2, [[0.25, 0.5, 0.25, 0.25]] * 2, heads="query", sink=4, block=4)
    assert by_query.kv_density(64) == 0.3125
    assert by_query.kv_share(config, 64) == 0.375
    windowed = MistralConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, sliding_window=17)
    windowed.layer_types = ["sliding_attention", "full_attention"]
    half = SpanPlan.uniform(2, 2, 0.5, sink=4, block=4)
    assert half.kv_share(windowed, 64) == (16 + 32) / (16 + 64)
    assert half.kv_share(config, 64) == half.kv_density(64) == 0.5

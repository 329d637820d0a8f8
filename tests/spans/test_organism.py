"""The long-context organism: its tasks, its weights, and the plans that a searched plan is compared with."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moa.assets import base_path
from moa.evaluation.accuracy import evaluate
from moa.evaluation.retrieval import TextSet, long_rows, text_losses
from moa.spans import SpanPlan, apply_spans
from moa.spans.baselines import far_influence, layer_only, two_class, uniform_window
from moa.tasks.long_context import COPIED, CUE, LONG_TASKS, generate


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(base_path("embedded-long"))


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(base_path("embedded-long"), dtype=torch.float32).eval()


def words(text: str) -> int:
    return len(text.split())


def solve(prompt: str) -> str:
    """An answer read off the prompt's text, without the generator's help."""
    if (copy := prompt.split(" Copy:")) and len(copy) == 2:
        read, cue = copy[0].removeprefix("Text:").split(), copy[1].split()
        places = [i for i in range(len(read)) if read[i : i + CUE] == cue]
        assert len(places) == 1
        return " ".join(read[places[0] + CUE :][:COPIED])
    text, key = prompt.split(" Question: ")
    (answer,) = re.findall(rf"\b{key} (\d{{4}})\.", text)
    return answer


@pytest.mark.parametrize("task", LONG_TASKS)
@pytest.mark.parametrize("length", [64, 300, 1000])
def test_the_answer_follows_from_the_prompt(task: str, length: int) -> None:
    for prompt in generate(task, length, 10, words):
        assert solve(prompt.prompt) == prompt.answer.strip()
        assert prompt.answer.startswith(" ")


@pytest.mark.parametrize("task", LONG_TASKS)
def test_prompts_are_as_long_as_asked_and_their_depths_spread(task: str) -> None:
    prompts = generate(task, 500, 60, words)
    assert all(480 <= words(p.prompt + p.answer) <= 500 for p in prompts)
    depths = sorted(p.depth for p in prompts)
    assert depths[0] < 0.15
    assert depths[-1] > 0.85
    assert 0.3 < sum(depths) / len(depths) < 0.7


@pytest.mark.parametrize("task", LONG_TASKS)
def test_prompts_depend_on_the_seed_alone(task: str) -> None:
    assert generate(task, 200, 3, words, seed=1) == generate(task, 200, 3, words, seed=1)
    assert generate(task, 200, 3, words, seed=1) != generate(task, 200, 3, words, seed=2)


def test_two_words_say_where_to_copy_from() -> None:
    (prompt,) = generate("copying", 3000, 1, words)
    read = prompt.prompt.split(" Copy:")[0].removeprefix("Text:").split()
    assert len(read) > 2900
    assert len(set(pairwise(read))) == len(read) - 1


def test_what_cannot_be_generated_is_named() -> None:
    with pytest.raises(ValueError, match="unknown task 'line'; valid tasks: lines, needle, copying"):
        generate("line", 200, 1, words)
    with pytest.raises(ValueError, match=r"at least 64 .* got 63 and 1"):
        generate("lines", 63, 1, words)


def right(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> list[bool]:
    """Which rows the model answers right."""
    found = evaluate(model, tokenizer, rows, template="short", kind="begins", max_new_tokens=20, batch_size=10)
    return [item.correct for item in found.items]


@pytest.mark.parametrize("task", LONG_TASKS)
def test_tokens_are_counted_as_the_model_sees_them(tokenizer: Any, task: str) -> None:
    for row in long_rows(tokenizer, f"long:{task}@512", 5):
        assert 490 <= len(tokenizer(row["prompt"] + row["output"])["input_ids"]) <= 512


def test_facts_are_asked_one_to_a_text(tokenizer: Any) -> None:
    rows = long_rows(tokenizer, "long:facts@1024", 3)
    assert len({row["prompt"] for row in rows}) == 3
    for row in rows:
        start = row["prompt"].rpartition("\n")[2]
        assert f"{start} {row['answer']}" in row["prompt"]
        assert 500 <= len(tokenizer(row["prompt"] + row["output"])["input_ids"]) <= 1024


def test_the_tokenizer_loses_nothing(tokenizer: Any) -> None:
    text = "Record: red cat 4716.\n\nThe Küche, 123 456 7; \t«sic»"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("task", LONG_TASKS)
def test_the_organism_retrieves(model: Any, tokenizer: Any, task: str) -> None:
    assert sum(right(model, tokenizer, long_rows(tokenizer, f"long:{task}@256", 30))) >= 27


def test_a_wrong_answer_counts_as_wrong(model: Any, tokenizer: Any) -> None:
    (row,) = long_rows(tokenizer, "long:lines@128", 1)
    assert row["answer"] != "0000"
    wrong = [row | {"answer": answer} for answer in ("0000", row["answer"][:3])]
    assert right(model, tokenizer, [row, *wrong]) == [True, False, False]


def test_retrieval_needs_more_than_a_window(model: Any, tokenizer: Any) -> None:
    """Facts before the smallest window are out of reach, those within it are not."""
    window = SpanPlan.uniform(model.config.num_hidden_layers, model.config.num_key_value_heads, beta=0.0)
    rows = long_rows(tokenizer, "long:lines@512", 120)
    places = [row["prompt"].index(f" {row['answer']}.") / len(row["prompt"]) for row in rows]
    rows = [row for row, place in zip(rows, places, strict=True) if 0.2 < place < 0.7][:20]
    with apply_spans(model, window):
        far = right(model, tokenizer, rows)
    assert sum(far) <= 2
    assert sum(right(model, tokenizer, rows)) >= 18


def test_running_text_counts_the_second_halves(model: Any, tokenizer: Any) -> None:
    text = (base_path("embedded-long") / "held_out.txt").read_text()[:3000]
    ids = torch.tensor([tokenizer(text)["input_ids"][:256]])
    with torch.no_grad():
        chances = [model(input_ids=row[None]).logits[0].log_softmax(-1) for row in ids.view(2, 128)]
    wanted = [
        -torch.stack([chance[i - 1, row[i]] for i in range(64, 128)]).mean().item()
        for chance, row in zip(chances, ids.view(2, 128), strict=True)
    ]
    assert text_losses(model, tokenizer, TextSet("novels", text, 128, 2)) == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(ValueError, match="make no window of 8192"):
        text_losses(model, tokenizer, TextSet("novels", text, 8192, 2))


@pytest.mark.parametrize("length", [1024, 2048, 4096])
@pytest.mark.parametrize("density", [0.25, 0.5, 0.8])
def test_baselines_have_the_promised_bytes(model: Any, density: float, length: int) -> None:
    shape = (model.config.num_hidden_layers, model.config.num_key_value_heads)
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    dense = SpanPlan.dense(*shape).kv_bytes(model, length)
    assert dense == 2 * shape[0] * shape[1] * length * model.config.head_dim * 4
    for plan in (
        uniform_window(model, density, length),
        two_class(model, density, length, scores),
        layer_only(model, density, length, scores),
    ):
        spare = density - plan.kv_bytes(model, length) / dense
        assert 0 <= spare < 64 / length


def test_two_classes_keep_the_best_heads_whole(model: Any) -> None:
    shape = (model.config.num_hidden_layers, model.config.num_key_value_heads)
    scores = torch.arange(shape[0] * shape[1]).view(shape).float()
    spans = torch.tensor(two_class(model, 0.5, 2048, scores).spans(2048)).flatten()
    full = spans == 2048
    assert full.any()
    assert full[: -int(full.sum())].sum() == 0
    assert len(set(spans[~full].tolist())) == 1


def test_layers_share_a_span_and_follow_their_scores(model: Any) -> None:
    shape = (model.config.num_hidden_layers, model.config.num_key_value_heads)
    scores = torch.ones(shape)
    scores[-1] *= 3
    spans = layer_only(model, 0.3, 2048, scores).spans(2048)
    assert all(len(set(row)) == 1 for row in spans)
    assert spans[-1][0] == pytest.approx(3 * spans[0][0], abs=3 * 64)


def test_far_influence_leaves_out_sink_and_window() -> None:
    influence = torch.arange(16.0).view(1, 1, 4, 4).tril()
    assert far_influence(influence).item() == 9 + 13 + 14
    assert far_influence(influence, window=2).item() == 13


@pytest.mark.parametrize("density", [0.01, 0.0, 1.5])
def test_a_budget_that_cannot_be_met_is_refused(model: Any, density: float) -> None:
    with pytest.raises(ValueError, match="is no budget"):
        uniform_window(model, density, 1024)


def test_a_record_of_more_lines_than_pairs_of_words_is_as_long_as_asked() -> None:
    def words(text: str) -> int:
        return len(text.split())

    for length in (4096, 8192, 32768):
        (made,) = generate("lines", length, 1, words, seed=2)
        assert length - 4 <= words(made.prompt) + 1 <= length
        record = made.prompt.removeprefix("Record:").partition(" Question: ")[0].split(". ")
        keys = [entry.strip(" .").rpartition(" ")[0] for entry in record]
        assert len(set(keys)) == len(keys)
        assert keys.count(made.prompt.rpartition("Question: ")[2]) == 1

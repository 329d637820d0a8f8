"""Evaluation: batches change nothing, nothing is cut, intervals and files say what was measured."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from moa.data import example_of, prompt_of
from moa.data.dialects import convert
from moa.decoding import generate_by
from moa.evaluation.accuracy import Result, evaluate, wilson
from moa.evaluation.generation import generate
from moa.evaluation.loss import answer_loss, answer_losses
from moa.evaluation.results import as_json, family_means, write
from moa.evaluation.sets import evaluate_sets, load_all, load_sets
from moa.spans import SpanPlan, apply_spans

ROWS = [
    {"instruction": "x" * length, "input": "", "output": f"The answer is {length}", "answer": str(length)}
    for length in (3, 40, 11, 1, 27, 5, 33, 8, 19)
]


@pytest.fixture(scope="module")
def lively(tiny_llama: Callable[..., Any]) -> Any:
    """Weights wide enough that every prompt gets its own continuation."""
    return tiny_llama(initializer_range=0.3).eval()


@pytest.fixture
def answering(lively: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model, made to continue each prompt of `ROWS` with the number of its x's and, after a heading, to go on."""

    def reply(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        texts = tiny_tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        answers = [f" It is {text.count('x')}." + ("\n\n### Instruction: 7" if "###" in text else "") for text in texts]
        ids = [tiny_tokenizer(answer)["input_ids"] for answer in answers]
        longest = max(map(len, ids))
        return torch.cat([input_ids, torch.tensor([row + [0] * (longest - len(row)) for row in ids])], dim=1)

    monkeypatch.setattr(lively, "generate", reply)
    return lively


def test_batches_change_nothing_and_order_is_kept(lively: Any, tiny_tokenizer: Any):
    one, eight = (
        evaluate(lively, tiny_tokenizer, ROWS, template="short", max_new_tokens=12, batch_size=size) for size in (1, 8)
    )
    assert one == eight
    assert [item.prompt for item in eight.items] == [prompt_of(row, "short") for row in ROWS]
    assert len({item.text for item in eight.items}) > 1
    # What transformers itself says, without batch or padding.
    for row, item in zip(ROWS, eight.items, strict=True):
        ids = tiny_tokenizer(prompt_of(row, "short"), return_tensors="pt")["input_ids"]
        output = lively.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=0
        )
        assert item.text == tiny_tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("rule", [{"density": 0.3}, {"alpha": 16.0, "beta": 0.0}], ids=["elastic", "fixed"])
def test_batches_change_nothing_under_a_span_plan(tiny_llama: Any, tiny_tokenizer: Any, rule: dict[str, float]):
    """Spans follow from the length of a text, and in a batch from the longest one's."""
    model = tiny_llama(initializer_range=0.4, max_position_embeddings=2048).eval()
    rows = [{"instruction": "how far? " * n, "input": "", "output": f"{n} steps"} for n in range(1, 25, 2)]
    sizes: list[int] = []
    with apply_spans(model, SpanPlan.uniform(2, 2, **rule, sink=4, block=4)):
        alone, together = (
            evaluate(model, tiny_tokenizer, rows, template="none", max_new_tokens=12, batch_size=size, progress=tell)
            for size, tell in ((1, None), (6, sizes.append))
        )
        losses = [answer_losses(model, tiny_tokenizer, rows, template="none", batch_size=n) for n in (1, 6)]
    assert alone == together
    for one, other in zip(*losses, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert sizes == [6, 6] if "alpha" in rule else max(sizes) < 6


@pytest.mark.parametrize(
    "own",
    [
        {"do_sample": True, "temperature": 5.0, "top_p": 0.5, "repetition_penalty": 3.0},
        {"min_new_tokens": 8},
        {"suppress_tokens": [*range(3, 120)]},
        {"bad_words_ids": [[token] for token in range(3, 120)]},
        {"forced_eos_token_id": 7},
        {"num_return_sequences": 2, "num_beams": 2},
        {"exponential_decay_length_penalty": (1, 9.0)},
    ],
    ids=lambda own: next(iter(own)),
)
def test_generation_settings_of_the_model_do_not_count(lively: Any, tiny_tokenizer: Any, own: dict[str, Any]):
    plain = evaluate(lively, tiny_tokenizer, ROWS, template="short", max_new_tokens=8)
    before = lively.generation_config
    lively.generation_config = given = GenerationConfig(**own, eos_token_id=2, pad_token_id=0)
    try:
        assert evaluate(lively, tiny_tokenizer, ROWS, template="short", max_new_tokens=8) == plain
        assert lively.generation_config is given
    finally:
        lively.generation_config = before


def test_threads_leave_a_model_its_settings():
    class Slow:
        generation_config = given = GenerationConfig(min_new_tokens=8)

        def generate(self, **inputs: Any) -> int | None:
            time.sleep(0.02)  # long enough for the others to come in between
            return self.generation_config.min_new_tokens

    model = Slow()
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda _: generate_by(GenerationConfig(), model), range(8))) == [None] * 8
    assert model.generation_config is Slow.given


def test_counts_what_the_rule_finds(answering: Any, tiny_tokenizer: Any):
    rows = [ROWS[0], ROWS[1] | {"answer": "41"}, *ROWS[2:]]
    done: list[int] = []
    result = evaluate(answering, tiny_tokenizer, rows, template="short", batch_size=4, progress=done.append)
    assert result.kind == "number"
    assert [item.correct for item in result.items] == [True, False] + [True] * 7
    assert [item.answer for item in result.items] == ["3", "40", "11", "1", "27", "5", "33", "8", "19"]
    assert result.accuracy == 8 / 9
    assert sum(done) == len(rows)
    assert not answering.training


def test_long_prompts_are_reported_not_cut(lively: Any, tiny_tokenizer: Any):
    rows = [*ROWS, ROWS[0] | {"instruction": "x" * 600}]
    result = evaluate(lively, tiny_tokenizer, rows, template="short", max_new_tokens=4)
    assert result.too_long == 1
    assert result.items[-1].text is None
    assert not result.items[-1].correct
    assert all(item.text is not None for item in result.items[:-1])


def test_training_mode_comes_back_even_after_an_error(lively: Any, tiny_tokenizer: Any):
    lively.train()
    try:
        run = generate(lively, tiny_tokenizer, ["a", "b"], max_new_tokens=1, batch_size=1)
        next(run)
        assert not lively.training
        run.close()
        assert lively.training
    finally:
        lively.eval()


def test_no_rows_is_an_error(lively: Any, tiny_tokenizer: Any):
    with pytest.raises(ValueError, match="no rows"):
        evaluate(lively, tiny_tokenizer, [], template="short")
    with pytest.raises(ValueError, match="no rows"):
        answer_loss(lively, tiny_tokenizer, [], template="short")


def test_a_gold_answer_that_no_rule_reads_is_refused_before_anything_is_asked(lively: Any, tiny_tokenizer: Any):
    rows = [{"instruction": text, "input": "", "answer": text} for text in ("a", "?!")]
    asked: list[int] = []
    with pytest.raises(ValueError, match=r"'\?!' is not a text"):
        evaluate(lively, tiny_tokenizer, rows, template="short", max_new_tokens=1, progress=asked.append)
    assert not asked


@pytest.fixture
def chatty(tiny_tokenizer: Any) -> Any:
    """The tokenizer with a chat template."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return tokenizer


def test_chats_are_asked_through_the_chat_template_and_compared_with_their_last_message(
    answering: Any, chatty: Any, tmp_path: Path
):
    chats = [[{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": "1"}] for row in ROWS]
    rows = [{"messages": chat, "answer": row["answer"]} for chat, row in zip(chats, ROWS, strict=True)]
    del rows[0]["answer"]  # 3 is not "1"
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data,) = load_sets(str(tmp_path / "chat.jsonl"))
    result = evaluate(answering, chatty, data.rows, template="alpaca", kind=data.kind)
    assert data.kind == "number"
    assert [item.prompt for item in result.items[:2]] == [
        "[user]xxx</s>[assistant]",
        f"[user]{'x' * 40}</s>[assistant]",
    ]
    assert [item.correct for item in result.items] == [False] + [True] * 8


def test_an_instruction_may_be_asked_through_the_chat_template(answering: Any, chatty: Any):
    result = evaluate(answering, chatty, ROWS, template="chat")
    assert result.items[0].prompt == "[user]xxx</s>[assistant]"
    assert result.accuracy == 1.0


@pytest.mark.parametrize("template", ["short", "chat"])
def test_published_gold_answers_are_right_when_they_are_given(
    lively: Any, chatty: Any, template: str, monkeypatch: pytest.MonkeyPatch
):
    """In the form of GSM8K: reasoning with other numbers, then ``#### 42``; a heading after it is no answer."""
    golds = ["42", "1,002", "-7", "0.5", "18"]
    texts = [f" She has {n} of <<{n}*2={2 * n}>>{2 * n}.\n#### {gold}" for n, gold in enumerate(golds, start=90)]
    rows = [{"question": f"How many, {n}?", "answer": text.strip()} for n, text in enumerate(texts)]
    file = [convert(row, split="test", place="here") for row in rows]
    assert [row["answer"] for row in file] == golds

    def reply(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        (asked,) = chatty.batch_decode(input_ids, skip_special_tokens=True)
        place = next(n for n, row in enumerate(rows) if row["question"] in asked)
        after = "\n\n### Instruction:\nAdd 1 and 11" if template == "short" else ""
        return torch.cat([input_ids, torch.tensor([chatty(texts[place] + after)["input_ids"]])], dim=1)

    monkeypatch.setattr(lively, "generate", reply)
    result = evaluate(lively, chatty, file, template=template, batch_size=1)
    assert [item.answer for item in result.items] == ["42", "1002", "-7", "0.5", "18"]
    assert result.accuracy == 1.0


def test_a_chat_may_have_headings_in_its_answer(lively: Any, chatty: Any, monkeypatch: pytest.MonkeyPatch):
    text = "### Step 1\n4 and 5\n### Result\n9"
    monkeypatch.setattr(
        lively,
        "generate",
        lambda input_ids, **_: torch.cat([input_ids, torch.tensor([chatty(text)["input_ids"]])], dim=1),
    )
    row = {"instruction": "4 + 5?", "input": "", "output": "9", "answer": "9"}
    assert evaluate(lively, chatty, [row], template="chat").accuracy == 1.0


def test_answer_loss_is_the_mean_over_answer_tokens(lively: Any, tiny_tokenizer: Any):
    total, count = 0.0, 0
    for row in ROWS:
        example = example_of(row, "short")
        prompt = tiny_tokenizer(example["prompt"])["input_ids"]
        ids = torch.tensor([[*tiny_tokenizer(example["prompt"] + example["completion"])["input_ids"], 2]])
        logs = lively(input_ids=ids).logits.detach().log_softmax(-1)[0, len(prompt) - 1 : -1]
        wanted = ids[0, len(prompt) :]
        total -= float(logs.gather(1, wanted[:, None]).sum())
        count += len(wanted)
    for size in (1, 4):
        loss = answer_loss(lively, tiny_tokenizer, ROWS, template="short", batch_size=size)
        assert loss == pytest.approx(total / count, rel=1e-5)
    each = [answer_loss(lively, tiny_tokenizer, [row], template="short") for row in ROWS]
    together = answer_losses(lively, tiny_tokenizer, ROWS, template="short", batch_size=3)
    assert [loss / tokens for loss, tokens in together] == pytest.approx(each, rel=1e-5)
    with pytest.raises(ValueError, match="context is 512"):
        answer_loss(lively, tiny_tokenizer, [ROWS[0] | {"output": "x" * 600}], template="short")


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # R: prop.test(x, n, correct=FALSE)$conf.int
    [(0, 10, 0.0, 0.2775328), (5, 10, 0.2365931, 0.7634069), (10, 10, 0.7224672, 1.0), (81, 100, 0.7222, 0.8749)],
)
def test_wilson(correct: int, n: int, low: float, high: float):
    assert wilson(correct, n) == pytest.approx((low, high), abs=1e-4)


def test_sets_know_family_kind_and_length(tmp_path: Path):
    folder = tmp_path / "eval_AddSub"
    folder.mkdir()
    (folder / "test.jsonl").write_text('{"instruction": "1 + 1?", "input": "", "output": "", "answer": "2"}\n')
    (added,) = load_sets(str(folder))
    assert (added.name, added.family, added.kind, added.max_new_tokens) == ("AddSub", "math", "number", 256)
    (by_file,) = load_sets(str(folder / "test.jsonl"))
    assert by_file.name == "AddSub"
    tasks = load_all(["tasks:all"], limit=3, max_new_tokens=7)
    assert {data.family for data in tasks} == {"math", "commonsense"}
    assert all(len(data.rows) == 3 and data.max_new_tokens == 7 and data.chance is not None for data in tasks)
    with pytest.raises(ValueError, match="'AddSub'"):
        load_all([str(folder), str(folder / "test.jsonl")])


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *((name, "math") for name in ("gsm8k", "GSM8K-test", "AQuA", "math_qa")),
        *((name, "commonsense") for name in ("ARC-Challenge", "arceasy", "arc_c", "social_i_qa", "boolq_1")),
        *((name, "other") for name in ("archive", "architecture-questions", "aquarium", "svampire")),
    ],
)
def test_only_a_published_sets_own_name_makes_its_family(tmp_path: Path, name: str, family: str):
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    (data,) = load_sets(str(tmp_path / f"{name}.jsonl"))
    assert data.family == family


def test_result_file_holds_everything(answering: Any, tiny_tokenizer: Any, tmp_path: Path):
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    sets = load_all([str(tmp_path / "mine.jsonl"), "tasks:lookup"], limit=4)
    seen: list[tuple[str, int]] = []
    outcomes = evaluate_sets(
        answering, tiny_tokenizer, sets, template="short", batch_size=2, progress=lambda *done: seen.append(done)
    )
    means = family_means(outcomes)
    assert means == {"other": 1.0, "commonsense": 0.0, "all": 0.5}
    assert sum(rows for name, rows in seen if name == "mine") == 4
    file = tmp_path / "deep" / "result.json"
    write(file, as_json(outcomes, {"base": "tiny", "seed": 0}))
    content = json.loads(file.read_text())
    assert content["settings"] == {"base": "tiny", "seed": 0}
    assert content["command"].startswith("moa")
    assert content["versions"].keys() >= {"moa", "torch", "transformers", "peft"}
    assert content["mean_accuracy"] == means
    assert content["sets"]["mine"]["accuracy"] == 1.0
    assert len(content["sets"]["mine"]["items"]) == 4
    assert [path.name for path in file.parent.iterdir()] == ["result.json"]


def test_wilson_is_what_a_result_reports(answering: Any, tiny_tokenizer: Any):
    result = evaluate(answering, tiny_tokenizer, ROWS, template="short")
    assert isinstance(result, Result)
    assert result.interval == wilson(9, 9)
    assert math.isclose(result.interval[1], 1.0)

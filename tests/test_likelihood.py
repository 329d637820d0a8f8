"""Choices by likelihood: scores are those of the very tokens that the model is asked with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moa.data.tokens import prompt_tokens
from moa.evaluation.likelihood import choices_of, chosen

ASKED = "Which one? Answer1: red Answer2: blue Answer3: green\n\nAnswer format: answer1/answer2/answer3"
ROWS = [
    {"instruction": f"{n} {ASKED}", "input": "", "output": f"the correct answer is answer{n % 3 + 1}", "answer": ""}
    for n in range(9)
]

LETTERS = [
    {"instruction": f"{n} times {7 - n % 5}? A) {n} B) {2 * n} C) {n * n}", "input": "", "output": "ABC"[n % 3]}
    for n in range(40)
]


@pytest.mark.parametrize(
    ("row", "kind", "expected"),
    [
        (ROWS[0], "label", ["answer1", "answer2", "answer3"]),
        ({"instruction": "Option1: a Option2: b", "output": "option2"}, "label", ["option1", "option2"]),
        ({"instruction": "Is it? true/false", "output": "", "answer": "false"}, "bool", ["true", "false"]),
        ({"instruction": "Choices: (A) 1 (B) 2 (C) 3", "output": "", "answer": "C"}, "choice", ["A", "B", "C"]),
        ({"instruction": "The options: A ) 38 , B ) 27", "output": "", "answer": "B"}, "choice", ["A", "B"]),
    ],
)
def test_choices_are_those_that_the_question_names(row: dict[str, Any], kind: str, expected: list[str]):
    assert choices_of(row, kind) == expected


@pytest.mark.parametrize(("kind", "answer"), [("choice", "D"), ("label", "answer4")])
def test_a_row_without_its_answer_among_the_choices_is_refused(kind: str, answer: str):
    with pytest.raises(ValueError, match=f"the answer '{answer}' is not one of the choices"):
        choices_of({"instruction": f"A) x B) y {ASKED}", "output": "", "answer": answer}, kind)


def test_free_answers_are_no_choice(tiny_llama: Any, tiny_tokenizer: Any):
    with pytest.raises(ValueError, match="kind='number' is not one of"):
        chosen(tiny_llama(), tiny_tokenizer, ROWS, template="short", kind="number")


@pytest.mark.parametrize("form", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
@pytest.mark.parametrize(
    ("rows", "kind", "said"),
    [
        (ROWS, "label", {f"answer{n}": f" the correct answer is answer{n}" for n in (1, 2, 3)}),
        (LETTERS, "choice", {letter: f" {letter}" for letter in "ABC"}),
    ],
    ids=["labels", "letters"],
)
def test_the_most_likely_choice_is_that_of_the_models_own_chances(
    tiny_llama: Any, tiny_tokenizer: Any, form: str, rows: list[dict[str, Any]], kind: str, said: dict[str, str]
):
    model = tiny_llama(initializer_range=0.3).train()
    tiny_tokenizer = type(tiny_tokenizer).from_pretrained(_formed(tiny_tokenizer, form))
    right = chosen(model, tiny_tokenizer, rows, template="short", kind=kind, batch_size=4)
    assert model.training
    model.eval()
    wanted = []
    for row in rows:
        asked = prompt_tokens(tiny_tokenizer, f"### Instruction:\n{row['instruction']}\n\n### Response:")
        assert (asked[0] == tiny_tokenizer.bos_token_id) == form.startswith("<s>")
        scores = {}
        for choice, text in said.items():
            own = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                chances = model(torch.tensor([asked + own])).logits[0].log_softmax(-1)
            scores[choice] = sum(chances[len(asked) + i - 1, token].item() for i, token in enumerate(own))
        wanted.append(row["output"].endswith(max(scores, key=lambda choice: scores[choice])))
    assert right == wanted
    assert 0 < sum(right) < len(right)


def test_a_chat_gets_no_begin_of_text_that_its_template_does_not_write(
    tiny_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    tokenizer = type(tiny_tokenizer).from_pretrained(_formed(tiny_tokenizer, "<s> $A"))
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    model, rows = tiny_llama(initializer_range=0.3), []
    asked: list[list[int]] = []
    forward = type(model).forward
    monkeypatch.setattr(
        type(model),
        "forward",
        lambda self, input_ids, **rest: asked.extend(input_ids.tolist()) or forward(self, input_ids, **rest),
    )
    for row in ROWS:
        answer = {"role": "assistant", "content": row["output"]}
        rows.append({"messages": [{"role": "user", "content": row["instruction"]}, answer], "output": row["output"]})
    assert len(chosen(model, tokenizer, rows, template="chat", kind="label", batch_size=4)) == len(rows)
    assert len(asked) == 3 * len(rows)
    assert not any(tokenizer.bos_token_id in row for row in asked)


def test_a_prompt_that_does_not_fit_is_refused(tiny_llama: Any, tiny_tokenizer: Any):
    row = {"instruction": f"{'far ' * 60}{ASKED}", "output": "answer1"}
    with pytest.raises(ValueError, match="but the model's context is 128"):
        chosen(tiny_llama(max_position_embeddings=128), tiny_tokenizer, [row], template="short", kind="label")


def _formed(tokenizer: Any, form: str) -> str:
    """A folder with the tokenizer that puts special tokens around a text."""
    import copy
    import tempfile

    from tokenizers import processors

    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=form, special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    )
    folder = tempfile.mkdtemp()
    other.save_pretrained(folder)
    return folder

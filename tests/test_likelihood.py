"""Choices by likelihood: lm_eval's scores are those of the very tokens that the model is asked with."""

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


@pytest.mark.parametrize("opened", [False, True])
def test_the_most_likely_choice_is_that_of_the_models_own_chances(tiny_llama: Any, tiny_tokenizer: Any, opened: bool):
    pytest.importorskip("lm_eval", reason="needs the extra 'bench'")
    model = tiny_llama(initializer_range=0.3).train()
    if opened:
        tiny_tokenizer = type(tiny_tokenizer).from_pretrained(_opening(tiny_tokenizer))
    right = chosen(model, tiny_tokenizer, ROWS, template="short", kind="label", batch_size=4)
    assert model.training
    model.eval()
    wanted = []
    for row in ROWS:
        asked = prompt_tokens(tiny_tokenizer, f"### Instruction:\n{row['instruction']}\n\n### Response:")
        assert (asked[0] == tiny_tokenizer.bos_token_id) == opened
        scores = {}
        for choice in ("answer1", "answer2", "answer3"):
            said = tiny_tokenizer(f" the correct answer is {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                chances = model(torch.tensor([asked + said])).logits[0].log_softmax(-1)
            scores[choice] = sum(chances[len(asked) + i - 1, token].item() for i, token in enumerate(said))
        wanted.append(row["output"].endswith(max(scores, key=lambda choice: scores[choice])))
    assert right == wanted
    assert 0 < sum(right) < len(right)


def _opening(tokenizer: Any) -> str:
    """A folder with the tokenizer that puts a begin-of-text token before a text."""
    import copy
    import tempfile

    from tokenizers import processors

    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    folder = tempfile.mkdtemp()
    other.save_pretrained(folder)
    return folder

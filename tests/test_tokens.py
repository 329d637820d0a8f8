"""One way from rows to tokens: what is learned after is what is asked, in every form and by every verb."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from moa.data import TEMPLATE_NAMES, example_of, example_tokens, form_of, prompt_of, prompt_text, prompt_tokens
from moa.data.dialects import convert
from moa.data.tokens import end_of_turn
from moa.evaluation.generation import generate, greedy
from moa.evaluation.loss import answer_losses

CHATML = (
    "{% if tools %}<tools>{{ tools | tojson }}{% endif %}{% if mood is defined %}<mood>{{ mood }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BARE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
THINKING = BARE.replace("[assistant]", "[assistant]<no thoughts>")

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": "3"},
]
INSTRUCTION = {"instruction": "Add.", "input": "1, 2", "output": "\nIt is 3.", "answer": "3"}
ROWS = {
    "instruction": INSTRUCTION,
    "prompt": {"prompt": "1 + 2 =", "output": " 3", "answer": ""},
    "messages": {"messages": MESSAGES, "output": "3", "answer": ""},
}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    """With ChatML's markers as special tokens and its template."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def surround(tokenizer: Any) -> Any:
    """The tokenizer, made to put begin-of-text before and end-of-text behind every text."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


@pytest.mark.parametrize("template", TEMPLATE_NAMES)
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("surrounded", [False, True])
def test_what_is_learned_after_is_what_is_asked(tokenizer: Any, template: str, kind: str, surrounded: bool):
    if surrounded:
        surround(tokenizer)
    row = ROWS[kind]
    asked = prompt_tokens(tokenizer, prompt_of(row, template))
    example = example_tokens(tokenizer, row, template)
    assert example.prompt == asked
    chat = kind == "messages" or (kind == "instruction" and template == "chat")
    assert tokenizer.decode(asked) == ("<s>" if surrounded and not chat else "") + prompt_text(
        tokenizer, prompt_of(row, template)
    )
    assert tokenizer.eos_token_id not in asked
    answer = tokenizer.decode(example.answer)
    assert answer == (f"{row['output'].strip()}<|im_end|>\n" if chat else f" {row['output'].strip()}</s>")


def test_the_chat_form_of_an_instruction(tokenizer: Any):
    text = prompt_text(tokenizer, prompt_of(INSTRUCTION, "chat"))
    assert text == "<|im_start|>user\nAdd.\n\n1, 2<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_text(tokenizer, prompt_of(INSTRUCTION, "none")) == "Add.\n\n1, 2"


def test_tools_and_columns_reach_the_template_in_prompt_and_training(tokenizer: Any):
    fields = {"messages": MESSAGES, "tools": TOOLS, "chat_template_kwargs": {"mood": "gay"}, "source": "web"}
    row = convert(fields, split="train", place="chats.jsonl, line 7")
    asked = prompt_text(tokenizer, prompt_of(row, "alpaca"))
    assert asked.startswith('<tools>[{"type": "function"')
    assert "<mood>gay<|im_start|>system" in asked
    example = example_tokens(tokenizer, row, "alpaca")
    assert tokenizer.decode(example.prompt) == asked
    assert tokenizer.decode(example.answer) == "3<|im_end|>\n"
    theirs = example_of(row, "alpaca")
    assert (theirs["tools"], theirs["chat_template_kwargs"]) == (TOOLS, {"mood": "gay", "source": "web"})


def test_a_column_that_the_template_reads_is_used_by_its_own_name(tokenizer: Any):
    row = convert({"messages": MESSAGES, "mood": "grim", "tools": None}, split="train", place="chats.jsonl, line 7")
    assert prompt_text(tokenizer, prompt_of(row, "chat")).startswith("<mood>grim")


def test_tools_that_the_template_does_not_read_are_refused(tokenizer: Any):
    tokenizer.chat_template = BARE
    row = convert({"messages": MESSAGES, "tools": TOOLS}, split="train", place="chats.jsonl, line 7")
    with pytest.raises(
        ValueError, match=r"chats.jsonl, line 7: the row has 'tools', which the tokenizer's chat template does not read"
    ):
        prompt_tokens(tokenizer, prompt_of(row, "chat"))


def test_a_template_that_ends_no_turn_gets_end_of_text(tokenizer: Any):
    tokenizer.chat_template = BARE
    example = example_tokens(tokenizer, ROWS["messages"], "chat")
    assert tokenizer.decode(example.answer) == "3\n</s>"
    assert end_of_turn(tokenizer) == set()


def test_a_template_that_asks_in_another_form_than_it_answers_is_refused(tokenizer: Any):
    tokenizer.chat_template = THINKING
    with pytest.raises(
        ValueError, match=r"^chats.jsonl, line 7: .*differently once it is answered.*<no thoughts>.*\[assistant\]3"
    ):
        example_tokens(tokenizer, ROWS["messages"] | {"place": "chats.jsonl, line 7"}, "chat")


def test_a_template_that_refuses_messages_says_why(tokenizer: Any):
    tokenizer.chat_template = "{{ raise_exception('no system role here') }}"
    with pytest.raises(ValueError, match=r"^chats.jsonl, line 7: .*refuses the messages: no system role here"):
        prompt_tokens(tokenizer, prompt_of(ROWS["messages"] | {"place": "chats.jsonl, line 7"}, "chat"))
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="needs a chat template, and this tokenizer has none"):
        prompt_tokens(tokenizer, prompt_of(ROWS["messages"], "chat"))


def test_a_merge_across_the_border_leaves_the_prompt_as_it_is_asked(tokenizer: Any):
    tokenizer.add_tokens([AddedToken("= 3", normalized=False)])
    whole = tokenizer("1 + 2 = 3")["input_ids"]
    asked = prompt_tokens(tokenizer, "1 + 2 =")
    assert whole[: len(asked)] != asked
    example = example_tokens(tokenizer, ROWS["prompt"], "none")
    assert example == (asked, [*tokenizer(" 3")["input_ids"], tokenizer.eos_token_id])


def test_an_answer_that_ends_with_end_of_text_gets_no_second_one(tokenizer: Any):
    example = example_tokens(tokenizer, {"prompt": "a", "output": "b</s>", "answer": ""}, "none")
    assert tokenizer.decode(example.answer) == "b</s>"


def test_a_tokenizer_without_an_end_is_refused(tokenizer: Any):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        example_tokens(tokenizer, INSTRUCTION, "short")


@pytest.mark.parametrize("text", ["", "half \ud83d of it"])
def test_what_is_no_prompt_is_refused(tokenizer: Any, text: str):
    with pytest.raises(ValueError, match=r"the prompt (is empty|has half of a surrogate pair, '\\ud83d')"):
        prompt_tokens(tokenizer, text)


def test_the_form_of_rows_is_what_new_questions_get():
    instruction, prompt, chat = ROWS["instruction"], ROWS["prompt"], ROWS["messages"]
    assert form_of([instruction], "short") == "short"
    assert form_of([instruction, prompt], "short") == "short"
    assert form_of([prompt], "short") == "none"
    assert form_of([chat], "short") == "chat"
    assert form_of([chat, instruction], "chat") == "chat"
    for others in ([chat, instruction], [chat, prompt]):
        with pytest.raises(ValueError, match="mixes chat messages with plain rows"):
            form_of(others, "short")


def test_generation_reads_the_prompt_and_stops_at_the_end_of_a_turn(tokenizer: Any, tiny_llama: Any, monkeypatch: Any):
    surround(tokenizer)
    model = tiny_llama(vocab_size=len(tokenizer))
    read: list[list[int]] = []

    def reply(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        read.extend(input_ids.tolist())
        return torch.cat([input_ids, torch.full_like(input_ids[:, :1], tokenizer.eos_token_id)], dim=1)

    monkeypatch.setattr(model, "generate", reply)
    prompts = ["1 + 2 =", prompt_of(ROWS["messages"], "chat")]
    list(generate(model, tokenizer, prompts, max_new_tokens=2, batch_size=1))
    assert sorted(read, key=len) == [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    ends = greedy(model, tokenizer, 2).eos_token_id
    assert ends == sorted([2, tokenizer.convert_tokens_to_ids("<|im_end|>")])


@pytest.mark.parametrize("kind", ROWS)
def test_the_loss_counts_the_answer_alone(tokenizer: Any, tiny_llama: Any, kind: str):
    model = tiny_llama(vocab_size=len(tokenizer), initializer_range=0.3)
    prompt, answer = example_tokens(surround(tokenizer), ROWS[kind], "short")
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    expected = -float(logs.gather(1, torch.tensor(answer)[:, None]).sum())
    ((loss, number),) = answer_losses(model, tokenizer, [ROWS[kind]], template="short")
    assert (loss, number) == (pytest.approx(expected, rel=1e-5), len(answer))

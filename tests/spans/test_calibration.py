"""Calibration items: the dense model's own answers, cutting, templates, sources, resuming, and bad input."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moa.assets import base_path
from moa.spans.evidence import calibration
from moa.spans.evidence.calibration import Signal, calibrate, check_signals, load_items
from moa.spans.evidence.conversation import begun, conversation, prompt_tokens
from moa.spans.evidence.items import Item
from moa.spans.evidence.sources import Passage, Source, Turn
from moa.tasks.facts import FACTS, fact_texts

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """Twenty long rows and a short one, the last line without an end."""
    file = tmp_path / "documents.jsonl"
    rows = [{"context": f"{row}: " + "words " * 60, "question": f"What is {row}?"} for row in range(20)]
    rows.append({"context": "short", "question": "why?"})
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_items_are_the_models_own_greedy_answers(tiny_llama, tiny_tokenizer, documents, tmp_path):
    model = tiny_llama().eval()
    file = tmp_path / "items.jsonl"
    counts = calibrate(
        model, tiny_tokenizer, Source(str(documents)), {128: False, 256: False}, file, items=3, max_new_tokens=6
    )
    assert {length: len(signals) for length, signals in counts.items()} == {128: 3, 256: 3}
    assert {signal.right for signals in counts.values() for signal in signals} == {None}
    for length in counts:
        for item in load_items(file, length):
            assert 0.5 * length <= len(item.tokens) <= length
            prompt = item.response.index(True)
            assert all(item.response[prompt:])
            tokens = list(item.tokens[:prompt])
            while len(tokens) < len(item.tokens):
                with torch.no_grad():
                    tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
            assert tuple(tokens) == item.tokens


def test_middle_of_the_context_is_cut_and_the_question_stays(tiny_tokenizer):
    passage = Passage("begin " + "x" * 500 + " end", (Turn("Why?"),))
    tokens = prompt_tokens(tiny_tokenizer, passage, 100)
    text = tiny_tokenizer.decode(tokens)
    assert len(tokens) == 100
    assert text.startswith("begin xx")
    assert text.endswith("xx end\n\nWhy?\n")
    with pytest.raises(ValueError, match="leave no room"):
        prompt_tokens(tiny_tokenizer, passage, 5)


def test_chat_template_is_used_if_there_is_one(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", TEMPLATE)
    text = tiny_tokenizer.decode(prompt_tokens(tiny_tokenizer, Passage("c" * 200, (Turn("Why?"),)), 60))
    assert text.startswith("<user>cc")
    assert text.endswith("cc\n\nWhy?<assistant>")
    begins = Passage("c" * 200, (Turn("Why?", "Because"),))
    assert tiny_tokenizer.decode(prompt_tokens(tiny_tokenizer, begins, 70)).endswith("cc\n\nWhy?<assistant>Because")
    ready = Passage("All of it", (Turn(""),), plain=True)
    assert tiny_tokenizer.decode(prompt_tokens(tiny_tokenizer, ready, 70)) == "<user>All of it<assistant>"


def test_held_out_rows_are_never_calibrated_on(documents):
    source = Source(str(documents), seed=3)
    kinds = [{p.context for p in source.passages(128, 99, len, held_out=held_out)} for held_out in (False, True)]
    assert not kinds[0] & kinds[1]
    assert len(kinds[0] | kinds[1]) == 21
    made = [
        {
            p.context
            for p in Source("tasks:lines,needle").passages(256, 6, lambda text: len(text) // 4, held_out=held_out)
        }
        for held_out in (False, True)
    ]
    assert len(made[0]) == 6
    assert not made[0] & made[1]


def test_one_question_for_all_rows(documents):
    first = next(iter(Source(str(documents), ask="Summarise.").passages(128, 1, len, held_out=False)))
    assert first.turns[0].question == "Summarise."


def test_killed_run_goes_on_to_the_same_items(tiny_llama, tiny_tokenizer, documents, tmp_path):
    model, source, lengths = tiny_llama().eval(), Source(str(documents)), {128: False, 256: False}
    settings = {"items": 3, "max_new_tokens": 4}
    calibrate(model, tiny_tokenizer, source, lengths, tmp_path / "whole.jsonl", **settings)

    def kill(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    file = tmp_path / "items.jsonl"
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, tiny_tokenizer, source, lengths, file, progress=kill, **settings)
    file.write_text(file.read_text() + '{"length":256,"pass')
    calibrate(model, tiny_tokenizer, source, lengths, file, **settings)
    assert file.read_text() == (tmp_path / "whole.jsonl").read_text()
    with pytest.raises(ValueError, match=r"items was 3, now 2; give --overwrite"):
        calibrate(model, tiny_tokenizer, source, lengths, file, items=2, max_new_tokens=4)


def test_bad_input(tiny_llama, tiny_tokenizer, documents, tmp_path):
    model, file = tiny_llama().eval(), tmp_path / "items.jsonl"

    def run(source: Source, length: int = 128, **settings: int) -> None:
        calibrate(model, tiny_tokenizer, source, {length: False}, file, **{"items": 1, "max_new_tokens": 4} | settings)

    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        run(Source(str(tmp_path / "none.jsonl")))
    with pytest.raises(
        ValueError, match=r"field 'text' must hold text; the row's fields are \['context', 'question'\]"
    ):
        run(Source(str(documents), context="text"))
    with pytest.raises(ValueError, match="unknown task 'nonsense'"):
        run(Source("tasks:nonsense"))
    with pytest.raises(ValueError, match=r"neither facts:\[FILE\], nor tasks:NAME"):
        run(Source("nonsense"))
    with pytest.raises(ValueError, match="less room for the prompt"):
        run(Source(str(documents)), max_new_tokens=100)
    with pytest.raises(ValueError, match="length 4096 is more than the 512 tokens of the model's context"):
        run(Source(str(documents)), length=4096)
    model.config.max_position_embeddings = 4096
    with pytest.raises(ValueError, match="no text of at least 2048 tokens for length 4096"):
        run(Source(str(documents)), length=4096)
    assert not file.exists()
    with pytest.raises(FileNotFoundError, match="moa spans calibrate"):
        load_items(file, 128)
    file.write_text('{"settings": {}}\n{"length": 128, "tokens": "all", "response": []}\n')
    with pytest.raises(ValueError, match="line 2: an item's 'tokens'"):
        load_items(file, 128)
    with pytest.raises(ValueError, match=r"no items of length 64, only of \[128\]"):
        load_items(file, 64)
    file.write_text("[" * 100_000 + "\n")
    with pytest.raises(ValueError, match="line 1: not JSON"):
        load_items(file, 64)


SENTENCES = " ".join(f"It was told again in the year after number {n}." for n in range(300))


def test_facts_are_in_the_text_once_and_all_asked():
    made = list(itertools.islice(fact_texts(SENTENCES, 400, lambda text: len(text.split()), seed=1), 6))
    assert made == list(itertools.islice(fact_texts(SENTENCES, 400, lambda text: len(text.split()), seed=1), 6))
    for one in made:
        assert len({asked.answer for asked in one.asked}) == len({asked.question for asked in one.asked}) == FACTS
        for asked in one.asked:
            assert one.context.count(f"{asked.start} {asked.answer}") == 1
        assert 200 < len(one.context.split()) < 320  # questions, answers and a template take the rest
    with pytest.raises(ValueError, match="too short to hide facts in"):
        next(fact_texts("One. Two.", 400, len))
    with pytest.raises(ValueError, match="length=100 has no room"):
        next(fact_texts(SENTENCES, 100, len))


@pytest.mark.parametrize("template", [None, "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"])
def test_known_answers_are_found_in_the_conversation(tiny_tokenizer, monkeypatch, template):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    turns = (Turn("Which?", "It is", "1234"), Turn("And then?", "It is", "56"))
    tokens, answers = conversation(tiny_tokenizer, Passage("It is 1234. It is 56.", turns))
    assert [tiny_tokenizer.decode(tokens[part.start : part.stop]) for part in answers] == [" 1234", " 56"]
    assert tiny_tokenizer.decode(tokens[: answers[0].start]).endswith("Which?\nIt is" if not template else ">It is")
    assert tiny_tokenizer.decode(tokens).count("It is 1234.") == 2


def test_a_fact_at_the_end_of_the_text_is_not_taken_for_its_answer(tiny_tokenizer, monkeypatch):
    """Chat templates of instruction-tuned models begin with some hundred letters of their own."""
    opening = "you are helpful. " * 8
    monkeypatch.setattr(
        tiny_tokenizer, "chat_template", opening + "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    )
    context, asked = "words. " * 4 + "it is 1234.", (Turn("which?", "it is", "1234"), Turn("again?", "it is", "1234"))
    tokens, answers = conversation(tiny_tokenizer, Passage(context, asked))
    assert len(answers) == 2
    assert tiny_tokenizer.decode(tokens[: answers[0].start]).endswith("which?><it is")
    assert tiny_tokenizer.decode(tokens[: answers[1].start]).endswith("again?><it is")


def test_a_prompt_never_ends_with_end_of_text(tiny_tokenizer):
    class Ending:
        chat_template = None

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            own = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [1, *own, 2] if add_special_tokens else own}

    own = tiny_tokenizer("abc", add_special_tokens=False)["input_ids"]
    assert begun(Ending(), "abc") == [1, *own]
    assert prompt_tokens(Ending(), Passage("abc", (Turn(""),), plain=True), 50) == [1, *own]


@pytest.mark.slow
def test_a_model_that_looks_things_up_gives_items_with_signal(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base_path("embedded-long"), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(base_path("embedded-long"))
    signals = calibrate(
        model, tokenizer, Source("tasks:lines"), {512: False}, tmp_path / "items.jsonl", items=4, max_new_tokens=8
    )[512]
    assert sum(signal.right for signal in signals) == sum(signal.asked for signal in signals) == 4
    assert sum(signal.carries for signal in signals) >= 3
    check_signals({512: signals}, 0.5)


def test_of_several_known_answers_the_right_ones_are_supervised(tiny_llama, tiny_tokenizer, tmp_path, monkeypatch):
    """As if the model gave every answer right but the second of the four."""

    def judged(model: object, item: Item) -> tuple[torch.Tensor, torch.Tensor]:
        right = torch.ones(sum(item.response), dtype=torch.bool)
        right[7] = (
            len(right) < 4 * 5
        )  # answers have a blank and four digits; the second time, only the right ones are left
        return torch.zeros(len(right)), right

    monkeypatch.setattr(calibration, "predicted", judged)
    (tmp_path / "text.txt").write_text(SENTENCES)
    source, file = Source(f"facts:{tmp_path / 'text.txt'}"), tmp_path / "items.jsonl"
    model = tiny_llama(max_position_embeddings=2048).eval()
    signals = calibrate(model, tiny_tokenizer, source, {1536: False}, file, items=2)[1536]
    assert [(signal.right, signal.asked) for signal in signals] == [(3, FACTS)] * 2
    for item in load_items(file, 1536):
        said = tiny_tokenizer.decode([token for token, mark in zip(item.tokens, item.response, strict=True) if mark])
        assert len(said.split()) == 3
        assert all(len(number) == 4 and number.isdigit() for number in said.split())


def test_items_without_signal_are_refused():
    signals = {256: [Signal(0.1, 0.5, 1, 1), Signal(0.1, 0.05, None, 1), Signal(0.1, -0.2, 0, 1)]}
    check_signals(signals, 0.3)
    with pytest.raises(ValueError, match=r"only 1 of 3 items of 256 tokens.*a window of 32.*signal=0\.5"):
        check_signals(signals, 0.5)

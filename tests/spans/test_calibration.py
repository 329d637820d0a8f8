"""Calibration items: the dense model's own answers, cutting, templates, sources, resuming, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moa.spans.evidence.calibration import calibrate, load_items, prompt_tokens
from moa.spans.evidence.sources import Passage, Source

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
    assert counts == {128: 3, 256: 3}
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
    passage = Passage("begin " + "x" * 500 + " end", "Why?")
    tokens = prompt_tokens(tiny_tokenizer, passage, 100)
    text = tiny_tokenizer.decode(tokens)
    assert len(tokens) == 100
    assert text.startswith("begin xx")
    assert text.endswith("xx end\n\nWhy?\n")
    with pytest.raises(ValueError, match="leave no room"):
        prompt_tokens(tiny_tokenizer, passage, 5)


def test_chat_template_is_used_if_there_is_one(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", TEMPLATE)
    text = tiny_tokenizer.decode(prompt_tokens(tiny_tokenizer, Passage("c" * 200, "Why?"), 60))
    assert text.startswith("<user>cc")
    assert text.endswith("cc\n\nWhy?<assistant>")


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
    assert first.question == "Summarise."


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
    with pytest.raises(ValueError, match="neither tasks:NAME"):
        run(Source("nonsense"))
    with pytest.raises(ValueError, match="less room for the prompt"):
        run(Source(str(documents)), max_new_tokens=100)
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

"""Tokenizer and training rows of the long-context organism (`pretrain_long_context.py`).

Contract: `build_tokenizer` makes a lossless byte-level BPE in which every word of the tasks and every pair of digits
is one token. `Rows.batch(step, rows, length)` gives token ids and loss weights that depend on the seed and the
arguments alone. Weights are zero where the next token is random by design.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from itertools import islice

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moa.tasks.long_context import ADJECTIVES, NOUNS, keys, story, value

END, PAD = "<|endoftext|>", "<|pad|>"
TEXT_VOCABULARY = 600  # bytes, specials and merges of the novels; the tasks' words come on top
MIXTURE = {"lines": 0.3, "needle": 0.25, "copying": 0.2, "novels": 0.25}
TEXT_WEIGHT = 0.3  # of a token of running text; one of an answer weighs 1
MARKS = ("Record", "ĠQuestion", "Text", "ĠCopy", "ĠNote")  # in byte-level BPE's letters

_DIGITS = pre_tokenizers.Split(Regex(r" ?\d\d?|(?:[^\d ]| (?!\d))+"), behavior="isolated")
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)


def build_tokenizer(novels: str) -> PreTrainedTokenizerFast:
    """Merges learned from the novels, then those that complete the tasks' words and digit pairs."""
    base = Tokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.Sequence([_DIGITS, _BYTES])
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT_VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    base.train_from_iterator([novels], trainer)
    vocabulary = {token: i for token, i in base.get_vocab().items()}
    merges = _merges(base)
    blank = "Ġ"  # how byte-level BPE writes a space
    digits = "0123456789"
    wanted = [blank + d for d in digits] + [blank + a + b for a in digits for b in digits]
    wanted += [a + b for a in digits for b in digits] + [blank + word for word in (*ADJECTIVES, *NOUNS)] + [*MARKS]
    for word in wanted:
        pieces = [t.value for t in models.BPE(vocab=vocabulary, merges=merges).tokenize(word)]
        while len(pieces) > 1:
            left, right, *rest = pieces
            merges.append((left, right))
            vocabulary.setdefault(left + right, len(vocabulary))
            pieces = [left + right, *rest]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = base.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


Piece = tuple[list[int], float]  # tokens, the weight of predicting each of them


class Rows:
    """Training rows: ids `(rows, length)` int64 and the weight of predicting each token, float32."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, novels: np.ndarray, seed: int):
        self.tokenizer, self.novels, self.seed = tokenizer, novels, seed
        self._cache: dict[str, list[int]] = {}

    def batch(self, step: int, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of a step; kinds are drawn by `MIXTURE`."""
        rng = random.Random(f"{self.seed}/{step}")
        kinds = rng.choices(list(MIXTURE), weights=list(MIXTURE.values()), k=rows)
        made = [self.row(rng, kind, length) for kind in kinds]
        return torch.tensor([ids for ids, _ in made]), torch.tensor([weights for _, weights in made])

    def row(self, rng: random.Random, kind: str, length: int) -> tuple[list[int], list[float]]:
        """One row of a kind, exactly `length` tokens."""
        ids: list[int] = []
        weights: list[float] = []
        for piece, weight in getattr(self, "_" + kind)(rng, length):
            ids += piece
            weights += [weight] * len(piece)
            if len(ids) >= length:
                break
        return ids[:length], weights[:length]

    def ids(self, text: str) -> list[int]:
        """Tokens of a text made of words that recur."""
        if text not in self._cache:
            self._cache[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self._cache[text]

    def _asked(self, key: tuple[str, str], answer: str) -> Iterable[Piece]:
        yield self.ids(f" {key[0]}") + self.ids(f" {key[1]}"), 0.0
        yield self.ids(f" {answer[:2]}") + self.ids(answer[2:]) + self.ids("."), 1.0

    def _told(self, key: tuple[str, str], answer: str) -> list[int]:
        return [t for piece, _ in self._asked(key, answer) for t in piece]

    def _lines(self, rng: random.Random, length: int) -> Iterable[Piece]:
        room = (length - 4) // len(self._told(("red", "cat"), "1000"))
        entries = [(key, value(rng)) for key in keys(rng, max(2, int(room * rng.uniform(0.3, 0.7))))]
        yield self.ids("Record:"), 0.0
        for entry in entries:
            yield self._told(*entry), 0.0
        yield self.ids(" Question:"), 0.0
        for _ in range(room):
            yield from self._asked(*rng.choice(entries))

    def _needle(self, rng: random.Random, length: int) -> Iterable[Piece]:
        entries = [(key, value(rng)) for key in keys(rng, rng.randint(1, 2 + length // 64))]
        asked = len(self._told(*entries[0]))
        filler = length - (2 * asked + 4) * len(entries) - 8
        text = list(islice(self._filler(rng), max(filler, 8)))
        cuts = sorted(rng.randrange(len(text)) for _ in entries)
        yield self.ids("Text:"), 0.0
        for start, end, entry in zip([0, *cuts], [*cuts, None], [*entries, None], strict=True):
            yield text[start:end], TEXT_WEIGHT
            if entry:
                yield self.ids(" Note:") + self._told(*entry), 0.0
        yield self.ids(" Question:"), 0.0
        for entry in rng.sample(entries, len(entries)):
            yield from self._asked(*entry)
        while True:
            yield from self._asked(*rng.choice(entries))

    def _filler(self, rng: random.Random) -> Iterable[int]:
        if rng.random() < 0.5:
            at = rng.randrange(len(self.novels) - 10_000)
            yield from self.novels[at : at + 10_000].tolist()
        while True:
            yield from self.tokenizer.encode(story(rng), add_special_tokens=False)

    def _copying(self, rng: random.Random, length: int) -> Iterable[Piece]:
        size = int(length * rng.uniform(0.3, 0.7))
        if rng.random() < 0.6:
            text = [self.ids(f" {rng.choice(rng.choice((ADJECTIVES, NOUNS)))}")[0] for _ in range(size)]
        else:
            text = list(islice(self._filler(rng), size))
        yield self.ids("Text:") + text, 0.0
        while True:
            at = rng.randrange(max(1, size - 24))
            yield self.ids(" Copy:") + text[at : at + 4], 0.0
            yield text[at + 4 : at + rng.randint(20, 60)], 1.0

    def _novels(self, rng: random.Random, length: int) -> Iterable[Piece]:
        at = rng.randrange(len(self.novels) - length)
        yield self.novels[at : at + length].tolist(), TEXT_WEIGHT

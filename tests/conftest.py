"""Tiny models and data made on the spot: no test needs a network or a downloaded file."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>"]
LONG = {"slow", "torture"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first: of several processes none is left alone with one at the end."""
    items.sort(key=lambda item: LONG.isdisjoint(mark.name for mark in item.iter_markers()))


def pytest_collection_finish() -> None:
    """What is loaded by now stays: the collections of garbage that trainers ask for need not look through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and three special tokens: every text survives, every digit is one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="right"
    )


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """`tiny_llama(seed=0, **config)`: a random Llama of two blocks, 32 wide."""

    def build(seed: int = 0, **overrides: object) -> LlamaForCausalLM:
        fields: dict[str, object] = {
            "vocab_size": len(SPECIAL) + 256,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(fields | overrides)))

    return build


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable, tiny_tokenizer: object) -> Path:
    """A folder with the tiny model and its tokenizer, as `--base` takes it."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `.jsonl` file of 40 sums."""
    file = tmp_path_factory.mktemp("rows") / "train.jsonl"
    rows = [{"instruction": f"{a} + {b} = ?", "output": str(a + b)} for a in range(8) for b in range(5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file

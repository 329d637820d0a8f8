"""Tiny models, a tiny tokenizer and mixtures that act, for tests of any kind. Nothing is downloaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.peft import MIN_PEFT_VERSION

import moa

VOCABULARY = 64

through_transformers = pytest.mark.skipif(
    Version(version("peft")) < Version(MIN_PEFT_VERSION),
    reason=f"this transformers asks for peft {MIN_PEFT_VERSION} before its own models take adapters",
)
"""Of tests of ``model.add_adapter``, ``model.load_adapter`` and their like."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A fixed seed inside, the caller's random state back outside."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def tiny_llama(**config: Any) -> LlamaForCausalLM:
    """A random two-block Llama in eval mode, the same at every call; weights wide enough for lively logits."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    with seeded(0):
        return LlamaForCausalLM(LlamaConfig(**{**settings, **config})).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable letter, with a chat template."""
    letters = ["<pad>", "<s>", "</s>", "<unk>", "_", *"abcdefghijklmnopqrstuvwxyz0123456789 .,:?!+-*/=()\n'"]
    assert len(letters) <= VOCABULARY
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '\n' }}{% endfor %}",
    )


def tiny_config(**fields: Any) -> moa.MoAConfig:
    """Every kind of expert, copies among them, under a SwiGLU router with a learned threshold."""
    settings: dict[str, Any] = {
        "experts": [
            moa.LoraExpert(targets=["q", "v"], r=2),
            moa.LoraExpert(targets=["down"], r=2, copies=moa.Copies(3, bias=True)),
            moa.PromptExpert(length=3),
            moa.ParallelExpert(size=4),
        ],
        "router": moa.Router(hidden_per_expert=4, input="block", initial_logit=0.0),
        "gating": moa.Threshold(),
    }
    return moa.MoAConfig(**{**settings, **fields})


def is_adapter(name: str, adapter: str = r"\w+") -> bool:
    """Whether a parameter's name is one of a mixture's."""
    return re.search(rf"\.moa_\w+\.{adapter}\.", name) is not None


def perturb(model: nn.Module, seed: int = 1, adapter: str = "default") -> nn.Module:
    """Fill ``adapter`` with noise, so that every expert, router and threshold makes a difference."""
    with seeded(seed), torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name, adapter):
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


def tiny_moa(config: moa.MoAConfig | None = None, *, adapter: str = "default", **base: Any) -> PeftModel:
    """A tiny Llama with a mixture whose weights are all noise, in eval mode."""
    model = get_peft_model(tiny_llama(**base), config or tiny_config(), adapter_name=adapter)
    return perturb(model.eval(), adapter=adapter)


def tokens(rows: int = 2, length: int = 8, seed: int = 0) -> Tensor:
    """Random token ids without special ones."""
    return torch.randint(5, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(rows: int = 2, length: int = 8) -> dict[str, Tensor]:
    """A batch whose rows are of different length, padded on the left."""
    ids, mask = tokens(rows, length), torch.ones(rows, length, dtype=torch.long)
    for row in range(1, rows):
        ids[row, : 2 * row], mask[row, : 2 * row] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: nn.Module, **inputs: Any) -> Tensor:
    """Logits of a fixed padded batch, or of ``inputs``, without gradients."""
    with torch.no_grad():
        return model(**(inputs or padded())).logits


def adapter_tensors(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """Copies of an adapter's tensors."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if is_adapter(name, adapter)}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all gradients there are."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

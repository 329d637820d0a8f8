"""Tiny random models of every family in the table, for tests that must hold for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 97

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
FOUR_HEADS = COMMON | {"num_key_value_heads": 4}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Family:
    """A family's tiny configuration and what it cannot host."""

    settings: dict[str, Any]
    prompt: bool = True
    down: bool = True


FAMILIES: dict[str, Family] = {
    "llama": Family(COMMON),
    "mistral": Family(COMMON | {"sliding_window": None}),
    "qwen2": Family(COMMON),
    "qwen3": Family(COMMON | {"head_dim": 16}),
    "gemma2": Family(COMMON | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64}),
    "gemma3_text": Family(COMMON | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64}),
    "phi3": Family(COMMON),
    "gpt_neox": Family({k: v for k, v in COMMON.items() if k != "num_key_value_heads"}),
    "opt": Family(
        {k: v for k, v in COMMON.items() if k not in ("intermediate_size", "num_key_value_heads")}
        | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
    ),
    "gpt2": Family(
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    ),
    "falcon": Family(
        COMMON | {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False, "ffn_hidden_size": 48},
        prompt=False,
    ),
    "olmo2": Family(COMMON),
    "granite": Family(COMMON),
    "cohere": Family(COMMON | {"use_qk_norm": True}),
    "starcoder2": Family(COMMON | {"residual_dropout": 0.0, "embedding_dropout": 0.0, "sliding_window": None}),
    "stablelm": Family(COMMON | {"qk_layernorm": True}),
    "smollm3": Family(COMMON),
    "mixtral": Family(COMMON | EXPERTS, down=False),
    "qwen3_moe": Family(
        COMMON | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}, down=False
    ),
    "gpt_oss": Family(COMMON | EXPERTS | {"head_dim": 8, "sliding_window": 64}, down=False),
    "gptj": Family(
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
        prompt=False,
    ),
    "bloom": Family(
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0}
        | {"bos_token_id": 1, "eos_token_id": 2},
        prompt=False,
    ),
    "mpt": Family(
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        prompt=False,
    ),
}


def build_family(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of the family in eval mode, its weights large enough for every part to matter."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **FAMILIES[name].settings)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model

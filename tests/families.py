"""Tiny random models of many families: `FAMILIES` for every mixture there is, `DECODERS` for the default one."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel, __version__

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
GPTJ_CALLS_THE_INTERFACE = Version(__version__) >= Version("5.24")
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
        prompt=GPTJ_CALLS_THE_INTERFACE,
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


# Names that families have for the same few sizes; a family gets those that its configuration knows.
SIZES: dict[str, Any] = {
    **{name: VOCABULARY for name in ("vocab_size", "vocab_size_per_layer_input")},
    **{name: 32 for name in ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "lru_width")},
    **{name: 48 for name in ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "decoder_ffn_dim")},
    **{
        name: 2
        for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_key_value_heads")
    },
    **{name: 4 for name in ("num_attention_heads", "n_head", "n_heads", "attention_heads", "decoder_attention_heads")},
    **{name: 64 for name in ("max_position_embeddings", "n_positions", "max_seq_len", "sliding_window")},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False},
    **{"head_dim": 8, "query_pre_attn_scalar": 8, "rotary_dim": 4},
    **{name: 4 for name in ("n_routed_experts", "num_experts", "num_local_experts")},
    **{name: 24 for name in ("moe_intermediate_size", "shared_expert_intermediate_size")},
    **{name: 1 for name in ("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace")},
    **{"num_experts_per_tok": 2, "q_lora_rank": 16, "kv_lora_rank": 12},
    **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2},
    **{"mamba_d_conv": 4, "mamba_chunk_size": 16, "mamba_d_ssm": 64, "mamba_dt_rank": 4, "attention_window_size": 64},
    **{"hidden_size_per_layer_input": 8, "altup_num_inputs": 2, "laurel_rank": 4},
    **{name: 0.0 for name in ("attention_dropout", "hidden_dropout", "dropout", "activation_dropout")},
    **{name: 0.0 for name in ("residual_dropout", "embedding_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop")},
    **{name: 0.0 for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")},
}

FULL = "q k v prompt o down parallel"
NO_PROMPT = "q k v o down parallel"
EXPERTS_ONLY = "q k v prompt o parallel"
"""What a block with stacked feed-forward experts hosts."""
LATENT = "q prompt o down parallel"
LATENT_EXPERTS = "q prompt o parallel"
FEED_FORWARD = "down parallel"


@dataclass(frozen=True)
class Decoder:
    """What a family's blocks host of the default mixture, and how its tiny configuration differs from `SIZES`.

    Attributes:
        blocks: the gate columns of each block, in their order; one string if all blocks are alike.
        settings: fields of its configuration. None: leave the field as the family has it.
        overrides: settings of the preset that the family needs.
    """

    blocks: str | tuple[str, ...] = FULL
    settings: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)

    def columns(self, index: int) -> list[str]:
        return (self.blocks if isinstance(self.blocks, str) else self.blocks[index]).split()


MLA = {"head_dim": None, "num_key_value_heads": 4}
MIXED = {"layer_types": ["linear_attention", "full_attention"]}
SHORT_CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
SHARED_BLOCKS = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "hybrid"] * 2, "attention_head_dim": 16}
SHARED_BLOCKS |= {"attention_hidden_size": 64, "head_dim": None}
STREAMS = {"router": {"input": "attention"}}

DECODERS: dict[str, Decoder] = {
    **dict.fromkeys(
        (
            *(
                "apertus",
                "arcee",
                "beam",
                "biogpt",
                "bitnet",
                "cohere",
                "cohere2",
                "cwm",
                "doge",
                "ernie4_5",
                "exaone4",
            ),
            *("falcon_h1", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt-sw3", "gpt2", "gpt_bigcode"),
            *("gpt_neox", "granite", "granite_swa", "helium", "hunyuan_v1_dense", "hyperclovax", "internlm3"),
            *("iquestcoder", "jais2", "llama", "ministral", "mistral", "modernbert-decoder", "nanochat", "nemotron"),
            *("olmo", "olmo2", "olmo3", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3"),
            *("stablelm", "starcoder2", "vaultgemma", "flint"),
        ),
        Decoder(),
    ),
    "bert": Decoder(settings={"is_decoder": True}),
    "roberta": Decoder(settings={"is_decoder": True}),
    # attention that does not go through the interface, rotates by itself, attends twice, or reads more than its tokens
    **dict.fromkeys(
        (
            *("bloom", "ctrl", "diffllama", "falcon", "gpt_neox_japanese", "ministral3", "moshi", "mpt"),
            *("openai-gpt", "xglm"),
        ),
        Decoder(NO_PROMPT),
    ),
    **dict.fromkeys(("codegen", "gptj"), Decoder(FULL if GPTJ_CALLS_THE_INTERFACE else NO_PROMPT)),
    "gpt_neo": Decoder(NO_PROMPT, {"attention_types": [[["global", "local"], 1]]}),
    **dict.fromkeys(
        ("gemma4_text", "gemma4_unified_text"),
        Decoder(NO_PROMPT, {"layer_types": ["sliding_attention", "full_attention"]}),
    ),
    # feed-forward experts, in some families with a first block that has none
    **dict.fromkeys(
        (
            *("aria_text", "cohere2_moe", "flex_olmo", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoeshared"),
            *(
                "hunyuan_v1_moe",
                "kolibri1",
                "llama4_text",
                "mellum",
                "minimax_m2",
                "minimax_m3_vl_text",
                "mixtral",
                "olmoe",
                "phimoe",
            ),
            *("qwen2_moe", "qwen3_moe", "solar_open"),
        ),
        Decoder(EXPERTS_ONLY),
    ),
    **dict.fromkeys(
        ("afmoe", "dots1", "ernie4_5_moe", "exaone_moe", "glm4_moe", "hy_v3", "mimo_v2_flash"),
        Decoder((FULL, EXPERTS_ONLY)),
    ),
    "laguna": Decoder((FULL, EXPERTS_ONLY), {"num_attention_heads_per_layer": [4, 8]}),
    "inkling_text": Decoder(EXPERTS_ONLY, {"swa_num_attention_heads": 8, "swa_num_key_value_heads": 4}),
    "jetmoe": Decoder("k v prompt parallel"),
    # keys and values that are kept compressed
    **dict.fromkeys(("minicpm3", "youtu"), Decoder(LATENT, MLA)),
    **dict.fromkeys(("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite"), Decoder((LATENT, LATENT_EXPERTS), MLA)),
    **dict.fromkeys(
        ("deepseek_v32", "dots3_note_text", "glm_moe_dsa"), Decoder(("q o down parallel", "q o parallel"), MLA)
    ),
    # blocks without attention, or with a linear one, among others
    "bamba": Decoder((FEED_FORWARD, FULL), {"attn_layer_indices": [1]}),
    "granitemoehybrid": Decoder(("parallel", EXPERTS_ONLY), MIXED),
    "jamba": Decoder(
        ("parallel", FULL),
        {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0},
    ),
    "lfm2": Decoder((FEED_FORWARD, FULL), SHORT_CONVOLUTION),
    "lfm2_moe": Decoder((FEED_FORWARD, EXPERTS_ONLY), SHORT_CONVOLUTION | {"num_dense_layers": 1}),
    "lfm3": Decoder((FEED_FORWARD, FULL), SHORT_CONVOLUTION),
    "bailing_hybrid": Decoder((NO_PROMPT, LATENT_EXPERTS), MLA | MIXED),
    "kimi_linear": Decoder((NO_PROMPT, LATENT_EXPERTS), MLA | MIXED),
    "minimax": Decoder((EXPERTS_ONLY, "q k v o parallel")),
    "nemotron_h": Decoder(
        ("", "parallel", "q k v prompt o", FEED_FORWARD),
        {"num_hidden_layers": None, "chunk_size": 16, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8}
        | {"moe_shared_expert_intermediate_size": 24, "n_groups": 1},
    ),
    "olmo_hybrid": Decoder((NO_PROMPT, FULL)),
    "qwen3_5_text": Decoder((FEED_FORWARD, FULL), MIXED),
    "qwen3_5_moe_text": Decoder(("parallel", EXPERTS_ONLY), MIXED),
    "qwen3_next": Decoder(("parallel", EXPERTS_ONLY), MIXED),
    "recurrent_gemma": Decoder((FEED_FORWARD, FEED_FORWARD, NO_PROMPT), {"num_hidden_layers": 3}),
    "zamba": Decoder(("", NO_PROMPT) * 2, SHARED_BLOCKS | {"n_mamba_heads": 2}),
    "zamba2": Decoder(
        ("", NO_PROMPT) * 2,
        SHARED_BLOCKS
        | {"hybrid_layer_ids": [1, 3], "adapter_rank": 4, "num_mem_blocks": 1}
        | {"mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 8},
    ),
    # several residual streams in a block
    "deepseek_v4": Decoder("q o parallel", overrides=STREAMS),
    "hy_v4": Decoder(("q o down parallel", "q o parallel"), MLA, STREAMS),
    "gemma3n_text": Decoder(
        FULL,
        {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0}
        | {"intermediate_size": [48, 48], "activation_sparsity_pattern": [0.0, 0.0]},
        STREAMS,
    ),
}

LONGCAT = MLA | {"zero_expert_num": 1, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 24, "moe_topk": 2}

REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys(("mamba", "falcon_mamba", "xlstm", "rwkv"), ("found no decoder block with attention", {})),
    **dict.fromkeys(("bart", "marian", "pegasus", "whisper"), ("encoder-decoder", {})),
    "hrm_text": ("cannot tell which of", {}),
    "longcat_flash": ("not sure which module of block 0 of longcat_flash is 'q'", LONGCAT),
}
"""Families that cannot be adapted: words of the message, and settings of their configuration."""


def build_decoder(name: str, settings: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    """A random frozen model of the family in eval mode, of a few thousand weights."""
    known = CONFIG_MAPPING[name]
    fields = set(inspect.signature(known.__init__).parameters) | set(getattr(known, "__dataclass_fields__", ()))
    sizes = {key: value for key, value in SIZES.items() if key in fields and key not in settings}
    sizes |= {key: value for key, value in settings.items() if value is not None}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.15)
    return model

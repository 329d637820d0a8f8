"""Where the parts of a decoder block live in each model family: data, not code.

A family is one `Architecture`: module paths inside a decoder block, and, for fused projections, how the fused output
is laid out. A family that is not in the table is given by the user in the same terms:
``MoAConfig(architecture={"blocks": "model.layers", "attention": "self_attn", "q": "self_attn.q_proj", ...})``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from moa import _hosts
from moa.adapters.choices import from_fields
from moa.adapters.low_rank import Part

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Architecture:
    """Module paths of one family, relative to a decoder block; None where the family has no such module.

    Attributes:
        blocks: the end of the path of the ModuleList that holds the decoder blocks.
        attention: the module whose forward calls transformers' attention interface.
        q, k, v, o, gate, up, down: linear projections; several may name the same fused module.
        mlp: the feed-forward module, or ``"first..last"`` where the block calls its layers itself.
        qkv_layout: ``"concatenated"``, ``"per_head"`` (GPT-NeoX) or ``"falcon"`` if q, k and v are fused.
        mask_hides: True in a block's boolean attention mask means "hidden" and not, as elsewhere, "visible".
    """

    blocks: str = "layers"
    attention: str | None = "self_attn"
    q: str | None = "self_attn.q_proj"
    k: str | None = "self_attn.k_proj"
    v: str | None = "self_attn.v_proj"
    o: str | None = "self_attn.o_proj"
    gate: str | None = "mlp.gate_proj"
    up: str | None = "mlp.up_proj"
    down: str | None = "mlp.down_proj"
    mlp: str | None = "mlp"
    qkv_layout: str | None = None
    mask_hides: bool = False


LLAMA = Architecture()
MIXTURE_OF_EXPERTS = Architecture(gate=None, up=None, down=None)

ARCHITECTURES: dict[str, Architecture] = {
    **dict.fromkeys(
        (
            *("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text"),
            *("olmo", "olmo2", "olmo3", "granite", "cohere", "cohere2", "stablelm", "smollm3", "seed_oss"),
            *("exaone4", "helium", "arcee"),
        ),
        LLAMA,
    ),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "olmoe", "granitemoe"), MIXTURE_OF_EXPERTS),
    "phi3": Architecture(
        q="self_attn.qkv_proj",
        k="self_attn.qkv_proj",
        v="self_attn.qkv_proj",
        gate="mlp.gate_up_proj",
        up="mlp.gate_up_proj",
        qkv_layout="concatenated",
    ),
    "starcoder2": Architecture(gate=None, up="mlp.c_fc", down="mlp.c_proj"),
    "opt": Architecture(o="self_attn.out_proj", gate=None, up="fc1", down="fc2", mlp="fc1..fc2"),
    "gpt2": Architecture(
        blocks="h",
        attention="attn",
        q="attn.c_attn",
        k="attn.c_attn",
        v="attn.c_attn",
        o="attn.c_proj",
        gate=None,
        up="mlp.c_fc",
        down="mlp.c_proj",
        qkv_layout="concatenated",
    ),
    "gpt_neox": Architecture(
        attention="attention",
        q="attention.query_key_value",
        k="attention.query_key_value",
        v="attention.query_key_value",
        o="attention.dense",
        gate=None,
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        qkv_layout="per_head",
    ),
    "falcon": Architecture(
        blocks="h",
        attention="self_attention",
        q="self_attention.query_key_value",
        k="self_attention.query_key_value",
        v="self_attention.query_key_value",
        o="self_attention.dense",
        gate=None,
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        qkv_layout="falcon",
    ),
    "gptj": Architecture(
        blocks="h",
        attention="attn",
        q="attn.q_proj",
        k="attn.k_proj",
        v="attn.v_proj",
        o="attn.out_proj",
        gate=None,
        up="mlp.fc_in",
        down="mlp.fc_out",
    ),
    "bloom": Architecture(
        blocks="h",
        attention="self_attention",
        q="self_attention.query_key_value",
        k="self_attention.query_key_value",
        v="self_attention.query_key_value",
        o="self_attention.dense",
        gate=None,
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        qkv_layout="per_head",
    ),
    "mpt": Architecture(
        blocks="blocks",
        attention="attn",
        q="attn.Wqkv",
        k="attn.Wqkv",
        v="attn.Wqkv",
        o="attn.out_proj",
        gate=None,
        up="ffn.up_proj",
        down="ffn.down_proj",
        mlp="ffn",
        qkv_layout="concatenated",
        mask_hides=True,
    ),
}


def architecture_of(model_type: str | None, override: Mapping[str, str | None] | None) -> Architecture:
    """The table's entry, or the user's own.

    Raises:
        ValueError: the family is unknown and no ``architecture`` was given, or it has an unknown key.
    """
    if override is not None:
        return from_fields("architecture", Architecture, override)
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"MoA does not know where the projections of {model_type!r} models are. Say so with "
            f"MoAConfig(architecture={{'blocks': ..., 'attention': ..., 'q': ..., 'down': ..., 'mlp': ...}}): module "
            f"paths inside one decoder block, None for what it lacks. Known families: {sorted(ARCHITECTURES)}"
        )
    return ARCHITECTURES[model_type]


def text_config(model: nn.Module) -> PretrainedConfig:
    """The configuration of the language model, also inside a composite (vision and text) model."""
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"{type(model).__name__} has no config; MoA adapts transformers models")
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def find_blocks(model: nn.Module, architecture: Architecture) -> list[str]:
    """Qualified names of the decoder blocks, in order.

    Raises:
        ValueError: no ModuleList, or more than one, fits ``architecture``.
    """
    anchor = architecture.attention or architecture.mlp or architecture.q
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and f".{name}".endswith(f".{architecture.blocks}")
        and len(module) > 0
        and (anchor is None or _find(module[0], anchor.partition("..")[0]) is not None)
    ]
    if len(lists) > 1:  # a vision tower may look alike
        lists = [name for name in lists if "language_model" in name or "text_model" in name] or lists
    if len(lists) != 1:
        found = f"these all fit: {lists}" if lists else "no ModuleList fits"
        raise ValueError(
            f"cannot tell which modules of {type(model).__name__} are its decoder blocks: {found}. "
            f"Give the whole path in MoAConfig(architecture={{'blocks': ...}})."
        )
    return [f"{lists[0]}.{index}" for index in range(len(model.get_submodule(lists[0])))]


@dataclass(frozen=True)
class Host:
    """A place in a block that an expert can sit at.

    Attributes:
        module: the module whose output the expert changes.
        source: the module whose input the expert reads; ``module`` itself but for an inline MLP.
        in_features: width of that input.
        out_features: width of what the expert adds.
        part: which rows of a fused output, or None for all of it.
        config: the language model's configuration.
    """

    module: nn.Module
    source: nn.Module
    in_features: int
    out_features: int
    part: Part | None
    config: PretrainedConfig


class BlockView:
    """One decoder block seen through its family's `Architecture`."""

    def __init__(self, block: nn.Module, index: int, architecture: Architecture, config: PretrainedConfig):
        self.module = block
        self.index = index
        self.architecture = architecture
        self.config = config

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def attention(self) -> nn.Module | None:
        return _find(self.module, self.architecture.attention)

    def host(self, role: str) -> Host | None:
        """The host for ``role`` (a projection, ``"mlp"`` or ``"attention"``), None if this block has none."""
        path = getattr(self.architecture, role)
        first, _, last = (path or "").partition("..")
        source, module = _find(self.module, first), _find(self.module, last or first)
        if source is None or module is None:
            return None
        if role not in PROJECTIONS:
            return Host(module, source, self.hidden_size, self.hidden_size, None, self.config)
        in_features, out_features = _hosts.features_of(module)
        if in_features is None:  # stacked experts and other things that are not a linear layer
            return None
        part = self._part(role, path)
        if part is not None:
            out_features = out_features // part.slots * (part.stop - part.start)
        return Host(module, module, in_features, out_features, part, self.config)

    def _part(self, role: str, path: str) -> Part | None:
        shared = [name for name in PROJECTIONS if getattr(self.architecture, name) == path]
        if len(shared) == 1:
            return None
        if role in ("gate", "up"):
            return Part(1, 2, shared.index(role), shared.index(role) + 1)
        return _qkv_part(role, self.architecture.qkv_layout, self.config)


def _qkv_part(role: str, layout: str | None, config: PretrainedConfig) -> Part:
    heads: int = config.num_attention_heads
    kv_heads: int = getattr(config, "num_key_value_heads", None) or heads
    if layout == "falcon":
        layout, kv_heads = _falcon_layout(config)
    per_kv = heads // kv_heads
    if layout == "per_head":  # for every KV head: its queries, its key, its value
        start = {"q": 0, "k": per_kv, "v": per_kv + 1}[role]
        return Part(kv_heads, per_kv + 2, start, start + (per_kv if role == "q" else 1))
    if layout == "concatenated":
        start = {"q": 0, "k": heads, "v": heads + kv_heads}[role]
        return Part(1, heads + 2 * kv_heads, start, start + (heads if role == "q" else kv_heads))
    raise ValueError(f"architecture: qkv_layout={layout!r} is not one of ['concatenated', 'falcon', 'per_head']")


def _falcon_layout(config: Any) -> tuple[str, int]:
    """Falcon's three layouts (7B multi-query, 40B grouped, RW multi-head) in terms of the other two."""
    if config.new_decoder_architecture:
        return "per_head", config.num_kv_heads
    return ("concatenated", 1) if config.multi_query else ("per_head", config.num_attention_heads)


def _find(module: nn.Module, path: str | None) -> nn.Module | None:
    for name in (path or "").split("."):
        child = _hosts.children(module).get(name)
        if child is None:
            return None
        module = child
    return module

"""Where the parts of a decoder block are: the terms in which a family is described, and what no structure can tell.

`moa.adapters.structure` finds most of it in the modules themselves. `EXCEPTIONS` holds what it cannot know, such as the
order of rows in a fused projection, by ``model_type``. Users say the same things in the same terms:
``MoAConfig(architecture={"q": "attn.query", "qkv_layout": None, ...})``.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from moa import _hosts
from moa.adapters.low_rank import Part
from moa.adapters.sharding import Parallel, Split
from moa.choices import check_choice, check_flag

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
ROLES = (*PROJECTIONS, "mlp", "attention")
QKV_LAYOUTS = ("bigcode", "codegen", "concatenated", "falcon", "latent", "per_head")


@dataclass(frozen=True)
class Architecture:
    """Module paths of one decoder block, relative to it; None where it has no such module.

    Attributes:
        blocks: the end of the path of the ModuleList that holds the decoder blocks; None: found by itself.
        attention: the module whose forward calls transformers' attention interface.
        q, k, v, o, gate, up, down: linear projections; several may name the same fused module.
        mlp: the feed-forward module, or ``"first..last"`` where the block calls its layers itself.
        qkv_layout: how a module that several of q, k and v name is laid out: ``"concatenated"``, ``"per_head"``
            (GPT-NeoX), ``"latent"`` (keys without rotation and values of each head, as in DeepSeek's ``kv_b_proj``),
            ``"falcon"``, ``"bigcode"`` or ``"codegen"``.
        mask_hides: True in a block's boolean attention mask means "hidden" and not, as elsewhere, "visible".
    """

    blocks: str | None = None
    attention: str | None = None
    q: str | None = None
    k: str | None = None
    v: str | None = None
    o: str | None = None
    gate: str | None = None
    up: str | None = None
    down: str | None = None
    mlp: str | None = None
    qkv_layout: str | None = None
    mask_hides: bool = False

    def __post_init__(self) -> None:
        for name in ("blocks", *ROLES):
            path = getattr(self, name)
            if path is not None and not isinstance(path, str):
                raise ValueError(f"architecture: {name}={path!r} must be a path, e.g. 'self_attn.q_proj', or None")
        check_flag("architecture: mask_hides", self.mask_hides)
        if self.qkv_layout is not None:
            check_choice("architecture: qkv_layout", self.qkv_layout, QKV_LAYOUTS)


CONCATENATED: dict[str, Any] = {"qkv_layout": "concatenated"}
PER_HEAD: dict[str, Any] = {"qkv_layout": "per_head"}

EXCEPTIONS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("phi3", "phi4_multimodal", "gpt2", "gpt-sw3", "openai-gpt"), CONCATENATED),
    **dict.fromkeys(("gpt_neox", "gpt_neox_japanese", "bloom", "persimmon", "minimax"), PER_HEAD),
    "mpt": {"qkv_layout": "concatenated", "mask_hides": True},
    "falcon": {"qkv_layout": "falcon"},
    "gpt_bigcode": {"qkv_layout": "bigcode"},
    "codegen": {"qkv_layout": "codegen"},
    # gate and up in one matrix under a name that does not say so, the activated half first
    "moshi": {"gate": "mlp.fc1", "up": "mlp.fc1"},
    "modernbert-decoder": {"gate": "mlp.Wi", "up": "mlp.Wi"},
    # queries and outputs are chosen per token among stacked 3-D weights, keys and values are not
    "jetmoe": {
        "attention": "self_attention",
        "q": None,
        "k": "self_attention.kv_proj",
        "v": "self_attention.kv_proj",
        "o": None,
        "qkv_layout": "concatenated",
    },
    # one vector is the key and the value of all heads, and it is compressed once more before it is attended to
    "deepseek_v4": {"k": None, "v": None},
}


def text_config(model: nn.Module) -> PretrainedConfig:
    """The configuration of the language model, also inside a composite (vision and text) model."""
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"{type(model).__name__} has no config; MoA adapts transformers models")
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def linear_size(module: nn.Module) -> tuple[int, int] | None:
    """``(in_features, out_features)`` of anything that maps features as a linear layer does, quantised ones included.

    None: the module is something else.
    """
    if isinstance(module, nn.Embedding | nn.MultiheadAttention | nn.modules.conv._ConvNd):
        return None
    if isinstance(module, nn.Linear):  # of the whole, where PEFT would tell the size of a process's share
        return module.in_features, module.out_features
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() > 2:  # the stacked weights of many experts
        return None
    with warnings.catch_warnings():  # PEFT warns of layers that it does not know by class, although it can read them
        warnings.simplefilter("ignore", UserWarning)
        in_features, out_features = _hosts.features_of(module)
    return None if in_features is None or out_features is None else (int(in_features), int(out_features))


@dataclass(frozen=True)
class Host:
    """A place in a block that an expert can sit at.

    Attributes:
        module: the module whose output the expert changes.
        source: the module whose input the expert reads; ``module`` itself but for an inline MLP.
        in_features: width of that input.
        out_features: width of what the expert adds.
        part: which rows of a fused output, or None for all of it; of a share of the output, if it is split.
        config: the configuration of the language model, in a model of unlike blocks that of this block.
        split: how tensor parallelism splits what goes through it; None: nothing in this model is split. Both widths
            are those of the whole.
    """

    module: nn.Module
    source: nn.Module
    in_features: int
    out_features: int
    part: Part | None
    config: PretrainedConfig
    split: Split | None = None


STREAMS_FIRST = {"AltUp": True, "HyperConnection": False}
"""By a child's class, blocks of several residual streams: whether streams come before rows in what they read."""


@dataclass(eq=False)
class BlockView:
    """One decoder block seen through its `Architecture`.

    Attributes:
        module: the block.
        index: its number.
        architecture: where its parts are.
        config: as in `Host`.
        absent: role -> why this block certainly has no host for it. A role that has neither a host nor an entry here
            is one that the finder is not sure about.
        parallel: how the model is split among processes; None: it is not.
    """

    module: nn.Module
    index: int
    architecture: Architecture
    config: PretrainedConfig
    absent: dict[str, str] = field(default_factory=dict)
    parallel: Parallel | None = None

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def streams_first(self) -> bool | None:
        """Where residual streams lie in what the block reads, before rows or after them; None: there is just one."""
        kinds = [type(child).__name__ for child in self.module.children()]
        return next((first for mark, first in STREAMS_FIRST.items() if any(mark in kind for kind in kinds)), None)

    @property
    def attention(self) -> nn.Module | None:
        return find_module(self.module, self.architecture.attention)

    def host(self, role: str) -> Host | None:
        """The host for ``role`` (a projection, ``"mlp"`` or ``"attention"``), None if this block has none.

        Raises:
            ValueError: the role is a part of a fused projection whose layout nobody has said, or does not fit its size.
        """
        path = getattr(self.architecture, role)
        first, _, last = (path or "").partition("..")
        source, module = find_module(self.module, first), find_module(self.module, last or first)
        if source is None or module is None:
            return None
        if role == "mlp" and isinstance(module, nn.Sequential):  # which would run a child as one more of its layers
            source, module = module[0], module[-1]
        if role not in PROJECTIONS:
            width = self.attention_width if role == "attention" else self.hidden_size
            return Host(module, source, width, self.hidden_size, None, self.config, self._split(source, module))
        size = linear_size(module)
        if size is None:  # stacked experts and other things that are not a linear layer
            return None
        in_features, out_features = size
        part = self._part(role, path, out_features)
        if part is not None:
            out_features = out_features // part.slots * (part.stop - part.start)
        split = self._split(module, module)
        if split is not None and split.writes_share and part is not None:
            part = part.share(split.processes)
        return Host(module, module, in_features, out_features, part, self.config, split)

    @property
    def split(self) -> Split | None:
        """Of what the block itself reads and puts out, which is whole in every process."""
        return None if self.parallel is None else Split(self.parallel.mesh)

    def _split(self, source: nn.Module, module: nn.Module) -> Split | None:
        if self.parallel is None:
            return None
        query = find_module(self.module, self.architecture.q)
        return Split(
            self.parallel.mesh,
            reads_share=self.parallel.style(source).reads_share,
            writes_share=self.parallel.style(module).writes_share,
            heads_share=module is self.attention and query is not None and self.parallel.style(query).writes_share,
        )

    def split_obstacle(self, role: str, heads: bool) -> str | None:
        """Why experts cannot follow how tensor parallelism splits ``role``; None: they can, or nothing is split.

        Args:
            role: as in `host`.
            heads: whether the expert acts on heads inside of attention.
        """
        host = self.host(role)
        if host is None or host.split is None or self.parallel is None:
            return None
        for module in (host.source, host.module):
            if (why := self.parallel.obstacle(module)) is not None:
                return why
        if heads:
            hosts = [found for name in ("q", "k", "v") if (found := self.host(name)) is not None]
            if len({self.parallel.style(found.module) for found in hosts}) > 1:
                return "its queries, keys and values are split in different ways"
        size = linear_size(host.module)
        if host.part is None or size is None or not host.split.writes_share:
            return None
        groups = self._part(role, getattr(self.architecture, role), size[1]).groups  # type: ignore[union-attr]
        if groups % host.split.processes == 0:
            return None
        return (
            f"each of {host.split.processes} processes has an equal share of its rows, in which several projections "
            f"are laid out as {groups} group{'s' * (groups > 1)}"
        )

    @property
    def attention_width(self) -> int:
        """Width of what the attention module reads: the block's, but for those that see the embeddings beside it."""
        path = self.architecture.k if self.architecture.qkv_layout != "latent" else None
        module = find_module(self.module, path)
        size = None if module is None else linear_size(module)
        return self.hidden_size if size is None else size[0]

    def _part(self, role: str, path: str, out_features: int) -> Part | None:
        shared = [name for name in PROJECTIONS if getattr(self.architecture, name) == path]
        if len(shared) == 1:
            return None
        if role in ("gate", "up"):
            start = shared.index(role)
            return Part(1, 2, start, start + 1)
        if self.architecture.qkv_layout is None:
            raise ValueError(
                f"{path} ({out_features} outputs) of block {self.index} holds {' and '.join(shared)} in an order that "
                "its shape does not tell. Say it with MoAConfig(architecture={'qkv_layout': 'concatenated'}) if all "
                "queries come first, then all keys, then all values, or 'per_head' if one head's queries, key and "
                "value stand together"
            )
        if self.architecture.qkv_layout == "latent":
            return self._latent_part(role, out_features)
        return qkv_part(role, shared, self.architecture.qkv_layout, self.config, out_features)

    def _latent_part(self, role: str, out_features: int) -> Part:
        """Of every head its key without rotation, then its value."""
        names = ("qk_nope_head_dim", "v_head_dim")
        key, value = (getattr(self.attention, name, None) or getattr(self.config, name) for name in names)
        if out_features % (key + value):
            raise ValueError(f"architecture: {out_features} rows are not heads of {key} + {value}, as 'latent' needs")
        start, stop = (0, key) if role == "k" else (key, key + value)
        return Part(out_features // (key + value), key + value, start, stop)


def qkv_part(role: str, shared: list[str], layout: str, config: Any, out_features: int) -> Part:
    """Where ``role`` is in a projection of ``out_features`` rows that holds all of ``shared``.

    Raises:
        ValueError: that many rows cannot be laid out so.
    """
    if layout == "codegen":  # four groups, each its queries, values and keys, in this order
        start = ("q", "v", "k").index(role)
        return Part(4, 3, start, start + 1)
    heads, kv_heads = _head_counts(config, out_features, with_queries="q" in shared)
    if layout == "falcon":
        layout = "per_head" if config.new_decoder_architecture or not config.multi_query else "concatenated"
    elif layout == "bigcode":
        layout = "concatenated" if config.multi_query else "per_head"
    if layout == "per_head":  # of every KV head: its queries, its key, its value
        sizes, groups = {"q": heads // kv_heads, "k": 1, "v": 1}, kv_heads
    else:
        sizes, groups = {"q": heads, "k": kv_heads, "v": kv_heads}, 1
    start = sum(sizes[name] for name in shared[: shared.index(role)])
    return Part(groups, sum(sizes[name] for name in shared), start, start + sizes[role])


def _head_counts(config: Any, out_features: int, *, with_queries: bool) -> tuple[int, int]:
    """Heads and KV heads of a fused projection; its size decides where the configuration speaks of other blocks."""
    heads: int = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    queries = heads if with_queries else 0
    named = _kv_heads(config) or heads
    for kv_heads in (named, 1, heads):
        if (queries + 2 * kv_heads) * width == out_features:
            return heads, kv_heads
    if (queries + 2 * named) * width % out_features:  # nor one rank's equal share of it
        raise ValueError(
            f"architecture: {out_features} rows are not {heads} heads of {width} numbers with their keys and values"
        )
    return heads, named


def _kv_heads(config: Any) -> int | None:
    return getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)


def find_module(module: nn.Module, path: str | None) -> nn.Module | None:
    """The submodule at ``path``, None if there is none."""
    for name in (path or "").split("."):
        child = _hosts.children(module).get(name)
        if child is None:
            return None
        module = child
    return module

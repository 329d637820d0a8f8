"""Attention influence of a model: what its answers lose, to first order, when an attention entry is taken away.

Contract: the result is a mean over items; items shorter than ``length`` fill the upper left corner. A run that was
killed goes on after its last finished item and ends with the same numbers, bit for bit.

Limits: decoders whose every layer attends through transformers' attention interface; items one at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from moa.files import parsed, whole
from moa.spans.evidence.items import Item, log_odds, response_logits
from moa.spans.evidence.probe import BlockSums, probing
from moa.spans.model import family, identity

KINDS = ("blocks", "absolute", "signed")
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"log-odds": log_odds, "cross-entropy": cross_entropy}


@dataclass
class Influence:
    """Influence summed over blocks, of one length.

    Attributes:
        signed: (layers, KV heads, blocks, blocks) float32, summed over items; row = query block, column = key block.
            Summed over the query heads of a KV head it is the exact first-order loss of a mask they share.
        absolute: the same with the absolute value taken per entry, query head and item before summing.
        length: tokens.
        block: tokens per block.
        items: how many items were summed.
        loss: their mean response loss in nats.
        about: whose influence it is: ``embeddings`` of the model (`moa.spans.model.family`), and what the caller of
            `influence` said. Plain JSON data.
    """

    signed: Tensor
    absolute: Tensor
    length: int
    block: int
    items: int = 0
    loss: float = 0.0
    about: dict[str, Any] = field(default_factory=dict)

    def mean(self, kind: str = "blocks") -> Tensor:
        """Mean over items, (layers, KV heads, blocks, blocks) float32.

        Args:
            kind: "blocks", what a search takes: the absolute value of a block's signed sum. Within a block what helps
                and what hurts cancel, as they do when all of it goes; across blocks they do not, since a first-order
                estimate of an answer that is right already has no reliable sign. "absolute" is the official code's
                sum of absolute entries, "signed" the paper's plain sum; both are here to compare.

        Raises:
            ValueError: another ``kind``.
        """
        if kind not in KINDS:
            raise ValueError(f"influence={kind!r} is not one of {list(KINDS)}")
        if kind == "blocks":
            return (self.signed / max(self.items, 1)).abs()
        return (self.signed if kind == "signed" else self.absolute) / max(self.items, 1)

    def add(self, other: Influence) -> None:
        """Add what was measured on other items."""
        items = self.items + other.items
        self.signed += other.signed
        self.absolute += other.absolute
        self.loss = (self.loss * self.items + other.loss * other.items) / items
        self.items = items

    def save(self, path: Path, key: str = "") -> None:
        """Write a safetensors file; it appears whole or not at all."""
        numbers = {name: getattr(self, name) for name in ("length", "block", "items", "loss", "about")}
        metadata = {"influence": json.dumps(numbers | {"key": key})}
        with whole(path) as draft:
            try:
                save_file({"signed": self.signed, "absolute": self.absolute}, draft, metadata)
            except SafetensorError as error:
                raise OSError(f"cannot write {path}: {error}") from error

    @classmethod
    def load(cls, path: Path) -> Influence:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not such a file, damaged, or with numbers that are not finite.
        """
        return _read(path)[0]


def influence(
    model: Any,
    items: Sequence[Item],
    length: int,
    block: int = 64,
    *,
    loss: str = "log-odds",
    about: Mapping[str, Any] | None = None,
    save_to: Path | None = None,
    elsewhere: Callable[[range], Mapping[int, Path]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Influence:
    """Measure a model's attention influence on its own answers.

    Args:
        model: a causal language model whose layers attend through transformers' attention interface.
        items: texts of at most ``length + 1`` tokens (the last is only predicted).
        length: tokens; the result has ``ceil(length / block)`` blocks a side.
        block: tokens per block.
        loss: what an entry is worth by, "log-odds" (`moa.spans.evidence.items.log_odds`) or the official code's
            "cross-entropy".
        about: what to keep with the result, plain JSON data.
        save_to: a safetensors file, written after every item; if it exists, the run goes on from it.
        elsewhere: measures items in other processes: is given the places of those that are left, and gives the files
            that `influence` of each alone was saved to. The sum is made here, in the same order.
        progress: called with the number of finished items, at the start and after every item.

    Raises:
        ValueError: no items, another ``loss``, an item that is too long, a loss that is not finite, layers without
            interface attention, or a file of another run. Names item, layer or setting.
    """
    _check(items, length, block)
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r} is not one of {list(LOSSES)}")
    key = _key(model, items, length, block, loss)
    said = {**(about or {}), "embeddings": family(model)}
    if save_to is not None and save_to.exists():
        total = _continued(save_to, key)
        total.about = said
    else:
        empty = _sums(model, length, block)
        total = Influence(empty.signed, empty.absolute, length, block, about=said)
    left = range(total.items, len(items))
    parts = elsewhere(left) if elsewhere and left else {}
    for place in left:
        if progress:
            progress(place)
        if place in parts:
            total.add(_continued(parts[place], _key(model, [items[place]], length, block, loss)))
        else:
            total.add(_measure(model, items[place], length, block, place, LOSSES[loss]))
        if save_to is not None:
            total.save(save_to, key)
    if progress:
        progress(len(items))
    return total


def _sums(model: Any, length: int, block: int) -> BlockSums:
    config = model.config.get_text_config()
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return BlockSums(config.num_hidden_layers, kv_heads, length, block)


def _measure(
    model: Any, item: Item, length: int, block: int, place: int, worth: Callable[[Tensor, Tensor], Tensor]
) -> Influence:
    """Of one item."""
    sums = _sums(model, length, block)
    with probing(model, sums), torch.enable_grad():
        logits, wanted = response_logits(model, item)
        loss = cross_entropy(logits.detach(), wanted)
        if not torch.isfinite(loss):
            raise ValueError(f"item {place} has a loss of {loss.item()}: the model's numbers are not finite on it")
        worth(logits, wanted).backward()
    if missing := sorted(set(range(sums.signed.shape[0])) - sums.seen):
        raise ValueError(f"layers {missing} do not attend through transformers' attention interface")
    if not torch.isfinite(sums.absolute).all():
        raise ValueError(f"item {place} has an influence that is not finite; try float32")
    return Influence(sums.signed, sums.absolute, length, block, items=1, loss=float(loss))


def _check(items: Sequence[Item], length: int, block: int) -> None:
    if block < 1 or length < block:
        raise ValueError(f"length={length} and block={block}: a length holds at least one block of at least one token")
    if not items:
        raise ValueError(f"no items to measure influence on at length {length}")
    for place, item in enumerate(items):
        if len(item.tokens) > length + 1:
            raise ValueError(
                f"item {place} has {len(item.tokens)} tokens, more than length {length} and one to predict"
            )


def _key(model: Any, items: Sequence[Item], length: int, block: int, loss: str) -> str:
    """What a saved run must have in common with this one."""
    content = json.dumps([identity(model), length, block, loss, [item.to_dict() for item in items]])
    return hashlib.sha256(content.encode()).hexdigest()


def _continued(path: Path, key: str) -> Influence:
    found, its_key = _read(path)
    if its_key != key:
        raise ValueError(
            f"{path} was measured with another model, data set, length, block or dtype; give --overwrite to start over"
        )
    return found


def _read(path: Path) -> tuple[Influence, str]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no influence file {str(path)!r}; `moa spans profile` writes it")
    try:
        with safe_open(path, framework="pt") as file:
            numbers = parsed((file.metadata() or {})["influence"], str(path))
            found = Influence(
                file.get_tensor("signed"),
                file.get_tensor("absolute"),
                int(numbers["length"]),
                int(numbers["block"]),
                int(numbers["items"]),
                float(numbers["loss"]),
                dict(numbers["about"]),
            )
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or holds no influence ({error}); measure it again with --overwrite"
        ) from None
    blocks = -(-found.length // found.block)
    for tensor in (found.signed, found.absolute):
        if tensor.dim() != 4 or tensor.shape[2:] != (blocks, blocks) or not torch.isfinite(tensor).all():
            raise ValueError(
                f"{path} is damaged: influence of shape {tuple(tensor.shape)} at {blocks} blocks, or not finite"
            )
    return found, str(numbers["key"])

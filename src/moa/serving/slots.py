"""Which mixture is in which of an engine's slots, while mixtures come and go.

Shapes of a running engine are fixed, so a slot takes mixtures of one configuration only. There are at least as many
slots as mixtures in a batch; when there are more mixtures than slots, they take turns. Nothing here knows vLLM.

An engine's prefix cache files what it has computed under a mixture's name and folder. What was cached under the two
must never have been computed with other weights, so the two never stand for other weights: see `Slots.add`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor

from moa.models import existing
from moa.serving.adapters import configuration, fingerprint, weights
from moa.training.base import WEIGHTS


class Asked(Protocol):
    """A request's choice of a mixture, as vLLM's ``LoRARequest`` says it."""

    @property
    def lora_int_id(self) -> int: ...
    @property
    def lora_name(self) -> str: ...
    @property
    def lora_path(self) -> str: ...


class Mixture(NamedTuple):
    """One that the engine knows.

    Attributes:
        name: that clients ask for.
        folders: from where its weights came, the newest last.
        kind: fingerprint of its configuration.
        tensors: its weights, kept here for when it has no slot.
    """

    name: str
    folders: list[str]
    kind: str
    tensors: Mapping[str, Tensor]


class Slots:
    """The slots of one engine.

    Args:
        kinds: for every slot, the fingerprint of the configuration it has room for.
        fill: puts tensors to work in a slot; raises ValueError, and changes nothing, if they do not fit.
        bases: names of the base models that mixtures may have been trained on.
        caching: whether the engine keeps a prefix cache.
    """

    def __init__(
        self,
        kinds: Sequence[str],
        fill: Callable[[int, Mapping[str, Tensor]], object],
        bases: Iterable[str | None],
        *,
        caching: bool,
    ):
        self._kinds = list(kinds)
        self._fill = fill
        self._bases = set(bases)
        self._caching = caching
        self._known: dict[int, Mixture] = {}
        self._slots: dict[int, int] = {}  # vLLM's number of a mixture -> slot, the one used last at the end
        self._contents: dict[tuple[str, str], str] = {}  # name and folder -> what was read there
        self._replaced: set[tuple[str, str]] = set()

    def add(self, asked: Asked, *, again: bool = False) -> bool:
        """Read a mixture from its folder and put it to work; with ``again`` in the place of the weights it has.

        Returns:
            Whether anything was read.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: it cannot be served, has a configuration that no slot has room for, belongs to another base, or
                its name and folder stood for other weights before, with which the prefix cache may be filled.
        """
        number, name, folder = asked.lora_int_id, asked.lora_name, asked.lora_path
        before = self._known.get(number)
        if before is not None and not again:
            return False
        kind, content = self._check(asked, before)
        tensors = weights(folder)
        slot = self._slots.get(number)
        if slot is None:
            slot = self._place(kind, ())
        self._fill(slot, tensors)
        self._take(number, slot)
        folders = [] if before is None else before.folders
        self._replaced |= {(name, old) for old in folders if old != folder}
        self._known[number] = Mixture(name, [*folders, folder], kind, tensors)
        self._contents[name, folder] = content
        return True

    def use(self, asked: Iterable[Asked]) -> dict[int, int]:
        """The slot of every mixture that the next forward asks for, by number; those that have none take others'.

        A request that came before new weights did goes on with them. In what order they are asked for does not matter:
        processes that share a model must not differ in what is in a slot, and each is told in an order of its own.

        Raises:
            As `add`, for mixtures that the engine does not know yet.
        """
        now = sorted(asked, key=lambda one: (one.lora_int_id, one.lora_path))
        for one in now:
            known = self._known.get(one.lora_int_id)
            if known is None or one.lora_name != known.name or one.lora_path not in known.folders:
                self.add(one, again=True)
        numbers = [one.lora_int_id for one in now]
        for number in numbers:
            slot = self._slots.get(number)
            if slot is None:
                known = self._known[number]
                slot = self._place(known.kind, numbers)
                self._fill(slot, known.tensors)
            self._take(number, slot)
        return {number: self._slots[number] for number in numbers}

    def pretend(self, asked: Asked) -> None:
        """Let a request of the engine's own warm-up have a slot, whatever is in it."""
        slot = (asked.lora_int_id - 1) % len(self._kinds)
        self._known[asked.lora_int_id] = Mixture(asked.lora_name, [asked.lora_path], self._kinds[slot], {})
        self._slots[asked.lora_int_id] = slot

    def remove(self, number: int) -> bool:
        """Forget a mixture; whether it was known."""
        self._slots.pop(number, None)
        return self._known.pop(number, None) is not None

    def clear(self) -> None:
        """Forget all mixtures."""
        self._slots.clear()
        self._known.clear()

    @property
    def numbers(self) -> set[int]:
        """Of the mixtures that are known."""
        return set(self._known)

    def _check(self, asked: Asked, before: Mixture | None) -> tuple[str, str]:
        """What kind a folder's mixture is of, and a hash of its weights."""
        name, folder = asked.lora_name, asked.lora_path
        if before is not None and before.name != name:
            raise ValueError(f"{name!r} has the number {asked.lora_int_id}, which is that of {before.name!r}")
        config = configuration(folder)
        kind = fingerprint([config])
        if kind not in self._kinds or (before is not None and before.kind != kind):
            raise ValueError(
                f"{name!r} ({folder}) has other experts, another router or another gating than the mixtures that this "
                "engine was started with, and a running engine cannot change its shapes: start one with it"
            )
        if config.base_model_name_or_path not in self._bases:
            raise ValueError(
                f"{name!r} ({folder}) was trained on {config.base_model_name_or_path!r}, this engine's mixtures on "
                f"{', '.join(sorted(map(repr, self._bases)))}"
            )
        content = hashlib.sha256(Path(existing(folder, "adapter"), WEIGHTS).read_bytes()).hexdigest()
        file = (name, folder)
        if self._caching and (file in self._replaced or self._contents.get(file, content) != content):
            raise ValueError(
                f"{name!r} had other weights from {folder} before, or got others since, and the prefix cache may hold "
                "what they computed: save new weights in a new folder, or start with --no-enable-prefix-caching"
            )
        return kind, content

    def _place(self, kind: str, needed: Collection[int]) -> int:
        """A slot for a mixture of that kind: a free one, else of the mixture that was used longest ago."""
        taken = {slot: number for number, slot in self._slots.items()}
        fitting = [slot for slot, own in enumerate(self._kinds) if own == kind]
        for slot in fitting:
            if slot not in taken:
                return slot
        for number, slot in self._slots.items():
            if slot in fitting and number not in needed:
                del self._slots[number]
                return slot
        raise ValueError(f"a batch asks for more than {len(fitting)} mixtures of one configuration")

    def _take(self, number: int, slot: int) -> None:
        """Note that a mixture is in a slot and was used last."""
        self._slots.pop(number, None)
        self._slots[number] = slot

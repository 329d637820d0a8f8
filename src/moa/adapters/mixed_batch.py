"""Batches whose rows belong to different adapters: ``adapter_names=``, as PEFT has it for LoRA.

Every adapter that is named gets the rows that name it, and works on them as if they were a batch of their own; rows of
``__base__`` are left alone. The base model runs once for all rows. Which adapters are active does not matter then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from moa import _hosts

F = TypeVar("F")
"""A block's forward, `moa.adapters.context.Forward`."""

BASE = "__base__"
"""PEFT's name for rows without an adapter."""


class Group(Generic[F]):
    """The rows of one adapter in one block's forward.

    Attributes:
        adapter: whose they are.
        rows: their numbers, (rows,).
        batch: how many rows the whole batch has.
        forward: what the adapter's experts find in place of the block's own: gates and inputs of these rows.
    """

    def __init__(self, adapter: str, rows: Tensor, batch: int, forward: F):
        self.adapter = adapter
        self.rows = rows
        self.batch = batch
        self.forward = forward
        self._last: tuple[Tensor, tuple[bool, int], Tensor] | None = None

    def input(self, x: Tensor) -> Tensor:
        """`of`; for the same tensor the same answer, by which experts see that they read one input."""
        state = (torch.is_grad_enabled(), _hosts.version(x))
        if self._last is None or self._last[0] is not x or self._last[1] != state:
            self._last = (x, state, self.of(x))
        return self._last[2]

    def of(self, x: Tensor) -> Tensor:
        """These rows of ``x`` (batch, ...), or (batch * tokens, features) where an MLP flattens: (rows, ...)."""
        return self._by_rows(x).index_select(0, self.rows)

    def put(self, y: Tensor, own: Tensor, *, in_place: bool) -> Tensor:
        """``y``, as ``x`` in `of`, with ``own`` in the place of these rows; a new tensor if gradients are asked for."""
        by_rows = self._by_rows(y)
        own = own.to(y.dtype).view(len(self.rows), *by_rows.shape[1:])
        if in_place and not torch.is_grad_enabled():
            by_rows.index_copy_(0, self.rows, own)
            return y
        return by_rows.index_copy(0, self.rows, own).view(y.shape)

    def _by_rows(self, x: Tensor) -> Tensor:
        if x.dim() > 2 and len(x) == self.batch:
            return x
        if x.dim() == 2 and len(x) % self.batch == 0:
            return x.unflatten(0, (self.batch, -1))
        raise RuntimeError(
            f"adapter_names: an expert's tensor of shape {tuple(x.shape)} does not show {self.batch} rows"
        )


class Names:
    """Whose the rows of a batch are.

    Args:
        names: an adapter, or `BASE`, for every row that the caller gives.
        expands: ``generate`` may repeat every row (beams, several answers); else there must be as many names as rows.
    """

    def __init__(self, names: Sequence[str], expands: bool):
        self.names = list(names)
        self.expands = expands

    def of_rows(self, batch: int) -> list[str]:
        """One name for each of ``batch`` rows.

        Raises:
            ValueError: there are more or fewer.
        """
        repeats, rest = divmod(batch, len(self.names))
        if rest or not repeats or (repeats > 1 and not self.expands):
            raise ValueError(
                f"adapter_names has {len(self.names)} entries and the batch {batch} rows: name an adapter, or "
                f"{BASE!r}, for each row"
            )
        return [name for name in self.names for _ in range(repeats)]

    def groups(self, hidden: Tensor, forward: Callable[[int], F]) -> list[Group[F]]:
        """Of a block's input (batch, tokens, features); ``forward`` makes what so many tokens are given."""
        names = self.of_rows(len(hidden))
        groups = []
        for adapter in dict.fromkeys(names):
            if adapter != BASE:
                rows = torch.tensor([row for row, name in enumerate(names) if name == adapter], device=hidden.device)
                groups.append(Group(adapter, rows, len(names), forward(len(rows) * hidden.shape[1])))
        return groups


def read_names(names: Any, known: Sequence[str], given: Tensor | None, training: bool) -> Names:
    """Check ``adapter_names=``.

    Args:
        names: what the user gave.
        known: the adapters there are.
        given: the batch that ``generate`` was called with, (rows, ...); None: unknown, it must fit as it comes.
        training: whether the model is in training mode.

    Raises:
        TypeError: not a list of names.
        ValueError: training, a name that does not exist, or not one for each row.
    """
    if training:
        raise ValueError("adapter_names works for inference only, but the model is in training mode: call model.eval()")
    if not isinstance(names, list | tuple) or not names:
        raise TypeError(
            f"adapter_names must be a list with the name of an adapter, or {BASE!r}, for each row, not {names!r}"
        )
    unknown = sorted({str(name) for name in names} - {*known, BASE})
    if unknown:
        raise ValueError(f"adapter_names: there is no adapter {unknown[0]!r}; there are {[*known, BASE]}")
    read = Names(names, expands=given is not None)
    if given is not None and len(given) != len(names):
        read.expands = False
        read.of_rows(len(given))
    return read


@contextmanager
def tell_wrappers(model: nn.Module, names: Names) -> Iterator[None]:
    """Inside, let PEFT's wrappers of ``modules_to_save`` and trainable tokens know the names of this thread's rows."""
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    handles = [module.register_forward_pre_hook(_hook(module, names), with_kwargs=True) for module in wrappers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(wrapper: nn.Module, names: Names) -> Callable[..., Any]:
    own, thread = _hosts.adapters_of_wrapper(wrapper), threading.get_ident()

    def name_rows(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != thread:
            return None
        rows = [name if name in own else BASE for name in names.of_rows(len(args[0]))]
        return args, kwargs | {"adapter_names": rows}

    return name_rows

"""What a decoder block's experts need to know about the forward that is running: its gates, its text, its inputs.

The block opens the context, its router fills it, and experts at their places in the block read it. It is thread-local,
so that one model may serve several threads.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from moa import _hosts
from moa.adapters.low_rank import FEW_TOKENS, read
from moa.adapters.mixed_batch import Group, Names

Gate: TypeAlias = float | Tensor | None
"""One gate: (batch, tokens, 1), or a number where there is just one token; None: not gated."""

Weights: TypeAlias = float | Tensor | None
"""What multiplies an expert's update: a `Gate`, or (..., copies) for an expert of several copies."""


Reader: TypeAlias = tuple[int, str]
"""Who reads an input: the identity of a layer, and one of its adapters."""

Reading: TypeAlias = tuple[Reader, list[Tensor]]
"""A reader and its first matrices, each (rank, in)."""


class Forward:
    """One block's forward that is running.

    Attributes:
        few: inference on so few tokens that the number of calls costs more than arithmetic. Not in training mode, where
            reentrant checkpointing runs the forward without gradients first: both runs have to round alike. Not under
            autocast, which would take the products out of float32, nor under tensor parallelism, whose sums over
            processes are in the way for many tokens only.
        gates: adapter -> one `Gate` per output of its router, (n, 1) if there are few tokens; an adapter without a
            router is missing.
        tokens: (batch, tokens), True for text, or None if nothing is padded.
        starts: (batch, tokens), True where a new document begins; None: one document per row.
        past: the KV cache that the block was called with, if a router reads more than a token; attention modules of
            some hybrids call it otherwise.
        notes: expert -> whatever it saw before its host ran and needs afterwards.
        bypassed: experts leave their hosts' outputs as they are (while prompt keys are computed).
        groups: the rows of each adapter, of which each has a forward of its own; None: all adapters see all rows.
    """

    __slots__ = (
        *(
            "bypassed",
            "few",
            "gates",
            "groups",
            "notes",
            "past",
            "read_input",
            "read_outputs",
            "read_state",
            "starts",
            "tokens",
            "wide_input",
        ),
    )

    def __init__(self, few: bool) -> None:
        self.few = few
        self.gates: dict[str, Sequence[Gate]] = {}
        self.tokens: Tensor | None = None
        self.starts: Tensor | None = None
        self.past: Any = None
        self.notes: dict[Any, Any] = {}
        self.bypassed = False
        self.read_input: Tensor | None = None
        self.read_state: tuple[bool, int] | None = None
        self.read_outputs: dict[Reader, list[Tensor]] = {}
        self.wide_input: tuple[Tensor, int, Tensor] | None = None
        self.groups: list[Group[Forward]] | None = None

    def gate(self, adapter: str, output: int | None, like: Tensor) -> Gate:
        """The gate of one router output in the shape and dtype of ``like`` (..., features).

        Raises:
            RuntimeError: called on tokens other than the block's.
        """
        if output is None:
            return None
        gate = self.gates[adapter][output]
        if gate is None or isinstance(gate, float):
            return gate
        if gate.shape[:-1] != like.shape[:-1]:
            if gate.numel() != like.shape[:-1].numel():
                raise RuntimeError(
                    f"gates of shape {tuple(gate.shape)} do not fit an expert's input {tuple(like.shape)}"
                )
            gate = gate.reshape(*like.shape[:-1], 1)  # some MLPs flatten (batch, tokens)
        return gate.to(like.dtype)

    def wide(self, x: Tensor) -> Tensor:
        """``x`` in at least float32, (..., features)."""
        return self.rows(x).view(x.shape)

    def rows(self, x: Tensor) -> Tensor:
        """``x`` in at least float32, as (n, features). Kept for the next expert that reads the same tensor."""
        if self.wide_input is None or self.wide_input[0] is not x or self.wide_input[1] != _hosts.version(x):
            rows = x.reshape(-1, x.shape[-1])
            if x.dtype is not torch.float32 and x.dtype is not torch.float64:
                rows = rows.to(torch.float32)
            self.wide_input = (x, _hosts.version(x), rows)
        return self.wide_input[2]

    def read(self, reader: Reader, x: Tensor, readers: Sequence[Reading], dtype: torch.dtype) -> list[Tensor]:
        """``x`` (..., in) through the first matrices of ``reader``, one (..., rank) each, and of everybody beside it.

        Args:
            reader: one of ``readers``.
            x: the input.
            readers: all who are likely to read this very tensor; they will find their part here.
            dtype: to compute in.
        """
        state = (torch.is_grad_enabled(), _hosts.version(x))
        if self.read_input is not x or self.read_state != state:  # hooks of others may look on, or change it in place
            self.read_input, self.read_state, self.read_outputs = x, state, {}
        if reader not in self.read_outputs:
            outputs = iter(read(x, [matrix for _, matrices in readers for matrix in matrices], dtype))
            self.read_outputs |= {key: [next(outputs) for _ in matrices] for key, matrices in readers}
        return self.read_outputs[reader]


class BlockContext(threading.local):
    """Where a block keeps its `Forward` of this thread; None while none is running.

    Attributes:
        forward: see above.
        names: whose the rows are; None: every active adapter's.
    """

    forward: Forward | None = None
    names: Names | None = None

    def open(self, hidden: Tensor, exact: bool) -> Forward:
        """Start a forward on ``hidden`` (batch, tokens, features); ``exact``: as for many tokens, always."""
        inference = not exact and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        inference = inference and not torch.is_autocast_enabled(hidden.device.type)
        self.forward = now = Forward(inference and hidden.numel() <= FEW_TOKENS * hidden.shape[-1])
        if self.names is not None:
            now.groups = self.names.groups(hidden, lambda tokens: Forward(inference and tokens <= FEW_TOKENS))
            for group in now.groups:
                group.forward.notes = now.notes
        return now

    def close(self) -> None:
        self.forward = None

    @contextmanager
    def alone(self, group: Group[Forward]) -> Iterator[Forward]:
        """Inside, the block's forward is that of the group's rows."""
        whole, self.forward = self.forward, group.forward
        try:
            yield group.forward
        finally:
            self.forward = whole

    @property
    def now(self) -> Forward:
        """The forward that is running.

        Raises:
            RuntimeError: there is none.
        """
        if self.forward is None:
            raise RuntimeError("a MoA expert ran outside of its decoder block's forward, where there are no gates")
        return self.forward

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockContext:
        copied = memo[id(self)] = BlockContext()
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockContext, ()


def parameters_of_forward(cls: type[nn.Module]) -> list[str]:
    """Names of what the class's ``forward`` can be called with, for `bound_arguments`; not to be asked per call."""
    return list(inspect.signature(cls.forward).parameters)[1:]


def bound_arguments(parameters: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name; a first positional one is always called ``hidden_states``."""
    named = dict(zip(parameters, args, strict=False)) | kwargs
    if args:
        named.setdefault("hidden_states", args[0])
    return named


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor that a module was called with."""
    return args[0] if args else next(iter(kwargs.values()))

"""The contract of an expert kind: two classes in one file.

- A configuration, subclass of `ExpertConfig`: what the user may set, and `sites`, where in a block it sits.
- A layer, subclass of `ExpertLayer`: attached to one site, it creates the weights of each adapter (`build`) and hooks
  its host so that its gated output takes part in the block's forward.

A new kind is one new file with these two, entered in ``EXPERTS`` in `moa.adapters.experts`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from moa.adapters.architectures import Host
from moa.adapters.block import BlockContext
from moa.adapters.choices import build, check_range, from_fields
from moa.adapters.gating import GATINGS, Gates, Softmax
from moa.adapters.ops import combine
from moa.adapters.routers import Router, RouterLayer
from moa.adapters.tuner import Attached


class Site(NamedTuple):
    """One place that an expert takes in a block.

    Attributes:
        name: unique in the block, also the name of its gate column, e.g. ``"q"``.
        role: which `Host` it needs: a projection, ``"mlp"`` or ``"attention"``.
    """

    name: str
    role: str


@dataclass
class Copies:
    """Several homogeneous copies of an expert at the same site under a router of their own.

    Attributes:
        number: how many.
        shared: the copies share their first matrix (LoRA's A, the adapter's down projection), as in HydraLoRA.
        gating: the rule that mixes them; MoLoRA and HydraLoRA use softmax.
        bias: whether their (linear) router has a bias.
    """

    number: int = 1
    shared: bool = False
    gating: Any = field(default_factory=Softmax)
    bias: bool = False

    def __post_init__(self) -> None:
        check_range("copies: number", self.number, low=1)
        self.gating = build("copies: gating", GATINGS, self.gating)
        if getattr(self.gating, "k", 1) > self.number:
            raise ValueError(f"copies: top-k gating with k={self.gating.k} needs at least that many copies")


@dataclass(kw_only=True)
class ExpertConfig:
    """What every kind of expert can be told.

    Attributes:
        layers: numbers of the blocks that get this expert; None: all.
        gate: share one gate among all sites of experts with the same ``gate`` name; None: a gate for every site.
        copies: a number, or a `Copies` (or dict) with details.
        optional: leave out, with a warning, what a model cannot host, instead of refusing the whole configuration.
            Presets and the default configuration are made of optional experts; what was placed in the end is saved.
    """

    kind: ClassVar[str]
    layers: list[int] | None = None
    gate: str | None = None
    copies: Any = 1
    optional: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.copies, int):
            self.copies = Copies(self.copies)
        elif not isinstance(self.copies, Copies):
            self.copies = from_fields("copies", Copies, self.copies)
        for layer in self.layers or []:
            check_range(f"{self.kind} expert: layers", layer, low=0)

    def sites(self) -> list[Site]:
        raise NotImplementedError


class ExpertLayer(Attached):
    """One site of one kind in one block, for any number of adapters.

    Attributes:
        config: the configuration class of the kind.
        site: the site's name, unique in the block.
        output: adapter -> which output of the block's router gates this expert; None: it is added ungated.
    """

    config: ClassVar[type[ExpertConfig]]
    other_param_names: ClassVar[tuple[str, ...]] = ("output",)

    def __init__(self, site: str, host: Host, context: BlockContext):
        super().__init__(host.module)
        self.site = site
        self.place = host
        self.context = context
        self.output: dict[str, int | None] = {}
        self._handles: list[Any] = []

    def build(self, adapter: str, config: Any, init_weights: bool) -> None:
        """Create the weights of ``adapter``; with ``init_weights`` the expert must start as exactly nothing."""
        raise NotImplementedError

    def add_adapter(
        self, adapter: str, config: ExpertConfig, output: int | None, *, init_weights: bool, inference_mode: bool
    ) -> None:
        """Create everything that ``adapter`` needs at this site."""
        self.output[adapter] = output
        self.build(adapter, config, init_weights)
        if config.copies.number > 1:
            if "mixture_copies" not in self._modules:
                self.mixture_copies = RouterLayer(self.host, self.place.in_features)
            router = Router(hidden_per_expert=0, bias=config.copies.bias)
            self.mixture_copies.add_router(adapter, router, config.copies.gating, config.copies.number)
            self.mixture_copies.finish_adapter(adapter, inference_mode)
        self.finish_adapter(adapter, inference_mode)

    def weights(self, adapter: str, x: Tensor) -> Tensor | None:
        """What multiplies the copies' outputs for input ``x`` (..., in): (..., copies), (..., 1), or None for one."""
        return combine(self.context.gate(adapter, self.output[adapter], x), self.route(adapter, x))

    def route(self, adapter: str, x: Tensor) -> Tensor | None:
        """The weights (..., copies) of this expert's copies, None if there is just one."""
        copies = self._modules.get("mixture_copies")
        if copies is None or adapter not in copies.moa_w2:
            return None
        gates: Gates = copies(x, adapter, self.context.tokens)
        return gates.weights.to(x.dtype)

    def in_place_of_part(self, delta: Tensor) -> Tensor:
        """What is meant for one part of a fused projection -> full width, with zeros for its other parts."""
        part = self.place.part
        if part is None:
            return delta
        slots = delta.unflatten(-1, (part.groups, part.stop - part.start, -1))
        return F.pad(slots, (0, 0, part.start, part.slots - part.stop)).flatten(-3)

    def add_hook(self, module: nn.Module, before: Any = None, after: Any = None) -> None:
        """Hook ``module`` with bound methods (they survive deepcopy and pickling); `detach` removes them."""
        if before is not None:
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if after is not None:
            self._handles.append(module.register_forward_hook(after, with_kwargs=True))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor that a module was called with."""
    return args[0] if args else next(iter(kwargs.values()))

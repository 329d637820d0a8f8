"""The contract of an expert kind: two classes in one file.

- A configuration, subclass of `ExpertConfig`: what the user may set, and `sites`, where in a block it sits.
- A layer, subclass of `ExpertLayer`: `build` makes the weights of an adapter, `update` says what an input adds to the
  host's output, and `form` says the same in the terms of engines that serve. Everything else, from the loop over
  adapters to the cast back into the host's dtype, is here.

Who wants to know what experts do, such as `moa.inspection`, adds itself to a layer's ``observers`` and asks `update`.

A kind whose update is a narrow bottleneck derives from `moa.adapters.experts.bottleneck.BottleneckLayer` instead, says
its `factors`, and gets `update` and the fast ways of computing it for nothing. A new kind is one new file, entered in
``EXPERTS`` in `moa.adapters.experts`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Self, TypeAlias

import torch
from torch import Tensor, nn

from moa import _hosts
from moa.adapters.architectures import Host
from moa.adapters.context import BlockContext, Forward, Gate, Weights, first_argument
from moa.adapters.experts.forms import Form
from moa.adapters.gating import GATINGS, Gates, Softmax
from moa.adapters.gradients import check_gradient
from moa.adapters.low_rank import widen
from moa.adapters.routers import Router, RouterLayer
from moa.adapters.tuner import Attached
from moa.choices import build, check_flag, check_range, from_fields, numbers


class Site(NamedTuple):
    """One place that an expert takes in a block.

    Attributes:
        name: unique in the block, also the name of its gate column, e.g. ``"q"``.
        role: which `Host` it needs: a projection, ``"mlp"`` or ``"attention"``.
    """

    name: str
    role: str


# The official implementation's order of gates; experts of other kinds come after, in the order of the configuration.
COLUMN_ORDER = ("lora", "q", "k", "v", "prompt", "o", "up", "gate", "down", "parallel")


def column_position(site: str) -> int:
    """Where a site's gate column stands among the others; unknown names come last."""
    name = site.partition("#")[0]
    return COLUMN_ORDER.index(name) if name in COLUMN_ORDER else len(COLUMN_ORDER)


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
        check_range("copies: number", self.number, low=1, whole=True)
        check_flag("copies: shared", self.shared)
        check_flag("copies: bias", self.bias)
        self.gating = build("copies: gating", GATINGS, self.gating)
        if getattr(self.gating, "k", 1) > self.number:
            raise ValueError(f"copies: top-k gating with k={self.gating.k} needs at least that many copies")


@dataclass(kw_only=True)
class ExpertConfig:
    """What every kind of expert can be told.

    Attributes:
        layers: numbers of the blocks that get this expert, one or a list; None: all.
        gate: share one gate among all sites of experts with the same ``gate`` name; None: a gate for every site.
        copies: a number, or a `Copies` (or dict) with details.
        optional: leave out, with a warning, what a model cannot host, instead of refusing the whole configuration.
            Presets and the default configuration are made of optional experts; what was placed in the end is saved.
    """

    kind: ClassVar[str]
    size_setting: ClassVar[str | None] = None
    """The setting that makes an expert of this kind larger, for searches under a budget; None: it has no size."""
    needs_attention_interface: ClassVar[bool] = False
    """At ``"attention"``: it acts inside of the module, through transformers' interface, and not on its output."""

    layers: list[int] | None = None
    gate: str | None = None
    copies: Any = 1
    optional: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.copies, int):
            self.copies = Copies(self.copies)
        elif not isinstance(self.copies, Copies):
            self.copies = from_fields("copies", Copies, self.copies)
        if self.layers is not None:
            self.layers = numbers(f"{self.kind} expert: layers", self.layers, "a block")
        if self.gate is not None and not (isinstance(self.gate, str) and self.gate):
            raise ValueError(f"{self.kind} expert: gate={self.gate!r} must be a name, or None for a gate of its own")
        check_flag(f"{self.kind} expert: optional", self.optional)

    def sites(self) -> list[Site]:
        raise NotImplementedError

    def obstacle_to_splitting(self) -> str | None:
        """Why this expert cannot follow a host that tensor parallelism splits; None: its layer does, by `split_along`
        and in `update`.
        """
        return "it does not say how"

    def resized(self, size: int, **changes: Any) -> Self:
        """The same expert with another value of its ``size_setting``, and ``changes``."""
        assert self.size_setting is not None
        return dataclasses.replace(self, **{self.size_setting: size, **changes})


Observer: TypeAlias = Callable[[str, Tensor, Tensor], object]
"""Called with an adapter and the ``x`` and ``y`` of `ExpertLayer.update`, right before the expert adds to ``y``."""


class ExpertLayer(Attached):
    """One site of one kind in one block, for any number of adapters.

    Attributes:
        config: the configuration class of the kind.
        site: the site's name, unique in the block.
        place: where it sits.
        role: as in `Site`.
        output: adapter -> which output of the block's router gates this expert; None: it is added ungated.
        observers: see `Observer`; empty unless somebody watches. They must not keep ``y``, which is changed in place.
    """

    config: ClassVar[type[ExpertConfig]]
    other_param_names: ClassVar[tuple[str, ...]] = ("output",)
    adding: ClassVar[str] = "apply_to"
    """The method by which this kind adds to ``y``: of the forward, an adapter and whatever it needs, ``y`` last."""
    role: str = ""

    def __init__(self, site: str, host: Host, context: BlockContext):
        super().__init__(host.module, host.split)
        self.site = site
        self.place = host
        self.context = context
        self.output: dict[str, int | None] = {}
        self.observers: list[Observer] = []
        self._handles: list[Any] = []
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        self.hook()

    # --- what a kind says of itself -----------------------------------------------------------------------------------

    def build(self, adapter: str, config: Any, init_weights: bool) -> None:
        """Create the weights of ``adapter``; with ``init_weights`` the expert must start as exactly nothing."""
        raise NotImplementedError

    def update(self, adapter: str, x: Tensor, y: Tensor, weights: Tensor | None) -> Tensor:
        """What ``x`` adds to ``y``, (..., out).

        Args:
            adapter: whose weights.
            x: what the expert reads (..., in), in the dtype of the adapter.
            y: the host's output so far (..., out), of this expert's part if the host is a fused projection.
            weights: (..., copies), (..., 1), or None: factors on the copies' updates, applied wherever it is cheapest;
                leading dimensions may be 1.
        """
        raise NotImplementedError

    def form(self, adapter: str) -> Form:
        """What serving engines compute in place of `update`: see `moa.adapters.experts.forms`.

        Asked while the block's forward runs, so that a kind may ask the base's modules something.

        Raises:
            ValueError: this kind has no such form.
        """
        raise ValueError(
            f"the {self.config.kind} expert does not say its form, so no engine can serve it: give its layer, "
            f"{type(self).__name__}, a method form()"
        )

    @contextmanager
    def asked(self, answer: Callable[[str], object]) -> Iterator[None]:
        """Inside, forwards call ``answer`` with each adapter where the expert would add its update, and nothing is
        added: what the host reads and puts out need not be as wide as the expert thinks.
        """

        def instead(now: Forward, adapter: str, *tensors: Any) -> Tensor:
            answer(adapter)
            return tensors[-1]  # type: ignore[no-any-return]

        setattr(self, self.adding, instead)
        try:
            yield
        finally:
            delattr(self, self.adding)

    def hook(self) -> None:
        """Take part in the host's forward; here by adding to its output."""
        self.add_hook(self.host, after=self._after_host)

    # --- the loop around it -------------------------------------------------------------------------------------------

    def _after_host(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._disable_adapters:
            return output
        now = self.context.now
        if now.bypassed:
            return output
        y = output[0] if isinstance(output, tuple) else output
        x = self.input_of(module, args, kwargs, y)
        if self.training:
            check_gradient(self.site, module, x, y)
        y = self.add_all(now, x, y)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def add_all(self, now: Forward, x: Tensor, y: Tensor) -> Tensor:
        """``y`` with the updates of all adapters that take part, each in its own rows if the batch mixes adapters."""
        if now.groups is None:
            for adapter in self.enabled():
                y = self._add(now, adapter, x, y)
            return y
        for group in now.groups:
            if group.adapter in self.output:
                with self.context.alone(group) as own:
                    added = self._add(own, group.adapter, group.input(x), group.of(y))
                y = group.put(y, added, in_place=y is not x)
        return y

    def _add(self, now: Forward, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        if self.observers:
            self.show(adapter, x, y)
        return self.apply_to(now, adapter, x, y)

    def show(self, adapter: str, x: Tensor, y: Tensor) -> None:
        """Let observers see what `update` is about to be given."""
        x, own = x.to(self.dtype_of(adapter)), self.own_part(y)
        for observer in self.observers:
            observer(adapter, x, own)

    def input_of(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        """What the expert reads, given how its host was called and what it put out."""
        return first_argument(args, kwargs)

    @property
    def in_features(self) -> int:
        """Width of what the expert reads."""
        return self.place.in_features

    @property
    def reads_share(self) -> bool:
        """Whether what the expert reads is a share of the features, see `moa.adapters.sharding`."""
        return self.split is not None and self.split.reads_share

    @property
    def writes_share(self) -> bool:
        """Whether what the expert adds to is a share of the features."""
        return self.split is not None and self.split.writes_share

    def apply_to(self, now: Forward, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """``y`` with the gated update of one adapter."""
        x = x.to(self.dtype_of(adapter))
        weights = as_tensor(self.weights(now, adapter, x), x)
        delta = self.update(adapter, x, self.own_part(y), weights)
        return (y + widen(delta, self.place.part).view_as(y)).to(y.dtype)

    def own_part(self, y: Tensor) -> Tensor:
        """The host's output (..., features) -> what of it is this expert's, (..., out)."""
        part = self.place.part
        return y if part is None else part.of(y).reshape(*y.shape[:-1], -1)

    def enabled(self, container: Any = None) -> Sequence[str]:
        """Names of the adapters that take part in a forward now and have this expert."""
        return super().enabled(self.output if container is None else container)

    def dtype_of(self, adapter: str) -> torch.dtype:
        """The dtype of an adapter's weights."""
        return next(children_of(self, adapter).parameters()).dtype

    def weights(self, now: Forward, adapter: str, x: Tensor) -> Weights:
        """What multiplies the copies' updates for input ``x`` (..., in)."""
        gate: Gate = now.gate(adapter, self.output[adapter], x)
        copies = self.router_over_copies(adapter)
        if copies is None:
            return gate
        gates: Gates = copies(x, adapter, now.tokens)
        route = gates.weights.to(x.dtype)
        return route if gate is None else gate * route

    def router_over_copies(self, adapter: str) -> RouterLayer | None:
        """What decides between the adapter's copies; None if there is just one."""
        copies: RouterLayer | None = _hosts.children(self).get("mixture_copies")  # type: ignore[assignment]
        return copies if copies is not None and copies.has(adapter) else None

    def number_of_copies(self, adapter: str) -> int:
        copies = self.router_over_copies(adapter)
        return 1 if copies is None else copies.number_of_outputs(adapter)

    # --- attaching ----------------------------------------------------------------------------------------------------

    def add_adapter(
        self, adapter: str, config: ExpertConfig, output: int | None, *, init_weights: bool, inference_mode: bool
    ) -> None:
        """Create everything that ``adapter`` needs at this site."""
        self.output[adapter] = output
        self.build(adapter, config, init_weights)
        if config.copies.number > 1:
            if "mixture_copies" not in _hosts.children(self):
                split = None if self.split is None else replace(self.split, reads_share=self.reads_share)
                self.mixture_copies = RouterLayer(self.host, self.in_features, self.context, split)
            router = Router(hidden_per_expert=0, bias=config.copies.bias, initial_logit=0.0)
            self.mixture_copies.add_router(adapter, router, config.copies.gating, config.copies.number)
            self.mixture_copies.finish_adapter(adapter, inference_mode)
        self.finish_adapter(adapter, inference_mode)

    def add_hook(self, module: nn.Module, before: Any = None, after: Any = None) -> None:
        """Hook ``module`` with bound methods (they survive deepcopy and pickling); `detach` removes them."""
        if before is not None:
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if after is not None:
            self._handles.append(module.register_forward_hook(after, with_kwargs=True))

    def detach(self) -> None:
        """Take no part in the host's forward any more, until `hook` is called again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def children_of(layer: ExpertLayer, adapter: str) -> nn.Module:
    """The first of an adapter's modules that has parameters."""
    for name in layer.adapter_layer_names:
        module: nn.Module = getattr(layer, name)[adapter]
        if any(True for _ in module.parameters()):
            return module
    raise RuntimeError(f"{type(layer).__name__} of {adapter!r} has no parameters")


def as_tensor(weights: Weights, like: Tensor) -> Tensor | None:
    """`Weights` as a tensor (..., copies) or (..., 1) in the dtype of ``like``, or None."""
    if isinstance(weights, float):
        return like.new_full((*(1,) * (like.dim() - 1), 1), weights)
    return weights

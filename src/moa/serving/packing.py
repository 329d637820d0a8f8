"""Mixtures as a few wide products per block, for engines that serve weights that stay as they are.

`Packed` takes a model with mixtures attached, asks every expert for its form, takes the experts' hooks off and puts
`moa.serving.modules` in their place. The experts stay where they are, with their weights, so that they can be packed
again, into the same tensors, when those have changed.

Nothing here knows an engine: what is packed runs in transformers, too, and is tested there.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from moa import _hosts
from moa.adapters.block import Mixture, attended, routed_class
from moa.adapters.context import first_argument, parameters_of_forward
from moa.adapters.experts import ExpertLayer
from moa.adapters.experts.forms import Bottleneck, Form, Reads, Rescaling
from moa.adapters.tuner import TunerLayer
from moa.serving import products
from moa.serving.modules import PackedBottlenecks, PackedPrompt, PackedRescaling, PackedRouter, Placed
from moa.serving.shards import Processes, shard

Forms = Mapping[tuple[ExpertLayer, str], Form]
"""The form of every expert, for each of its adapters."""

CHILD = "mixture_packed"
"""Under this name packed modules are children of blocks and of attention modules."""

INTERFACE = "moa_packed"
"""The attention function of modules with packed prompts: their own, then the prompts."""


class Packed:
    """A model whose mixtures are packed.

    Args:
        model: with mixtures attached, in evaluation mode.
        adapters: which of them.
        run: runs the model's blocks on a token or two, for experts that have to see a forward.
        mask: (tokens, adapters), kept by whoever runs the model: 1 for the adapter that a token of the next forward
            asks for, 0 elsewhere; rows beyond its tokens are not read. None: there is one adapter for all tokens.
        processes: how the model is split among an engine's processes, to which the adapters, which are whole, are
            fitted. None: it is not.

    Raises:
        ValueError: an expert has no form, its host never ran, or is split in a way that it cannot follow.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Sequence[str],
        run: Callable[[], object],
        mask: Tensor | None = None,
        processes: Processes | None = None,
    ):
        self._adapters = list(adapters)
        self._run = run
        self._mask = mask
        self._processes = processes
        for layer in model.modules():
            if isinstance(layer, TunerLayer):
                layer.set_adapter(self._adapters, inference_mode=True)
        self._mixtures = [module for module in model.modules() if isinstance(module, Mixture)]
        self._blocks = self._pack()
        for block in self._blocks:
            block.attach()

    def refresh(self) -> None:
        """Pack the experts' weights as they are now, into the tensors that a compiled graph may hold."""
        for block in self._blocks:
            block.detach()
        fresh = self._pack()
        for block, new in zip(self._blocks, fresh, strict=True):
            for (name, own), (_, tensor) in zip(block.named_buffers(), new.named_buffers(), strict=True):
                assert own.shape == tensor.shape, name
                own.copy_(tensor)
            block.attach()

    @torch.no_grad()
    def _pack(self) -> list[PackedBlock]:
        forms = _forms(self._mixtures, self._adapters, self._run)
        return [PackedBlock(mixture, self._adapters, forms, self._mask, self._processes) for mixture in self._mixtures]


class Running:
    """What the packed experts of one block tell each other in a forward.

    Attributes:
        gates: (n, columns); None before the last router has decided, and where nothing is gated.
        pieces: position of an adapter -> its gates, (n, outputs).
        attended: what attention reads, (batch, tokens, features).
        read: a tensor that was read for several experts, and position -> what each got of it, (n, rows).
        sources: position of an expert that reads another module's input -> that input.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.gates: Tensor | None = None
        self.pieces: dict[int, Tensor] = {}
        self.attended: Tensor | None = None
        self.read: tuple[Tensor, dict[int, Tensor]] | None = None
        self.sources: dict[int, Tensor] = {}


class PackedBlock(nn.Module):
    """The experts of one decoder block; `attach` puts them to work in the place of those they are made of.

    Args:
        mixture: of the block.
        adapters: all of the model's; those without an expert here take no part.
        forms: of all experts.
        mask, processes: see `Packed`.
    """

    columns: Tensor
    mask: Tensor | None

    def __init__(
        self,
        mixture: Mixture,
        adapters: Sequence[str],
        forms: Forms,
        mask: Tensor | None,
        processes: Processes | None,
    ):
        super().__init__()
        self._processes = processes
        self.register_buffer("mask", mask, persistent=False)
        self._mixture = (mixture,)  # a tuple, so that nn.Module does not register it as a child
        self._now = Running()
        self._handles: list[Any] = []
        self._experts = experts_of(mixture)
        self._dtype = _dtype_of(mixture)
        self._adapters = [
            (position, name)
            for position, name in enumerate(adapters)
            if any(name in layer.output for layer in self._experts)
        ]
        self._add_routers(mixture)
        self._add_experts(forms)
        self._share_reading()

    # --- building -----------------------------------------------------------------------------------------------------

    def _add_routers(self, mixture: Mixture) -> None:
        """A router for every adapter that has one, by what it reads, and the number of each adapter's first gate."""
        self.routers = nn.ModuleDict({"block": nn.ModuleList(), "attention": nn.ModuleList()})
        self._routed: dict[str, list[int]] = {"block": [], "attention": []}
        self._first_gate: dict[str, int] = {}
        outputs = 0
        for position, name in self._adapters:
            self._first_gate[name] = outputs
            if name not in mixture.router:
                outputs += 1  # all its experts under the token's choice of adapters
                continue
            stage = mixture.router[name].input
            self.routers[stage].append(PackedRouter(mixture, name, self._dtype))  # type: ignore[operator]
            self._routed[stage].append(position)
            outputs += mixture.number_of_outputs(name)
        self._gated = any(self._routed.values()) or self.mask is not None

    def _add_experts(self, forms: Forms) -> None:
        """Bottlenecks by host and by what they read, then rescalings and prompts; each has its part of the gates."""
        groups: dict[tuple[nn.Module, nn.Module, Reads], list[Placed]] = {}
        others: list[tuple[nn.Module, Placed]] = []
        for layer in self._experts:
            for _, name in self._adapters:
                if name not in layer.output:
                    continue
                placed = self._place(layer, name, forms[layer, name])
                if isinstance(placed.form, Bottleneck):
                    key = (layer.place.module, layer.place.source, placed.form.reads)
                    groups.setdefault(key, []).append(placed)
                else:
                    others.append((layer.place.module, placed))
        self._hosts = [*groups]
        self.bottlenecks = nn.ModuleList(PackedBottlenecks(experts, self._dtype) for experts in groups.values())
        rescalings = [(host, placed) for host, placed in others if isinstance(placed.form, Rescaling)]
        self._rescaled = [host for host, _ in rescalings]
        self.rescalings = nn.ModuleList(PackedRescaling(placed, self._dtype) for _, placed in rescalings)
        prompts = [placed for _, placed in others if not isinstance(placed.form, Rescaling)]
        self.prompts = nn.ModuleList(PackedPrompt(placed, self._dtype) for placed in prompts)
        columns: list[int] = []
        for expert in (*self.bottlenecks, *self.rescalings, *self.prompts):
            expert.span = (len(columns), len(columns) + len(expert.columns))
            columns += expert.columns
        place = _parameter_of(self._mixture[0]).device
        self.register_buffer("columns", torch.tensor(columns, device=place), persistent=False)

    def _place(self, layer: ExpertLayer, adapter: str, form: Form) -> Placed:
        """An expert's form, of which this process holds what it holds of the host, with what gates it."""
        read = total = None
        if self._processes is not None:
            share = self._processes.share
            form, read = shard(form, share(layer.place.module), share(layer.place.source))
            total = None if read is None else self._processes.total
        copies = layer.router_over_copies(adapter)
        router = None if copies is None else PackedRouter(copies, adapter, self._dtype, read)
        return Placed(form, self._first_gate[adapter] + (layer.output[adapter] or 0), router, total)

    def _share_reading(self) -> None:
        """Stack what reads one tensor: routers, and with those at attention the bottlenecks of q, k and v."""
        self._shared: dict[str, list[int]] = {"block": [], "attention": []}
        if self.routers["attention"]:
            read = self.routers["attention"][0].weight.shape[1]
            for index, (host, _, reads) in enumerate(self._hosts):
                roles = {layer.role for layer in self._experts if layer.place.module is host}
                expert = self.bottlenecks[index]
                alike = expert.down.shape[1] == read and expert.total is None
                if reads is Reads.INPUT and roles <= {"q", "k", "v"} and alike:
                    self._shared["attention"].append(index)
        for stage, routers in self.routers.items():
            readers = [*((router.weight, router.bias) for router in routers)]  # type: ignore[union-attr]
            readers += [(self.bottlenecks[i].down, self.bottlenecks[i].down_bias) for i in self._shared[stage]]
            self.register_buffer(f"{stage}_weight", torch.cat([w for w, _ in readers]) if readers else None, False)
            biases = [w.new_zeros(len(w)) if b is None else b for w, b in readers]
            self.register_buffer(f"{stage}_bias", torch.cat(biases) if readers else None, False)

    # --- running ------------------------------------------------------------------------------------------------------

    def open(self, hidden: Tensor) -> None:
        """Start a forward on ``hidden`` (batch, tokens, features)."""
        now = self._now
        now.clear()
        if not self._gated:
            return
        routed = self._routed["block"] + self._routed["attention"]
        for position, _ in self._adapters:
            if position not in routed:
                now.pieces[position] = self._asked(hidden.new_ones(hidden.shape[:-1].numel(), 1), position)
        self._route(hidden, "block")

    def close(self) -> None:
        """End it."""
        self._now.clear()

    def _route(self, features: Tensor, stage: str) -> None:
        """Let the routers decide that read ``features`` (batch, tokens, in_features)."""
        now, routers, shared = self._now, self.routers[stage], self._shared[stage]
        if len(routers):  # type: ignore[arg-type]
            weight, bias = getattr(self, f"{stage}_weight"), getattr(self, f"{stage}_bias")
            low = products.read(features.flatten(0, -2), weight, bias)
            sizes = [len(router.weight) for router in routers]  # type: ignore[union-attr]
            parts = low.split(sizes + [len(self.bottlenecks[i].down) for i in shared], dim=-1)
            for position, router, first in zip(self._routed[stage], routers, parts, strict=False):  # type: ignore[arg-type]
                now.pieces[position] = self._asked(router(first), position)
            now.read = (features, dict(zip(shared, parts[len(sizes) :], strict=True)))
        if now.gates is None and len(now.pieces) == len(self._adapters):
            pieces = [now.pieces[position] for position, _ in self._adapters]
            every = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
            now.gates = every.to(self._dtype).index_select(1, self.columns)  # type: ignore[arg-type]

    def _asked(self, weights: Tensor, position: int) -> Tensor:
        """Gates (n, outputs) of one adapter, 0 where a token asks for another one."""
        if self.mask is None:
            return weights
        return weights * self.mask[: len(weights), position : position + 1].to(weights.dtype)

    def _gates(self, expert: Any) -> Tensor | None:
        gates = self._now.gates
        return gates if gates is None else gates[:, expert.span[0] : expert.span[1]]

    def _before_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = attended(self._parameters_of_attention, args, kwargs)
        self._now.attended = hidden
        if self._routed["attention"]:
            self._route(hidden, "attention")

    def _read(self, index: int, x: Tensor) -> Tensor:
        """``x`` (n, in) through the first matrices of some bottlenecks, (n, rows)."""
        expert, read = self.bottlenecks[index], self._now.read
        if read is not None and read[0] is x and index in read[1]:
            return read[1][index]
        return expert.read(x.flatten(0, -2))  # type: ignore[operator,no-any-return]

    def _after_host(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        expert, reads = self.bottlenecks[index], self._hosts[index][2]
        y = output[0] if isinstance(output, tuple) else output
        if reads is Reads.OUTPUT:
            x = y
        else:
            x = first_argument(args, kwargs) if reads is Reads.INPUT else self._now.sources[index]
        new = expert(y.flatten(0, -2), self._read(index, x), self._gates(expert)).view(y.shape)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def _before_source(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._now.sources[index] = first_argument(args, kwargs)

    def _rescale(self, index: int, y: Tensor, x: Tensor) -> Tensor:
        expert = self.rescalings[index]
        new: Tensor = expert(y.flatten(0, -2), x.flatten(0, -2), self._gates(expert))
        return new.view(y.shape)

    def _rescale_output(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        return self._rescale(index, output, first_argument(args, kwargs))

    def _rescale_input(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = first_argument(args, kwargs)
        new = self._rescale(index, x, x)
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {next(iter(kwargs)): new})

    def after_attention(self, query: Tensor, scaling: float | None, output: Tensor) -> Tensor:
        """Add all prompts to the attention interface's ``output``."""
        for prompt in self.prompts:
            output = prompt(output, query, scaling, self._now.attended, self._gates(prompt))
        return output

    # --- at work ------------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Take the place of the experts and the router that this is made of."""
        (mixture,) = self._mixture
        for layer in self._experts:
            layer.detach()
        mixture.detach()
        block, base = mixture.host, type(mixture.host).unrouted_class  # type: ignore[attr-defined]
        block.__class__ = packed_class(base) if self._adapters else base
        if not self._adapters:
            return
        block.add_module(CHILD, self)
        for index, host in enumerate(self._rescaled):
            if self.rescalings[index].of_input:
                self._keep(host.register_forward_pre_hook(_call(self._rescale_input, index), with_kwargs=True))
        for index, (host, source, reads) in enumerate(self._hosts):
            if reads is Reads.SOURCE:
                self._keep(source.register_forward_pre_hook(_call(self._before_source, index), with_kwargs=True))
            self._keep(host.register_forward_hook(_call(self._after_host, index), with_kwargs=True))
        for index, host in enumerate(self._rescaled):
            if not self.rescalings[index].of_input:
                self._keep(host.register_forward_hook(_call(self._rescale_output, index), with_kwargs=True))
        self._attach_to_attention(mixture.attention[0])

    def _attach_to_attention(self, attention: Any) -> None:
        if self._routed["attention"] or any(prompt.copies is not None for prompt in self.prompts):
            self._parameters_of_attention = parameters_of_forward(type(attention))
            self._keep(attention.register_forward_pre_hook(self._before_attention, with_kwargs=True))
        if len(self.prompts):
            self._own_config = attention.config
            attention.packed_block = (self,)  # a tuple, so that nn.Module does not register it as a child
            attention.config = copy.copy(attention.config)
            attention.attention_before_prompts = _hosts.stored_implementation(attention.config)
            _hosts.store_implementation(attention.config, INTERFACE)

    def detach(self) -> None:
        """Give their place back to the experts and the router."""
        (mixture,) = self._mixture
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        block: Any = mixture.host
        base: Any = type(block)
        if self._adapters:
            base = base.unrouted_class
            delattr(block, CHILD)
            if len(self.prompts):
                mixture.attention[0].config = self._own_config  # type: ignore[union-attr]
        block.__class__ = routed_class(base)
        mixture.hook()
        for layer in self._experts:
            layer.hook()

    def _keep(self, handle: Any) -> None:
        self._handles.append(handle)


def _call(method: Callable[..., Any], index: int) -> Callable[..., Any]:
    def hook(*args: Any) -> Any:
        return method(index, *args)

    return hook


@functools.cache
def packed_class(base: Any) -> Any:
    """The subclass of a decoder block's class that routes by its packed routers first; under the same name."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        packed = getattr(self, CHILD)
        packed.open(args[0] if args else kwargs["hidden_states"])
        output = base.forward(self, *args, **kwargs)
        packed.close()
        return output

    namespace: dict[str, Any] = {"forward": forward, "unrouted_class": base}
    namespace |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), namespace)


def _with_prompts(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
) -> tuple[Tensor, Any]:
    attend = _hosts.attention_function(module, module.attention_before_prompts)
    output, weights = attend(module, query, key, value, attention_mask, *args, **kwargs)
    return module.packed_block[0].after_attention(query, kwargs.get("scaling"), output), weights


AttentionInterface.register(INTERFACE, _with_prompts)


def experts_of(mixture: Mixture) -> list[ExpertLayer]:
    """All experts in the block."""
    return [module for module in mixture.host.modules() if isinstance(module, ExpertLayer)]


def _forms(mixtures: Sequence[Mixture], adapters: Sequence[str], run: Callable[[], object]) -> Forms:
    """Every expert's form, asked in a forward in the place of what the expert would add.

    Raises:
        ValueError: an expert's host never ran, so that the expert would be passed by.
    """
    forms: dict[tuple[ExpertLayer, str], Form] = {}

    def keep(layer: ExpertLayer, adapter: str) -> None:
        forms[layer, adapter] = layer.form(adapter)

    asked = [(mixture, layer) for mixture in mixtures for layer in experts_of(mixture)]
    with ExitStack() as stack:
        for _, layer in asked:
            stack.enter_context(layer.asked(functools.partial(keep, layer)))
        run()
    for mixture, layer in asked:
        for adapter in adapters:
            if adapter in layer.output and (layer, adapter) not in forms:
                raise ValueError(
                    f"the {layer.config.kind} expert at {layer.site!r} of block {mixture.index} cannot be served: this "
                    f"engine computes {type(layer.host).__name__} without calling it. Train without an expert there"
                )
    return forms


def _parameter_of(mixture: Mixture) -> Tensor:
    """The first floating-point tensor of the block that is no adapter's: everything is computed in its dtype."""
    host = mixture.host
    return next(
        tensor
        for name, tensor in (*host.named_parameters(), *host.named_buffers())
        if ".moa_" not in f".{name}" and tensor.is_floating_point() and tensor.element_size() > 1
    )


def _dtype_of(mixture: Mixture) -> torch.dtype:
    return _parameter_of(mixture).dtype

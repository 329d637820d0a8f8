"""Base models that are split among processes before an adapter is attached: tensor parallelism, and what is refused.

Under transformers' tensor parallelism every process runs every block on the same tokens, and holds a share of the rows
or columns of each projection. What the blocks hand on, and with it all that routers and gates see, is the same
everywhere; inside of attention and of an MLP every process has a share of the features. An expert follows its host:
where it reads a share, its first matrix is split alike and the products are summed up; where it adds to a share, its
second matrix is split alike. Its parameters are DTensors, as the base's: they start alike in all processes, optimisers
and gradient clipping count them once, and PEFT saves and loads them whole.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moa import _hosts


class Style(NamedTuple):
    """What a module of a tensor parallel plan reads and puts out: its process's share of the features, or all."""

    reads_share: bool = False
    writes_share: bool = False


WHOLE = Style()

STYLES: dict[str | None, Style] = {
    None: WHOLE,  # the plan does not name it
    "colwise": Style(writes_share=True),
    "rowwise": Style(reads_share=True),
    "colwise_gather_output": WHOLE,
    "colwise_rep": WHOLE,
    "rowwise_split_input": WHOLE,
    "rowwise_rep": WHOLE,
    "local_params": WHOLE,  # attention modules with parameters of their own, such as sinks
}
"""transformers' names for how a module is split -> what experts at it have to know."""


@dataclass(frozen=True)
class Split:
    """How one place in a model is split.

    Attributes:
        mesh: the processes.
        reads_share: the place's input is a share of its features.
        writes_share: so is its output.
        heads_share: of attention: so are queries, keys and values, by heads.
    """

    mesh: Any
    reads_share: bool = False
    writes_share: bool = False
    heads_share: bool = False

    @property
    def processes(self) -> int:
        return self.mesh.size()  # type: ignore[no-any-return]

    def summed(self, x: Tensor) -> Tensor:
        """The sum of all processes' ``x``, each of which is made of a share; its gradient is everybody's."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        whole = DTensor.from_local(x, self.mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()])
        return whole.to_local()  # type: ignore[no-any-return]

    def spread(self, x: Tensor) -> Tensor:
        """``x``, which is the same everywhere, for making a share of something of it; its gradients are summed up."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        if not torch.is_grad_enabled() or not x.requires_grad:
            return x
        whole = DTensor.from_local(x, self.mesh, [Replicate()], run_check=False)
        return whole.to_local(grad_placements=[Partial()])  # type: ignore[no-any-return]

    def distribute(self, module: nn.Module, along: Mapping[str, int]) -> None:
        """Turn a small module's own parameters into DTensors of which it computes with this process's part.

        Args:
            module: of any class; afterwards of a subclass under the same name.
            along: parameter -> the dimension it is split along; parameters that are missing are whole everywhere.
        """
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        names = [name for name, parameter in _hosts.parameters(module).items() if parameter is not None]
        for name in names:
            parameter: Any = _hosts.parameters(module)[name]
            placement = Shard(along[name]) if name in along else Replicate()
            shared = distribute_tensor(parameter.detach(), self.mesh, [placement])  # of the first process
            # past setattr, in which PEFT sends what is created under low_cpu_mem_usage to the meta device
            _hosts.parameters(module)[name] = nn.Parameter(shared, requires_grad=parameter.requires_grad)
        if names:
            base: Any = type(module)
            module.__class__ = _local_class(base, tuple(names))


@functools.cache
def _local_class(base: Any, names: tuple[str, ...]) -> Any:
    """A subclass whose attributes ``names`` are this process's parts of the parameters of these names."""

    def part(name: str) -> property:
        return property(lambda module: local(_hosts.parameters(module)[name]))

    namespace: dict[str, Any] = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), namespace | {name: part(name) for name in names})


def local(tensor: Any) -> Any:
    """This process's part of a DTensor, with its gradient; anything else as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@dataclass(frozen=True)
class Parallel:
    """A model that is split by tensor parallelism.

    Attributes:
        mesh: the processes, in one dimension.
        styles: the identity of a module -> transformers' name of how it is split.
    """

    mesh: Any
    styles: Mapping[int, str]

    def style(self, module: nn.Module) -> Style:
        """How a module is split; `WHOLE` if its style is one that experts do not know, see `obstacle`."""
        return STYLES.get(self.styles.get(id(module)), WHOLE)

    def obstacle(self, module: nn.Module) -> str | None:
        """Why experts cannot follow how a module is split; None: they can."""
        name = self.styles.get(id(module))
        if name in STYLES:
            return None
        return f"it is split as {name!r}, and experts follow {[style for style in STYLES if style]} only"


def read_split(model: nn.Module) -> Parallel | None:
    """How ``model`` is split by transformers' tensor parallelism; None: it is not.

    Raises:
        ValueError: it is split in another way, or in several at once. What is attached after ``fully_shard`` is never
            synchronised: each process would train an adapter of its own, and one of them would be saved.
    """
    processes = getattr(model, "tp_size", None) or 1
    sharded = _first_sharded(model)
    if processes == 1 and sharded is None:
        return None
    if processes == 1:
        raise ValueError(
            f"the base model is sharded already ({sharded} is a DTensor): an adapter attached now would not be "
            "synchronised among processes. Attach the adapter first, then shard (fully_shard, or leave it to Trainer)"
        )
    if sharded is None or not _hosts.loads_shards():
        raise ValueError(
            f"the base model is split by tensor parallelism (tp_size={processes}) in a way that transformers before "
            "5.17 or an older peft has, in which a mixture would be saved in pieces. Use newer ones, or load it "
            "without tp_plan: DDP, FSDP2 and DeepSpeed ZeRO train a mixture on several devices"
        )
    config = model.config.distributed_config
    others = {name: size for name in OTHERS if (size := getattr(config, name, 1)) > 1}
    if others:
        raise ValueError(
            f"the base model is split by tensor parallelism (tp_size={processes}) and in other ways at once "
            f"({others}); a mixture follows tensor parallelism alone"
        )
    plan: Mapping[str, str] = model.tp_plan  # type: ignore[assignment]
    styles = {
        id(module): plan[generic]
        for name, module in model.named_modules()
        if (generic := re.sub(r"\.\d+(?=\.|$)", ".*", name)) in plan
    }
    return Parallel(model.get_parameter(sharded).device_mesh, styles)


OTHERS = ("fsdp_size", "dp_replicate_size", "pp_size", "ep_size")


def _first_sharded(model: nn.Module) -> str | None:
    if not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor

    return next((name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)), None)

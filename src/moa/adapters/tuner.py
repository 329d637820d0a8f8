"""What every piece of a mixture is to PEFT: a tuner layer that is attached to a base module as a child.

PEFT's own methods wrap the modules they adapt. MoA attaches instead: the base model keeps its classes, its module
names and its state dict, and removing a mixture is deleting children. Three rules follow from how PEFT looks at
tuner layers (each was a silent bug in some method): a child's name must not start with the method's prefix, the
parameters one level below must, and modules keyed by adapter name must hold their parameters directly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from moa.adapters.sharding import Split


class TunerLayer(BaseTunerLayer):
    """The class by which `MoAModel` recognises its own layers."""


class Attached(nn.Module, TunerLayer):
    """A tuner layer without a base layer, following the device and dtype of its host.

    Args:
        host: the base module this is, or will be, a child of. Kept out of the module tree.
        split: how tensor parallelism splits what goes through the host; None: nothing is split.
    """

    # BaseTunerLayer's properties of these names ask the base layer, which for a layer without one is the layer itself.
    weight = None
    bias = None

    adapter_layer_names: ClassVar[tuple[str, ...]] = ()
    other_param_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, host: nn.Module, split: Split | None = None):
        super().__init__()
        self.split = split
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._host = (host,)  # a tuple, so that nn.Module does not register it as a child

    @property
    def host(self) -> nn.Module:
        """The base module this layer is attached to."""
        return self._host[0]

    def enabled(self, container: Any) -> Sequence[str]:
        """Names of the adapters in ``container`` that take part in a forward now. Asked at every call: no detours."""
        if self._disable_adapters:
            return ()
        active = self._active_adapter
        if isinstance(active, str):
            return (active,) if active in container else ()
        if len(active) == 1:
            return active if active[0] in container else ()
        return [adapter for adapter in active if adapter in container]

    def finish_adapter(self, adapter: str, inference_mode: bool) -> None:
        """After an adapter's weights were created: device, dtype and mode of the host, split as the host is, trainable
        only if active.
        """
        self.train(self.host.training)
        self._move_adapter_to_device_of_base_layer(adapter)
        if self.split is not None:
            along = self.split_along(adapter)
            for name in self.adapter_layer_names:
                if adapter in (modules := getattr(self, name)):
                    self.split.distribute(modules[adapter], along.get(name, {}))
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def split_along(self, adapter: str) -> Mapping[str, Mapping[str, int]]:
        """Under tensor parallelism, of each of `adapter_layer_names` the parameters that are split, and the dimension
        they are split along. What is missing is whole in every process.
        """
        return {}

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        host_device, dtype = self._device_and_dtype_of_host()
        device = device or host_device
        if device is None or device.type == "meta":
            return
        for name in self.adapter_layer_names:
            modules = getattr(self, name)
            if adapter_name in modules and not any(p.is_meta for p in modules[adapter_name].parameters()):
                modules[adapter_name].to(device, dtype)

    def _device_and_dtype_of_host(self) -> tuple[torch.device | None, torch.dtype | None]:
        """Device of the host's first weight and dtype of its first floating-point one (None: quantised)."""
        device = None
        for name, tensor in (*self.host.named_parameters(), *self.host.named_buffers()):
            if ".moa_" in f".{name}":
                continue
            device = device or tensor.device
            if tensor.is_floating_point() and tensor.element_size() > 1:
                return tensor.device, tensor.dtype
        return device, None

    def _freeze_what_never_trains(self) -> None:
        """Called whenever PEFT has switched ``requires_grad`` on; for parameters that a configuration keeps fixed."""

    def set_adapter(self, adapter_names: Any, inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._freeze_what_never_trains()

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad=requires_grad)
        self._freeze_what_never_trains()

    def detach(self) -> None:
        """Undo whatever was done to the host, hooks above all. The child itself is deleted by the caller."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(MERGE_MESSAGE)

    def unmerge(self) -> None:
        raise NotImplementedError(MERGE_MESSAGE)


MERGE_MESSAGE = (
    "a Mixture of Adapters cannot be merged into the base weights: its gates differ from token to token. Keep the "
    "adapter beside the base model (save_pretrained, PeftModel.from_pretrained), or drop it with unload(). For plain "
    "LoRA, which merges: `moa export ADAPTER --to lora`, exact for LoRA experts without a router, else fitted to the "
    "mixture, with the gap measured."
)

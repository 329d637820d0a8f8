"""`MoAModel`, PEFT's side of a mixture: finds the decoder blocks, attaches routers and experts, takes them off."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from moa import _hosts
from moa.adapters.architectures import BlockView, text_config
from moa.adapters.auxiliary import follow_loss
from moa.adapters.block import Mixture, attach_mixture, detach_mixture
from moa.adapters.config import MoAConfig
from moa.adapters.decoder import view_blocks
from moa.adapters.experts import EXPERTS, ExpertLayer
from moa.adapters.experts.base import column_position
from moa.adapters.experts.bottleneck import BottleneckLayer
from moa.adapters.fitting import fit
from moa.adapters.members import mixtures_of
from moa.adapters.mixed_batch import BASE, read_names, tell_wrappers
from moa.adapters.placement import BlockPlan, check_routers_learn, plan_block
from moa.adapters.tuner import MERGE_MESSAGE, TunerLayer
from moa.adapters.unsloth import refuse_unsloth


class MoAModel(BaseTuner):
    """A base model with one or more mixtures attached. Users get it through ``peft.get_peft_model``.

    PEFT's injection visits modules by name; MoA's targets are the decoder blocks themselves.
    """

    prefix = "moa_"
    tuner_layer_cls = TunerLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's. A ``state_dict`` is not needed to find the places: the configuration names them, and what is kept
        and saved of it is what this model can host.
        """
        refuse_unsloth(model)
        check_name(adapter_name)
        kwargs["state_dict"] = None
        self._views = view_blocks(model, self.peft_config[adapter_name].architecture)
        self.peft_config[adapter_name] = fit(self.peft_config[adapter_name], self._views)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        mixtures = mixtures_of(model)
        follows = any(mixture.auxiliary[adapter_name] for mixture in mixtures)
        for mixture in mixtures:
            mixture.follows[adapter_name] = follows
        if follows:  # for whoever calls the model and not its PeftModel
            mixtures[0].keep(model.register_forward_hook(_follow_loss, with_kwargs=True))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base model's, which PEFT calls past its hooks, and in MPT's case without having read adapter_names."""
        with self._enable_peft_forward_hooks(*args, **kwargs):
            kwargs.pop("adapter_names", None)
            return _follow_loss(self, args, kwargs, super().forward(*args, **kwargs))

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config

    def _prepare_model(self, peft_config: MoAConfig, model: nn.Module) -> None:  # type: ignore[override]
        """Plan every block before the first one is touched."""
        family = text_config(model).model_type
        self._plans: dict[str, tuple[BlockView, BlockPlan]] = {
            name: (view, plan_block(peft_config, view, family)) for name, view in self._views.items()
        }
        check_saved(model, peft_config, self._plans.values())
        if not peft_config.inference_mode:
            check_routers_learn(peft_config, [plan for _, plan in self._plans.values()])

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> bool:  # type: ignore[override]
        return key in self._plans

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: MoAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        """Attach to one block. All blocks get the routed class, so that wrap policies by class fit them all."""
        view, plan = self._plans[current_key]
        mixture = attach_mixture(view, len(self._plans))
        gatings = [peft_config.gating, *(placement.expert.copies.gating for placement in plan.placements)]
        mixture.auxiliary[adapter_name] = any(gating.has_auxiliary_loss for gating in gatings)
        if peft_config.router is not None and plan.placements:
            mixture.set_router(adapter_name, peft_config.router, plan.columns, plan.outputs)
            router = mixture.router[adapter_name]
            mixture.add_router(adapter_name, router, peft_config.gating, max(plan.outputs) + 1)
            mixture.finish_adapter(adapter_name, peft_config.inference_mode)
        for placement in plan.placements:
            expert = self._expert_at(placement, mixture)
            expert.add_adapter(
                adapter_name,
                placement.expert,
                placement.output,
                init_weights=peft_config.init_weights,
                inference_mode=peft_config.inference_mode,
            )
        if mixture.disable_adapters:  # what is new to the block joins those that are switched off
            for layer in mixture.host.modules():
                if isinstance(layer, TunerLayer):
                    layer.enable_adapters(False)
        share_inputs(mixture)
        if any(_hides_children(placement.host.module) for placement in plan.placements):
            mixture.keep(mixture.host.register_state_dict_post_hook(_add_hidden))

    def _expert_at(self, placement: Any, mixture: Mixture) -> ExpertLayer:
        """The layer at a placement's site, shared by all adapters that have this kind of expert there."""
        child = f"mixture_{placement.name}"
        parent = placement.host.module
        if child not in _hosts.children(parent):
            layer = EXPERTS[placement.expert.kind](placement.name, placement.host, mixture.context)
            layer.role = placement.role
            parent.add_module(child, layer)
            put_in_order(parent, layer)
        return _hosts.children(parent)[child]  # type: ignore[return-value]

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As PEFT's, but tensors that do not fit are an error here and not a warning or half a load.

        Raises:
            ValueError: a tensor is missing, unknown, or of another shape; the message names it and both shapes.
        """
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_tensors(model, adapter_name, remapped)
        return remapped

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """As PEFT's, of a ``state_dict`` from which it has taken whatever has another adapter's name in its own.

        Raises:
            ValueError: that were tensors of this adapter, too.
        """
        for name in (name for name, _ in model.named_parameters() if _of_adapter(adapter_name).search(name)):
            clash = next((other for other in unwanted_adapter_names if f".{other}." in f"{name}."), None)
            if clash is not None and name not in state_dict:
                raise ValueError(
                    f"the adapter {adapter_name!r} cannot be saved beside one that is called {clash!r}: PEFT would "
                    f"leave out tensors that have this in their names, e.g. {name}. Delete {clash!r} from this model "
                    "first, or load it under another name"
                )
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(MERGE_MESSAGE)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:  # type: ignore[override]
        if merge:
            self._check_merge_allowed()
        for parent in list(self.model.modules()):
            for name, child in list(_hosts.children(parent).items()):
                if isinstance(child, Mixture):
                    detach_mixture(parent)
                elif isinstance(child, ExpertLayer):
                    child.detach()
                    delattr(parent, name)
        base = super()._unload_and_optionally_merge(False, *args, **kwargs)
        if hasattr(base, "peft_config"):  # PEFT before 0.19.1 leaves it behind
            del base.peft_config
        return base

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """As PEFT's: around a forward or ``generate``. ``adapter_names`` says whose the rows are."""
        if kwargs.get("adapter_names") is None:
            yield
            return
        inputs = [*args[:1], *(kwargs.get(name) for name in ("input_ids", "inputs", "inputs_embeds"))]
        given = next((tensor for tensor in inputs if tensor is not None), None)
        names = read_names(kwargs["adapter_names"], list(self.peft_config), given, self.training)
        contexts = [module.context for module in self.model.modules() if isinstance(module, Mixture)]
        before = [context.names for context in contexts]
        with tell_wrappers(self.model, names):
            try:
                for context in contexts:
                    context.names = names
                yield
            finally:
                for context, name in zip(contexts, before, strict=True):
                    context.names = name


def _follow_loss(module: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> Any:
    """A forward hook: lets auxiliary losses, if there are any, follow what the model's loss is multiplied by."""
    if module.training and torch.is_grad_enabled():
        mixture = next((m for m in module.modules() if isinstance(m, Mixture)), None)
        if mixture is not None and any(mixture.follows[name] for name in mixture.enabled(mixture.follows)):
            follow_loss(outputs, kwargs)
    return outputs


def _hides_children(host: nn.Module) -> bool:
    """Whether a base layer writes a state dict of its own, as HQQ's do, in which what is attached to it is missing."""
    return type(host).state_dict is not nn.Module.state_dict


def _add_hidden(block: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A hook: adds to a block's state dict the experts in layers that hide them."""
    for name, layer in block.named_modules():
        if isinstance(layer, ExpertLayer) and _hides_children(layer.host):
            layer.state_dict(destination=state, prefix=f"{prefix}{name}.")


# Roles whose experts usually read one and the same tensor. Whether they do is asked again at every forward.
SAME_INPUT = (("q", "k", "v"), ("gate", "up", "mlp"))


def share_inputs(mixture: Mixture) -> None:
    """Tell a block's bottlenecks, and a router before attention, who else reads what they read."""
    layers = [m for m in mixture.host.modules() if isinstance(m, BottleneckLayer)]
    for layer in layers:
        layer.readers = (layer,)
    for roles in SAME_INPUT:
        for width in {layer.place.in_features for layer in layers if layer.role in roles}:
            together = tuple(m for m in layers if m.role in roles and m.place.in_features == width)
            for layer in together:
                layer.readers = together
            if roles[0] == "q" and width == mixture.in_features:
                mixture.beside = together


def check_name(adapter: Any) -> None:
    """Raise ValueError unless PEFT can find, save and load an adapter by its name."""
    if not isinstance(adapter, str) or not adapter or "." in adapter or adapter == BASE:
        raise ValueError(f"adapter_name={adapter!r} must be a word without dots, and not {BASE!r}, which is no adapter")


def check_saved(model: nn.Module, config: MoAConfig, plans: Iterable[tuple[BlockView, BlockPlan]]) -> None:
    """Refuse to save modules in full that have a part of a mixture: PEFT would copy it with them, out of its block.

    Raises:
        ValueError: naming the module; or there is none of these names.
    """
    saved = tuple(config.modules_to_save or ())
    parts = {id(module) for module in model.modules() if isinstance(module, TunerLayer)}
    for view, plan in plans:
        parts |= {id(module) for p in plan.placements for module in (p.host.module, p.host.source)}
        if config.router is not None and config.router.input == "attention":
            parts.add(id(view.attention))
    if saved and not any(name.endswith(saved) for name, _ in model.named_modules()):
        raise ValueError(f"modules_to_save={list(saved)}: no module's path ends with one of these names")
    for name, module in model.named_modules():
        if name.endswith(saved) and any(id(part) in parts for part in module.modules()):
            raise ValueError(
                f"modules_to_save={list(saved)}: {name} has experts or is read by a router, and cannot be trained in "
                "full beside them. Name modules outside of the mixture, such as 'lm_head' or 'embed_tokens', or give "
                "the mixture other places"
            )


def put_in_order(host: nn.Module, new: ExpertLayer) -> None:
    """Let the experts at one host act in the order of their gate columns, whichever adapter came first.

    What rescales an output does so after everything that adds to it.
    """
    children, place = _hosts.children(host), column_position(new.site)
    for name, layer in list(children.items()):
        if isinstance(layer, ExpertLayer) and column_position(layer.site) > place:
            layer.detach()
            layer.hook()
            children[name] = children.pop(name)


def _of_adapter(adapter: str) -> re.Pattern[str]:
    """What the names of an adapter's tensors have in them; an adapter may be called what a module is called."""
    return re.compile(rf"\.moa_\w+\.{re.escape(adapter)}\.")


def check_tensors(model: nn.Module, adapter: str, given: dict[str, Tensor]) -> None:
    """Compare ``given``, named as in ``model``, with the adapter's own tensors.

    Raises:
        ValueError: naming the first tensors that are missing, unknown, or of another shape.
    """
    own = _of_adapter(adapter)
    expected = {name: t for name, t in model.state_dict().items() if own.search(name)}
    theirs = {name: t for name, t in given.items() if ".moa_" in name}
    for name, tensor in theirs.items():
        if name in expected and expected[name].shape != tensor.shape:
            raise ValueError(
                f"this adapter belongs to another base model or configuration: {name} has shape "
                f"{tuple(tensor.shape)} in the file, {tuple(expected[name].shape)} in this model"
            )
    missing = sorted(expected.keys() - theirs.keys())
    unknown = sorted(theirs.keys() - expected.keys())
    if missing or unknown:
        parts = [
            f"{len(names)} {what}, e.g. {names[0]}"
            for what, names in (("missing", missing), ("unknown", unknown))
            if names
        ]
        raise ValueError(f"the adapter's tensors do not fit its configuration: {'; '.join(parts)}")

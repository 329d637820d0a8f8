"""`apply_spans`: put a plan on a model, and take it off again.

Nothing of the model's code is replaced. Its text configuration names the plan's attention function instead of the
host's (so that mixtures of adapters, which come in between, follow), a hook gives every new cache its layers, and
``generate`` says how long the text gets. Removing undoes these three.
"""

from __future__ import annotations

import inspect
from types import MethodType, TracebackType
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel, __version__
from transformers.cache_utils import CacheLayerMixin
from transformers.generation import GenerationMode

from moa import _hosts
from moa.spans.model import family
from moa.spans.plan import SpanPlan
from moa.spans.runtime import attention
from moa.spans.runtime.cache import NOT_CROPPABLE, Handover, Spans, fit
from moa.spans.runtime.kernels import HOSTS
from moa.spans.runtime.visibility import Sight


def apply_spans(
    model: nn.Module, plan: SpanPlan, *, length: int = 0, any_model: bool = False, static: bool = False
) -> AppliedSpans:
    """Let a model attend by a plan, until `AppliedSpans.remove` or the end of a ``with`` block.

    Inside, ``model(...)`` and ``model.generate(...)`` follow the plan: prefill and training by its masks, decoding from
    caches that hold the plan's bytes. Such caches are made under ``torch.no_grad()`` only (``generate`` is); with
    gradients on, an ordinary cache and the same masks are used. Layers with a sliding window of their own keep it.
    Works on any decoder that uses transformers' attention interface with ``sdpa`` or ``eager``, under PEFT and with
    Mixture of Adapters.

    Args:
        model: a transformers model, or a PEFT model around one.
        plan: for its layers and heads.
        length: tokens the texts will reach, if known; else ``generate`` says it (to its cache, so not with
            ``use_cache=False``), or the text itself does. `moa.spans.runtime.cache` has the rule. Several turns on
            one cache need it: what an earlier turn has let go of does not come back when the text gets longer.
        any_model: whether the plan may have been searched for another model of the same shape.
        static: caches of one shape from the first token to the ``length``-th, which count on the device: one compiled
            graph, or one CUDA graph, then decodes every token, and nothing is asked of the device, padding or not. Each
            token reads all slots, filled or not. Tokens that compiled graphs add beyond ``length`` are not counted:
            spans stay those of ``length``.

    Raises:
        ValueError: the plan does not fit the model or was made for another one, a plan is applied already, the model
            cannot work under one, or ``static`` has no ``length``.
        RuntimeError: this transformers is too old.

    Examples:
        >>> with moa.apply_spans(model, plan):  # doctest: +SKIP
        ...     model.generate(**inputs, max_new_tokens=100)
    """
    return AppliedSpans(model, plan, length, any_model, static)


class AppliedSpans:
    """A plan on a model; see `apply_spans`.

    Attributes:
        active: whether it is still applied.
        spans: the plan's spans on the model's KV heads.
        length: the length it was told, 0 if none.
        static: whether its caches are.
    """

    def __init__(
        self, model: nn.Module, plan: SpanPlan, length: int = 0, any_model: bool = False, static: bool = False
    ) -> None:
        if not hasattr(CacheLayerMixin, "get_max_length"):
            raise RuntimeError(
                f"attention spans need newer caches than transformers {__version__} has; 5.23 and 5.24 are tested"
            )
        if length < 0:
            raise ValueError(f"length={length} must be the tokens a text reaches, or 0 if that is unknown")
        if static and not length:
            raise ValueError("static=True needs length=..., the tokens that the longest text reaches")
        self.model = _host_model(model)
        self.decoder = self.model.get_decoder() or self.model
        self.length, self.static = length, static
        self.handover = Handover()
        self._cache_name = _hosts.name_of_cache(type(self.decoder).forward)
        self.active = False
        self.spans = Spans(plan, self.decoder.config)
        self.sight = Sight.of(plan)
        if not any_model:
            _check_model(plan, self.model)
        modules = attention_modules(self.decoder, self.spans.shape.layers)
        self._check(modules)
        host = _host_implementation(self.decoder.config)
        name = attention.register(host)
        for layer, module in enumerate(modules):
            if self.spans.shape.windows[layer] is None:
                attention.SITES[module] = attention.Site(self, layer)
        self._modules, self._names = modules, (host, name)
        self._set_implementation(host, name)
        self._hook = self.decoder.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        if hasattr(self.model, _hosts.PREPARE_CACHE):
            prepare = self._prepare(getattr(type(self.model), _hosts.PREPARE_CACHE))
            setattr(self.model, _hosts.PREPARE_CACHE, MethodType(prepare, self.model))
        self.active = True

    def _check(self, modules: list[nn.Module]) -> None:
        config = self.decoder.config
        if any(module in attention.SITES for module in modules):
            raise ValueError("a span plan is already applied to this model; remove it first")
        host = _host_implementation(config)
        if host not in HOSTS:
            raise ValueError(
                f"attention implementation {host!r}: a span plan runs on {list(HOSTS)}; "
                "call model.set_attn_implementation('sdpa') first"
            )
        if None not in self.spans.shape.windows:
            raise ValueError(
                f"{config.model_type}: every layer has a sliding window of its own, nothing is left to a plan"
            )
        if self.static and set(self.spans.shape.windows) != {None}:
            raise ValueError(
                f"{config.model_type}: static=True, but layers with a sliding window of their own grow with the text"
            )
        if getattr(config, "num_kv_shared_layers", 0):
            raise ValueError(
                f"{config.model_type}: layers that share another layer's keys cannot have spans of their own"
            )
        for layer, module in enumerate(modules):
            if hasattr(module, "sinks"):
                raise ValueError(
                    f"{config.model_type}: layer {layer} has learned attention sinks, which spans do not know"
                )
            _hosts.attention_function(module, host)

    def _set_implementation(self, old: str, new: str) -> None:
        for config in (self.decoder.config, *(module.config for module in self._modules)):
            if _hosts.stored_implementation(config) == old:
                _hosts.store_implementation(config, new)

    def _before_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if module is not self.decoder:  # a copied model has the hook, but not the plan
            return args, kwargs
        if len(args) > 1:  # a cache may be among them
            args, kwargs = (), {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
        self._refuse_weights(kwargs.get("output_attentions"))
        self._refuse_another(_hosts.attention_implementation(module.config))
        self.handover.layer = self.handover.read = self.handover.longest = None
        cache = _hosts.cache_of(kwargs)
        if torch.is_grad_enabled():
            return args, kwargs
        if cache is None:
            wanted = kwargs.get("use_cache")
            if getattr(module.config, "use_cache", False) if wanted is None else wanted:
                kwargs = {key: value for key, value in kwargs.items() if key not in _hosts.CACHES}
                cache = kwargs[self._cache_name] = DynamicCache(config=module.config)
        if cache is not None:
            fit(cache, self)
        return args, kwargs

    def _refuse_weights(self, wanted: bool | None) -> None:
        if getattr(self.decoder.config, "output_attentions", False) if wanted is None else wanted:
            raise ValueError(
                "output_attentions=True: under a span plan no attention weights of a whole row exist; ask for them "
                "without the plan, with attn_implementation='eager'"
            )

    def _refuse_another(self, implementation: str) -> None:
        """Another attention function knows nothing of the plan, and would read its caches as ordinary ones."""
        if implementation != self._names[1]:
            raise ValueError(
                f"attention implementation {implementation!r} was set while a span plan is applied, which runs as "
                f"{self._names[1]!r}; remove the plan, set it, and apply the plan again"
            )

    def _prepare(self, original: Any) -> Any:
        def prepare(
            model: Any,
            generation_config: Any,
            model_kwargs: dict[str, Any],
            generation_mode: Any,
            batch_size: int,
            max_cache_length: int,
        ) -> Any:
            if model is not self.model:
                return original(model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
            _refuse_assistants(generation_config, generation_mode)
            result = original(model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
            if (cache := _hosts.cache_of(model_kwargs)) is not None:
                # The last token is in no cache. `max_length` would not count a prompt that is given as embeddings.
                fit(cache, self, max_cache_length + 1 + _virtual_tokens(model))
            return result

        return prepare

    def alike(self, own: int, longest: int, *, told: bool) -> bool:
        """Whether a text sees the same beside a longer one in its batch, whose length counts for both, as alone.

        Args:
            own: tokens that the text reaches.
            longest: tokens that the longer one reaches.
            told: as ``generate`` tells it; else the lengths of forwards of whole texts.
        """
        alone, beside = (
            self.spans.at(max(self.length, text) if told else self.spans.reach(self.length, text, text))
            for text in (own, longest)
        )
        return all(
            min(span, own) == min(other, own)
            for row, others in zip(alone, beside, strict=True)
            for span, other in zip(row, others, strict=True)
        )

    def remove(self) -> None:
        """Leave the model as it was before; a second call does nothing."""
        if not self.active:
            return
        self.active = False
        self._hook.remove()
        self.model.__dict__.pop(_hosts.PREPARE_CACHE, None)
        host, name = self._names
        self._set_implementation(name, host)
        for module in self._modules:
            attention.SITES.pop(module, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> AppliedSpans:
        return self  # what a copied cache refers to is this application, to this model

    def __enter__(self) -> AppliedSpans:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def applied_to(model: nn.Module) -> AppliedSpans | None:
    """The plan that a model, or the model in a PEFT model, attends by now; None if there is none."""
    sites = (attention.SITES.get(module) for module in model.modules())
    found = next((site.owner for site in sites if site is not None), None)
    assert found is None or isinstance(found, AppliedSpans)
    return found


def attention_modules(decoder: nn.Module, layers: int) -> list[nn.Module]:
    """The self-attention of every layer, in order.

    Raises:
        ValueError: a layer without one that calls transformers' attention interface, or with several.
    """
    found: dict[int, nn.Module] = {}
    for name, module in decoder.named_modules():
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int) or not uses_interface(module):
            continue
        if layer in found:
            raise ValueError(f"layer {layer} has two attention modules ({name} is the second); spans need exactly one")
        found[layer] = module
    if missing := [layer for layer in range(layers) if layer not in found]:
        raise ValueError(
            f"{type(decoder).__name__}: layer {missing[0]} has no attention that uses transformers' attention "
            "interface, which spans need"
        )
    return [found[layer] for layer in range(layers)]


def uses_interface(module: nn.Module) -> bool:
    """Whether a module's own forward calls transformers' attention interface."""
    for cls in type(module).__mro__:
        forward = cls.__dict__.get("forward")
        code = getattr(forward and inspect.unwrap(forward), "__code__", None)
        if code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names:
            return True
    return False


def _host_implementation(config: Any) -> str:
    """What the model attends by without a plan; a copy that was made under one has its name and nothing else of it."""
    return _hosts.attention_implementation(config).removeprefix(attention.PREFIX)


def _virtual_tokens(model: Any) -> int:
    """Tokens that PEFT's prompt tuning puts before the prompt, of which ``generate`` knows nothing."""
    owner = getattr(model.prepare_inputs_for_generation, "__self__", model)  # PEFT's model while it generates
    config: Any = getattr(owner, "active_peft_config", None)
    return int(config.num_virtual_tokens) if getattr(config, "is_prompt_learning", False) else 0


def _check_model(plan: SpanPlan, model: PreTrainedModel) -> None:
    """Whether a plan that knows its model is for this one: the same embeddings, or the same name."""
    name = _hosts.name_or_path(model.config)
    known = plan.embeddings is not None and plan.embeddings == family(model)
    if known or plan.model is None or _last(plan.model) == _last(name) or not (name or plan.embeddings):
        return
    raise ValueError(
        f"this plan was searched for the model {plan.model!r}, this is {name or 'a model without a name'!r} and has "
        "other embeddings; search a plan for it, or give any_model=True (in a file: remove its 'model') if they "
        "are related"
    )


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def _refuse_assistants(generation_config: Any, generation_mode: Any) -> None:
    """Before the prompt is read: drafted tokens are taken back where they are wrong, which no ring can do."""
    if generation_mode == GenerationMode.ASSISTED_GENERATION or generation_config.is_assistant:
        raise NotImplementedError(NOT_CROPPABLE)


def _host_model(model: nn.Module) -> PreTrainedModel:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(
            f"apply_spans needs a transformers model or a PEFT model around one, not {type(inner).__name__}"
        )
    return inner

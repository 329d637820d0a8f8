"""Every door into others' private parts, opened once: a release that moves one fails here by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from peft.utils.peft_types import PeftType
from tiny import tiny_llama, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

import moa
from moa import _hosts
from moa.adapters.running_mean import RunningMeans


def test_children_and_parameters_are_the_modules_own():
    layer = nn.Linear(3, 2)
    outer = nn.Sequential(layer)
    assert _hosts.children(outer) == {"0": layer}
    assert _hosts.parameters(layer)["weight"] is layer.weight
    layer.weight = nn.Parameter(torch.zeros(2, 3))
    assert _hosts.parameters(layer)["weight"] is layer.weight
    _hosts.children(outer).pop("0")
    assert not list(outer.children())


def test_versions_count_changes_in_place():
    tensor = torch.zeros(2)
    before = _hosts.version(tensor)
    tensor.add_(1)
    assert _hosts.version(tensor) == before + 1
    with torch.inference_mode():
        assert _hosts.version(torch.zeros(2)) == -1


def test_whoever_hooks_a_module_watches_it():
    layer = nn.Linear(2, 2)
    assert not _hosts.is_watched(layer)
    for register in (layer.register_forward_hook, layer.register_forward_pre_hook):
        handle = register(lambda *_: None)
        assert _hosts.is_watched(layer)
        handle.remove()
    layer.forward = lambda x: x  # what accelerate does
    assert _hosts.is_watched(layer)


def test_the_compiler_knows_what_stays_where_it_is():
    tensor = torch.zeros(2)
    _hosts.keep_address(tensor)
    assert torch._dynamo.utils.get_static_address_type(tensor)


def test_views_are_told_from_tensors():
    x = torch.zeros(4, requires_grad=True) * 1
    assert _hosts.is_view(x[1:])
    assert not _hosts.is_view(x)


def test_recomputation_knows_that_it_runs_in_backward():
    seen = []

    def function(x):
        seen.append(_hosts.in_backward())
        return x.square()

    checkpoint(function, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    assert seen == [False, True]


def test_the_innermost_hooks_on_saved_tensors_are_found():
    assert _hosts.saved_tensor_hooks() is None

    def pack(tensor):
        return tensor

    def unpack(tensor):
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        assert _hosts.saved_tensor_hooks() == (pack, unpack)
        with torch.autograd.graph.saved_tensors_hooks(unpack, pack):
            assert _hosts.saved_tensor_hooks() == (unpack, pack)
    assert _hosts.saved_tensor_hooks() is None


def test_checkpointing_is_recognised_by_its_hooks():
    seen = []

    def function(x):
        seen.append(_hosts.saved_tensor_hooks()[0].__module__)
        return x.square()

    checkpoint(function, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    assert all(module.startswith("torch.utils.checkpoint") for module in seen)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (nn.functional.silu, "SiluBackward0"),
        (nn.functional.gelu, "GeluBackward0"),
        (lambda x: x * torch.ones(2, requires_grad=True), "MulBackward0"),
    ],
)
def test_what_a_function_keeps_can_be_asked_for(function, name):
    x = torch.randn(2, requires_grad=True)
    node = function(x).grad_fn
    assert node.name() == name
    assert torch.equal(_hosts.saved(node, "self"), x)
    assert _hosts.saved(node, "nothing_of_this_name") is None


def test_gelu_keeps_which_of_its_forms_it_was():
    node = nn.functional.gelu(torch.randn(2, requires_grad=True), approximate="tanh").grad_fn
    assert _hosts.saved(node, "approximate") == "tanh"


def test_attention_implementations_are_read_stored_and_looked_up():
    model = tiny_llama()
    config, attention = model.config, model.model.layers[0].self_attn
    assert _hosts.attention_implementation(config) == _hosts.stored_implementation(config) == "sdpa"
    assert isinstance(getattr(type(config), _hosts.IMPLEMENTATION_PROPERTY), property)
    _hosts.store_implementation(config, "eager")
    assert _hosts.attention_implementation(config) == "eager"
    assert _hosts.attention_function(attention, "sdpa") is ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert _hosts.attention_function(attention, "eager").__module__ == type(attention).__module__
    with pytest.raises(ValueError, match="Linear has no attention function called 'nothing'"):
        _hosts.attention_function(nn.Linear(1, 1), "nothing")


def test_others_overrides_of_an_attention_function_are_respected():
    model = get_peft_model(tiny_llama(), moa.preset("soft-moa"))
    calls = []
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def counted(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = counted  # in the instance's own mapping, as cache compressors do
    try:
        model(tokens())
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert len(calls) == 2  # blocks
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own


def test_generation_makes_its_cache_by_the_method_we_know():
    assert callable(getattr(tiny_llama(), _hosts.PREPARE_CACHE))


def test_a_model_knows_where_it_was_loaded_from(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    model = type(tiny_llama()).from_pretrained(tmp_path)
    assert _hosts.name_or_path(model.config) == str(tmp_path)


def test_sizes_of_linear_layers_of_any_kind():
    assert _hosts.features_of(nn.Linear(3, 2)) == (3, 2)
    assert _hosts.features_of(Conv1D(2, 3)) == (3, 2)


def test_wrappers_know_their_adapters():
    from peft.utils import AuxiliaryTrainingWrapper

    model = get_peft_model(tiny_llama(), moa.MoAConfig(modules_to_save=["lm_head"]))
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    assert [_hosts.adapters_of_wrapper(wrapper) for wrapper in wrappers] == [{"default"}]


def test_peft_loads_and_saves_shards():
    assert _hosts.loads_shards()  # what it does then is tested in tests/test_distributed.py


def test_the_method_is_in_pefts_enum_once():
    assert _hosts.append_method("MOA") is PeftType.MOA is PeftType("MOA")
    assert list(PeftType.__members__).count("MOA") == 1


PRIVATE = re.compile(
    r"(?<![\w.])(?!self\b|cls\b|super\b)[\w\])]+\._(?!_|replace\b|asdict\b)[a-z]\w+|torch\._C|_global_mapping"
)


@pytest.mark.parametrize("package", ["adapters", "spans"])
def test_no_other_file_touches_what_is_not_public(package):
    found = []
    for file in sorted((Path(moa.__file__).parent / package).rglob("*.py")):
        text = re.sub(r'""".*?"""', "", file.read_text(encoding="utf-8"), flags=re.DOTALL).replace("super()", "self")
        found += [f"{file.name}: {line.strip()}" for line in text.splitlines() if PRIVATE.search(line)]
    assert found == []


def test_the_cache_that_a_model_is_called_with_is_found_under_its_name():
    model = tiny_llama()
    name = _hosts.name_of_cache(model.forward)
    assert name in _hosts.CACHES
    seen = []
    for module in (model.model, model.model.layers[0], model.model.layers[0].self_attn):
        module.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(_hosts.cache_of(kwargs)), with_kwargs=True
        )
    output = model(input_ids=tokens(), use_cache=True, **{name: DynamicCache()})
    cache = _hosts.cache_of(output)
    assert isinstance(cache, DynamicCache)
    assert seen == [cache] * 3
    assert _hosts.cache_of({"cache": None, "past_key_values": cache}) is cache
    assert _hosts.cache_of({"hidden_states": 0}) is None
    with pytest.raises(ValueError, match=r"Linear\.forward takes no KV cache.*'input'"):
        _hosts.name_of_cache(nn.Linear(1, 1).forward)


def test_a_layer_that_keeps_no_keys_is_known_as_one():
    cache = DynamicCache()
    cache.layers.append(RunningMeans(is_sliding=False))
    if hasattr(cache, "is_dummy"):  # older releases do not look
        assert cache.is_dummy == [True]
